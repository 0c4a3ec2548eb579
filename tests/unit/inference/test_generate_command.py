"""``megatron-ee generate`` as a user runs it: what it prints, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ee.commands.generate import _check_compare, parser
from megatron_ee.commands.generate_requests import FIELDS, make_request
from megatron_ee.commands.main import main
from megatron_ee.config.exits import ExitSpec
from megatron_ee.data.tokenizer import load_tokenizer
from megatron_ee.data.tokenizer_backends import TokenizersBackend
from megatron_ee.errors import ConfigError
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.released import open_released
from megatron_ee.inference.requests import Request
from megatron_ee.testing.models import save_tiny_model

PROMPT = "Once upon a time"
ROOT = Path(__file__).resolve().parents[3]
SaveTokenizer = Callable[..., None]
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}>"


def without_progress(err: str) -> str:
    """Lines such as ``loading: 0.7/0.8 MB``."""
    return "".join(
        line for line in err.splitlines(True) if not line.startswith(("loading: ", "hashing the backbone: "))
    )


class Command:
    """Runs it in this process."""

    def __init__(self, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.model, self.capsys = model, capsys

    def run(self, *arguments: object, model: Path | None = None) -> tuple[int, str, str]:
        """Exit status, stdout, and stderr without progress."""
        self.capsys.readouterr()
        fixed = ["generate", "--model", str(model or self.model), "--dtype", "float32"]
        status = main([*fixed, *map(str, arguments)])
        captured = self.capsys.readouterr()
        return status, captured.out, without_progress(captured.err)

    def json(self, *arguments: object) -> Any:
        status, out, err = self.run(*arguments, "--json")
        assert status == 0, err
        return json.loads(out)


@pytest.fixture
def command(byte_model: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(byte_model, capsys)


@pytest.mark.smoke
def test_full_mode_equals_transformers(command: Command, byte_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = command.json("--prompt", PROMPT, "--max-tokens", 20)
    inputs = AutoTokenizer.from_pretrained(byte_model)(PROMPT, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(byte_model, dtype=torch.float32)
    theirs = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=1)
    assert result["token_ids"] == theirs[0, inputs["input_ids"].shape[1] :].tolist()
    assert set(result["layers"]) == {4}


@pytest.mark.smoke
def test_json_has_the_fixed_keys_and_every_mode_says_what_it_should(command: Command, adapter: Path) -> None:
    found = {}
    for mode in ("full", "threshold", "speculative"):
        result = command.json(
            "--adapter", adapter, "--prompt", PROMPT, "--mode", mode, "--threshold", 0.01, "--max-tokens", 12
        )
        assert set(result) == {"text", "token_ids", "layers", "statistics"}
        assert len(result["token_ids"]) == len(result["layers"]) == 12
        figures = result["statistics"]
        assert figures["finish_reason"] == "length" and figures["tokens"] == 12
        assert figures["tokens_by_layer"] == {
            str(layer): result["layers"].count(layer) for layer in sorted(set(result["layers"]))
        }
        assert all(0 <= confidence <= 1 for confidence in figures["confidences"])
        found[mode] = result
    assert found["speculative"]["token_ids"] == found["full"]["token_ids"]
    assert found["speculative"]["text"] == found["full"]["text"]
    assert {1, 4} <= set(found["threshold"]["layers"])
    assert (
        command.json("--adapter", adapter, "--prompt", PROMPT, "--threshold", 0.01, "--max-tokens", 12)["token_ids"]
        == (found["threshold"]["token_ids"])
    )  # the mode where there are exits


def test_several_prompts_and_samples(command: Command, adapter: Path) -> None:
    drawn = ("--adapter", adapter, "--temperature", 1, "--max-tokens", 6, "--ignore-eos")
    result = command.json(*drawn, "--prompt", "one", "--prompt", "two", "--samples", 2, "--seed", 5)
    assert set(result) == {"outputs", "statistics"} and len(result["outputs"]) == 4
    assert result["statistics"]["outputs"] == 4 and result["statistics"]["tokens"] == 24
    assert all(set(one) == {"text", "token_ids", "layers", "statistics"} for one in result["outputs"])
    for number, (prompt, seed) in enumerate((("one", 5), ("one", 6), ("two", 5), ("two", 6))):
        alone = command.json(*drawn, "--prompt", prompt, "--seed", seed)
        assert result["outputs"][number]["token_ids"] == alone["token_ids"]


def test_defaults_are_the_requests_own() -> None:
    """They are written out for the command, which reads its options without torch."""
    arguments = vars(parser().parse_args(["--model", "m", "--prompt", "p"]))
    assert make_request("p", {name: arguments[name] for name in FIELDS}, has_exits=False) == Request(
        prompt="p", stop=[]
    )


def test_options_reach_the_request(command: Command, adapter: Path, byte_model: Path) -> None:
    common = ("--adapter", adapter, "--prompt", PROMPT, "--ignore-eos", "--max-tokens", 12)
    assert set(command.json(*common, "--threshold", 0.01, "--exits", "2")["layers"]) == {2, 4}
    always, rests = (
        command.json(*common, "--threshold", 0.025, "--exits", "2", "--backoff", backoff)["layers"]
        for backoff in (0, 1)
    )
    assert always.count(2) > rests.count(2) > 0
    assert command.json(*common, "--threshold", 1e-9, "--max-deferred", 2)["layers"][:4] == [4, 1, 1, 4]
    assert command.json(*common, "--threshold", 1e-9, "--min-full", 5)["layers"][:6] == [4] * 5 + [1]
    assert set(command.json(*common, "--threshold", 1e-9, "--thresholds", "1=1.5")["layers"]) == {2, 4}
    entropy = command.json(*common, "--threshold", 1.1, "--measure", "entropy")["statistics"]["confidences"]
    assert entropy != command.json(*common, "--mode", "full")["statistics"]["confidences"]
    drafted = command.json(*common, "--mode", "speculative", "--draft-exit", 2, "--draft-length", 4)
    assert drafted["statistics"]["proposed"] > 0 and set(drafted["layers"]) <= {2, 4}
    full = command.json(*common, "--mode", "full", "--logprobs", 2)
    assert len(full["logprobs"]) == 12
    for token, logprob in zip(full["token_ids"], full["logprobs"], strict=True):
        assert len(logprob["top"]) == 2
        assert logprob["emitted"] == pytest.approx(logprob["top"][str(token)], abs=1e-5)  # greedy: the likeliest
    assert command.json(*common, "--echo")["text"].startswith(PROMPT)
    drawn = command.json(*common, "--temperature", 1, "--mode", "full")
    text = drawn["text"]
    stop = next(text[i : i + 2] for i in range(2, len(text) - 2) if "\ufffd" not in text[i : i + 2])
    stopped = command.json(*common, "--temperature", 1, "--mode", "full", "--stop", stop)
    assert stopped["text"] == text[: text.index(stop)] and stopped["statistics"]["finish_reason"] == "stop"
    penalised = command.json(*common, "--mode", "full", "--repetition-penalty", 1000)["token_ids"]
    assert len(set(penalised)) == 12
    for option in (("--top-k", 1), ("--top-p", 1e-6), ("--min-p", 1)):
        narrow = command.json(*common, "--temperature", 1, *option, "--mode", "full")
        assert narrow["token_ids"] == full["token_ids"]


def test_text_shows_where_tokens_left_and_that_the_context_ended(command: Command, adapter: Path) -> None:
    status, out, err = command.run(
        "--adapter", adapter, "--prompt", PROMPT, "--threshold", 0.01, "--max-tokens", 100, "--ignore-eos"
    )
    assert status == 0 and out.startswith(PROMPT + "[4]") and "[1]" in out
    assert f"{64 - len(PROMPT) - 1} tokens" in out and " after layer 1" in out
    assert err.splitlines() == ["megatron-ee generate: stopped at the end of the model's context"]


def test_a_threshold_without_effect_is_told(command: Command, adapter: Path) -> None:
    _, _, err = command.run(
        "--adapter", adapter, "--prompt", PROMPT, "--mode", "full", "--threshold", 0.5, "--max-tokens", 2
    )
    assert err.splitlines() == ["megatron-ee generate: --threshold has no effect in mode full"]


def test_html(command: Command, adapter: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    status, out, err = command.run(
        "--adapter", adapter, "--prompt", "<script>", "--max-tokens", 5, "--html", page, "--ignore-eos"
    )
    assert status == 0 and out and not err
    text = page.read_text()
    assert text.startswith("<!DOCTYPE html>") and "&lt;script&gt;" in text and "<script" not in text


def test_a_page_has_every_answer_to_a_file(
    command: Command, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, options = tmp_path / "page.html", ("--adapter", adapter, "--max-tokens", 3, "--ignore-eos")
    path = write_prompts(tmp_path / "prompts.jsonl", {"prompt": "<one>", "samples": 2}, {"prompt": "two"})
    for more in ((), ("--explain",)):
        status, out, err = command.run(*options, "--prompts", path, "--html", page, *more)
        assert status == 0 and len(out.splitlines()) == 2, err
        text = page.read_text()
        assert "<h2>Answer 3 of 3</h2>" in text and text.count("&lt;one&gt;") == 2 and text.count(">two<") == 1
    monkeypatch.setattr("megatron_ee.inference.replay.ExitReplay.finite", False)
    assert command.run(*options, "--prompts", path, "--html", page, "--explain")[0] == 1
    assert "Answer" not in page.read_text()


def test_compare_shows_every_mode(command: Command, adapter: Path) -> None:
    result = command.json(
        "--adapter", adapter, "--prompt", PROMPT, "--compare", "--threshold", 0.01, "--max-tokens", 8, "--ignore-eos"
    )
    assert set(result) == {"full", "threshold", "speculative"}
    assert [one["token_ids"] for one in result["full"]["outputs"]] == [
        one["token_ids"] for one in result["speculative"]["outputs"]
    ]
    status, _, err = command.run("--prompt", PROMPT, "--compare", "--max-tokens", 2)
    assert status == 2 and "--compare: needs exits" in err


def test_chat(command: Command, byte_model: Path, tmp_path: Path, save_tokenizer: SaveTokenizer) -> None:
    path = tmp_path / "model"
    shutil.copytree(byte_model, path)
    save_tokenizer(path, template=TEMPLATE)
    chat = Command(path, command.capsys)
    result = chat.json("--prompt", "Hi", "--chat", "--max-tokens", 8, "--ignore-eos")
    tokenizer = load_tokenizer(path)
    expected = [token for token in tokenizer.encode_prompt("[user] Hi>") if token != 0]  # the template has no <s>
    assert result["statistics"]["prompt_tokens"] == len(expected)
    status, _, err = command.run("--prompt", "Hi", "--chat")
    assert status == 1 and "the tokenizer has no chat template; give the prompt as text" in err
    status, _, err = chat.run("--prompt", "Hi\udcff", "--chat")  # a byte that is no UTF-8
    assert status == 2 and "--prompt: is not valid Unicode: character " in err
    assert len(err.splitlines()) == 1
    save_tokenizer(path, template="{{ messages.__class__.__mro__ }}")
    status, _, err = chat.run("--prompt", "Hi", "--chat")
    assert status == 1 and "the chat template fails on these messages: " in err and len(err.splitlines()) == 1


REFUSED: list[tuple[tuple[object, ...], str]] = [
    (("--prompt", ""), "--prompt: is empty; give text to continue"),
    (("--prompt", "", "--chat"), "--prompt: is empty; give text to continue"),
    (("--prompt", "fine", "--prompt", ""), "--prompt: is empty; give text to continue"),
    (("--prompt", "x" * 63), "--prompt: has 64 tokens; the model's 64 positions leave room"),
    (("--mode", "threshold"), "--mode: threshold needs exits; give their adapter"),
    (("--mode", "speculative"), "--mode: speculative needs exits; give their adapter"),
    (("--mode", "quick"), "argument --mode: invalid choice: 'quick'"),
    (("EXITS", "--threshold", 0), "--threshold: must be above 0, not 0.0"),
    (("EXITS", "--threshold", "nan"), "--threshold: must be a finite number, not nan"),
    (("EXITS", "--threshold", "high"), "argument --threshold: invalid float value: 'high'"),
    (("EXITS", "--thresholds", "1:0.5"), "argument --thresholds: must be like 8=0.8,16=0.95, not '1:0.5'"),
    (("EXITS", "--thresholds", "3=0.5"), "--thresholds: there is no exit after layer 3; there are: 1, 2"),
    (("EXITS", "--thresholds", "1=0.5,2=0.5,1=0.6"), "argument --thresholds: names layer 1 twice: '1=0.5,2=0.5,1=0.6'"),
    (("EXITS", "--measure", "luck"), "--measure: must be one of probability, margin, entropy, not 'luck'"),
    (("EXITS", "--exits", "3"), "--exits: there is no exit after layer 3; there are: 1, 2"),
    (("EXITS", "--exits", "a"), "argument --exits: must be layers such as 8,16, not 'a'"),
    (("EXITS", "--exits", "1,1"), "--exits: names layer 1 twice"),
    (("EXITS", "--max-deferred", -1), "argument --max-deferred: must be at least 0, not -1"),
    (("EXITS", "--backoff", -1), "argument --backoff: must be at least 0, not -1"),
    (("EXITS", "--min-full", 0), "argument --min-full: must be at least 1, not 0"),
    (
        ("EXITS", "--mode", "speculative", "--draft-exit", 3),
        "--draft-exit: there is no exit after layer 3; there are: 1, 2",
    ),
    (("EXITS", "--mode", "speculative", "--draft-length", 99), "--draft-length: must be at most 16, not 99"),
    (
        ("EXITS", "--draft-vocabulary", 0, "--draft-corpus", "c"),
        "argument --draft-vocabulary: must be at least 1, not 0",
    ),
    (("EXITS", "--draft-vocabulary", 9), "--draft-vocabulary and --draft-corpus: give both"),
    (("--max-tokens", 0), "argument --max-tokens: must be at least 1, not 0"),
    (("--max-tokens", "many"), "argument --max-tokens: must be a whole number, not 'many'"),
    (("--temperature", -1), "--temperature: must be 0 (greedy) or from"),
    (("--top-p", 0), "--top-p: must be above 0, not 0.0"),
    (("--min-p", 2), "--min-p: must be at most 1, not 2.0"),
    (("--repetition-penalty", 0), "--repetition-penalty: must be at least 0.001, not 0.0"),
    (("--seed", -1), "--seed: must be at least 0, not -1"),
    (("--samples", 1000), "--samples: must be at most 128, not 1000"),
    (("--stop", ""), "--stop[0]: must be text of 1 or more characters, not ''"),
    (("--logprobs", 1000), "--logprobs: must be at most 100, not 1000"),
    (("--logprobs", 2), "--logprobs: are shown in JSON only; give --json or --prompts, or leave it out"),
    (("--dtype", "float16"), "argument --dtype: invalid choice: 'float16'"),
    (("EXITS", "--compare", "--samples", 2), "--samples: --compare compares one output per prompt; leave it out"),
    (("EXITS", "--compare", "--kv-memory", 1e-6), "--max-tokens: 64 positions need"),
    (("--tensor", 2), "tensor x pipeline: 2 x 1 needs 2 processes, but there are 1; start as many with torchrun"),
    (("--pipeline", 3), "tensor x pipeline: 1 x 3 needs 3 processes, but there are 1; start as many with torchrun"),
    (("--kv-memory", 1e-6), "--max-tokens: 64 positions need 0.131 MB of KV cache, but it may have 0.001 MB; ask"),
    (("--kv-memory", "nan"), "argument --kv-memory: must be a number above 0 and at most 1e9, not 'nan'"),
    (("--kv-memory", 1e300), "argument --kv-memory: must be a number above 0 and at most 1e9, not '1e+300'"),
    (("--kv-memory=-1",), "argument --kv-memory: must be a number above 0 and at most 1e9, not '-1'"),
    (("EXITS", "--html", "page.html", "--compare"), "--html: shows the answers of one mode; leave out --compare"),
    (("--prompts", "x"), "argument --prompts: not allowed with argument --prompt"),
    (("EXITS", "--mode", "full", "--draft-exit", 4), "--draft-exit: there is no exit after layer 4; there are: 1, 2"),
]


def test_drafts_frequent_tokens(command: Command, adapter: Path, tmp_path: Path) -> None:
    """The output is full mode's; drafts, with tokens that are all frequent ones."""
    (tmp_path / "text.txt").write_text("abc abd abe " * 50)
    corpus = tmp_path / "corpus"
    prepared = ["--input", tmp_path / "text.txt", "--tokenizer", command.model, "--output", corpus]
    assert main(["prepare-data", *map(str, prepared)]) == 0
    options = ["--adapter", adapter, "--prompt", PROMPT, "--max-tokens", 24, "--ignore-eos", "--json"]
    drafted = [*options, "--mode", "speculative", "--draft-exit", 2, "--draft-length", 3]
    few = ["--draft-vocabulary", 3, "--draft-corpus", corpus]
    full, plain, restricted = (
        json.loads(command.run(*a)[1]) for a in ([*options, "--mode", "full"], drafted, drafted + few)
    )
    assert full["token_ids"] == plain["token_ids"] == restricted["token_ids"]
    frequent = set(load_tokenizer(command.model).encode("ab "))
    proposed = {t for t, layer in zip(restricted["token_ids"], restricted["layers"], strict=True) if layer == 2}
    assert proposed <= frequent and restricted["statistics"]["accepted"] <= plain["statistics"]["accepted"]
    status, _, err = command.run(*drafted, "--draft-vocabulary", 3, "--draft-corpus", tmp_path / "none")
    assert status == 2 and f"--draft-corpus: no such corpus: {tmp_path}/none" in err and len(err.splitlines()) == 1


