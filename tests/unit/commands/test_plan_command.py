"""``plan`` from the command line: the example configurations, JSON, and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.commands.main import main
from megatron_ee.testing.examples import EXAMPLES, MODELS, RECIPE_MODELS


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str]) -> Any:
    """A function that plans an example as it is in the checkout, without its model, and returns what is printed."""

    def plan(example: str, *options: str) -> str:
        assert main(["plan", "--config", str(EXAMPLES / example / "config.yaml"), *options]) == 0
        captured = capsys.readouterr()
        assert f"; planned with {EXAMPLES / example / 'config.json'}\n" in captured.err
        return captured.out

    return plan


def written_commands() -> dict[str, list[str]]:
    """The plan commands in the documentation and in the example configurations, by the file and the command."""
    root = EXAMPLES.parent
    found = {}
    pages = [root / "README.md", EXAMPLES / "README.md", *sorted((root / "docs").glob("*.md"))]
    for path in [*pages, *sorted(EXAMPLES.glob("*/*.yaml"))]:
        for line in re.findall(r"megatron-ee (plan --config examples/[^`\n]*)", path.read_text(encoding="utf-8")):
            found[f"{path.relative_to(root)}: {line}"] = shlex.split(line)
    return found


COMMANDS = written_commands()


def test_every_example_has_a_command_and_its_model() -> None:
    models = [path.parent for path in EXAMPLES.glob("*/config.json")]
    configurations = {str(path.relative_to(EXAMPLES.parent)) for model in models for path in model.glob("*.yaml")}
    assert {words[2] for words in COMMANDS.values()} == configurations
    assert {Path(name).parent.name for name in configurations} == set(RECIPE_MODELS)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_can_be_pasted_into_a_fresh_checkout(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    words = COMMANDS[command]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert f"; planned with {Path(words[2]).with_name('config.json')}\n" in captured.err
    assert "Plan: tensor" in captured.out or "Best of what fits" in captured.out


KEY_LINES = {
    "llama2_7b": "A GPU needs 45.7 GB. It has 80 GB.",
    "llama2_13b": "A GPU needs 37.8 GB. It has 80 GB.",
    "llama2_70b": "A GPU needs 34.0 GB. It has 80 GB.",
    "llama3.1_8b": "A GPU needs 50.1 GB. It has 80 GB.",
}


@pytest.mark.parametrize("example", MODELS)
def test_examples(example: str, planned: Any) -> None:
    lines = planned(example, "--gpu", "h100", "--price", "2.5").splitlines()
    assert KEY_LINES[example] in lines
    layers, size = MODELS[example]["num_hidden_layers"], MODELS[example]["vocab_size"]
    assert lines[0].startswith(f"llama, {layers} layers, 7 exits, bfloat16 on ") and size > 0
    starts = ("Plan: tensor", "Memory per rank in GB", "Step: ", "Run", "Disk: 2 checkpoints of", "Best of what fits")
    places = [next(place for place, line in enumerate(lines) if line.startswith(start)) for start in starts]
    assert places == sorted(places)
    assert sum(line.startswith("- ") for line in lines) >= 8  # what the figures rest on
    assert any(line.endswith("none of it was measured") for line in lines)


def test_json_has_everything(planned: Any) -> None:
    found = json.loads(planned("llama2_70b", "--gpu", "h100", "--price", "2", "--gpus", "16", "--json"))
    run = found["run"]
    assert (run["gpus"], run["tensor"], run["pipeline"], run["data"]) == (16, 4, 2, 2)
    first, second = run["stages"]
    assert first["phases"]["tuning"] == sum(first["memory"].values())
    assert set(first["memory"]) == {
        "backbone",
        "exits",
        "gradients",
        "optimizer",
        "activations",
        "taps",
        "buffers",
    }
    assert first["bytes_per_step"]["stages"] > second["bytes_per_step"]["stages"] == 0
    assert first["bytes_per_step"]["data"] > 0 < first["bytes_per_step"]["tensor"]
    assert run["seconds"] == pytest.approx(sum(phase["seconds"] for phase in run["phases"]))
    assert run["price"] == pytest.approx(2 * 16 * run["seconds"] / 3600)
    assert run["kilowatt_hours"] == pytest.approx(16 * 700 * run["seconds"] / 3.6e6)
    assert run["fits"] and found["gpu_memory"] == 80e9
    assert len(found["best"]) == 3 and all(each["fits"] for each in found["best"])
    assert any("short by" in each["text"] and each["short"] > 0 for each in found["misfits"])


def test_without_a_device_there_are_no_times(planned: Any) -> None:
    found = json.loads(planned("llama2_7b", "--json"))
    assert found["best"] is found["misfits"] is found["gpu_memory"] is None
    assert found["run"]["step_seconds"] is found["run"]["phases"] is found["run"]["fits"] is None
    assert found["run"]["memory_planned"] < found["run"]["memory_needed"]
    limited = planned("llama2_7b", "--gpu-memory", "40")
    assert "A GPU needs 45.7 GB. It has 40 GB: short by 5.7 GB." in limited.splitlines()


def test_the_memory_of_the_host_is_compared_if_it_is_known(planned: Any) -> None:
    options = ("--exits", "[{layer: 8, head: shared}]", "--gpu", "rtx4090")
    unknown, known = planned("llama2_7b", *options), planned("llama2_7b", *options, "--host-memory", "3")
    (line,) = (line for line in unknown.splitlines() if line.startswith("The host needs"))
    assert line.count("GB") == 1 and "name it with --host-memory" in unknown
    (line,) = (line for line in known.splitlines() if line.startswith("The host needs"))
    assert "It has 3 GB: short by" in line and "--host-memory" not in known
    assert "of host memory: Python with its libraries, in 1 process, takes 2.0 GB; `checkpoint.asyn" in known
    found = json.loads(planned("llama2_7b", *options, "--host-memory", "3", "--json"))
    assert found["host_memory"] == 3e9 and not found["run"]["fits"]
    assert found["run"]["host_memory_needed"] > sum(found["run"]["host_memory"].values()) > 1e9
    assert any(each["host"] for each in found["misfits"])


def test_what_changes_hidden_states_is_marked(planned: Any) -> None:
    """On 11 GB the layers stream, or they are quantised."""
    options = ("--exits", "[{layer: 24, head: shared, init: copy}]", "--data.validation", "[]", "--gpu-memory", "11")
    lines = planned("llama2_7b", *options).splitlines()
    (marked,) = (line for line in lines if "--model.quantise" in line)
    assert marked.startswith("3: ")
    assert marked.endswith("(other hidden states: layers rounded to int8, so agreement differs)")
    found = json.loads(planned("llama2_7b", *options, "--json"))
    assert [each["changes_hidden_states"] for each in found["best"]] == [False, False, True]


def test_a_run_that_does_not_divide_the_gpus_is_planned_for_other_sizes(
    planned: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = planned("llama2_70b", "--gpus", "1", "--gpu", "rtx4090").splitlines()
    assert lines[0] == "Nothing fits 1 x 24 GB."
    assert lines[1].startswith("tensor 1 x pipeline 1: short by 218.6 GB: 70 frozen layers take 120.3 GB")


def test_a_batch_that_does_not_divide_is_planned_for_other_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gpus", "24", "--gpu", "h100", "--json"]
    assert main(["plan", "--config", str(EXAMPLES / "llama2_70b" / "config.yaml"), *options]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["run"] is None and len(found["best"]) == 3
    assert captured.err.splitlines()[-1] == (
        "tuning.global_batch_size: 16 is not a multiple of tuning.micro_batch_size 1 x 3 data-parallel replicas: only "
        "other sizes are planned"
    )


def test_dtype_that_is_not_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {key: value for key, value in MODELS["llama2_7b"].items() if key != "torch_dtype"}
    config = str(EXAMPLES / "llama2_7b" / "config.yaml")

    def planned(**named: str) -> Any:
        (tmp_path / "config.json").write_text(json.dumps({**values, **named}))
        options = ("--model.path", str(tmp_path), "--model.dtype", "auto", "--json")
        assert main(["plan", "--config", config, *options]) == 0
        return json.loads(capsys.readouterr().out)["run"]

    narrow, wide = planned(torch_dtype="float16"), planned(torch_dtype="float32")
    assert wide["stages"][0]["memory"]["backbone"] == 2 * narrow["stages"][0]["memory"]["backbone"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert main(["plan", "--config", config, "--model.path", str(tmp_path), "--model.dtype", "auto"]) == 0
    assert capsys.readouterr().err == f"model.dtype: {tmp_path} names no dtype; planned for bfloat16\n"
    assert planned() == narrow


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "quant_method 'bitsandbytes' is not supported; sup",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.bits None is not supported"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "model.quantise: model/config.json is of a model that is q",
        ),
        (
            {"intermediate_size": 28670},
            "int4 needs groups of 128, 64, 32 input features, but none divides 28670, which",
        ),
    ],
)
def test_what_tune_cannot_load_is_refused(
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({**MODELS["llama2_7b"], **changes}))
    config = str(EXAMPLES / "llama2_7b" / "config.yaml")
    assert main(["plan", "--config", config, "--model.path", "model", "--model.quantise", "int4"]) > 0
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (
            ["--gpu", "h1000"],
            2,
            "--gpu: 'h1000' is unknown; possible: h100, h200, a100, a100-40gb, b200, l40s, l4, rtx4",
        ),
        (["--gpus", "0"], 2, "argument --gpus: must be at least 1, not 0"),
        (
            ["--gpus", "3"],
            2,
            "--gpus: 3 is not a multiple of parallel.tensor 4 x parallel.pipeline 2; change these, or",
        ),
        (["--gpu-memory", "-1"], 2, "argument --gpu-memory: must be a positive number, not -1"),
        (["--host-memory", "64"], 2, "--host-memory: has no effect without the memory of a GPU; add --gpu or --gpu-m"),
        (["--price", "2"], 2, "--price: has no effect without the time of a run; add --gpu or --measured"),
        (["--price", "x"], 2, "argument --price: must be a number, not 'x'"),
        (["--gpu", "h100", "--measured"], 2, "argument --measured: not allowed with argument --gpu"),
        (["--measured"], 2, "--measured: one process measures no link, but 8 are planned for; start it with torchrun"),
        (["--gpus", "24"], 2, "tuning.global_batch_size: 16 is not a multiple of tuning.micro_batch_size 1 x 3 data-"),
        (
            ["--model.path", "none"],
            2,
            "model.path: no such file or directory: none; a plan needs the model's config.json",
        ),
        (["--model.path", "."], 1, "config.json: not found; give a Hugging Face model directory with a config.json"),
        (
            ["--parallel.tensor", "3"],
            2,
            "parallel.tensor: 3 does not divide the model's 64 attention heads; possible: 1, 2",
        ),
        (["--parallel.tensr", "3"], 2, "parallel.tensr: unknown key; did you mean 'tensor'?"),
    ],
)
def test_refusals_are_one_line(
    options: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODELS["llama2_70b"]))
    config = str(EXAMPLES / "llama2_70b" / "config.yaml")
    assert main(["plan", "--config", config, "--model.path", "model", *options]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"megatron-ee plan: error: {message}") and captured.err.count("\n") == 1, (
        captured.err
    )
