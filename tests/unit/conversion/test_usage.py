"""The commands printed after an export: they parse as their tools read them, and the Python one runs as it is."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.commands.main import main
from megatron_ee.conversion.copy import write_output
from megatron_ee.conversion.formats import open_contents
from megatron_ee.conversion.to_parallel import to_parallel
from megatron_ee.conversion.usage import usage
from megatron_ee.importers.megatron.export import to_torch_dist

SavedModel = Callable[..., tuple[Path, Any]]
TITLES = ("transformers", "vLLM", "SGLang", "llama.cpp")


def sections(text: str) -> dict[str, str]:
    """What stands under each tool's title."""
    found: dict[str, str] = {}
    title = ""
    for line in text.splitlines():
        if line.startswith(TITLES) and line.endswith(":"):
            title = line.split(" ")[0].rstrip(":")
            found[title] = ""
        elif title:
            found[title] += line + "\n"
    assert tuple(found) == TITLES
    return found


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


@pytest.fixture
def released(tmp_path: Path, saved_model: SavedModel) -> Path:
    """A model with a tokenizer, in a directory whose name needs every kind of quoting."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path / 'it\'s a "model"'
    saved_model("llama2")[1].save_pretrained(path)
    words = ["<unk>", "<s>", "</s>", "Once", "upon", "a", "time", *(f"word{n}" for n in range(124))]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(path)
    return path


def test_the_commands(released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(released.parent)
    draft, original = f"{released.parent}/d'raft", str(released)
    text = sections(usage(Path("d'raft"), released.name, open_contents(released)))

    serve = shlex.split(text["vLLM"])
    assert serve[:3] == ["vllm", "serve", original]
    tokens = json.loads(option(serve, "--speculative-config")).pop("num_speculative_tokens")
    speculative = {"method": "draft_model", "model": draft, "num_speculative_tokens": tokens}
    assert json.loads(option(serve, "--speculative-config")) == speculative and tokens > 0

    serve = shlex.split(text["SGLang"])
    assert option(serve, "--model-path") == original
    assert option(serve, "--speculative-algorithm") == "STANDALONE"
    assert option(serve, "--speculative-draft-model-path") == draft
    # SGLang verifies a chain (topk 1) of so many steps and the token before it.
    assert option(serve, "--speculative-eagle-topk") == "1" and option(serve, "--speculative-num-steps") == str(tokens)
    assert option(serve, "--speculative-num-draft-tokens") == str(tokens + 1)

    first, second, third = (shlex.split(line) for line in text["llama.cpp"].strip().splitlines())
    assert first[1:3] == ["convert_hf_to_gguf.py", original] and second[1:3] == ["convert_hf_to_gguf.py", draft]
    assert third[0] == "llama-server"
    assert option(third, "-m") == option(first, "--outfile") and option(third, "-md") == option(second, "--outfile")
    assert option(third, "--spec-type") == "draft-simple"


def test_a_model_on_the_hub(released: Path) -> None:
    text = sections(usage(released / "draft", "org/model", open_contents(released)))
    assert shlex.split(text["vLLM"])[2] == "org/model"
    first, second, _ = (shlex.split(line) for line in text["llama.cpp"].strip().splitlines())
    assert first[2:4] == ["--remote", "org/model"] and "--remote" not in second


def test_the_tokenizer(released: Path, saved_model: SavedModel) -> None:
    assert "so it was copied" in usage(Path("draft"), "org/model", open_contents(released))
    bare, _ = saved_model("llama3.1")
    assert f"{bare} has none: copy org/model's" in usage(Path("draft"), "org/model", open_contents(bare))


def test_an_original_that_the_tools_do_not_read(released: Path, tmp_path: Path) -> None:
    """The commands name the Hugging Face directory that the line before them makes."""
    write_output(to_parallel(open_contents(released)), tmp_path / "parallel")
    write_output(to_torch_dist(open_contents(released)), tmp_path / "megatron")
    for name, config in (("parallel", None), ("megatron", None), ("megatron", released)):
        text = usage(tmp_path / "draft", str(tmp_path / name), open_contents(released), config)
        (line,) = (line for line in text.splitlines() if line.startswith("megatron-ee convert "))
        assert shlex.split(sections(text)["vLLM"])[2] == option(shlex.split(line), "--output")
        shutil.rmtree(tmp_path / "draft-original", ignore_errors=True)
        assert main(shlex.split(line)[1:]) == 0
        original, again = open_contents(released), open_contents(tmp_path / "draft-original")
        assert {name: tensor.sha256() for name, tensor in again.backbone.items()} == {
            name: tensor.sha256() for name, tensor in original.backbone.items()
        }
    assert "megatron-ee convert" not in usage(tmp_path / "draft", str(released), open_contents(released))


@pytest.mark.slow
def test_the_python_runs_as_it_is(released: Path) -> None:
    code = sections(usage(released, str(released), open_contents(released)))["transformers"]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time") and len(done.stdout.split()) > 10
