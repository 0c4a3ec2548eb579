"""Gates fitted in every layout, after tuning and while it distils, are those that one process fits."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ee.checkpoint.adapter import Adapter, open_adapter
from megatron_ee.checkpoint.adapter_writing import save_adapter
from megatron_ee.checkpoint.initialise import initialise_exit
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.checkpoint.tensors import StoredTensor
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import DataConfig, FitConfig, ModelConfig, ParallelConfig, RunConfig, TuningConfig
from megatron_ee.exits.stage import build_stage
from megatron_ee.model.setup import build_setup
from megatron_ee.parallel.groups import joined_processes, model_groups
from megatron_ee.parallel.layout import even_layout
from megatron_ee.testing.project import Project
from megatron_ee.testing.ranks import run_command, run_ranks
from megatron_ee.testing.tuning import RandomBlend
from megatron_ee.tuning.finish import add_gates
from megatron_ee.tuning.full_model import FullModel
from megatron_ee.tuning.interrupt import Interrupt

LENGTH = 32
SPECS = (ExitSpec(1, "mlp", "shared"), ExitSpec(2, "norm", "shared"), ExitSpec(3, "layer", "shared"))
GATES = frozenset({1, 3})


@dataclass(frozen=True)
class Place:
    """``tensor`` and ``pipeline`` sizes, sequence parallelism, sequences per microbatch: the rest is data-parallel."""

    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    micro: int = 1


PLACES = {1: [Place(micro=4)], 2: [Place(2, sequence=True, micro=2), Place(1, 2), Place(micro=2)]}


def add_all(path: Path, places: Sequence[Place], output: Path) -> None:
    """On one rank: an adapter without gates gets them, in every place."""
    model, blend = open_model(path), RandomBlend(LENGTH)
    with joined_processes() as control:
        for number, place in enumerate(places):
            with model_groups(control, place.tensor, place.pipeline) as groups:
                setup = build_setup(model.architecture, torch.float32, groups, sequence_parallel=place.sequence)
                layout = even_layout(model.architecture.num_layers, place.pipeline, [spec.layer for spec in SPECS])
                exits = build_stage(setup, layout, SPECS).exits
                for exit_ in exits:
                    initialise_exit(exit_, model, 1)
                adapter = output / str(number)
                save_adapter(adapter, exits, SPECS, groups, base_model="", backbone_sha256="0" * 64, steps=7)
                config = RunConfig(
                    ModelConfig(str(path)),
                    [],
                    DataConfig([], sequence_length=LENGTH),
                    ParallelConfig(),
                    tuning=TuningConfig(global_batch_size=4, micro_batch_size=place.micro),
                    fit=FitConfig(tokens=800),
                )
                paths = [adapter, output / "missing"]
                add_gates(config, FullModel(setup, model, Interrupt()), paths, GATES, blend)  # type: ignore[arg-type]


def whole(tensor: StoredTensor) -> torch.Tensor:
    return torch.cat([slab.clone() for slab in tensor.slabs()])


def assert_close(found: Adapter, expected: Adapter, layers: Iterable[int], where: object = "") -> None:
    """The gates after ``layers``."""
    for name in (f"exits.{layer}.gate.{part}" for layer in layers for part in ("weight", "bias")):
        mine, theirs = whole(found.weights[name]), whole(expected.weights[name])
        assert theirs.abs().max() > 0
        assert (mine - theirs).abs().max() <= 1e-4 * max(1.0, float(theirs.abs().max())), (where, name)


def test_layouts_fit_the_gates_of_one_process(saved_model: Any, tmp_path: Path) -> None:
    path = saved_model("llama-biases")[0]
    run_ranks(1, add_all, path, PLACES[1], tmp_path / "one")
    run_ranks(2, add_all, path, PLACES[2], tmp_path / "two")
    expected = open_adapter(tmp_path / "one" / "0")
    assert expected.exits == tuple(dataclasses.replace(spec, gate=spec.layer in GATES) for spec in SPECS)
    assert expected.steps == 7
    for number, place in enumerate(PLACES[2]):
        found = open_adapter(tmp_path / "two" / str(number))
        assert found.exits == expected.exits and found.weights.keys() == expected.weights.keys()
        assert_close(found, expected, GATES, place)


DISTILS: dict[str, Any] = {
    "exits": [{"layer": 1, "init": "copy", "gate": True}, {"layer": 3, "body": "norm", "gate": True}],
    "loss": {"distillation": {"kl": 1.0, "top_k": 8}},
    "tuning": {"steps": 3, "global_batch_size": 4, "micro_batch_size": 2},
    "validation": {"interval": 2, "sequences": 8},
    "checkpoint": {"interval": 1, "keep": 9},
    "fit": {"tokens": 800},
}
ELSEWHERE = [{"layers": [1, 4], "exits": [3]}, {"exits": [1]}]


def tune(project: Project, world_size: int, output: Path, *arguments: object, **parallel: Any) -> None:
    config = project.config(output.with_suffix(".yaml"), parallel=parallel, **DISTILS)
    command = ["tune", "--config", str(config), "--output", str(output), *map(str, arguments)]
    environment = {"MEGATRON_EE_CACHE": str(project.cache)}
    assert run_ranks(world_size, run_command, command, environment, str(output)) == [0] * world_size


@pytest.fixture(scope="module")
def one(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of one process that distils."""
    output = tmp_path_factory.mktemp("distils") / "run"
    tune(project, 1, output)
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [
        {"pipeline": 2, "layout": ELSEWHERE},
        {"pipeline": 2},
        {"tensor": 2, "sequence": True},
        {},
    ],
    ids=["a stage of exits", "pipeline", "tensor", "data"],
)
def test_a_run_that_distils_has_the_gates_of_one_process(
    parallel: dict[str, Any], one: Path, project: Project, tmp_path: Path
) -> None:
    """Also if one process goes on from a state in between."""
    output = tmp_path / "run"
    tune(project, 2, output, **parallel)
    for name in ("adapter", "adapter-best", "checkpoints/step-1"):
        found, expected = open_adapter(output / name), open_adapter(one / name)
        assert found.steps == expected.steps
        assert_close(found, expected, (1, 3), name)
    for path in (output / "checkpoints" / "step-2", output / "checkpoints" / "step-3", output / "adapter"):
        shutil.rmtree(path)
    tune(project, 1, output, "--resume")
    assert_close(open_adapter(output / "adapter"), open_adapter(one / "adapter"), (1, 3))
