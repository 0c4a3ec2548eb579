"""``megatron-ee tune`` as a process: what it leaves, what it keeps, and going on after a signal."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_ee.checkpoint.saved_model import SavedModel
from megatron_ee.checkpoint.store import open_checkpoint
from megatron_ee.commands.main import main
from megatron_ee.data.indexed import Corpus
from megatron_ee.data.loader import Batch, ValidationWindows
from megatron_ee.testing.command import Command
from megatron_ee.testing.project import all_tensors, changed_model, read_log
from megatron_ee.tuning.trainer import Trainer


def wait_for(command: Command, arrived: Callable[[], bool]) -> None:
    """Until something has happened in a run that goes on."""
    deadline = time.monotonic() + 120
    while not arrived():
        assert command.running and time.monotonic() < deadline, command.wait(0).stderr
        time.sleep(0.005)


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key


@pytest.mark.smoke
def test_run_leaves_what_it_should(project: Any, tuned: Path) -> None:
    for name in ("adapter/exits.safetensors", "adapter-best/exits.json", "config.json"):
        assert (tuned / name).is_file(), name
    for name in ("step-12.json", "agreement.png", "acceptance.png"):
        assert (tuned / "validation" / name).is_file(), name
    assert list((tuned / "tensorboard").glob("events.*"))
    assert sorted(path.name for path in (tuned / "checkpoints").iterdir()) == ["step-12", "step-8"]
    log = read_log(tuned)
    steps = [line for line in log if "exits" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert all(
        {"layer", "loss", "weight", "grad_norm"} == exit_.keys() and exit_["grad_norm"] > 0
        for line in steps
        for exit_ in line["exits"]
    )
    total = [line["grad_norm"] ** 2 for line in steps]
    parts = [sum(exit_["grad_norm"] ** 2 for exit_ in line["exits"]) for line in steps]
    assert total == pytest.approx(parts, rel=1e-4)
    validations = [line for line in log if "validation" in line]
    assert [line["step"] for line in validations] == [0, 5, 10, 12]
    seen = [sum(line["tokens"] for line in steps[: validation["step"]]) for validation in validations]
    assert [line["tokens_seen"] for line in validations] == seen
    for before, after in zip(*(line["validation"]["exits"] for line in (validations[0], validations[-1])), strict=True):
        assert after["loss"] < before["loss"]
    assert all(line["validation"]["final_loss"] == validations[0]["validation"]["final_loss"] for line in validations)
    drafts = [exit_["acceptance"] for line in validations for exit_ in line["validation"]["exits"]]
    # One document is held out, and a continuation is half a sequence: 16 tokens, the first before any round.
    assert all(each["tokens"] == 15 and 1 <= each["length"] <= 5 for each in drafts)


@pytest.mark.smoke
def test_adapter_holds_the_last_weights_and_only_the_exits(tuned: Path) -> None:
    adapter = load_file(tuned / "adapter" / "exits.safetensors")
    checkpoint = all_tensors(tuned, 12)
    assert_same(adapter, {key: value for key, value in checkpoint.items() if not key.startswith("optimizer.")})
    assert {key.split(".")[1] for key in adapter} == {"1", "2", "3"}
    assert not any("lm_head" in key for key in adapter if key.startswith("exits.2."))
    description = json.loads((tuned / "adapter" / "exits.json").read_text())
    assert [exit_["body"] for exit_ in description["exits"]] == ["mlp", "layer", "norm"]


@pytest.mark.parametrize(
    ("dtype", "number"),
    [("float32", signal.SIGTERM), pytest.param("bfloat16", signal.SIGINT, marks=pytest.mark.slow)],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    project: Any, tmp_path: Path, number: signal.Signals, dtype: str
) -> None:
    """Losses, weights, optimizer state and data order, bit for bit."""
    config = project.config(tmp_path / "run.yaml", model={"dtype": dtype}, tuning={"steps": 30})
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    project.run("tune", "--config", config, "--output", straight)

    log = broken / "log.jsonl"
    with project.start("tune", "--config", config, "--output", broken) as process:
        wait_for(process, lambda: log.exists() and log.read_text().count('"lr"') >= 7)
        process.send(number)
        done = process.wait()
    assert done.returncode == 0 and number.name in done.stderr, done.stderr
    stopped_at = read_log(broken)[-1]["step"]
    assert 7 <= stopped_at < 30

    project.run("tune", "--config", config, "--output", broken, "--resume")
    assert read_log(broken) == read_log(straight)
    assert_same(all_tensors(broken, 30), all_tensors(straight, 30))
    for name in ("adapter", "adapter-best"):
        assert (broken / name / "exits.safetensors").read_bytes() == (
            straight / name / "exits.safetensors"
        ).read_bytes()


@pytest.mark.slow
def test_a_signal_ends_a_validation_which_the_resumed_run_does_again(
    project: Any, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGATRON_EE_CACHE", str(project.cache))
    config, output = project.config(tmp_path / "run.yaml"), tmp_path / "run"
    started = 0

    def signalled(windows: ValidationWindows, *arguments: Any) -> Iterator[Batch]:
        nonlocal started
        for number, batch in enumerate(all_batches(windows, *arguments)):
            started += 1
            if started == 8 + 2:  # the first validation has 8 batches
                signal.raise_signal(signal.SIGTERM)
            assert started <= 10, "a microbatch after the signal"
            yield batch
            assert number < 8

    all_batches = ValidationWindows.batches
    with monkeypatch.context() as patch:
        patch.setattr(ValidationWindows, "batches", signalled)
        assert main(["tune", "--config", str(config), "--output", str(output)]) == 0
    assert json.loads((output / "status.json").read_text()) == {"state": "interrupted", "step": 5, "steps": 12}
    assert "SIGTERM: saving after step 5" in capsys.readouterr().err
    assert [line["step"] for line in read_log(output) if "validation" in line] == [0]
    assert main(["tune", "--config", str(config), "--output", str(output), "--resume"]) == 0
    assert read_log(output) == read_log(tuned)
    assert_same(all_tensors(output, 12), all_tensors(tuned, 12))
    assert json.loads((output / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("where", ["importing", "hashing", "loading", "final exit"])
def test_a_signal_before_the_first_step_is_an_interruption(
    where: str,
    project: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MEGATRON_EE_CACHE", str(tmp_path / "cache"))
    config, output = project.config(tmp_path / "run.yaml"), tmp_path / "run"
    place = {
        "importing": "megatron_ee.config.check.check_model_path",
        "hashing": "megatron_ee.tuning.run.hash_backbone",
        "loading": "megatron_ee.tuning.run.load_layers",
        "final exit": "megatron_ee.data.loader.ValidationWindows.runs",
    }[where]
    module, _, name = place.rpartition(".")
    owner = ValidationWindows if where == "final exit" else importlib.import_module(module)
    usual = getattr(owner, name)

    def signalled(*arguments: Any, **named: Any) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        return usual(*arguments, **named)

    monkeypatch.setattr(place, signalled)
    monkeypatch.setattr(Trainer, "run", lambda self, log, interrupt: pytest.fail("it went on"))
    assert main(["tune", "--config", str(config), "--output", str(output), "--resume"]) == 0
    assert "SIGUSR1: ended before the first step; continue with --resume" in capsys.readouterr().err
    assert json.loads((output / "status.json").read_text()) == {"state": "interrupted", "step": 0, "steps": 12}


def test_a_signal_while_a_corpus_is_read_is_an_interruption(
    project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"  # without its description, so that it is read as a whole
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{project.train}{suffix}", f"{corpus}{suffix}")
    config, output = project.config(tmp_path / "run.yaml", data={"train": [str(corpus)]}), tmp_path / "run"
    usual = Corpus.largest_id

    def signalled(*arguments: Any) -> int:
        signal.raise_signal(signal.SIGUSR1)
        usual(*arguments)
        return pytest.fail("it went on")

    monkeypatch.setattr(Corpus, "largest_id", signalled)
    assert main(["tune", "--config", str(config), "--output", str(output)]) == 0
    assert "SIGUSR1: ended before the first step" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.slow
def test_killed_run_falls_back_to_its_checkpoint(project: Any, tmp_path: Path, tuned: Path) -> None:
    """After kill -9 and damage to the newest checkpoint, the one before it is taken, and the end is the same."""
    config, output = project.config(tmp_path / "run.yaml"), tmp_path / "run"
    with project.start("tune", "--config", config, "--output", output) as process:
        wait_for(process, (output / "checkpoints" / "step-8").is_dir)
        process.send(signal.SIGKILL)
        process.wait()
    newest = max((output / "checkpoints").glob("step-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))
    shard = newest / "shard-0000.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)

    done = project.run("tune", "--config", config, "--output", output, "--resume")
    assert "DAMAGED" in done.stderr and "shard-0000.safetensors" in done.stderr
    assert "continuing after step" in done.stderr
    assert_same(all_tensors(output, 12), all_tensors(tuned, 12))
    assert read_log(output) == read_log(tuned)


DIVERGING: dict[str, Any] = {
    "optimizer": {"lr": 0.1, "min_lr": 0.1},
    "validation": {"interval": 2, "sequences": 8},
    "tuning": {"steps": 40, "patience": 2},
}
"""Settings of a run whose validation loss soon gets worse."""


@pytest.mark.slow
def test_a_run_without_patience_left_is_over(
    project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped by a signal between two validations and resumed, it stops where it would have; then it is finished."""
    monkeypatch.setenv("MEGATRON_EE_CACHE", str(project.cache))
    config = project.config(tmp_path / "run.yaml", **DIVERGING)

    def tune(output: Path, *options: object) -> str:
        assert main(["tune", "--config", str(config), "--output", str(output), *map(str, options)]) == 0
        said = capsys.readouterr().err.splitlines()
        finished = json.loads((output / "status.json").read_text())["state"] == "finished"
        assert finished == any("exits with the lowest loss, of step " in line for line in said)
        return next((line for line in said if "stopped early" in line), "")

    straight, broken = tmp_path / "straight", tmp_path / "broken"
    said = tune(straight)
    status = json.loads((straight / "status.json").read_text())
    last, log = status["step"], read_log(straight)
    assert status == {"state": "finished", "step": last, "steps": 40} and 4 < last < 40
    losses = {
        line["step"]: sum(exit_["loss"] for exit_ in line["validation"]["exits"])
        for line in log
        if "validation" in line
    }
    best = min((step for step in losses if step), key=lambda step: losses[step])
    assert best == last - 4 and f"the best exits are those of step {best}, " in said, losses
    assert said.endswith(f", in {straight / 'adapter-best'}") and said.startswith(f"stopped early, after step {last}")
    assert json.loads((straight / "adapter-best" / "exits.json").read_text())["steps"] == best

    usual = Trainer._step

    def signalled(trainer: Trainer) -> Any:
        if trainer.progress.step == last - 2:  # one of two validations has been worse
            signal.raise_signal(signal.SIGTERM)
        return usual(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", signalled)
        assert tune(broken) == ""
    assert json.loads((broken / "status.json").read_text())["state"] == "interrupted"
    assert tune(broken, "--resume").startswith(f"stopped early, after step {last}")
    assert read_log(broken) == log
    assert_same(all_tensors(broken, last), all_tensors(straight, last))

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", lambda trainer: pytest.fail("a step after the end"))
        said = tune(broken, "--resume")
    assert said.startswith(f"had stopped early, after step {last}") and "with a higher tuning.patience" in said
    assert json.loads((broken / "status.json").read_text()) == status
    assert read_log(broken) == log
    tune(broken, "--resume", "--tuning.patience", 0, "--tuning.steps", last + 1)
    assert read_log(broken)[-1]["step"] == last + 1


def test_init_adapter_starts_from_its_exits(project: Any, tuned: Path, tmp_path: Path) -> None:
    config, output = project.config(tmp_path / "run.yaml", tuning={"steps": 1}), tmp_path / "run"
    project.run("tune", "--config", config, "--output", output, "--init-adapter", tuned / "adapter")
    first = next(line["validation"] for line in read_log(output) if "validation" in line)
    last = [line["validation"] for line in read_log(tuned) if "validation" in line][-1]
    assert first == last


def test_output_of_another_run_is_not_overwritten(project: Any, tuned: Path, tmp_path: Path) -> None:
    before = (tuned / "log.jsonl").read_bytes()
    done = project.run("tune", "--config", project.config(tmp_path / "run.yaml"), "--output", tuned, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "--resume" in done.stderr
    assert (tuned / "log.jsonl").read_bytes() == before


def test_a_model_is_no_place_for_a_run(
    project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGATRON_EE_CACHE", str(project.cache))
    shutil.copytree(project.model, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    config = project.config(tmp_path / "run.yaml", model={"path": str(tmp_path / "model")})
    for options in ([], ["--resume"], ["--debug"]):
        assert main(["tune", "--config", str(config), "--output", str(tmp_path / "model"), *options]) == 2
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1 and "--output" in errors and "config.json" in errors
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}


@pytest.fixture
def refused(
    project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """What ``tune`` says when it refuses these options, in one line; nothing may be hashed or loaded before."""
    monkeypatch.setenv("MEGATRON_EE_CACHE", str(project.cache))

    def run(*options: object, hashes: bool = False, status: int = 1, **changes: Any) -> str:
        config = project.config(tmp_path / "run.yaml", **changes)
        with monkeypatch.context() as patch:
            if not hashes:
                patch.setattr(SavedModel, "digest", lambda *_, **__: pytest.fail("hashed"))
            patch.setattr("megatron_ee.tuning.run.build_stage", lambda *_, **__: pytest.fail("loaded"))
            patch.setattr("megatron_ee.tuning.full_model.build_stage", lambda *_, **__: pytest.fail("loaded"))
            assert main(["tune", "--config", str(config), *map(str, options)]) == status
        beside = ("hashing", "is slow on this CPU")
        lines = [line for line in capsys.readouterr().err.splitlines() if not any(word in line for word in beside)]
        assert len(lines) == 1, lines
        return lines[0]

    return run


def test_what_is_not_installed_is_refused_early(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("deepspeed.")]:  # an earlier test may have used it
        monkeypatch.delitem(sys.modules, name)
    for package in ("wandb", "deepspeed"):
        monkeypatch.setitem(sys.modules, package, None)
    output = ("--output", tmp_path / "run")
    assert "logging.wandb.project: needs wandb" in refused(*output, status=2, logging={"wandb": {"project": "exits"}})
    settings = {"implementation": "deepspeed_cpu"}
    assert "optimizer.implementation" in refused(*output, status=2, optimizer=settings)


def test_resume_from_another_run_is_refused_early(
    refused: Callable[..., str], project: Any, tuned: Path, tmp_path: Path
) -> None:
    resume = ("--output", tuned, "--resume")
    assert "other exits" in refused(*resume, exits=[{"layer": 1}])
    assert "another dtype" in refused(*resume, model={"dtype": "bfloat16"})
    kept = refused(*resume, status=2, optimizer={"decay_towards": "initial"})
    assert (
        "optimizer.decay_towards: initial, but " in kept and "step-12 does not hold the exits' initial values" in kept
    )
    other = changed_model(project, tmp_path / "settings", settings={"rms_norm_eps": 1e-6})
    assert "norm_eps (1e-05 against 1e-06)" in refused(*resume, model={"path": other})
    other = changed_model(project, tmp_path / "weights", bias=0.5)
    assert "another backbone" in refused(*resume, model={"path": other}, hashes=True)
    assert (tuned / "checkpoints" / "step-12").is_dir()


def test_an_adapter_that_does_not_fit_is_refused_early(
    refused: Callable[..., str], project: Any, tuned: Path, tmp_path: Path
) -> None:
    start = ("--output", tmp_path / "run", "--init-adapter", tuned / "adapter")
    assert "no exit after layer 4" in refused(*start, exits=[{"layer": 4}])
    assert "body 'mlp'" in refused(*start, exits=[{"layer": 1, "body": "norm"}])
    other = changed_model(project, tmp_path / "settings", settings={"rms_norm_eps": 1e-6})
    assert "norm_eps (1e-05 against 1e-06)" in refused(*start, model={"path": other})
    assert "/no/such/corpus" in refused(*start, status=2, data={"train": ["/no/such/corpus"]})
    other = changed_model(project, tmp_path / "weights", bias=0.5)
    assert "exits fit only the weights they were tuned on" in refused(*start, model={"path": other}, hashes=True)


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["--tuning.stepz", "3"], "stepz"),
        (["--tuning.steps", "many"], "tuning.steps"),
        (["--exits", "[{layer: 5}]"], "exits[0].layer"),
        (["--exits", "[{layer: 2}, {layer: 0.5}]"], "exits[1].layer"),
        (["--data.sequence_length", "4096"], "data.sequence_length"),
        (["--exits", "[{layer: 2, body: embedding, head: shared}]"], "exits"),
        (["--data.train", "[/no/such/corpus]"], "/no/such/corpus"),
        (["--model.path", "/no/such/model"], "model.path"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    project: Any, tmp_path: Path, overrides: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, output = project.config(tmp_path / "run.yaml"), tmp_path / "run"
    assert main(["tune", "--config", str(config), "--output", str(output), *overrides]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and word in errors, errors
    assert not output.exists()


@pytest.mark.slow
def test_resume_with_other_data_is_refused_or_allowed(project: Any, tmp_path: Path) -> None:
    """Corpora prepared anew under the same names, with as many tokens as before."""
    corpora = {"train": tmp_path / "a", "validation": tmp_path / "b"}

    def prepare(name: str, letter: str) -> None:
        text = tmp_path / "text.txt"
        text.write_text(letter * 400)
        arguments = ["--input", text, "--tokenizer", project.model, "--output", corpora[name], "--overwrite"]
        assert main(["prepare-data", *map(str, arguments)]) == 0

    prepare("train", "a")
    prepare("validation", "b")
    data = {name: [str(prefix)] for name, prefix in corpora.items()}
    config, output = project.config(tmp_path / "run.yaml", data=data, tuning={"steps": 2}), tmp_path / "run"
    run = ["tune", "--config", config, "--output", output]
    project.run(*run)

    prepare("train", "c")
    prepare("validation", "d")
    done = project.run(*run, "--resume", "--tuning.steps", 3, check=False)
    assert done.returncode == 2
    expected = f"error: data.train[0]: {corpora['train']} has other content than when the run was started; "
    assert expected in done.stderr.splitlines()[-1] and "--allow-new-data" in done.stderr.splitlines()[-1]
    assert [line["step"] for line in read_log(output) if "exits" in line] == [1, 2]

    done = project.run(*run, "--resume", "--allow-new-data", "--tuning.steps", 3)
    assert f"data.validation[0]: {corpora['validation']} has other content" in done.stderr
    assert [line["step"] for line in read_log(output) if "exits" in line] == [1, 2, 3]
    best = open_checkpoint(output / "checkpoints" / "step-3").metadata["progress"]
    assert best["best_step"] == 3, "the loss on the text of before is no measure"
    project.run(*run, "--resume", "--tuning.steps", 4)  # the new data is the run's own from then on


def test_allow_new_data_needs_resume(project: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["tune", "--config", str(project.config(tmp_path / "run.yaml")), "--output", str(tmp_path / "run")]
    assert main([*run, "--allow-new-data"]) == 2
    assert "--allow-new-data: needs --resume" in capsys.readouterr().err


def test_two_runs_cannot_write_to_one_place(project: Any, tmp_path: Path) -> None:
    config, output = project.config(tmp_path / "run.yaml", tuning={"steps": 5000}), tmp_path / "run"
    with project.start("tune", "--config", config, "--output", output) as first:
        wait_for(first, (output / "log.jsonl").exists)
        second = project.run("tune", "--config", config, "--output", output, check=False)
        first.send(signal.SIGTERM)
        assert first.wait().returncode == 0
    assert second.returncode == 1
    assert "another run" in second.stderr.splitlines()[-1]
