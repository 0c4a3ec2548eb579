"""``megatron-ee convert`` as a user runs it: what it writes is used by the other commands, with equal results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_ee.testing.project import Project

FIGURES = ("--sequence-length", 32, "--sequences", 8, "--dtype", "float32", "--json")
PROMPT = ("--prompt", "import json", "--dtype", "float32", "--max-tokens", 12, "--json")


@pytest.fixture(scope="module")
def parallel(project: Project, tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with its tuned exits, cut for two by two ranks."""
    path = tmp_path_factory.mktemp("parallel") / "parallel"
    options = ("--to", "parallel", "--tensor", 2, "--stages", 1, 3)
    done = project.run("convert", "--input", tuned / "adapter", "--output", path, *options)
    assert done.stdout == "" and "writing" in done.stderr
    return path


def test_evaluate_and_generate_take_it_as_it_is(project: Project, tuned: Path, parallel: Path) -> None:
    both = ("--model", project.model, "--adapter", tuned / "adapter")
    alone = ("--model", parallel)
    for command, options in (("evaluate", ("--data", project.held_out, *FIGURES)), ("generate", PROMPT)):
        first = json.loads(project.run(command, *both, *options).stdout)
        second = json.loads(project.run(command, *alone, *options).stdout)
        assert first.keys() == second.keys()
        for key in ("final_loss", "exits", "text", "token_ids", "layers"):
            assert first.get(key) == second.get(key), key


