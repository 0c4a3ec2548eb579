"""``megatron-ee tune --debug``: any configuration on one process, cut down, with every check on."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ee.checkpoint.ownership import claim_output
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.commands.main import main
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.load import config_from_dict
from megatron_ee.config.schema import LossConfig, OptimizerConfig, ScheduleConfig
from megatron_ee.errors import UserError
from megatron_ee.exits.stage import Stage
from megatron_ee.parallel.groups import Groups
from megatron_ee.parallel.optimizer import ExitOptimizer
from megatron_ee.testing.project import Project, read_log
from megatron_ee.testing.tuning import random_batches
from megatron_ee.tuning.checks import checked
from megatron_ee.tuning.debug import choose_slice, cut_config, deterministic
from megatron_ee.tuning.schedule import Microbatch, Pipeline, one_stage
from megatron_ee.tuning.step import tuning_step
from megatron_ee.tuning.trainer import Trainer

CLUSTER: dict[str, Any] = {
    "exits": [
        {"layer": 2},
        {"layer": 4, "body": "layer", "head": "low_rank", "rank": 4},
        {"layer": 5, "weight": 2.0},
        {"layer": 6, "body": "norm", "head": "shared"},
    ],
    "parallel": {
        "tensor": 4,
        "pipeline": 2,
        "sequence": True,
        "layout": [{"layers": [1, 5], "exits": [2, 4, 5]}, {"layers": [6, 6], "exits": [6]}],
    },
    "tuning": {"steps": 40_000, "global_batch_size": 64, "micro_batch_size": 8},
    "loss": {"dynamic_token_weights": True},
    "checkpoint": {"interval": 1},
}


@pytest.fixture(scope="module")
def model(saved_model: Callable[..., tuple[Path, Any]]) -> Path:
    """Twice as deep as the slice."""
    return saved_model("llama2", num_hidden_layers=8, vocab_size=259)[0]


@pytest.fixture(scope="module")
def debugged(project: Project, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output and stderr of a debug run of a configuration for eight processes or more."""
    root = tmp_path_factory.mktemp("debugged")
    config = project.config(root / "run.yaml", model={"path": str(model)}, **CLUSTER)
    before = config.read_text()
    done = project.run("tune", "--config", config, "--output", root / "run", "--debug")
    assert config.read_text() == before
    return root / "run", done.stderr


def test_a_configuration_for_a_cluster_runs_as_it_is(debugged: tuple[Path, str], model: Path) -> None:
    output, errors = debugged
    assert errors.splitlines()[-1].startswith("debug: passed after step 3")  # all else was done before
    assert "layers 1 to 4 of 8" in errors
    assert [path.name for path in output.iterdir()] == ["debug"]

    run = json.loads((output / "debug" / "config.json").read_text())
    assert (run["parallel"]["tensor"], run["parallel"]["pipeline"], run["parallel"]["layout"]) == (1, 1, "auto")
    assert [(exit_["layer"], exit_["body"], exit_["head"]) for exit_ in run["exits"]] == [
        (1, "mlp", "own"),
        (2, "layer", "low_rank"),
        (4, "norm", "shared"),
    ]
    assert run["loss"]["dynamic_token_weights"]
    lines = read_log(output / "debug")
    assert [line["step"] for line in lines if "exits" in line] == [1, 2, 3]
    assert [line["step"] for line in lines if "validation" in line] == [0, 3]

    adapter = json.loads((output / "debug" / "adapter" / "exits.json").read_text())
    assert adapter["backbone_sha256"] != open_model(model).digest(), "it would pass for the real run's"


