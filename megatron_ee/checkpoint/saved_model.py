"""A saved model: a Hugging Face directory or a parallel checkpoint, checked before any memory is allocated.

A parallel checkpoint holds a backbone, and optionally exits, in the native format under their released names. The
``metadata`` of its manifest has ``kind`` ("parallel"), ``assets`` (SHA-256 by name of the other files: ``config.json``,
the tokenizer), and the keys of an adapter's description: ``exits``, ``base_model``, ``backbone_sha256``, ``steps``.
The shards follow one layout, but can be loaded in any other.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from megatron_ee import platform
from megatron_ee.checkpoint.digest import backbone_digest, file_sha256
from megatron_ee.checkpoint.hf_directory import INDEX, HFDirectory
from megatron_ee.checkpoint.manifest import MANIFEST
from megatron_ee.checkpoint.quantised.registry import Quantisation, find_quantisation
from megatron_ee.checkpoint.quantised.rounding import rounded_weights
from megatron_ee.checkpoint.quantised.weights import (
    QuantisedWeight,
    check_plain,
    expanded_weights,
    split_quantised,
    stored_weights,
)
from megatron_ee.checkpoint.store import Checkpoint, open_checkpoint
from megatron_ee.checkpoint.tensors import StoredTensor, same_values, stored
from megatron_ee.config.architecture import QUANTISE, Architecture, output_settings
from megatron_ee.config.schema import Quantise
from megatron_ee.errors import CheckpointError, ConfigError, DamagedError, shown
from megatron_ee.families.multimodal import Spelling, find_release, find_spelling, plain_config
from megatron_ee.families.registry import parse_architecture, read_config
from megatron_ee.families.weights import EMBEDDING, LM_HEAD, expected_tensors, is_non_weight
from megatron_ee.parallel.groups import launched_rank

KIND = "parallel"
EXITS = "exits."  # prefix of the names of exits' tensors
NOMINAL_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class SavedModel:
    """A Hugging Face directory or a parallel checkpoint, its tensors checked against its ``config.json``.

    Attributes:
        path: the directory.
        architecture: from ``config.json``, except ``tied``, which depends on the tensors.
        weights: every weight by released name. Quantised ones are expanded as they are read.
        non_weights: other known tensors, which are not weights.
        vision: tensors of a multimodal release outside its text model, by their names in the release. They are never
            loaded. All other attributes use the names of a text model.
        spelling: mapping between the names of a multimodal release and a text model; None for a text model.
        checkpoint: the parallel checkpoint; None for a Hugging Face directory.
        quantised: the quantised weights, as they are stored, by name.
        rounding: how the weights of a plain release are quantised as they are read, see ``quantise_layers``.
        quantises_activations: whether the release is made to quantise activations or the KV cache too. This is not
            done here.
    """

    path: Path
    architecture: Architecture
    weights: dict[str, StoredTensor]
    non_weights: dict[str, StoredTensor] = field(default_factory=dict)
    vision: dict[str, StoredTensor] = field(default_factory=dict)
    spelling: Spelling | None = None
    checkpoint: Checkpoint | None = None
    quantised: Mapping[str, QuantisedWeight] = field(default_factory=dict)
    quantises_activations: bool = False
    rounding: Quantise = "none"

    @property
    def dtype(self) -> str:
        """float32 if most bytes of the weights are float32 or float64, else bfloat16."""
        stored: Counter[torch.dtype] = Counter()
        for tensor in self.weights.values():
            stored[tensor.dtype] += tensor.nbytes
        return "float32" if stored.most_common(1)[0][0] in (torch.float32, torch.float64) else "bfloat16"

    @property
    def stored_weights(self) -> dict[str, StoredTensor]:
        """The tensors that hold the weights, by released name: several for a quantised weight."""
        return stored_weights(self.weights, self.quantised)

    @property
    def settings(self) -> dict[str, Any]:
        """What its outputs depend on besides the stored weights: ``output_settings``, and ``QUANTISE``."""
        return {**output_settings(self.architecture), QUANTISE: self.rounding}

    def digest(self, *, fresh: bool = False, advance: Callable[[int], None] | None = None) -> str:
        """The backbone's hash; see ``backbone_digest``."""
        return backbone_digest(self.stored_weights, fresh=fresh, advance=advance)


def quantise_layers(model: SavedModel, kind: Quantise, key: str) -> SavedModel:
    """The model with the matrices of its layers quantised as they are read; the model itself for ``none``.

    Its hash stays that of the stored weights.

    Args:
        model: not quantised, unless ``kind`` is ``none``.
        kind: of quantisation.
        key: of the setting, for messages.

    Raises:
        ConfigError: the model is quantised already, a package is missing, or no group size fits a matrix.
    """
    if kind == "none":
        return model
    if model.quantised:
        raise ConfigError(f"{key}: {model.path} is quantised already; leave it out")
    rounded = rounded_weights(model.weights, kind, key)
    expanded = {name: weight.expanded(model.weights[name].dtype) for name, weight in rounded.items()}
    return dataclasses.replace(model, weights={**model.weights, **expanded}, quantised=rounded, rounding=kind)


