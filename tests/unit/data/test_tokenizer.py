from __future__ import annotations

import json
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_ee.data.tokenizer import Detokenizer, Tokenizer, load_tokenizer
from megatron_ee.errors import DataError


def library_ids(directory: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text, add_special_tokens=False).ids


TEXT = "the naïve fox\n    jumps 漢字 😀 over"


@pytest.mark.parametrize("kind", ["hf_dir", "sp_model"])
def test_round_trip(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.eos_id is not None and tokenizer.eos_id not in ids and tokenizer.bos_id not in ids
    assert max(ids) < tokenizer.vocab_size


@pytest.mark.parametrize("method", ["encode", "encode_prompt", "encode_spans"])
def test_other_threads_run_while_a_long_text_is_encoded(method: str, hf_dir: Path) -> None:
    encode = getattr(load_tokenizer(hf_dir), method)
    ticks, stop = [], threading.Event()

    def tick() -> None:
        while not stop.wait(0.001):
            ticks.append(None)

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=tick)
    thread.start()
    try:
        sys.setswitchinterval(1e5)  # so that the interpreter's lock changes hands only where it is given up
        before = len(ticks)
        encode("the fox jumps " * 5_000)
        ran = len(ticks) - before
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
    assert ran


@pytest.mark.parametrize("kind", ["hf_dir", "sp_model"])
def test_pieces_join_to_the_text_without_broken_characters(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    text = "the ߷ fox 🜚 the"  # characters the tokenizers have to spell in bytes
    ids = tokenizer.encode(text)
    pieces = tokenizer.pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text
    assert "🜚" in "".join(pieces) and not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces


KINDS = ("hf_dir", "sp_model", "fallback_dir")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """One of each kind of decoder."""
    return load_tokenizer(request.getfixturevalue(request.param))


@pytest.fixture(scope="module", params=("hf_dir", "sp_model"))
def exact_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Its decoder never changes characters that were whole already."""
    return load_tokenizer(request.getfixturevalue(request.param))


# Small sizes and long ones: the context is cut every 16 tokens and is 64 at most.
MANY = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = st.text(st.sampled_from("the fox\n  aé漢字🜚😀👩🏽‍🚀߷"), max_size=60)


def joined(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    stream = Detokenizer(tokenizer, prompt)
    return "".join([stream.push(token) for token in ids]) + stream.flush()


@MANY
@given(before=TEXTS, after=TEXTS)
@example(before="", after="漢字" * 30)
@example(before="漢字" * 30, after="😀" * 30)
@example(before=" " * 80, after=" " * 80 + "the")
@example(before="\n", after="  the")
def test_streamed_text_is_the_text(tokenizer: Tokenizer, before: str, after: str) -> None:
    prompt, ids = tokenizer.encode(before), tokenizer.encode_continuation(after)
    whole = tokenizer.decode([*prompt, *ids])
    stream = Detokenizer(tokenizer, prompt)
    so_far = tokenizer.decode(prompt)
    assert whole.startswith(so_far)
    for token in ids:
        so_far += stream.push(token)
        assert whole.startswith(so_far)  # so there never is half a character
    assert so_far == whole and stream.flush() == ""


@MANY
@given(data=st.data())
def test_streamed_tokens_are_the_text_whatever_they_are(exact_tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Bytes that are no characters, special tokens anywhere, prompts that end amid a character."""
    some = st.integers(0, exact_tokenizer.vocab_size - 1)
    few = st.sampled_from([0, 1, 2, *exact_tokenizer.encode("漢🜚߷ é"), exact_tokenizer.vocab_size - 1])
    lists = st.lists(st.one_of(some, few), max_size=100)
    prompt, ids = data.draw(lists), data.draw(lists)
    whole, before = exact_tokenizer.decode([*prompt, *ids]), exact_tokenizer.decode(prompt)
    assert joined(exact_tokenizer, prompt, ids) == whole[len(before) :]


@pytest.mark.parametrize("character", ["é", "漢", "🜚", "👩🏽‍🚀"])
def test_a_character_comes_whole_or_not_at_all(tokenizer: Tokenizer, character: str) -> None:
    ids = tokenizer.encode("a" + character * 5)
    stream = Detokenizer(tokenizer)
    out = [stream.push(token) for token in ids]
    assert "".join(out) == "a" + character * 5
    assert not any("\ufffd" in piece for piece in out)


def test_text_before_an_incomplete_character_is_not_held_back(hf_dir: Path) -> None:
    tokenizer = load_tokenizer(hf_dir)
    ids = tokenizer.encode("x🜚")
    assert len(ids) > 3
    stream = Detokenizer(tokenizer)
    assert [stream.push(token) for token in ids[:-1]] == ["x", *[""] * (len(ids) - 2)]
    assert stream.flush() == "\ufffd"  # no more tokens: as decode shows it
    assert tokenizer.decode(ids[:-1]) == "x\ufffd"


def test_bytes_that_are_no_text_are_not_held_back_for_ever(exact_tokenizer: Tokenizer) -> None:
    lead = exact_tokenizer.encode("𐀀")[-4]  # the first byte of a character, again and again
    ids = [lead] * 300
    stream = Detokenizer(exact_tokenizer)
    lengths = [len(stream.push(token)) for token in ids]
    assert sum(lengths) >= 297 and max(lengths) <= 4
    assert sum(lengths) + len(stream.flush()) == len(exact_tokenizer.decode(ids)) == 300
    # And the stream finds back into text.
    assert joined(exact_tokenizer, ids, exact_tokenizer.encode_continuation("漢字")).endswith("漢字")


def test_spaces_are_kept_by_a_tokenizer_that_drops_them_before_a_text(tmp_path: Path, texts: list[str]) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(text.split()) for text in texts),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=200,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path)
    the, fox = tokenizer.encode("the"), tokenizer.encode("fox")
    space = next(token for token in range(tokenizer.vocab_size) if tokenizer.decode([*the, token]) == "the ")
    assert tokenizer.decode([space, space, *fox]) == "fox"
    ids = [*the, *[space] * 20, *fox]
    assert tokenizer.decode(ids) == "the" + " " * 21 + "fox"
    assert "".join(tokenizer.pieces(ids)) == tokenizer.decode(ids)
    for cut in range(len(ids)):
        before = tokenizer.decode(ids[:cut])
        assert joined(tokenizer, ids[:cut], ids[cut:]) == tokenizer.decode(ids)[len(before) :]