def test_every_module_and_parameter_is_logged_once(
    debugged: tuple[Path, str], model: Path, load_stage: Callable[..., Stage]
) -> None:
    lines = (debugged[0] / "debug" / "debug.log").read_text().splitlines()
    paths = [line.partition(":")[0] for line in lines]
    assert len(paths) == len(set(paths))

    specs = [ExitSpec(1), ExitSpec(2, "layer", "low_rank", rank=4), ExitSpec(4, "norm", "shared")]
    stage = load_stage(model, specs, layers=range(1, 5), final_exit=False)
    expected = [*(name for name, _ in stage.named_modules()), *(name for name, _ in stage.named_parameters())]
    assert {name.removeprefix("_") or "stage" for name in expected} <= set(paths)
    assert not any("layers.5" in path for path in paths)

    log = dict(line.split(": ", 1) for line in lines)
    assert log["exits.1.head.matrix.weight"] == "[384, 64] float32, trained"
    assert log["backbone.layers.4.mlp.down.weight"] == "[64, 112] float32, frozen"
    assert log["backbone.layers.1.mlp.down"] == "RowLinear([32, 2, 112] float32) -> [32, 2, 64] float32"
    assert log["exits.2.body.layer.mlp_half"] == "DecoderLayer([32, 2, 64] float32) -> [32, 2, 64] float32"
    taps = ", ".join(f"{layer}=[32, 2, 64] float32" for layer in (1, 2, 4))
    assert log["stage.run_layers"].endswith(f"-> [32, 2, 64] float32, {taps}")


def test_the_next_debug_run_takes_its_place_and_gives_the_same(
    debugged: tuple[Path, str], project: Project, tmp_path: Path
) -> None:
    first, output = debugged[0] / "debug", tmp_path / "run"
    config = debugged[0].with_suffix(".yaml")
    claim_output(output / "debug", "tune --debug")
    (output / "debug" / "adapter").mkdir()
    (output / "debug" / "leftover").touch()
    project.run("tune", "--config", config, "--output", output, "--debug")
    assert not (output / "debug" / "leftover").exists()
    assert read_log(output / "debug") == read_log(first)
    name = "adapter/exits.safetensors"
    assert (output / "debug" / name).read_bytes() == (first / name).read_bytes()


def test_another_run_in_its_place_is_kept(debugged: tuple[Path, str], project: Project, tmp_path: Path) -> None:
    adapter = tmp_path / "run" / "debug" / "adapter"
    adapter.mkdir(parents=True)
    config = debugged[0].with_suffix(".yaml")
    done = project.run("tune", "--config", config, "--output", tmp_path / "run", "--debug", check=False)
    assert done.returncode == 2 and str(adapter.parent) in done.stderr.splitlines()[-1]
    assert adapter.is_dir()


