"""What the tests of Megatron's distributed checkpoints share."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_ee.checkpoint.contents import Contents
from megatron_ee.conversion.formats import open_contents

FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": {"num_key_value_heads": 2},
    "llama3.2-tied": {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    "llama-biases": {},
    "qwen2": {},
    "qwen3": {},
}
"""Family -> changes; Megatron computes with other frequencies than our tiny Llama 3's."""
Model = tuple[Path, Any]
Exported = Callable[[str], tuple[Path, Path, Any]]


def read_all(contents: Contents) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in contents.backbone.items():
        found[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        tensor.read(found[name], (0,) * len(tensor.shape))
    return found


def assert_equal(contents: Contents, path: Path) -> None:
    """Every tensor is that of the Hugging Face directory, bit for bit."""
    expected = open_contents(path)
    found, wanted = read_all(contents), read_all(expected)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    assert contents.architecture == expected.architecture


def rewrite(directory: Path, rename: Callable[[str], str], change: Callable[[Any], None] | None = None) -> None:
    """Write ``.metadata`` again with other keys, or changed otherwise."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.state_dict_metadata = {rename(key): value for key, value in metadata.state_dict_metadata.items()}
    metadata.storage_data = {
        type(index)(rename(index.fqn), index.offset, index.index): place
        for index, place in metadata.storage_data.items()
    }
    if change is not None:
        change(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
