"""Opens a GGUF file, or a model in several, as the contents of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_ee.checkpoint.contents import Contents
from megatron_ee.errors import CheckpointError, shown
from megatron_ee.families.reading import Config
from megatron_ee.families.registry import parse_architecture
from megatron_ee.importers.gguf.header import Header
from megatron_ee.importers.gguf.kinds import KINDS, Facts, Kind, derive_config
from megatron_ee.importers.gguf.parts import read_parts
from megatron_ee.importers.gguf.tokenizer import generation_config, read_vocabulary, to_json, tokenizer_files
from megatron_ee.importers.gguf.weights import read_vector, released_weights

EMBEDDING = "token_embd.weight"


def open_gguf(path: Path, *, dtype: torch.dtype = torch.bfloat16) -> Contents:
    """Open a GGUF file. No weight is read.

    Args:
        path: the file, or any part of a model in several.
        dtype: of the weights. Dequantised values are rounded to it.

    Raises:
        CheckpointError: not a GGUF file, damaged, a part without the others, or of an architecture or with a setting
            that is not supported. The message names the file, key or tensor.
    """
    header = read_parts(path)
    path = header.path
    name = header.metadata.get("general.architecture")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None or not isinstance(name, str):
        raise CheckpointError(f"{path}: architecture {shown(name)} is not supported; supported: {', '.join(KINDS)}")
    vocabulary = read_vocabulary(path, header.metadata, name)
    special = generation_config(vocabulary)
    config = {
        **derive_config(kind, _facts(header, name, kind), _rows(header)),
        # Spelled out where there is none: transformers would assume those of another model.
        **{f"{token}_token_id": special.get(f"{token}_token_id") for token in ("bos", "eos", "pad")},
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    files, notes = tokenizer_files(vocabulary)
    architecture = parse_architecture(config, str(path))
    return Contents(
        source=path,
        format="GGUF file",
        architecture=architecture,
        backbone=released_weights(header, kind, architecture, dtype, kind.vectors),
        assets={"config.json": to_json(config), "generation_config.json": to_json(special), **files},
        base_model=str(path.resolve()),
        notes=notes,
    )


def _facts(header: Header, name: str, kind: Kind) -> Facts:
    values = {
        key.removeprefix(f"{name}."): value for key, value in header.metadata.items() if key.startswith(f"{name}.")
    }
    vectors = {tensor: read_vector(header.tensors[tensor]) for tensor in kind.vectors if tensor in header.tensors}
    return Facts(Config(values, f"{header.path}: {name}"), vectors, frozenset(header.tensors))


def _rows(header: Header) -> int:
    """The size of the vocabulary, padding included."""
    if EMBEDDING not in header.tensors:
        raise CheckpointError(f"{header.path}: tensor {EMBEDDING!r} is missing")
    return header.tensors[EMBEDDING].shape[0]