def test_a_weight_that_is_not_finite_is_named(project: Project, model: Path, tmp_path: Path) -> None:
    bad = tmp_path / "model"
    bad.mkdir()
    for file in model.iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    tensors = load_file(bad / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] = float("nan")
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})

    config = project.config(tmp_path / "run.yaml", model={"path": str(bad)}, **CLUSTER)
    done = project.run("tune", "--config", config, "--output", tmp_path / "run", "--debug", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    line = "megatron-ee tune: error: backbone.layers.2.attention.qkv.weight: 1 of 12288 values are not finite"
    assert done.stderr.splitlines()[-1].startswith(line), done.stderr
    assert json.loads((tmp_path / "run" / "debug" / "status.json").read_text())["state"] == "failed"


def test_several_processes_are_refused(
    debugged: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ["tune", "--config", str(debugged[0].with_suffix(".yaml")), "--output", str(tmp_path / "run")]
    assert main([*arguments, "--debug"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "2 are running" in errors
    assert main([*arguments, "--debug", "--resume"]) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["--parallel.tensor", "3"], "parallel.tensor"),
        (["--parallel.layout", "[{layers: [1, 4]}, {layers: [5, 6], exits: [5, 6]}]"], "parallel.layout"),
    ],
)
def test_the_configuration_is_checked_as_for_the_real_run(
    overrides: list[str], word: str, debugged: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tune", "--config", str(debugged[0].with_suffix(".yaml")), "--output", str(tmp_path / "run")]
    assert main([*arguments, *overrides, "--debug"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and word in errors


@pytest.mark.parametrize("before", [(False, False), (True, True)])
def test_switches_and_seeds_are_restored(before: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    try:
        state = torch.random.get_rng_state()
        with pytest.raises(KeyError), deterministic(7):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled()
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            assert torch.initial_seed() == 7
            raise KeyError
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.are_deterministic_algorithms_enabled() == before[0]
        assert torch.is_deterministic_algorithms_warn_only_enabled() == before[1]
        assert not torch.is_anomaly_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    finally:
        torch.use_deterministic_algorithms(False)


def test_slice_keeps_every_kind_of_exit() -> None:
    """One of each, in order, the last one after the slice's last layer."""
    specs = [ExitSpec(n, body, head) for n, body, head in [(8, "mlp", "own"), (16, "norm", "own"), (24, "mlp", "own")]]
    kept = choose_slice(specs, 80)
    assert kept.layers == 4 and kept.left_out == (24,)
    assert [(spec.layer, small.layer) for spec, small in kept.exits] == [(8, 2), (16, 4)]

    bodies, heads = ("embedding", "norm", "mlp", "layer"), ("own", "shared", "low_rank")
    kinds = [(body, head) for body in bodies for head in heads]
    every = choose_slice([ExitSpec(2 * n, *kind) for n, kind in enumerate(kinds, 1)], 32)  # type: ignore[arg-type]
    assert every.layers == 12 and not every.left_out
    assert [small.layer for _, small in every.exits] == list(range(1, 13))

    shallow = choose_slice([ExitSpec(1), ExitSpec(2, "norm")], 2)
    assert [(spec.layer, small.layer) for spec, small in shallow.exits] == [(1, 1), (2, 2)]


def test_a_configuration_that_is_smaller_stays_so() -> None:
    values: dict[str, Any] = {
        "model": {"path": "x"},
        "exits": [{"layer": 1}],
        "data": {"train": ["x"], "sequence_length": 16},
        "tuning": {"steps": 2, "global_batch_size": 1, "micro_batch_size": 1},
        "validation": {"sequences": 1},
        "logging": {"wandb": {"project": "exits"}},
    }
    small = cut_config(config_from_dict(values), choose_slice([ExitSpec(1)], 4))
    assert (small.data.sequence_length, small.tuning.steps, small.validation.sequences) == (16, 2, 1)
    assert (small.tuning.global_batch_size, small.tuning.micro_batch_size) == (2, 1)
    assert not small.logging.wandb.project, "a debug run is no run to keep"
    values["validation"]["sequences"] = 0  # all of them
    assert cut_config(config_from_dict(values), choose_slice([ExitSpec(1)], 4)).validation.sequences == 2
    assert small.validation.acceptance.prompts == 2


@pytest.fixture
def make_trainer(
    load_stage: Callable[..., Stage], groups: Groups, model: Path, tmp_path: Path
) -> Iterator[Callable[..., Trainer]]:
    """Gives a trainer of so many steps, to be stepped by hand."""

    def make(specs: list[ExitSpec], steps: int) -> Trainer:
        values = {"model": {"path": str(model)}, "exits": [{"layer": 1}], "data": {"train": ["x"]}}
        config = config_from_dict({**values, "tuning": {"steps": steps}})
        stage = load_stage(model, specs, layers=range(1, 5), final_exit=False)
        optimizer = ExitOptimizer(stage.exits, stage.setup.config, groups, OptimizerConfig(), ScheduleConfig(), steps)
        return Trainer(config, one_stage(stage), optimizer, None, tmp_path, {})  # type: ignore[arg-type]

    yield make


def step(trainer: Trainer) -> None:
    batches = random_batches(259, trainer.progress.step, 0, 1, 4)[:2]
    result = tuning_step(trainer.pipeline, trainer.optimizer, batches, LossConfig(), 1.0)
    trainer.progress.step += 1
    trainer.progress.tokens += result.tokens


@pytest.mark.parametrize(
    ("validating", "where"),
    [(False, "step 2, microbatch 1 of 2"), (True, "validation after step 1, microbatch 2 of 3")],
)
def test_the_first_output_that_is_not_finite_is_named(
    validating: bool, where: str, make_trainer: Callable[..., Trainer]
) -> None:
    trainer = make_trainer([ExitSpec(2), ExitSpec(4, "norm")], 2)
    up = trainer.pipeline.stage.backbone.layers["3"].mlp.gate_up.weight

    def validate(pipeline: Pipeline, step: int) -> Any:
        def exits_work(micro: Microbatch, teacher: object) -> None:
            up.fill_(1e38)  # finite, but products of it are not

        pipeline.run(random_batches(259, 0, 0, 1, 4), exits_work)

    trainer.validate = validate
    message = rf"^{where}: backbone\.layers\.3\.mlp\.gate_up \(ColumnLinear\): \d+ of \d+ values are not finite"
    with pytest.raises(UserError, match=message), checked(trainer):
        step(trainer)
        if validating:
            trainer.validate(trainer.pipeline, 1)
        up.fill_(1e38)
        step(trainer)


def test_a_gradient_that_stays_zero_is_named(make_trainer: Callable[..., Trainer]) -> None:
    """A of a low-rank head has one only from the second step on, since B starts as zero."""
    trainer = make_trainer([ExitSpec(2, head="low_rank")], 2)
    with checked(trainer):
        step(trainer)
        step(trainer)
    trainer = make_trainer([ExitSpec(2, head="low_rank")], 1)
    with pytest.raises(UserError, match=r"^exits\.2\.head\.down: .* zero up to step 1"), checked(trainer):
        step(trainer)


def test_a_frozen_weight_that_changes_is_named(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer([ExitSpec(2), ExitSpec(4, "norm")], 1)
    with pytest.raises(UserError, match=r"^exits\.2\.body\.mlp_norm\.weight: is frozen"), checked(trainer):
        step(trainer)
        with torch.no_grad():
            trainer.pipeline.stage.exits[0].body.mlp_norm.weight[5] += 1e-3


def test_a_gradient_that_is_not_finite_is_named_before_the_update(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer([ExitSpec(2), ExitSpec(4, "norm")], 1)
    weight = trainer.pipeline.stage.exits[0].body.mlp.down.weight
    before = weight.detach().clone()
    weight.register_hook(lambda gradient: gradient / 0)
    message = r"^step 1: the gradient of exits\.2\.body\.mlp\.down\.weight: \d+ of 7168 values are not finite"
    with pytest.raises(UserError, match=message), checked(trainer):
        step(trainer)
    assert torch.equal(weight, before)


def test_nan_in_the_backward_pass_is_one_line(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer([ExitSpec(2), ExitSpec(4, "norm")], 1)

    def spoil_gradient(module: Any, inputs: Any, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: gradient * float("nan"))

    trainer.pipeline.stage.exits[1].body.norm.register_forward_hook(spoil_gradient)
    message = r"^step 1, microbatch 1 of 2: exits\.4: the backward pass: .*nan values"
    with (
        pytest.warns(UserWarning, match="Error detected in"),
        pytest.raises(UserError, match=message),
        deterministic(1),
        checked(trainer),
    ):
        step(trainer)


def test_nothing_stays_attached(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer([ExitSpec(2)], 1)
    stage = trainer.pipeline.stage
    with checked(trainer):
        step(trainer)
    log = trainer.output / "debug.log"
    written = log.read_text()
    assert re.search(r"^exits\.2: Exit\(", written, flags=re.MULTILINE)
    step(trainer)
    assert log.read_text() == written
    for module in stage.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not {"run_layers", "embed", "attention_half", "features"} & vars(module).keys()
    assert "run" not in vars(trainer.pipeline) and "step" not in vars(trainer.optimizer)
