"""What counts as the same tokenizer, by its files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.data.fingerprint import tokenizer_digests


def edited(directory: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a directory with its ``tokenizer.json`` changed, and laid out anew."""
    shutil.copytree(directory, target)
    path = target / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
    return target


def swap(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


SAME: list[Callable[[dict[str, Any]], Any]] = [
    lambda content: None,
    lambda content: content["model"].update(ignore_merges=False, dropout=None),
    lambda content: content["model"].update(merges=[" ".join(pair) for pair in content["model"]["merges"]]),
    lambda content: content.update(truncation={"max_length": 9}, padding=None, post_processor=None, version="9"),
    lambda content: [token.update(special=False) for token in content["added_tokens"]],
]
OTHER: list[Callable[[dict[str, Any]], Any]] = [
    swap,
    lambda content: content["model"]["merges"].pop(),
    lambda content: content["model"].update(ignore_merges=True),
    lambda content: content.update(normalizer={"type": "NFKC"}),
    lambda content: content["pre_tokenizer"].update(add_prefix_space=True),
    lambda content: content["added_tokens"][1].update(content="<|other|>"),
    lambda content: content["added_tokens"].pop(),
]


@pytest.mark.parametrize("change", SAME)
def test_tokenizer_json_of_the_same_tokenizer(change: Any, hf_dir: Path, tmp_path: Path) -> None:
    assert tokenizer_digests(edited(hf_dir, tmp_path / "x", change)) == tokenizer_digests(hf_dir)
    assert tokenizer_digests(hf_dir / "tokenizer.json") == tokenizer_digests(hf_dir)


@pytest.mark.parametrize("change", OTHER)
def test_tokenizer_json_of_another_tokenizer(change: Any, hf_dir: Path, tmp_path: Path) -> None:
    assert tokenizer_digests(edited(hf_dir, tmp_path / "x", change)) != tokenizer_digests(hf_dir)


def test_a_template_makes_no_other_tokenizer(chat_dir: Path, hf_dir: Path) -> None:
    assert tokenizer_digests(chat_dir) == tokenizer_digests(hf_dir)


def test_a_directory_with_two_forms_takes_either(hf_dir: Path, sp_model: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_dir, tmp_path / "both")
    shutil.copy(sp_model, tmp_path / "both")
    both = tokenizer_digests(tmp_path / "both")
    assert both[0] == tokenizer_digests(hf_dir)[0], "tokenizer.json is the one that is used"
    (alone,) = tokenizer_digests(sp_model)
    assert alone in both[1:] and alone != both[0]
    assert tokenizer_digests(sp_model.parent)[0] == alone


def test_settings_and_tokens_count_beside_a_sentencepiece_model(sp_model: Path, tmp_path: Path) -> None:
    def made(name: str, **settings: Any) -> str:
        (tmp_path / name).mkdir()
        shutil.copy(sp_model, tmp_path / name)
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(settings))
        return tokenizer_digests(tmp_path / name)[0]

    plain = made("plain", chat_template="{{ x }}", model_max_length=9, legacy=None)
    others = {
        made("legacy", legacy=False),
        made("space", add_prefix_space=False),
        made("token", added_tokens_decoder={"9": {}}),
    }
    assert plain == tokenizer_digests(sp_model)[0] and len(others | {plain}) == 4


def test_vocabulary_and_merges(tmp_path: Path) -> None:
    assert tokenizer_digests(tmp_path) == () == tokenizer_digests(tmp_path / "none")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("a b")
    first = tokenizer_digests(tmp_path)
    (tmp_path / "merges.txt").write_text("b a")
    assert len(first) == 1 and first != tokenizer_digests(tmp_path)


@pytest.mark.parametrize("content", ["[1]", '{"model": 3}', "{", ""])
def test_what_is_no_tokenizer_has_a_digest_too(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    assert len(tokenizer_digests(tmp_path)) == 1
