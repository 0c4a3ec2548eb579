"""What earlier versions wrote is still read, value by value: ``tests/fixtures/format_v1`` is format 1 as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW

from megatron_ee.checkpoint.adapter import check_backbone, open_adapter
from megatron_ee.checkpoint.loading import load_backbone, load_exits
from megatron_ee.checkpoint.safetensors_file import DTYPE_NAMES
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.checkpoint.store import open_checkpoint
from megatron_ee.checkpoint.tensors import StoredTensor
from megatron_ee.config.schema import OptimizerConfig, ScheduleConfig
from megatron_ee.conversion.formats import open_contents
from megatron_ee.data.tokenizer import load_tokenizer
from megatron_ee.errors import CheckpointError
from megatron_ee.exits.stage import Stage
from megatron_ee.exits.tensors import exit_saved_sources
from megatron_ee.model.setup import build_setup
from megatron_ee.parallel.groups import Groups
from megatron_ee.parallel.optimizer import ExitOptimizer
from megatron_ee.parallel.split_adam import join
from megatron_ee.testing.project import saved_tensors
from megatron_ee.tuning.state import load_state, save_state

FORMAT = Path(__file__).resolve().parents[2] / "fixtures" / "format_v1"
EXPECTED: dict[str, Any] = json.loads((FORMAT / "expected.json").read_text())
CHECKPOINT = FORMAT / "step-3"
MAIN = "optimizer.main."


def described(tensors: dict[str, StoredTensor]) -> dict[str, list[Any]]:
    """As ``expected.json`` has it: dtype, digest and shape by name."""
    return {
        name: [DTYPE_NAMES[each.dtype], each.sha256()[:16], list(each.shape)] for name, each in sorted(tensors.items())
    }


@pytest.mark.parametrize("name", ["model", "parallel"])
def test_models(name: str) -> None:
    model = open_model(FORMAT / name)
    expected = EXPECTED[name]
    backbone = {key: value for key, value in expected["tensors"].items() if not key.startswith("exits.")}
    assert described(model.weights) == backbone
    assert model.digest(fresh=True) == expected["backbone_sha256"] == EXPECTED["model"]["backbone_sha256"]
    assert (model.architecture.num_layers, model.architecture.vocab_size) == (2, 33)
    tokenizer = load_tokenizer(FORMAT / name)
    assert tokenizer.decode(tokenizer.encode("an exit")) == "an exit"


def test_the_parallel_checkpoint_is_cut() -> None:
    manifest = json.loads((FORMAT / "parallel" / "manifest.json").read_text())
    assert max(len(each["pieces"]) for each in manifest["tensors"].values()) == 2
    contents = open_contents(FORMAT / "parallel")
    assert described(dict(contents.exit_tensors)) == EXPECTED["adapter"]["tensors"]
    assert contents.steps == 3 and contents.backbone_sha256 == EXPECTED["model"]["backbone_sha256"]


@pytest.mark.parametrize("name", ["adapter", "step-3", "parallel"])
def test_exits(name: str) -> None:
    adapter = open_adapter(FORMAT / name)
    assert described(adapter.weights) == EXPECTED["adapter"]["tensors"]
    kinds = [(each.layer, each.body, each.head, each.weight, each.rank, each.init) for each in adapter.exits]
    assert kinds == [(1, "layer", "low_rank", 0.5, 2, "copy"), (2, "norm", "own", 1.0, 64, "copy")]
    assert adapter.steps == 3
    check_backbone(adapter, EXPECTED["model"]["backbone_sha256"], FORMAT / "model")


def test_the_first_adapters_had_no_checksum_of_their_own(tmp_path: Path) -> None:
    directory = shutil.copytree(FORMAT / "adapter", tmp_path / "adapter")
    description = json.loads((directory / "exits.json").read_text())
    del description["sha256"]
    (directory / "exits.json").write_text(json.dumps(description))
    assert described(open_adapter(directory).weights) == EXPECTED["adapter"]["tensors"]


def test_training_checkpoint() -> None:
    checkpoint = open_checkpoint(CHECKPOINT)
    assert described(checkpoint.tensors()) == EXPECTED["step-3"]["tensors"]
    assert checkpoint.metadata == EXPECTED["step-3"]["metadata"]
    manifest = json.loads((CHECKPOINT / "manifest.json").read_text())
    files = [{piece["file"] for piece in each["pieces"]} for each in manifest["tensors"].values()]
    assert max(map(len, files)) == 2  # what a data-parallel rank owns ends within a tensor


@pytest.fixture(scope="module")
def stage(groups: Groups) -> Stage:
    """Filled from model and adapter."""
    model, adapter = open_model(FORMAT / "model"), open_adapter(FORMAT / "adapter")
    setup = build_setup(model.architecture, torch.bfloat16, groups)
    stage = Stage(setup, range(1, 3), adapter.exits, final_exit=True)
    load_backbone(stage, model)
    load_exits(stage.exits, adapter, model)
    return stage


def parameters(stage: Stage) -> dict[tuple[str, ...], torch.Tensor]:
    return {source.names: each.detach().clone() for exit_ in stage.exits for each, source in exit_saved_sources(exit_)}


def optimizer_of(stage: Stage, groups: Groups) -> ExitOptimizer:
    settings = OptimizerConfig(lr=1.0e-2, min_lr=1.0e-3)
    return ExitOptimizer(stage.exits, stage.setup.config, groups, settings, ScheduleConfig(), 3)


def test_a_run_goes_on_from_it(stage: Stage, groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(CHECKPOINT)
    from_adapter = parameters(stage)
    with torch.no_grad():
        for exit_ in stage.exits:
            for parameter in exit_.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
    optimizer = optimizer_of(stage, groups)
    progress = load_state(checkpoint, stage, optimizer, checkpoint.metadata)
    # Interrupted validations, patience and gates are newer than the format.
    newer = {"validation_due": False, "stale_validations": 0, "gates_step": None}
    assert progress.model_dump() == EXPECTED["step-3"]["metadata"]["progress"] | newer
    assert optimizer.counters() == EXPECTED["step-3"]["metadata"]["counters"]
    for names, parameter in parameters(stage).items():
        assert torch.equal(parameter, from_adapter[names]), names
    # On one rank, all that two ranks had: written again it is the same, but for the form of the main weights.
    description = {key: checkpoint.metadata[key] for key in ("backbone_sha256", "exits", "dtype")}
    again = save_state(tmp_path, stage, optimizer, progress, description, 2)
    before, after = saved_tensors(CHECKPOINT), saved_tensors(again)
    whole = [key for key in before if key.startswith(MAIN)]
    assert len(whole) == 14
    for key in whole:
        name = key.removeprefix(MAIN)
        assert torch.equal(join(after[name], after.pop(f"optimizer.remainder.{name}")), before.pop(key))
    assert before.keys() == after.keys()
    assert all(before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]) for key in before)

    # And back, for an Adam that keeps them whole.
    with monkeypatch.context() as context:
        context.setattr("megatron_ee.parallel.optimizer.adam_class", lambda *_: AdamW)
        other = optimizer_of(stage, groups)
    load_state(open_checkpoint(again), stage, other, description)
    back = saved_tensors(save_state(tmp_path / "back", stage, other, progress, {}, 2))
    first = saved_tensors(CHECKPOINT)
    assert back.keys() == first.keys()
    assert all(first[key].dtype == back[key].dtype and torch.equal(first[key], back[key]) for key in first)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"progress": None}, "progress: must be an object"),
        ({"progress": {"step": 3, "evil": 1}}, "progress.evil: unknown key"),
        ({"progress": {"step": -1}}, "progress.step: must be at least 0"),
        ({"progress": {"tokens": 1.5}}, "progress.tokens: must be a whole number"),
        ({"progress": {"best_step": 1, "best_loss": "low"}}, "progress.best_loss: must be a number"),
        ({"counters": {"adam_step": 3}}, "counters.scheduler: missing"),
        ({"counters": {"adam_step": True, "scheduler": 4}}, "counters.adam_step: must be a whole number"),
    ],
)
def test_numbers_that_are_none_are_refused(changes: dict[str, Any], words: str, stage: Stage, groups: Groups) -> None:
    checkpoint = open_checkpoint(CHECKPOINT)
    description = dict(checkpoint.metadata)
    checkpoint.metadata.update(changes)
    before = parameters(stage)
    with pytest.raises(CheckpointError, match=words):
        load_state(checkpoint, stage, optimizer_of(stage, groups), description)
    assert all(torch.equal(each, before[names]) for names, each in parameters(stage).items())