@pytest.mark.slow
def test_tuning_a_parallel_checkpoint_equals_tuning_the_released_one(
    project: Project, tuned: Path, parallel: Path, tmp_path: Path
) -> None:
    config = project.config(tmp_path / "run.yaml", model={"path": str(parallel)})
    project.run("tune", "--config", config, "--output", tmp_path / "run")
    first, second = (load_file(run / "adapter" / "exits.safetensors") for run in (tuned, tmp_path / "run"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    hashes = [
        json.loads((run / "adapter" / "exits.json").read_text())["backbone_sha256"] for run in (tuned, tmp_path / "run")
    ]
    assert hashes[0] == hashes[1]


def test_back_again(project: Project, tuned: Path, parallel: Path, tmp_path: Path) -> None:
    """The adapter comes out of every format as it went in, and so does the backbone."""
    checkpoint = max((tuned / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    project.run("convert", "--input", parallel, "--output", tmp_path / "hf", "--to", "hf")
    original = (tuned / "adapter" / "exits.safetensors").read_bytes()
    for number, source in enumerate((parallel, tmp_path / "hf", checkpoint)):
        project.run("convert", "--input", source, "--output", tmp_path / str(number), "--to", "adapter")
        first, second = (load_file(path / "exits.safetensors") for path in (tuned / "adapter", tmp_path / str(number)))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
        old, new = (
            json.loads((path / "exits.json").read_text()) for path in (tuned / "adapter", tmp_path / str(number))
        )
        assert old.pop("files") and new.pop("files") and old == new
    assert (tuned / "adapter" / "exits.safetensors").read_bytes() == original
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (project.model / name).read_bytes()
    first, second = (load_file(path / "model.safetensors") for path in (project.model, tmp_path / "hf"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_an_exit_drafts_for_the_model_it_came_from(project: Project, parallel: Path, tmp_path: Path) -> None:
    """The printed lines for transformers, run as they are."""
    done = project.run("convert", "--input", parallel, "--output", tmp_path / "draft", "--to", "hf", "--exit", 1)
    for tool in ("assistant_model=draft", "vllm serve", "sglang", "llama-server"):
        assert tool in done.stdout
    assert json.loads((tmp_path / "draft" / "config.json").read_text())["num_hidden_layers"] == 1
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "draft")
    model, draft = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (project.model, tmp_path / "draft")
    )
    prompt = tokenizer("def main", return_tensors="pt").input_ids
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 1}
    assert torch.equal(model.generate(prompt, assistant_model=draft, **options), model.generate(prompt, **options))


def test_dry_run_writes_nothing(project: Project, tuned: Path, tmp_path: Path) -> None:
    options = ("--to", "parallel", "--tensor", 2, "--exits", "[{layer: 0.99, body: norm, head: shared}]", "--dry-run")
    done = project.run("convert", "--input", tuned / "adapter", "--output", tmp_path / "out", *options)
    for word in ("adapter", "exit 1", "exit 3", "body norm, head own", "shard-p00-t01-000.safetensors"):
        assert word in done.stdout, done.stdout
    assert not list(tmp_path.iterdir())


def test_dry_run_tells_of_an_output_that_is_there(
    saved_model: Callable[..., tuple[Path, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_ee.commands.main import main

    model = saved_model("llama3.1")[0]
    (tmp_path / "file").touch()
    options = ["--input", str(model), "--output", str(tmp_path), "--to", "parallel", "--dry-run"]
    capsys.readouterr()
    assert main(["convert", *options]) == 2
    printed = capsys.readouterr()
    assert not printed.out and f"--output: {tmp_path} exists already; nothing is overwritten" in printed.err


@pytest.mark.parametrize(
    ("options", "status", "line"),
    [
        (("--to", "parallel", "--tensor", 3), 2, "--tensor: 3 does not divide the model's 2 key-value heads"),
        (("--to", "parallel", "--pipeline", 9), 2, "--pipeline: 9 stages are more than the model's 4 layers"),
        (("--to", "hf", "--pipeline", 2), 2, "--tensor, --pipeline and --stages have no effect with --to"),
        (("--to", "adapter", "--exit", 1), 2, "--exit: writes an exit as a Hugging Face model"),
        (("--to", "adapter"), 1, "holds no exits; add some with --exits or --adapter"),
        (("--to", "adapter", "--exits", "[{layer: 9}]"), 2, "exits[0].layer: 9 is outside the model"),
        (("--to", "adapter", "--exits", "[{layr: 1}]"), 2, "--exits[0].layr: unknown key"),
        (("--to", "hf", "--heads", "1=big"), 2, "--heads: '1=big' is not LAYER=HEAD"),
        (("--to", "hf", "--drop-exits", 2), 2, "no exit after layer 2; it has none"),
        (("--to", "hf", "--exit", 2), 1, "has no exits"),
    ],
)
def test_bad_options_are_one_line(
    options: tuple[Any, ...],
    status: int,
    line: str,
    saved_model: Callable[..., tuple[Path, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from megatron_ee.commands.main import main

    model = saved_model("llama3.1")[0]
    capsys.readouterr()  # what saving it said
    arguments = ["convert", "--input", str(model), "--output", str(tmp_path / "out"), *map(str, options)]
    assert main(arguments) == status
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and line in errors, errors
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_another_backbone_is_refused(
    tuned: Path, saved_model: Callable[..., tuple[Path, Any]], project: Project, tmp_path: Path
) -> None:
    other = saved_model("llama3.1", vocab_size=259, seed=7)[0]
    options = ("--to", "parallel", "--model", other)
    done = project.run("convert", "--input", tuned / "adapter", "--output", tmp_path / "out", *options, check=False)
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    line = done.stderr.splitlines()[-1]
    made_for = json.loads((tuned / "adapter" / "exits.json").read_text())["backbone_sha256"]
    assert made_for[:16] in line and str(tuned / "adapter") in line and str(other) in line


def test_to_megatron_and_back(project: Project, saved_model: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    model, _ = saved_model("llama2")
    there = ("--input", model, "--output", tmp_path / "megatron", "--to", "megatron")
    done = project.run("convert", *there, "--exits", "[{layer: 2}]")
    assert "its exits are left out: Megatron's format cannot hold them" in done.stderr
    back = ("--input", tmp_path / "megatron", "--output", tmp_path / "back", "--to", "hf")
    refused = project.run("convert", *back, check=False)
    assert refused.returncode == 1 and "--trust-checkpoint" in refused.stderr.splitlines()[-1]
    project.run("convert", *back, "--trust-checkpoint")
    first, second = (load_file(path / "model.safetensors") for path in (model, tmp_path / "back"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "back" / "config.json").read_bytes() == (model / "config.json").read_bytes()
