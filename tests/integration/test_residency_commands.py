"""Commands with layers streamed from host memory or disk give the results of layers on the device; what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_ee import platform
from megatron_ee.commands.main import main
from megatron_ee.testing.deepspeed import stand_in_deepspeed
from megatron_ee.testing.project import all_tensors, read_log
from megatron_ee.tuning import run as tuning

EXITS = [
    {"layer": 1, "body": "norm", "init": "fit", "gate": True},
    {"layer": 2, "head": "shared"},
    {"layer": 3, "body": "layer", "head": "shared", "init": "copy"},
]
SHORT = {"steps": 4, "global_batch_size": 4, "micro_batch_size": 2}
Tune = Callable[..., int]


@pytest.fixture(scope="module")
def tune(project: Any, tmp_path_factory: pytest.TempPathFactory) -> Tune:
    """Runs ``tune`` with a residency and a cache of its own; gives the exit status."""
    place = tmp_path_factory.mktemp("config")

    def run(output: Path, residency: str, *arguments: object, **changes: Any) -> int:
        values = {
            "model": {"residency": residency},
            "exits": EXITS,
            "tuning": SHORT,
            "validation": {"interval": 2, "sequences": 6, "acceptance": {"prompts": 2, "tokens": 4}},
            "checkpoint": {"interval": 2},
            "fit": {"tokens": 512},
            **changes,
        }
        config = project.config(place / "run.yaml", logging={"tensorboard": False}, **values)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MEGATRON_EE_CACHE", str(place / output.name))
            return main(["tune", "--config", str(config), "--output", str(output), *map(str, arguments)])

    return run


@pytest.fixture(scope="module")
def resident(tune: Tune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "resident"
    assert tune(output, "device") == 0
    return output


def assert_same(first: Path, second: Path) -> None:
    for name in ("adapter-initial", "adapter", "adapter-best"):
        one, other = (load_file(output / name / "exits.safetensors") for output in (first, second))
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            assert torch.equal(tensor, other[key]), f"{name}: {key}"
    one, other = all_tensors(first, 4), all_tensors(second, 4)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_from_disk(tune: Tune, resident: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(tmp_path / "disk", "disk") == 0
    said = capsys.readouterr().err
    assert "each of up to 4 tokens reads its layers from disk" in said
    assert "% of a step waited for a layer" in said and (tmp_path / "disk" / "streaming.png").is_file()
    # Threshold mode is not measured at the end, since it would read the layers for each token.
    assert read_log(tmp_path / "disk") == [line for line in read_log(resident) if "free_running" not in line]
    assert_same(tmp_path / "disk", resident)


def test_a_run_that_goes_on_from_host_memory(tune: Tune, resident: Path, tmp_path: Path) -> None:
    output = tmp_path / "resumed"
    shutil.copytree(resident, output)
    shutil.rmtree(output / "checkpoints" / "step-4")
    for name in ("adapter", "adapter-best"):
        shutil.rmtree(output / name)
    assert tune(output, "host", "--resume") == 0
    assert_same(output, resident)


def test_a_run_with_the_optimizer_in_host_memory(
    tune: Tune, resident: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its validations come between steps, when gradients of heads have no memory."""
    for name, module in stand_in_deepspeed().items():
        monkeypatch.setitem(sys.modules, name, module)
    assert tune(tmp_path / "run", "disk", "--optimizer.implementation", "deepspeed_cpu") == 0
    one, other = (load_file(output / "adapter-best" / "exits.safetensors") for output in (tmp_path / "run", resident))
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, other[key], rtol=1e-4, atol=1e-5)


def test_evaluate_and_generate(project: Any, resident: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--model", str(project.model), "--adapter", str(resident / "adapter"))

    def answer(*arguments: str) -> Any:
        assert main([*arguments, *files, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    data = ("--data", str(project.held_out), "--sequence-length", "32", "--sequences", "5")
    expected = answer("evaluate", *data)
    assert answer("evaluate", *data, "--residency", "disk") == expected
    for mode, residency in (("full", "disk"), ("threshold", "host"), ("speculative", "disk")):
        wanted = ("generate", "--prompt", "def run(", "--mode", mode, "--max-tokens", "8", "--threshold", "0.02")
        wanted = wanted if mode == "threshold" else wanted[:-2]
        first, second = answer(*wanted), answer(*wanted, "--residency", residency)
        assert (first["token_ids"], first["layers"]) == (second["token_ids"], second["layers"])


@pytest.mark.parametrize(
    ("residency", "implementation", "said"),
    [
        ("host", "auto", "model.residency: host needs 0.0 GB of {}'s memory for the layers of 1 process"),
        ("device", "deepspeed_cpu", "optimizer.implementation: deepspeed_cpu needs 0.0 GB of {}'s memory for the opt"),
        ("host", "deepspeed_cpu", "model.residency: host and optimizer.implementation: deepspeed_cpu need 0.0 GB of "),
    ],
)
def test_too_little_host_memory_is_said_before_loading(
    residency: str,
    implementation: str,
    said: str,
    tune: Tune,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(platform, "free_host_memory", lambda: 1000)
    monkeypatch.setattr(tuning, "adam_class", lambda *_: None)  # DeepSpeed need not be installed
    assert tune(tmp_path / "run", residency, "--optimizer.implementation", implementation) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert said.format(platform.host_name()) in line
    other = {"host auto": "disk", "device deepspeed_cpu": "auto", "host deepspeed_cpu": "disk or auto"}
    assert line.endswith(f"0.0 GB are free; use {other[f'{residency} {implementation}']}")
    assert not (tmp_path / "run" / "adapter-initial").exists()


def test_evaluate_says_so_before_it_hashes_the_backbone_and_generate_too(
    project: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platform, "free_host_memory", lambda: 1000)
    files = ("--model", str(project.model), "--data", str(project.held_out))
    assert main(["evaluate", *files, "--sequence-length", "32", "--residency", "host"]) == 2
    said = capsys.readouterr().err
    assert "--residency: host needs 0.0 GB" in said and "hashing" not in said
    assert main(["generate", *files[:2], "--prompt", "a", "--residency", "host"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("megatron-ee generate: error: --residency: host needs")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("tune --parallel.pipeline 2 --model.residency disk", "model.residency: disk reads each layer once for all"),
        ("tune --model.residency gpu", "model.residency: "),
        ("evaluate --pipeline 2 --residency host", "--residency: host reads each layer once for all microbatches"),
        ("generate --compile --residency disk", "--compile: not supported with residency disk"),
    ],
)
def test_what_does_not_go_together(
    line: str, said: str, project: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *options = line.split()
    config = str(project.config(tmp_path / "run.yaml"))
    inputs = {
        "tune": ("--config", config, "--output", str(tmp_path / "run")),
        "evaluate": ("--model", str(project.model), "--data", str(project.held_out)),
        "generate": ("--model", str(project.model), "--prompt", "a"),
    }
    assert main([command, *inputs[command], *options]) == 2
    assert said in capsys.readouterr().err
