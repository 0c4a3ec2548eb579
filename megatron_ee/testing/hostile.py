"""Creates valid model, adapter and checkpoint directories, and functions that corrupt one part of them maliciously."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_ee.checkpoint.adapter import DESCRIPTION, WEIGHTS, describe_exits
from megatron_ee.checkpoint.digest import file_sha256
from megatron_ee.checkpoint.hf_directory import INDEX, SINGLE
from megatron_ee.checkpoint.manifest import MANIFEST, encode
from megatron_ee.checkpoint.safetensors_file import write_safetensors
from megatron_ee.checkpoint.saved_model import KIND
from megatron_ee.checkpoint.writing import Piece, write_checkpoint
from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.tensors import exit_tensors
from megatron_ee.families.registry import parse_architecture
from megatron_ee.families.weights import expected_tensors

Spoil = Callable[[Path], object]

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 10,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
EXITS = (ExitSpec(1, "mlp", "low_rank", rank=2), ExitSpec(2, "norm", "shared"))
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SHARD = "shard-0000.safetensors"
ESCAPES = "\x1b[31m\x07\u202e"
"""Characters that must not reach a terminal unescaped: colours, a bell, right-to-left text."""


# ------------------------------------------------------------------------------------------------- valid directories


def architecture() -> Architecture:
    """The architecture of ``CONFIG``."""
    return parse_architecture(CONFIG)


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """Float32 tensors of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def make_model(directory: Path, *, sharded: bool = True) -> Path:
    """Create a Hugging Face directory: ``config.json``, and two shards with an index, or one file."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    tensors = random_tensors(expected_tensors(architecture()), 1)
    names = sorted(tensors)
    if not sharded:
        write_safetensors(directory / SINGLE, tensors, {"format": "pt"})
        return directory
    placed = {name: SHARDS[index % 2] for index, name in enumerate(names)}
    for file in SHARDS:
        write_safetensors(directory / file, {name: tensors[name] for name in names if placed[name] == file})
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))
    return directory


def make_adapter(directory: Path) -> Path:
    """Create an adapter with the exits ``EXITS``."""
    directory.mkdir(parents=True)
    write_safetensors(directory / WEIGHTS, _exit_tensors())
    description = describe_exits(EXITS, "models/base", "ab" * 32, 3, file_sha256(directory / WEIGHTS))
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=2))
    return directory


def make_checkpoint(directory: Path) -> Path:
    """Create a training checkpoint: the exits ``EXITS``, one of their tensors in four pieces, and a scalar."""
    tensors = {**_exit_tensors(), "counter": torch.tensor(17)}
    cut = "exits.1.mlp.up_proj.weight"
    pieces = [Piece(name, tuple(each.shape), (0,) * each.dim(), each) for name, each in tensors.items() if name != cut]
    whole = tensors[cut]
    boxes = (((0, 0), (5, 8)), ((5, 0), (1, 3)), ((5, 3), (1, 5)), ((6, 0), (6, 8)))
    for (row, column), (rows, columns) in boxes:
        part = whole[row : row + rows, column : column + columns]
        pieces.append(Piece(cut, tuple(whole.shape), (row, column), part))
    metadata = {"exits": _described(), "base_model": "models/base", "backbone_sha256": "ab" * 32}
    write_checkpoint(directory, pieces, {**metadata, "progress": {"step": 3}})
    return directory


def make_parallel(directory: Path) -> Path:
    """Create a parallel checkpoint without exits, with the layers' tensors in two pieces."""
    config = json.dumps(CONFIG).encode()
    metadata = {"kind": KIND, "assets": {"config.json": hashlib.sha256(config).hexdigest()}, "exits": [], "steps": 0}
    pieces = []
    for name, tensor in random_tensors(expected_tensors(architecture()), 1).items():
        half = len(tensor) // 2
        for start, part in ((0, tensor[:half]), (half, tensor[half:])):
            pieces.append(Piece(name, tuple(tensor.shape), (start,) + (0,) * (tensor.dim() - 1), part))
    write_checkpoint(directory, pieces, metadata)
    (directory / "config.json").write_bytes(config)
    return directory


