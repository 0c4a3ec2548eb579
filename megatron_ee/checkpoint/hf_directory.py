"""A released model's directory: its safetensors files with their tensors, and its small files.

Only the index and headers are read, so an invalid directory is refused before memory is allocated.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from megatron_ee.checkpoint.manifest import MANIFEST
from megatron_ee.checkpoint.safetensors_file import TensorEntry, read_header
from megatron_ee.config.untrusted import allowed_root, check_confined, read_json
from megatron_ee.errors import CheckpointError, shown, storage_errors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")
ASSET_FOLDERS = ("additional_chat_templates",)
"""Subdirectories of a model's directory whose files belong to the tokenizer."""
NOT_CARRIED = (*WEIGHT_FILES, ".index.json", ".py")
MAX_ASSET = 256 * 2**20  # bytes; ten times the largest tokenizers


@dataclass(frozen=True)
class HFDirectory:
    """Weights of one Hugging Face directory.

    Attributes:
        path: the directory.
        files: its safetensors files, in the order of their names.
        tensors: every tensor of these files by name, including tensors that are not in the index. If several files hold
            a tensor, the index selects one.
        absent: names in the index that no file holds, with the file that the index names.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, TensorEntry]
    absent: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> HFDirectory:
        """Find and check the files of ``path``: ``model.safetensors``, or else the index and its shards.

        A file must lie in the directory itself, or in the hub's download cache beside it; see ``allowed_root``.

        Raises:
            CheckpointError: no safetensors (or pickles only), an index that is not valid, points outside or
                contradicts its shards, a missing, truncated or malformed file.
        """
        directory = Path(path)
        with storage_errors(directory, "read"):
            if not directory.is_dir():
                wrong = "is a file" if directory.exists() else "no such directory"
                raise CheckpointError(f"{directory}: {wrong}; give a Hugging Face model directory")
        root = allowed_root(directory)
        single, index = directory / SINGLE, directory / INDEX
        if os.path.lexists(single):
            check_confined(single, root)
            return cls(directory, (single,), read_header(single))
        if not os.path.lexists(index):
            raise _nothing_usable(directory)
        check_confined(index, root)
        placed = _read_index(index)
        files = {name: directory / name for name in sorted(set(placed.values()))}
        for file in files.values():
            check_confined(file, root, index)
        return cls(directory, tuple(files.values()), *_join_shards(index, placed, files))


def _read_index(index: Path) -> dict[str, str]:
    """Read the index: tensor name -> file name, checked to be a plain relative path."""
    content = read_json(index)
    placed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{index}: expected an object with a weight_map of tensor names to file names")
    for tensor, name in placed.items():
        if not isinstance(name, str) or not name.isprintable() or "\\" in name:
            raise CheckpointError(f"{index}: weight_map: {shown(name)} of tensor {shown(tensor)} is not a file name")
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise CheckpointError(f"{index}: {shown(name)} leads outside the model directory; refused")
        if parts.suffix != ".safetensors":
            raise CheckpointError(f"{index}: {shown(name)} is not a safetensors file; only these are read")
    return placed


def _join_shards(
    index: Path, placed: dict[str, str], files: dict[str, Path]
) -> tuple[dict[str, TensorEntry], dict[str, Path]]:
    """``HFDirectory.tensors`` and ``absent`` of the shards ``files``."""
    tensors: dict[str, TensorEntry] = {}
    others: dict[str, str] = {}  # the actual file of a tensor that the index places in another file
    for name, file in files.items():
        for tensor, entry in read_header(file).items():
            if placed.get(tensor, name) != name:
                others[tensor] = file.name
            elif tensor in tensors:
                both = f"{tensors[tensor].path.name} and {file.name}"
                raise CheckpointError(f"{index}: tensor {tensor!r} is in both {both}, and the index names neither")
            else:
                tensors[tensor] = entry
    absent = {tensor: files[name] for tensor, name in placed.items() if tensor not in tensors}
    for tensor, file in absent.items():
        if tensor in others:
            raise CheckpointError(f"{index}: tensor {tensor!r} is in {others[tensor]}, not in {file.name}")
    return tensors, absent


def _nothing_usable(directory: Path) -> CheckpointError:
    """Error message for a directory with neither ``model.safetensors`` nor an index."""
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if any(directory.glob("*.safetensors")):
        return CheckpointError(f"{directory}: has safetensors files but neither {SINGLE} nor {INDEX}; add the index")
    if pickles:
        return CheckpointError(
            f"{directory}: holds weights only as pickle ({pickles[0]}), which can run code when read; convert it to "
            "safetensors first, for example with transformers: from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    return CheckpointError(f"{directory}: neither {SINGLE} nor {INDEX} found; give a Hugging Face model directory")


def released_assets(directory: Path) -> dict[str, Path | bytes]:
    """The small files of a model's directory: configuration, tokenizer with its chat templates, licence.

    Weights, code and hidden files are left out. Names are relative to the directory, with "/" as separator.

    Raises:
        CheckpointError: a file is a link to outside the directory, or is too large.
    """
    root = allowed_root(directory)
    found: dict[str, Path | bytes] = {}
    with storage_errors(directory, "list"):
        folders = [directory, *(directory / name for name in ASSET_FOLDERS if (directory / name).is_dir())]
        paths = [path for folder in folders for path in sorted(folder.iterdir())]
    for path in paths:
        if path.name.startswith(".") or path.name.endswith(NOT_CARRIED) or path.name == MANIFEST or path.is_dir():
            continue
        if not path.resolve().is_relative_to(root) or not path.is_file() or not path.name.isprintable():
            raise CheckpointError(f"{path}: not a plain file inside the model directory; refused")
        if path.stat().st_size > MAX_ASSET:
            raise CheckpointError(f"{path}: {path.stat().st_size / 1e6:.0f} MB is too large for a model's small file")
        found[path.relative_to(directory).as_posix()] = path
    return found
