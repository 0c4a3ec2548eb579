"""A parallel checkpoint on several ranks: any layout loads it, and its own reads each shard once, on one rank."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_ee.checkpoint import store
from megatron_ee.checkpoint.adapter import open_adapter
from megatron_ee.checkpoint.loading import load_backbone, load_exits
from megatron_ee.checkpoint.safetensors_file import TensorEntry
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.config.exits import ExitSpec
from megatron_ee.conversion.copy import write_output
from megatron_ee.conversion.edit import add_exits
from megatron_ee.conversion.formats import open_contents
from megatron_ee.conversion.to_parallel import to_parallel
from megatron_ee.exits.stage import build_stage
from megatron_ee.model.setup import build_setup
from megatron_ee.parallel.groups import process_groups
from megatron_ee.parallel.layout import Layout, StageLayout
from megatron_ee.testing.ranks import run_ranks

SPECS = (ExitSpec(1, "mlp"), ExitSpec(2, "norm", "low_rank", rank=4), ExitSpec(4, "layer"))


def layout(counts: tuple[int, ...]) -> Layout:
    stages, first = [], 1
    for count in counts:
        layers = range(first, first + count)
        stages.append(StageLayout(layers, tuple(spec.layer for spec in SPECS if spec.layer in layers)))
        first += count
    return Layout(tuple(stages))


def load(released: Path, parallel: Path, tensor: int, stages: tuple[int, ...]) -> tuple[list[str], list[str]]:
    """On every rank: parameters that differ between the two, and the shards whose tensors were read."""
    loaded: list[dict[str, Tensor]] = []
    read: Counter[str] = Counter()
    original = store.read_box

    def count(entry: TensorEntry, out: Tensor, *arguments: Any) -> None:
        read[entry.path.name] += out.numel()
        original(entry, out, *arguments)

    with process_groups(tensor, len(stages)) as groups:
        for path in (released, parallel):
            model = open_model(path)
            setup = build_setup(model.architecture, torch.float32, groups)
            stage = build_stage(setup, layout(stages), SPECS, final_exit=True)
            exits = open_adapter(parallel)
            read.clear()
            with mock.patch.object(store, "read_box", count):
                load_backbone(stage, model)
                load_exits(stage.exits, exits, model)
            loaded.append(dict(stage.named_parameters()))
    first, second = loaded
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])], sorted(read)


@pytest.mark.parametrize(("tensor", "stages"), [(2, (4,)), (1, (1, 3)), (2, (3, 1))])
@pytest.mark.parametrize(
    "family", ["llama3.2-tied", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "qwen3"))]
)
def test_every_layout_loads_it(
    family: str, tensor: int, stages: tuple[int, ...], saved_model: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    released = saved_model(family)[0]
    contents = add_exits(open_contents(released), SPECS, seed=3)
    contents = dataclasses.replace(contents, backbone_sha256=open_model(released).digest())
    write_output(to_parallel(contents, tensor=2, stages=[3, 1]), tmp_path / "parallel")
    ranks = run_ranks(tensor * len(stages), load, released, tmp_path / "parallel", tensor, stages)
    assert [differing for differing, _ in ranks] == [[]] * len(ranks)
    if (tensor, stages) == (2, (3, 1)):
        # Its own shard; the first one's, where the norms are that all hold; the head, which lies with another stage.
        for rank, (_, files) in enumerate(ranks):
            stage, slot = divmod(rank, 2)
            shards = {f"shard-p{stage:02}-t{slot:02}-000.safetensors", f"shard-p{stage:02}-t00-000.safetensors"}
            assert shards <= set(files) <= {*shards, f"shard-p{1 - stage:02}-t{slot:02}-000.safetensors"}, rank
