"""``megatron-ee generate --explain`` as a user runs it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.commands.main import main

Generate = Callable[..., tuple[int, str, str]]


@pytest.fixture
def generate(byte_model: Path, capsys: pytest.CaptureFixture[str]) -> Generate:
    """Runs it. Gives exit status, stdout, and stderr without progress."""

    def run(*arguments: object, model: Path = byte_model) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["generate", "--model", str(model), "--dtype", "float32", *map(str, arguments)])
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if not line.startswith(("loading: ", "hashing "))]
        return status, captured.out, "\n".join(lines)

    return run


def test_json_and_page_explain_every_answer(generate: Generate, adapter: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    common = ("--adapter", adapter, "--threshold", 0.01, "--max-tokens", 8, "--ignore-eos")
    prompts = ("--prompt", "one", "--prompt", "</script>", "--samples", 2, "--temperature", 1)
    status, out, err = generate(*common, *prompts, "--explain", "--json", "--html", page)
    assert status == 0, err
    found: Any = json.loads(out)
    assert len(found["outputs"]) == 4 and found["statistics"]["outputs"] == 4  # what is run to explain does not count
    _, plain, _ = generate(*common, *prompts, "--json")
    for one, other in zip(found["outputs"], json.loads(plain)["outputs"], strict=True):
        assert [one[key] for key in ("text", "token_ids", "layers")] == [
            other[key] for key in ("text", "token_ids", "layers")
        ]
        explanation = one["explanation"]
        assert [each["id"] for each in explanation["tokens"]] == one["token_ids"]
        assert [[each["layer"] for each in token["exits"]] for token in explanation["tokens"]] == [[1, 2, 4]] * 8
        assert len(explanation["full"]["token_ids"]) == 8
    text = page.read_text(encoding="utf-8")
    assert "Answer 4 of 4" in text and "&lt;/script&gt;" in text and "<script" not in text


def test_text_says_in_short_where_it_departs(generate: Generate, adapter: Path) -> None:
    status, out, err = generate(
        "--adapter", adapter, "--prompt", "one", "--threshold", 0.01, "--explain", "--ignore-eos"
    )
    assert (status, err) == (0, "megatron-ee generate: stopped at the end of the model's context")
    assert "Departs from full mode's answer at token " in out and "says the final exit's" in out
    assert out.startswith("one[4]")


def test_all_exits_speak_whatever_is_used(generate: Generate, adapter: Path) -> None:
    options = ("--adapter", adapter, "--prompt", "one", "--max-tokens", 4, "--explain", "--json")
    for more in (("--exits", "2"), ("--mode", "full"), ("--mode", "speculative", "--draft-exit", 1)):
        status, out, _ = generate(*options, *more)
        assert status == 0 and [each["layer"] for each in json.loads(out)["explanation"]["exits"]] == [1, 2, 4]


def test_chat(generate: Generate, byte_model: Path, adapter: Path, tmp_path: Path, save_tokenizer: Any) -> None:
    model = tmp_path / "model"
    shutil.copytree(byte_model, model)
    save_tokenizer(model, template="{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}>")
    options = ("--adapter", adapter, "--prompt", "hi", "--chat", "--max-tokens", 6, "--explain", "--json")
    status, out, err = generate(*options, model=model)
    assert status == 0, err
    found = json.loads(out)
    assert len(found["explanation"]["tokens"]) == len(found["token_ids"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--compare",), "--explain: explains the answers of one mode; leave out --compare"),
        (("--prompt", "x" * 63), "--prompt: has 64 tokens; the model's 64 positions leave room"),
        (("--prompts", "x"), "argument --prompts: not allowed with argument --prompt"),
        (("--html", "/"), "--html: / is a directory; name a file"),
    ],
)
def test_refuses_in_one_line_what_cannot_be_explained(
    arguments: tuple[object, ...], message: str, generate: Generate, adapter: Path
) -> None:
    status, out, err = generate("--adapter", adapter, "--prompt", "one", "--explain", *arguments)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1 and message in err


def test_refuses_a_model_without_exits_before_loading(generate: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ee.inference.loading.open_engine", lambda *_, **__: pytest.fail("loaded"))
    status, _, err = generate("--prompt", "one", "--explain")
    assert status == 2 and "--explain: needs exits; give their adapter with --adapter" in err


def test_a_file_of_prompts_is_explained_line_by_line(
    generate: Generate, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More prompts than run at a time: some run on while others are explained."""
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"{n}", "max_tokens": 3 + 4 * n, "samples": 1 + n % 2, "threshold": 0.01} for n in range(6)]
    lines.append({"prompt": "s", "mode": "speculative", "draft_exit": 2})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--adapter", adapter, "--prompts", path, "--max-num-seqs", 2, "--max-tokens", 9, "--ignore-eos")
    _, plain, _ = generate(*options)
    status, out, err = generate(*options, "--explain")
    assert status == 0, err
    for one, other in zip(map(json.loads, out.splitlines()), map(json.loads, plain.splitlines()), strict=True):
        for mine, theirs in zip(one.get("outputs", [one]), other.get("outputs", [other]), strict=True):
            assert (mine["token_ids"], mine["layers"]) == (theirs["token_ids"], theirs["layers"])
            assert [each["id"] for each in mine["explanation"]["tokens"]] == mine["token_ids"]
    monkeypatch.setattr("megatron_ee.inference.replay.ExitReplay.finite", False)
    status, out, err = generate(*options, "--explain")
    assert status == 1 and "7 of 7 prompts failed" in err
    assert json.loads(out.splitlines()[0]) == {"error": "the logits after layer 1 are not finite"}


def test_an_answer_that_fills_the_context_is_explained(generate: Generate, adapter: Path) -> None:
    options = ("--adapter", adapter, "--threshold", 0.01, "--ignore-eos", "--max-tokens", 200, "--explain", "--json")
    for length in (3, 62):
        status, out, _ = generate(*options, "--prompt", "x" * length)
        assert status == 0 and len(json.loads(out)["explanation"]["tokens"]) == 63 - length