def _exit_tensors() -> dict[str, torch.Tensor]:
    shapes = {name: shape for spec in EXITS for name, (shape, _) in exit_tensors(spec, architecture()).items()}
    return random_tensors(shapes, 2)


def _described() -> list[dict[str, Any]]:
    exits: list[dict[str, Any]] = describe_exits(EXITS, "", None, 0, "")["exits"]
    return exits


# ----------------------------------------------------------------------------------------------------------- changing


def edit(name: str, change: Callable[[Any], object]) -> Spoil:
    """Change the content of a JSON file."""

    def spoil(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        change(content)
        (directory / name).write_text(json.dumps(content))

    return spoil


def write(name: str, content: bytes | Callable[[], bytes]) -> Spoil:
    """Overwrite a file."""

    def spoil(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).write_bytes(content if isinstance(content, bytes) else content())

    return spoil


def replace(name: str, old: str, new: str) -> Spoil:
    """Replace the first occurrence of a text in a file."""

    def spoil(directory: Path) -> None:
        text = (directory / name).read_text()
        assert old in text
        (directory / name).write_text(text.replace(old, new, 1))

    return spoil


def instead(name: str, make: Callable[[Path], object]) -> Spoil:
    """Replace a file by something that is not a regular file."""

    def spoil(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        make(directory / name)

    return spoil


def link(target: str) -> Callable[[Path], None]:
    """For ``instead``: a symbolic link."""
    return lambda path: path.symlink_to(target)


def link_out(path: Path) -> None:
    """For ``instead``: a link to a valid file of the same name outside the directory."""
    outside = path.parent.parent / "outside"
    outside.mkdir()
    make: dict[str, Callable[[Path], Path]] = {
        SINGLE: partial(make_model, sharded=False),
        **dict.fromkeys((DESCRIPTION, WEIGHTS), make_adapter),
        **dict.fromkeys((MANIFEST, SHARD), make_checkpoint),
    }
    valid = make.get(path.name, make_model)(outside / "valid")
    shutil.copy(valid / path.name, outside / path.name)
    path.symlink_to(outside / path.name)


def with_header(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header (an object, or its text), and possibly another stated length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    """The header entry of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def forge(change: Callable[[Any], object], name: str = MANIFEST) -> Spoil:
    """Change the content of a manifest or an adapter's description, and its checksum."""

    def spoil(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        del content["sha256"]
        change(content)
        content["sha256"] = hashlib.sha256(encode(content, directory)).hexdigest()
        (directory / name).write_text(json.dumps(content))

    return spoil


def add_pieces(shape: list[int], boxes: list[tuple[list[int], list[int]]]) -> Spoil:
    """Add a tensor of bytes in these boxes (offset and shape), and its shard."""

    def spoil(directory: Path) -> None:
        header, pieces, end = {}, [], 0
        for index, (offset, extent) in enumerate(boxes):
            begin, end = end, end + math.prod(extent)
            header[str(index)] = tensor("U8", extent, [begin, end])
            pieces.append({"file": "more.safetensors", "name": str(index), "offset": offset, "shape": extent})
        content = with_header(header, bytes(end))
        (directory / "more.safetensors").write_bytes(content)

        def add(manifest: Any) -> None:
            blocks = [hashlib.sha256(content).hexdigest()]
            manifest["files"]["more.safetensors"] = {"size": len(content), "blocks": blocks}
            manifest["tensors"]["more"] = {"dtype": "U8", "shape": shape, "pieces": pieces}

        forge(add)(directory)

    return spoil


def single_columns(count: int) -> list[tuple[list[int], list[int]]]:
    """Boxes of one element each that tile ``[1, count]``."""
    return [([0, column], [1, 1]) for column in range(count)]


def sparse(size: int) -> Callable[[Path], None]:
    """For ``instead``: a sparse file of ``size`` bytes, with a header of the same length."""

    def make(path: Path) -> None:
        with open(path, "wb") as file:
            file.write((size - 8).to_bytes(8, "little"))
            file.truncate(size)

    return make


def both(*spoils: Spoil) -> Spoil:
    """Apply several changes in turn."""

    def spoil(directory: Path) -> None:
        for each in spoils:
            each(directory)

    return spoil
