"""Hashes of a corpus's texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_ee.data.prepare import prepare_corpus
from megatron_ee.data.texts import SUFFIX, hash_texts, hashed, read_hashes
from megatron_ee.errors import DataError


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_case_space_and_compatible_characters_do_not_matter() -> None:
    same = hash_texts(["What is ２+2?\n", "  what IS 2+2? "])
    assert same[0] == same[1]
    assert len(hash_texts(["", " \n", "x"])) == 1
    assert hashed(["a", "b", ""], hash_texts(["B "])) == [False, True, False]


def test_a_text_corpus_knows_its_texts_and_their_first_lines(tmp_path: Path, hf_dir: Path) -> None:
    lines = write(tmp_path / "a.jsonl", [{"text": "the quick fox\nlazy dog"}, {"text": "seven wizards"}])
    (tmp_path / "b.txt").write_text("a brown dog\njumps\n")
    prepare_corpus([lines, tmp_path / "b.txt"], hf_dir, tmp_path / "out", workers=1)
    known = read_hashes(tmp_path / "out")
    assert known is not None and len(known) == 5 and (np.diff(known.astype(object)) > 0).all()
    asked = ["The quick fox", "the quick fox lazy dog", "seven wizards", "a brown dog", "a brown dog jumps", "jumps"]
    assert hashed(asked, known) == [True] * 5 + [False]


def test_a_chat_corpus_knows_the_users_messages(
    tmp_path: Path, make_hf: Callable[..., Path], templates: dict[str, str]
) -> None:
    directory = make_hf(templates["prefixes"], eos="<|im_end|>")
    turns = [("user", "the quick fox?"), ("assistant", "seven"), ("user", "dog"), ("assistant", "lazy")]
    messages = [{"role": role, "content": content} for role, content in turns]
    lines = write(tmp_path / "chat.jsonl", [{"messages": messages}])
    prepare_corpus([lines], directory, tmp_path / "out", chat=True, workers=1)
    known = read_hashes(tmp_path / "out")
    assert known is not None and hashed([content for _, content in turns], known) == [True, False, True, False]


def test_a_corpus_without_hashes_and_a_damaged_file(tmp_path: Path) -> None:
    assert read_hashes(tmp_path / "old") is None
    (tmp_path / f"bad{SUFFIX}").write_bytes(b"12345")
    with pytest.raises(DataError, match="damaged"):
        read_hashes(tmp_path / "bad")
    np.array([2, 1], dtype="<u8").tofile(tmp_path / f"mixed{SUFFIX}")
    with pytest.raises(DataError, match="damaged"):
        read_hashes(tmp_path / "mixed")
