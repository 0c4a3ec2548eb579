"""Corpora that do not suit a model, or that are not those of before, are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.data.checks import changed_data, check_data, check_tokenizer, describe_data
from megatron_ee.data.indexed import Corpus, file_of, open_corpus
from megatron_ee.data.prepare import prepare_corpus
from megatron_ee.errors import DataError

Prepare = Callable[..., Path]


@pytest.fixture
def prepare(tmp_path: Path, hf_dir: Path) -> Prepare:
    """Makes a corpus of a text."""

    def make(name: str, text: str, tokenizer: Path = hf_dir) -> Path:
        (tmp_path / "text.txt").write_text(text)
        prepare_corpus([tmp_path / "text.txt"], tokenizer, tmp_path / name, overwrite=True)
        return tmp_path / name

    return make


def opened(train: Path, *validation: Path) -> tuple[list[Corpus], list[Corpus]]:
    return [open_corpus(train)], [open_corpus(path) for path in validation]


def test_the_models_own_tokenizer_is_taken(prepare: Prepare, hf_dir: Path, tmp_path: Path) -> None:
    corpus = open_corpus(prepare("c", "the fox"))
    assert corpus.metadata is not None and corpus.metadata.tokenizer_sha256 is not None
    shutil.copytree(hf_dir, tmp_path / "moved")
    for model in (hf_dir, tmp_path / "moved", tmp_path):  # the last has no tokenizer to compare with
        assert check_tokenizer([("--data", corpus)], model) == []


def test_another_tokenizer_is_refused(prepare: Prepare, hf_dir: Path, sp_model: Path) -> None:
    corpus = open_corpus(prepare("c", "the fox", sp_model))
    message = (
        rf"^--data: {corpus.prefix} was made with another tokenizer, {sp_model}, than {hf_dir} has; "
        rf"prepare it again with --tokenizer {hf_dir}$"
    )
    with pytest.raises(DataError, match=message):
        check_tokenizer([("--data", corpus)], hf_dir)


def test_another_end_of_text_is_refused(prepare: Prepare, chat_dir: Path, hf_dir: Path, tmp_path: Path) -> None:
    corpus = open_corpus(prepare("c", "the fox", hf_dir))  # ends with 0
    with pytest.raises(DataError, match=rf"documents of {corpus.prefix} end with token 0, .* {chat_dir} is 2; prepare"):
        check_tokenizer([("--data", corpus)], chat_dir)
    shutil.copytree(chat_dir, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert check_tokenizer([("--data", corpus)], tmp_path / "model") == []


@pytest.mark.parametrize("described", [True, False])
def test_a_corpus_that_does_not_say_is_taken_with_a_line(described: bool, prepare: Prepare, hf_dir: Path) -> None:
    prefix = prepare("c", "the fox")
    description = json.loads(file_of(prefix, ".json").read_text())
    del description["tokenizer_sha256"]
    if described:
        file_of(prefix, ".json").write_text(json.dumps(description))
    else:
        file_of(prefix, ".json").unlink()
    (line,) = check_data(*opened(prefix), hf_dir)
    assert line.startswith(f"data.train[0]: {prefix} does not record its tokenizer")


def test_training_and_validation_on_the_same_text_is_named(prepare: Prepare, hf_dir: Path) -> None:
    one, copy, other = prepare("a", "the fox"), prepare("b", "the fox"), prepare("c", "a dog")
    assert check_data(*opened(one, other), hf_dir) == []
    for held_out in (one, copy):
        (line,) = check_data(*opened(one, held_out), hf_dir)
        assert line.startswith(f"data.validation[0]: {held_out} has the same content as data.train[0], {one}:")


def test_what_has_changed_since_a_run_began(prepare: Prepare, tmp_path: Path) -> None:
    train, held_out = prepare("a", "the fox"), prepare("b", "a dog")
    before: Any = json.loads(json.dumps(describe_data(*opened(train, held_out))))
    assert changed_data(before, describe_data(*opened(train, held_out))) == {}
    assert changed_data(before, describe_data(*opened(prepare("moved", "the fox"), held_out))) == {}
    prepare("a", "the dog")
    assert changed_data(before, describe_data(*opened(train, held_out))) == {
        "data.train[0]": f"{train} has other content than when the run was started"
    }
    assert changed_data(before, describe_data(*opened(prepare("a", "the fox")))) == {
        "data.validation": "has 0 entries, but the run was started with 1"
    }
    assert changed_data(None, describe_data(*opened(train))) == {}, "of a checkpoint of an older version"
