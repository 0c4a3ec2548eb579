from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_ee.data.tokenizer import load_tokenizer
from megatron_ee.errors import DataError

TEXT = "the naïve fox\n    jumps 漢字 😀 over"


@pytest.mark.parametrize("kind", ["hf_dir", "sp_model"])
def test_round_trip(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.eos_id is not None and tokenizer.eos_id not in ids and tokenizer.bos_id not in ids
    assert max(ids) < tokenizer.vocab_size


@pytest.mark.parametrize("kind", ["hf_dir", "sp_model"])
def test_pieces_join_to_the_text_without_broken_characters(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    text = "the ߷ fox 🜚 the"  # characters the tokenizers have to spell in bytes
    ids = tokenizer.encode(text)
    pieces = tokenizer.pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text
    assert "🜚" in "".join(pieces) and not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces


@pytest.mark.parametrize("kind", ["hf_dir", "sp_model"])
def test_a_text_cut_at_a_line_end_has_the_tokens_of_the_whole(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    head, tail = "the quick fox\n", "jumps over\na dog"
    assert tokenizer.encode(head) + tokenizer.encode_continuation(tail) == tokenizer.encode(head + tail)


def test_ids_are_those_of_transformers_whatever_truncation_is_saved(hf_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_dir, tmp_path, dirs_exist_ok=True)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    text = TEXT * 20 + "<|im_end|>"
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(text) == load_tokenizer(hf_dir).hf.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_directory_with_only_tokenizer_model(sp_model: Path) -> None:
    assert load_tokenizer(sp_model.parent).encode(TEXT) == load_tokenizer(sp_model).encode(TEXT)


def test_hugging_face_is_preferred(sp_model: Path, hf_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_dir, tmp_path, dirs_exist_ok=True)
    shutil.copy(sp_model, tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.hf is not None and tokenizer.encode(TEXT) == load_tokenizer(hf_dir).encode(TEXT)


def test_end_of_text_from_the_model_configuration(hf_dir: Path, tmp_path: Path) -> None:
    shutil.copy(hf_dir / "tokenizer.json", tmp_path)
    assert load_tokenizer(tmp_path).eos_id is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": [2, 0]}))
    assert load_tokenizer(tmp_path).eos_id == 2


def test_fits(hf_dir: Path) -> None:
    tokenizer = load_tokenizer(hf_dir)
    tokenizer.fits(tokenizer.vocab_size)
    with pytest.raises(DataError, match=rf"has {tokenizer.vocab_size} tokens.*only {tokenizer.vocab_size - 1}"):
        tokenizer.fits(tokenizer.vocab_size - 1)


def test_refused(tmp_path: Path, hf_dir: Path) -> None:
    with pytest.raises(DataError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(DataError, match=r"neither tokenizer.json, tokenizer_config.json nor tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match="not a SentencePiece model") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "tokenizer.json").write_text("{]")
    with pytest.raises(DataError, match="cannot be loaded") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_code_in_the_directory_is_refused(tmp_path: Path, hf_dir: Path) -> None:
    shutil.copytree(hf_dir, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError, match="auto_map"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()