def choose_dtype(asked: str, model: SavedModel, key: str, *, tuning: bool = False) -> str:
    """Choose the dtype to run ``model`` in: ``asked``, or the model's own for ``auto``.

    If it is slow on this CPU, the first rank prints one line to stderr that starts with ``key``.

    Raises:
        ConfigError: the dtype is unknown; the message names ``key``.
    """
    if asked not in ("auto", *platform.DTYPES):
        raise ConfigError(f"{key}: {shown(asked)} is unknown; possible: auto, {', '.join(platform.DTYPES)}")
    dtype = model.dtype if asked == "auto" else asked
    if platform.is_slow(dtype) and launched_rank() == 0:
        work = "tuning" if tuning else "long prompts"
        line = f"{key}: {dtype} is slow on this CPU; for {work} float32 is several times as fast, with twice the memory"
        print(line, file=sys.stderr, flush=True)
    return dtype


def open_model(path: str | Path, *, verify: bool = True) -> SavedModel:
    """Open a model and check it before any memory is allocated.

    Args:
        path: a Hugging Face directory or a parallel checkpoint.
        verify: check the checksums of a parallel checkpoint. Hugging Face directories have none.

    Raises:
        CheckpointError: the directory, ``config.json`` or another file is invalid, or a weight is missing, unknown, or
            has a wrong shape or dtype.
    """
    path = Path(path)
    if os.path.isfile(path / MANIFEST):
        return model_in(open_checkpoint(path, verify=verify))
    config = read_config(path)
    described, directory = _describe(path, config), HFDirectory.open(path)
    tensors = {name: stored(entry) for name, entry in directory.tensors.items()}
    if find_release(config) is None:
        return _checked(path, described, tensors, directory.absent)
    return _text_model(path, described, tensors, directory.absent)


def _text_model(
    path: Path, described: _Described, tensors: dict[str, StoredTensor], absent: Mapping[str, Path]
) -> SavedModel:
    """Check the text model of a multimodal release. Arguments as for ``_checked``, with the names of the release."""
    spelling = find_spelling(tensors, str(path))
    text: dict[str, StoredTensor] = {}
    vision: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if spelling.is_vision(name):
            vision[name] = tensor
        elif plain := spelling.plain(name):
            text[plain] = tensor
        else:
            raise CheckpointError(
                f"{tensor.files[-1]}: unknown tensor {name!r} for a {described.architecture.family} model"
            )
    model = _checked(path, described, text, {spelling.plain(name) or name: file for name, file in absent.items()})
    return dataclasses.replace(model, vision=vision, spelling=spelling)


def say_limits(model: SavedModel) -> None:
    """Print to stderr, on the first rank, what of a release is not used: vision tensors, quantised activations."""
    lines = []
    if model.vision:
        lines.append(f"{model.path}: only its text model is loaded, not its {len(model.vision)} vision tensors")
    if model.quantises_activations:
        lines.append(f"{model.path}: its activations or KV cache are quantised where it is served, but not here")
    for line in lines if launched_rank() == 0 else ():
        print(line, file=sys.stderr, flush=True)


def model_in(checkpoint: Checkpoint) -> SavedModel:
    """Check the backbone in an open parallel checkpoint.

    Raises:
        CheckpointError: as ``open_model``.
    """
    check_parallel(checkpoint)
    tensors = {key: tensor for key, tensor in checkpoint.tensors().items() if not key.startswith(EXITS)}
    model = _checked(checkpoint.path, _describe(checkpoint.path, read_config(checkpoint.path)), tensors, {})
    return dataclasses.replace(model, checkpoint=checkpoint)


def is_parallel(checkpoint: Checkpoint) -> bool:
    """Whether it is a parallel checkpoint, not a training checkpoint."""
    return bool(checkpoint.metadata.get("kind") == KIND)


def check_parallel(checkpoint: Checkpoint) -> None:
    """Check that it is a parallel checkpoint, and check the files beside its shards.

    Raises:
        CheckpointError: it is a training checkpoint.
        DamagedError: a file is missing or changed.
    """
    path = checkpoint.path
    if not is_parallel(checkpoint):
        raise CheckpointError(f"{path}: is a training checkpoint, which holds exits but no backbone; give their model")
    assets = checkpoint.metadata.get("assets")
    if not isinstance(assets, dict) or "config.json" not in assets:
        raise DamagedError(f"{path}: its manifest does not list its files")
    for name, digest in assets.items():
        if not _is_plain_file(path, name):
            raise DamagedError(f"{path}/{name}: missing, or not a plain file; the checkpoint is not complete")
        if checkpoint.verify and file_sha256(path / name) != digest:
            raise DamagedError(f"{path / name}: damaged: its SHA-256 is not the one in the manifest")