def test_compiled_layers_are_asked(command: Command, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    class Parts:
        def __init__(self, stage: Stage) -> None:
            assert stage.backbone.layers

        def warm_up(self) -> None:
            asked.append(())

        def run(self, start: int, stop: int, *_: Any) -> None:
            asked.append((start, stop))

    monkeypatch.setattr("megatron_ee.inference.compiled.CompiledStage", Parts)
    options = ["--adapter", adapter, "--prompt", PROMPT, "--max-tokens", 8, "--mode", "full"]
    monkeypatch.setenv("CXX", "/bin/sh")  # one that is there
    compiled, eager = command.json(*options, "--compile"), command.json(*options)
    assert compiled["token_ids"] == eager["token_ids"]
    # Nothing stops at the exits, which full mode does without.
    assert asked == [(), *[(0, 4)] * 8]
    monkeypatch.setenv("CXX", "/nowhere/c++")
    status, out, err = command.run(*options, "--compile")
    assert (status, out) == (2, "") and len(err.splitlines()) == 1
    assert "--compile: on a CPU it needs a C++ compiler, and there is no /nowhere/c++" in err


def write_prompts(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str | bytes) else json.dumps(line) for line in lines]
    path.write_bytes(b"".join((text.encode() if isinstance(text, str) else text) + b"\n" for text in texts))
    return path


