"""prepare-data through the command line: a corpus, and what it says on stdout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ee.commands.main import main


def tokenizer(directory: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<unk>", "</s>", "exits", "leave", "early"])}
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(directory)
    return directory


def test_prepare_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"body": "exits leave early"}) + "\n" + json.dumps({"body": "early exits"}) + "\n")
    prefix = tmp_path / "corpus"
    arguments = ["prepare-data", "--input", str(path), "--tokenizer", str(tokenizer(tmp_path / "tokenizer"))]
    arguments += ["--output", str(prefix)]
    assert main([*arguments, "--text-key", "body"]) == 0
    assert capsys.readouterr().out == f"{prefix}: 2 documents, 7 tokens\n"
    assert Path(f"{prefix}.idx").is_file()
    assert main([*arguments, "--text-key", "body"]) == 2  # not over an existing one
    err = capsys.readouterr().err
    assert err.startswith(f"megatron-ee prepare-data: error: {prefix}")
    assert main([*arguments, "--text-key", "body", "--overwrite", "--workers", "2"]) == 0
    assert main([*arguments, "--overwrite"]) == 1
    assert "text" in capsys.readouterr().err.splitlines()[-1]


def test_a_chat_template_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, template = tmp_path / "chat.jsonl", tmp_path / "own.jinja"
    path.write_text(json.dumps({"messages": [{"role": "assistant", "content": "exits"}]}) + "\n")
    template.write_text("{% for m in messages %}{{ 'leave early ' + m.content }}{% endfor %}")
    arguments = ["prepare-data", "--input", str(path), "--tokenizer", str(tokenizer(tmp_path / "tokenizer"))]
    arguments += ["--output", str(tmp_path / "corpus"), "--chat-template", str(template)]
    assert main(arguments) == 2
    assert "--chat-template: applies to chat data only; give --chat, too" in capsys.readouterr().err
    assert main([*arguments, "--chat"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'corpus'}: 1 documents, 4 tokens\n"