def test_a_prompt_that_ends_amid_a_character(hf_dir: Path) -> None:
    tokenizer = load_tokenizer(hf_dir)
    ids = tokenizer.encode("x🜚y")
    for cut in range(len(ids) + 1):
        expected = tokenizer.decode(ids)[len(tokenizer.decode(ids[:cut])) :]
        assert joined(tokenizer, ids[:cut], ids[cut:]) == expected


@pytest.mark.parametrize("text", ["the quick fox " * 200, "漢字🜚" * 200, " " * 2000])
def test_a_token_costs_the_same_however_long_the_text_is(
    tokenizer: Tokenizer, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokenizer.encode(text)
    decoded: list[int] = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda some: decoded.append(len(some)) or decode(some))
    Detokenizer(tokenizer, ids)  # the prompt, too
    assert max(decoded) <= 64
    decoded.clear()
    joined(tokenizer, [], ids)
    assert max(decoded) <= 80
    assert sum(decoded) <= 30 * len(ids) or text.isspace()  # tokens decoded per token: 12 or so


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
    assert tokenizer.encode(text) == library_ids(hf_dir, text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_directory_with_only_tokenizer_model(sp_model: Path) -> None:
    assert load_tokenizer(sp_model.parent).encode(TEXT) == load_tokenizer(sp_model).encode(TEXT)


def test_hugging_face_is_preferred(sp_model: Path, hf_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_dir, tmp_path, dirs_exist_ok=True)
    shutil.copy(sp_model, tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(TEXT) == load_tokenizer(hf_dir).encode(TEXT) != load_tokenizer(sp_model).encode(TEXT)


def test_end_of_text_from_the_model_configuration(hf_dir: Path, tmp_path: Path) -> None:
    shutil.copy(hf_dir / "tokenizer.json", tmp_path)
    assert load_tokenizer(tmp_path).eos_id is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": [2, 0]}))
    assert load_tokenizer(tmp_path).eos_id == 2


def test_tokens_beyond_the_models_vocabulary(hf_dir: Path) -> None:
    tokenizer = load_tokenizer(hf_dir)
    ids = tokenizer.encode("the fox<|im_end|>")
    assert tokenizer.unknown_token(ids, max(ids) + 1) is None
    assert tokenizer.unknown_token([*ids, 399], 399) == (
        f"token {tokenizer.name_of(399)!r} (id 399) is not in the model's vocabulary of 399 tokens"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_a_padded_vocabulary_add_no_text(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    the, fox, padding = tokenizer.encode("the"), tokenizer.encode_continuation(" fox"), tokenizer.vocab_size + 7
    assert tokenizer.decode([padding, *the, padding, padding, *fox, padding]) == "the fox"
    assert joined(tokenizer, [], [padding, *the, *[padding] * 100, *fox]) == "the fox"
    assert tokenizer.name_of(padding) is None


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
    (tmp_path / "tokenizer.json").unlink()
    for id_ in ('"first"', "-1", "9" * 10, "[1]"):
        (tmp_path / "added_tokens.json").write_text(f'{{"<pad>": {id_}}}')
        with pytest.raises(DataError, match="added_tokens.json: '.*': .*<pad>.* is not an added token with its id"):
            load_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_code_in_the_directory_is_refused(tmp_path: Path, hf_dir: Path) -> None:
    shutil.copytree(hf_dir, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError, match="auto_map"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "wanted, changes, absent, refused",
    [
        ("Xenova/gpt-4o", {}, None, False),
        ("Xenova/gpt-4o", {"tokenizer_class": None}, None, True),
        ("Xenova/gpt-4o", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}, None, True),
        ("Xenova/gpt-4o", {}, "tokenizer.json", True),
        ("evil.Tokenizer", {}, None, True),
        ("evil/evil--evil.Tokenizer", {}, None, True),
        (["Xenova/gpt-4o", None], {}, None, True),
    ],
)
def test_a_tokenizer_elsewhere_is_ignored_beside_a_complete_one(
    wanted: Any, changes: dict[str, Any], absent: str | None, refused: bool, tmp_path: Path, hf_dir: Path
) -> None:
    shutil.copytree(hf_dir, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "GPT2Tokenizer", **changes}))
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": wanted}}))
    if absent is not None:
        (tmp_path / absent).unlink()
    if refused:
        with pytest.raises(DataError, match="auto_map asks for code"):
            load_tokenizer(tmp_path)
    else:
        assert load_tokenizer(tmp_path).encode(TEXT) == library_ids(hf_dir, TEXT)


@pytest.mark.parametrize("auto_map", [5, True, "evil.Tokenizer", ["evil.Tokenizer", None]])
def test_an_auto_map_that_is_no_object_is_refused(auto_map: Any, tmp_path: Path, hf_dir: Path) -> None:
    shutil.copytree(hf_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    with pytest.raises(DataError, match="auto_map asks for code"):
        load_tokenizer(tmp_path)