def test_a_file_of_prompts_is_answered_in_order(
    command: Command, byte_model: Path, adapter: Path, tmp_path: Path, save_tokenizer: SaveTokenizer
) -> None:
    """More than run at a time; each answer is what the same settings give alone."""
    model = tmp_path / "model"
    shutil.copytree(byte_model, model)
    save_tokenizer(model, template=TEMPLATE)
    exits = ("--adapter", adapter, "--max-tokens", 6, "--ignore-eos")
    lines: list[tuple[Any, tuple[object, ...]]] = [
        (
            {"prompt": "one", "max_tokens": 20, "mode": "full", "id": 1},
            ("--prompt", "one", "--max-tokens", 20, "--mode", "full"),
        ),
        ({"messages": [{"role": "user", "content": "hi"}]}, ("--prompt", "hi", "--chat")),
        ({"prompt": "two", "threshold": 0.01, "exits": [1]}, ("--prompt", "two", "--threshold", 0.01, "--exits", 1)),
        ({"prompt": "two", "thresholds": {"2": 0.01}}, ("--prompt", "two", "--thresholds", "2=0.01")),
        (
            {"prompt": "three", "mode": "speculative", "draft_exit": 2, "draft_length": 3},
            ("--prompt", "three", "--mode", "speculative", "--draft-exit", 2, "--draft-length", 3),
        ),
        (
            {"prompt": "x", "temperature": 1.0, "seed": 7, "echo": True},
            ("--prompt=x", "--temperature", 1, "--seed", 7, "--echo"),
        ),
        ({"prompt": "four", "logprobs": 2, "max_tokens": 1}, ("--prompt", "four", "--logprobs", 2, "--max-tokens", 1)),
    ]
    last = {"prompt": "five", "samples": 2, "id": "five"}
    path = write_prompts(tmp_path / "prompts.jsonl", *(line for line, _ in lines), "", last)
    status, out, err = command.run(*exits, "--prompts", path, "--max-num-seqs", 2, model=model)
    assert status == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    assert len(found) == len(lines) + 1 and [len(one["token_ids"]) for one in found[-1]["outputs"]] == [6, 6]
    assert [one.get("id") for one in found] == [1, *[None] * 6, "five"]
    assert "answering: 8/8 prompts" in err
    for one, (_, options) in zip(found, lines, strict=False):
        status, out, err = command.run(*exits, *options, "--json", model=model)
        alone = json.loads(out)
        for key in ("text", "token_ids", "layers", "logprobs"):
            assert one.get(key) == alone.get(key), (options, key)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":3: line: not valid JSON: "),
        ("[]", ":3: must be a JSON object, not []"),
        ({"max_tokens": 3}, ":3: give either a prompt or messages"),
        ({"prompt": "a", "messages": []}, ":3: give either a prompt or messages"),
        ({"prompt": ["a"]}, ":3: prompt: must be text, not ['a']"),
        ({"prompt": ""}, ":3: prompt: is empty"),
        (b'{"prompt": "\xff"}', ":3: not UTF-8: byte 12 of the line: invalid start byte"),
        ({"prompt": "a", "mode": ""}, ":3: mode: must be one of 'full', 'threshold' or 'speculative', not ''"),
        ({"prompt": "a" * 99}, ":3: prompt: has 100 tokens; the model's 64 positions leave room"),
        ({"messages": [{"role": "user"}]}, ":3: messages: message 1: content: missing"),
        ({"messages": [{"role": "user", "content": "a"}]}, "the tokenizer has no chat template"),
        ({"prompt": "a", "id": [1]}, ":3: id: must be text or a whole number, not [1]"),
        ({"prompt": "a", "max_token": 3}, ":3: 'max_token': unknown key; did you mean 'max_tokens'?"),
        ('{"prompt": "a", "seed": 1, "seed": 2}', ":3: line: not valid JSON: key 'seed' appears twice"),
        ({"prompt": "a", "max_tokens": "3"}, ":3: max_tokens: must be a whole number, not '3'"),
        ({"prompt": "a", "top_p": 2}, ":3: top_p: must be at most 1, not 2"),
        ('{"prompt": "a", "temperature": NaN}', ":3: line: not valid JSON: NaN is not JSON"),
        ({"prompt": "a", "echo": 1}, ":3: echo: must be true or false, not 1"),
        ({"prompt": "a", "stop": "x"}, ":3: stop: must be a list, not 'x'"),
        ({"prompt": "a", "mode": "fast"}, ":3: mode: must be one of 'full', 'threshold' or 'speculative', not 'fast'"),
        ({"prompt": "a", "exits": [True]}, ":3: exits[0]: must be a whole number, not True"),
        ({"prompt": "a", "draft_exit": 3}, ":3: draft_exit: there is no exit after layer 3; there are: 1, 2"),
        ({"prompt": "a", "thresholds": {"x": 1}}, ":3: thresholds"),
        ({"prompt": "a", "thresholds": {"3": 1}}, ":3: thresholds: there is no exit after layer 3"),
        ({"prompt": "a", "thresholds": [1]}, ":3: thresholds: must be an object, not [1]"),
    ],
)
def test_a_bad_line_is_refused_before_the_model_is_loaded(
    line: object, message: str, command: Command, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_ee.inference.loading.open_engine", lambda *_, **__: pytest.fail("loaded"))
    path = write_prompts(tmp_path / "prompts.jsonl", {"prompt": "good"}, "", line)
    status, out, err = command.run("--adapter", adapter, "--prompts", path)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith(f"megatron-ee generate: error: {path}:3: ") and message in err


def test_a_prompt_of_megabytes_is_refused_without_tokenizing_it(
    command: Command,
    byte_model: Path,
    tmp_path: Path,
    save_tokenizer: SaveTokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(byte_model, model)
    save_tokenizer(model, template=TEMPLATE)
    for name in ("encode_prompt", "encode_spans"):
        monkeypatch.setattr(TokenizersBackend, name, lambda *_: pytest.fail("tokenized"))
    path = write_prompts(tmp_path / "prompts.jsonl", {"prompt": "x" * 5_000_000})
    for options in (("--prompt", "x" * 5_000_000), ("--prompts", path), ("--prompts", path, "--chat")):
        status, out, err = command.run(*options, model=model)
        assert (status, out) == (2, "") and len(err.splitlines()) == 1
        assert "prompt: has at least 1250" in err and "tokens; the model's 64 positions leave room" in err


def test_a_file_without_prompts_is_refused(command: Command, tmp_path: Path) -> None:
    for path, message in (
        (write_prompts(tmp_path / "empty.jsonl", ""), "holds no prompt"),
        (tmp_path / "none.jsonl", "--prompts: no such file or directory: "),
    ):
        status, out, err = command.run("--prompts", path)
        assert (
            (status, out) == (2, "") and err.startswith("megatron-ee generate: error: --prompts: ") and message in err
        )
    path = write_prompts(tmp_path / "long.jsonl", {"prompt": "good"}, {"prompt": "x", "max_tokens": 60})
    status, out, err = command.run("--prompts", path, "--max-tokens", 1, "--kv-memory", 1e-5)
    assert (status, out) == (2, "") and f"{path}:" in err and "max_tokens: " in err


def test_settings_without_effect_are_reported(command: Command, adapter: Path) -> None:
    options = ["--adapter", adapter, "--prompt", PROMPT, "--max-tokens", 1, "--mode", "full"]
    given = ("--draft-exit", 2, "--threshold", 0.5, "--policy", "gate", "--min-full", 2, "--thresholds", "1=0.5")
    status, _, err = command.run(*options, *given)
    assert status == 0
    assert [line.partition("--")[2] for line in err.splitlines()] == [
        "policy has no effect in mode full",
        "threshold has no effect in mode full",
        "thresholds has no effect in mode full",
        "min-full has no effect in mode full",
        "draft-exit has no effect in mode full",
    ]


def test_options_are_unused_only_if_no_line_of_a_file_uses_them(
    command: Command, adapter: Path, tmp_path: Path
) -> None:
    path = write_prompts(tmp_path / "p.jsonl", {"prompt": "a", "mode": "full"}, {"prompt": "b"})
    options = ("--adapter", adapter, "--prompts", path, "--max-tokens", 1, "--threshold", 0.5, "--draft-length", 2)
    status, _, err = command.run(*options)
    assert status == 0
    notices = [line for line in err.splitlines() if "no effect" in line]
    assert notices == ["megatron-ee generate: --draft-length has no effect in mode full or threshold"]


@pytest.mark.parametrize("arguments, message", REFUSED, ids=[" ".join(map(str, a))[:40] for a, _ in REFUSED])
def test_refuses_in_one_line(arguments: tuple[object, ...], message: str, command: Command, adapter: Path) -> None:
    given: list[object] = [] if "--prompt" in arguments else ["--prompt", PROMPT]
    for argument in arguments:
        given += ["--adapter", adapter] if argument == "EXITS" else [argument]
    status, out, err = command.run(*given)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1
    assert message in err and err.startswith("megatron-ee generate: error: ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--compare",), "--compare: needs exits; give their adapter with --adapter"),
        (("--html", "/"), "--html: / is a directory; name a file"),
        (
            ("--html", f"{__file__}/a.html"),
            f"{__file__}/a.html cannot be written: {__file__} is not a writable directory",
        ),
        (
            ("--html", "/nowhere/a.html"),
            "--html: /nowhere/a.html cannot be written: /nowhere is not a writable directory",
        ),
    ],
)
def test_refuses_before_the_model_is_loaded(
    arguments: tuple[str, ...], message: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_ee.inference.loading.open_engine", lambda *_, **__: pytest.fail("loaded"))
    status, out, err = command.run("--prompt", PROMPT, *arguments)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1
    assert message in err


def test_compare_refuses_what_one_mode_cannot_answer_before_loading(byte_model: Path, adapter: Path) -> None:
    released = open_released(byte_model, adapter)
    assert released.adapter is not None
    released = replace(released, adapter=replace(released.adapter, exits=(ExitSpec(4),)))
    arguments = parser().parse_args(["--model", "m", "--prompt", PROMPT, "--compare"])
    with pytest.raises(ConfigError, match="^exits: only an exit before the last layer can draft"):
        _check_compare(arguments, [Request(prompt=PROMPT)], released)


def test_refuses_another_number_of_processes(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, out, err = command.run("--prompt", PROMPT)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1
    assert "tensor x pipeline: 1 x 1 needs 1 processes, but there are 2; start as many with torchrun" in err


def test_a_token_that_the_model_does_not_have_is_refused_where_it_occurs(
    command: Command, byte_model: Path, tmp_path: Path, save_tokenizer: SaveTokenizer
) -> None:
    path = tmp_path / "model"
    shutil.copytree(byte_model, path)
    save_tokenizer(path, extra=3)
    extra = {"258": {"content": "<extra0>", "special": True}}
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": extra}))
    assert command.run("--prompt", PROMPT, "--max-tokens", 2, model=path)[0] == 0
    for more in ((), ("--chat",)):
        (path / "chat_template.jinja").write_text("{{ messages[0].content }}")
        status, _, err = command.run("--prompt", f"{PROMPT}<extra0>", *more, model=path)
        assert status == 2 and len(err.splitlines()) == 1
        assert "--prompt: token '<extra0>' (id 258) is not in the model's vocabulary of 258 tokens" in err


@pytest.mark.parametrize("mode", ["full", "threshold", "speculative"])
def test_refuses_exits_of_another_backbone(
    mode: str, command: Command, adapter: Path, tmp_path: Path, save_tokenizer: SaveTokenizer
) -> None:
    save_tiny_model("llama2", tmp_path, seed=5, vocab_size=258, max_position_embeddings=64)
    save_tokenizer(tmp_path)
    status, _, err = command.run("--adapter", adapter, "--prompt", PROMPT, "--mode", mode, model=tmp_path)
    assert status == 1 and len(err.splitlines()) == 1
    assert "exits fit only the weights they were tuned on" in err


@pytest.mark.slow
def test_as_a_process(byte_model: Path, adapter: Path) -> None:
    """Nothing but the result on stdout, nothing but progress on stderr."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    arguments = ("--model", byte_model, "--adapter", adapter, "--prompt", PROMPT, "--max-tokens", 5, "--json")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_ee", "generate", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and without_progress(done.stderr) == ""
    assert len(json.loads(done.stdout)["token_ids"]) <= 5