def _is_plain_file(directory: Path, name: str) -> bool:
    """Whether ``name`` is a file in the directory or in a folder of it, without links and ``..``."""
    pure = PurePosixPath(name)
    if str(pure) != name or pure.is_absolute() or ".." in pure.parts or not os.path.isfile(directory / name):
        return False
    return os.path.realpath(directory / name) == os.path.join(os.path.realpath(directory), name)


@dataclass(frozen=True)
class _Described:
    """What ``config.json`` says; ``dtype`` is that of expanded weights, None if it is not stated."""

    architecture: Architecture
    quantisation: Quantisation | None
    dtype: torch.dtype | None


def _describe(path: Path, config: dict[str, Any]) -> _Described:
    """Read a parsed ``config.json``."""
    where = str(path / "config.json")
    architecture, plain = parse_architecture(config, where, quantised=True), plain_config(config, where)
    named = plain.get("dtype", plain.get("torch_dtype"))
    dtype = NOMINAL_DTYPES.get(named) if isinstance(named, str) else None
    return _Described(architecture, find_quantisation(plain, where), dtype)


def _checked(
    path: Path, described: _Described, tensors: dict[str, StoredTensor], absent: Mapping[str, Path]
) -> SavedModel:
    """Check tensors against ``config.json`` and return the model; ``absent`` as in ``HFDirectory``."""
    architecture, quantised, extra = described.architecture, dict[str, QuantisedWeight](), dict[str, StoredTensor]()
    possible = expected_tensors(dataclasses.replace(architecture, tied=False))
    if described.quantisation is None:
        check_plain(tensors, possible)
    else:
        quantised, extra, tensors = split_quantised(tensors, possible, described.quantisation, str(path))
        tensors |= expanded_weights(quantised, described.dtype)
    architecture, tensors = _resolve_head(architecture, tensors)
    expected = expected_tensors(architecture)
    for name, file in absent.items():
        if name not in tensors and not is_non_weight(name, architecture):
            raise CheckpointError(f"{file}: tensor {name!r} is missing, which {INDEX} places there")
    for name, tensor in tensors.items():
        if name not in expected and not is_non_weight(name, architecture):
            raise CheckpointError(f"{tensor.files[-1]}: unknown tensor {name!r} for a {architecture.family} model")
    for name, shape in expected.items():
        if name not in tensors:
            files = sorted({file for tensor in tensors.values() for file in tensor.files})
            raise CheckpointError(f"{path}: tensor {name!r} is missing from {_listed(files)}")
        where = f"{tensors[name].files[-1]}: tensor {name!r}"
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{where} has shape {list(tensors[name].shape)}, but config.json makes it {list(shape)}"
            )
        if not tensors[name].dtype.is_floating_point:
            raise CheckpointError(f"{where} has dtype {tensors[name].dtype}; expected a floating one")
        if described.quantisation is not None and tensors[name].dtype.itemsize == 1:
            raise CheckpointError(f"{where} has dtype {tensors[name].dtype}, but no scale, which it needs")
    others = {name: tensor for name, tensor in tensors.items() if name not in expected}
    weights = {name: tensors[name] for name in expected}
    quantised = {name: weight for name, weight in quantised.items() if name in expected}
    formats = sorted({weight.format.text for weight in quantised.values()})
    architecture = dataclasses.replace(architecture, weight_format="; ".join(formats))
    activations = described.quantisation is not None and described.quantisation.activations
    return SavedModel(
        path, architecture, weights, others | extra, quantised=quantised, quantises_activations=activations
    )


def _resolve_head(
    architecture: Architecture, tensors: dict[str, StoredTensor]
) -> tuple[Architecture, dict[str, StoredTensor]]:
    """Determine from the tensors, not from ``config.json``, whether the head is tied, as in transformers.

    A head that differs from the input embedding is kept, because the model was trained with it. If there is only a
    head, it is also used as the embedding.
    """
    if not architecture.tied or LM_HEAD not in tensors:
        return architecture, tensors
    if EMBEDDING not in tensors:
        return architecture, {EMBEDDING if name == LM_HEAD else name: tensor for name, tensor in tensors.items()}
    return dataclasses.replace(architecture, tied=_is_tied(tensors[EMBEDDING], tensors[LM_HEAD])), tensors


def _is_tied(embedding: StoredTensor, head: StoredTensor) -> bool:
    """Whether the head equals the embedding. Both are large, so their hashes are cached and they are read once."""
    if (embedding.dtype, embedding.shape) != (head.dtype, head.shape):
        return same_values(embedding, head)
    # ``made`` distinguishes the two tensors of the same files in the cache. The name must be equal for equal hashes.
    named = dataclasses.replace(head, made=f"{LM_HEAD} {head.made}")
    return backbone_digest({EMBEDDING: embedding}) == backbone_digest({EMBEDDING: named})


def _listed(files: Iterable[Path]) -> str:
    names = [file.name for file in files]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
