"""Tokenizers in GGUF files give the ids of the tokenizers that they were made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from gguf import TokenType
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoTokenizer

from megatron_ee.data.tokenizer import load_tokenizer
from megatron_ee.errors import CheckpointError
from megatron_ee.importers.gguf.tokenizer import generation_config, read_vocabulary, tokenizer_files

UNKNOWN, CONTROL, NORMAL, BYTE = (
    int(kind) for kind in (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.NORMAL, TokenType.BYTE)
)
USER_DEFINED, UNUSED = int(TokenType.USER_DEFINED), int(TokenType.UNUSED)
TEXTS = (
    *("", " ", "   ", "\n", " the quick", "the  quick\n\n   brown", "\tfox\r\n", "jumps  1  22 333 4444", "x12y"),
    *("naïve café in Łódź", "漢字 😀😀", "e\u0301 \u2163 \u00bd", "I'm you'RE it's", "a\u00a0b\u200bc", "lazy "),
    *("CamelCase ABCdef", "</s> over", "over<s>the lazy", "<|im_start|>dog <|im_end|> jumps", "!!! ...\n// code()"),
    "日本語の",
)


def write(directory: Path, metadata: dict[str, Any], architecture: str = "llama") -> tuple[str, ...]:
    """Write a tokenizer's files, with an empty ``config.json``; return the notices."""
    path = directory / "model.gguf"
    files, notes = tokenizer_files(read_vocabulary(path, metadata, architecture))
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    return notes


def byte_level(core: tokenizers.Tokenizer, pre: str | None, **more: Any) -> dict[str, Any]:
    """Metadata of a byte-level tokenizer, as llama.cpp's converter writes them."""
    content = json.loads(core.to_str())
    special = {token["content"] for token in content["added_tokens"]}
    tokens = sorted(core.get_vocab(), key=core.get_vocab().__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        **({} if pre is None else {"tokenizer.ggml.pre": pre}),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if token in special else NORMAL for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in content["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


def pattern(text: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(tokenizers.Regex(text), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
# As the released tokenizer.json files have them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
RELEASED: dict[str, tuple[pre_tokenizers.PreTokenizer, Any, bool]] = {
    "gpt-2": (GPT2, None, False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]), None, False),
    "llama-bpe": (pattern(LLAMA3), None, True),
    "qwen2": (pattern(QWEN2), normalizers.NFC(), False),
}


@pytest.fixture(scope="module")
def trained(hf_dir: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(hf_dir / "tokenizer.json"))


@pytest.mark.parametrize("pre", RELEASED)
def test_byte_level_ids_equal_the_released_ones(pre: str, trained: tokenizers.Tokenizer, tmp_path: Path) -> None:
    original = tokenizers.Tokenizer.from_str(trained.to_str())
    original.pre_tokenizer, normalizer, add_bos = RELEASED[pre]
    if normalizer is not None:
        original.normalizer = normalizer
    assert write(tmp_path, byte_level(trained, pre)) == ()
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    for text in TEXTS:
        ids = original.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False) == ids, text
        begin = [original.token_to_id("<|im_start|>")] if add_bos else []
        assert ours.encode_prompt(text) == theirs.encode(text) == begin + ids, text
        assert ours.decode(ids) == original.decode(ids, skip_special_tokens=False) == theirs.decode(ids), text


def test_a_word_of_the_vocabulary_is_one_token_though_no_merges_make_it(tmp_path: Path) -> None:
    """As Llama 3 has them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet, "fox"]
    common = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL] * 2 + [NORMAL] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.add_bos_token": False,
    }
    for pre, count in (("llama-bpe", 1), ("qwen2", 3)):
        write(tmp_path, {**common, "tokenizer.ggml.pre": pre})
        assert len(load_tokenizer(tmp_path).encode("fox")) == count


@pytest.mark.parametrize("pre", [None, "default"])
def test_an_unstated_split_is_gpt_2s_and_said(pre: str | None, trained: tokenizers.Tokenizer, tmp_path: Path) -> None:
    (note,) = write(tmp_path, byte_level(trained, pre))
    assert "tokenizer.ggml.pre" in note
    assert load_tokenizer(tmp_path).encode(TEXTS[5]) == trained.encode(TEXTS[5]).ids


def spelled(model: Path, prefix: bool, **more: Any) -> dict[str, Any]:
    """Metadata of a SentencePiece model, as llama.cpp's converter writes them."""
    core = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids = range(core.vocab_size())
    kinds = ((core.is_unknown, UNKNOWN), (core.is_control, CONTROL), (core.is_byte, BYTE))
    types = [next((kind for test, kind in kinds if test(index)), NORMAL) for index in ids]
    tokens, scores = [core.id_to_piece(index) for index in ids], [core.get_score(index) for index in ids]
    for token, kind in more.pop("added", {}).items():
        tokens, scores, types = [*tokens, token], [*scores, -1000.0], [*types, kind]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": core.bos_id(),
        "tokenizer.ggml.eos_token_id": core.eos_id(),
        "tokenizer.ggml.unknown_token_id": core.unk_id(),
        "tokenizer.ggml.add_space_prefix": prefix,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_equal_the_librarys(
    architecture: str, prefix: bool, sp_model: Path, texts: list[str], tmp_path: Path
) -> None:
    """With byte fallback. Gemma's merges follow from the order of its tokens, which is that of these scores too."""
    metadata = spelled(sp_model, prefix)
    assert write(tmp_path, metadata, architecture) == ()
    directory = tmp_path / "released"
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes(sp_model.read_bytes())
    (directory / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": prefix}))
    expected, ours = load_tokenizer(directory), load_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    for text in (*TEXTS, *texts):
        if "s>" in text or not text:  # special tokens, which the library does not look for; a prefix of nothing
            continue
        ids = expected.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.encode_prompt(text) == theirs.encode(text) == [1, *ids], text
        assert ours.decode(ids) == expected.decode(ids), text
    assert ours.encode("fox</s>")[-1] == 2 and theirs.eos_token == "</s>"


def test_added_tokens_are_whole(sp_model: Path, tmp_path: Path) -> None:
    """Of Phi-3, special ones also take the white space after them; runs of spaces, as Gemma has them, are tokens."""
    added = {"<|user|>": CONTROL, "<think>": USER_DEFINED, "  ": USER_DEFINED}
    metadata = spelled(sp_model, False, added=added)
    first = len(metadata["tokenizer.ggml.tokens"]) - len(added)
    for architecture, spaced in (("llama", False), ("phi3", True)):
        write(tmp_path, metadata, architecture)
        tokenizer = load_tokenizer(tmp_path)
        newline = [] if spaced else tokenizer.encode("\n")
        assert tokenizer.encode("<|user|>\nfox<think>") == [first, *newline, *tokenizer.encode("fox"), first + 1]
        assert tokenizer.encode("a  b") == [*tokenizer.encode("a"), first + 2, *tokenizer.encode("b")]
        assert tokenizer.special == {"<unk>", "<s>", "</s>", "<|user|>"}


def test_padding_of_the_vocabulary_is_no_token(trained: tokenizers.Tokenizer, tmp_path: Path) -> None:
    metadata = byte_level(trained, "gpt-2")
    size = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], f"[PAD{size}]", f"[PAD{size + 1}]"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], *[UNUSED] * 2]
    write(tmp_path, metadata)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == size and tokenizer.decode([size]) == ""


def test_beginning_and_end_and_chat_templates(trained: tokenizers.Tokenizer, tmp_path: Path) -> None:
    more = {"add_bos_token": True, "add_eos_token": True, "padding_token_id": 0, "eot_token_id": 0}
    metadata = byte_level(trained, "llama-bpe", **more)
    metadata |= {"tokenizer.chat_template": "{{ messages[0].content }}!", "tokenizer.chat_templates": ["tool_use"]}
    metadata |= {
        "tokenizer.chat_template.tool_use": "tools",
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 20,
    }
    write(tmp_path, metadata)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    begin, end = (metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos"))
    assert ours.encode_prompt("fox") == theirs.encode("fox") == [begin, *ours.encode("fox"), end]
    pair = [begin, *ours.encode("fox"), end]
    assert theirs("fox", "fox").input_ids == pair + pair
    assert theirs.pad_token == metadata["tokenizer.ggml.tokens"][0]
    assert theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    assert ours.templates == {"default": "{{ messages[0].content }}!", "tool_use": "tools"}
    assert generation_config(read_vocabulary(tmp_path, metadata, "llama")) == {
        **{"bos_token_id": begin, "pad_token_id": 0, "eos_token_id": [end, 0]},
        **{"temperature": 0.6, "top_k": 20, "do_sample": True},
    }


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model 't5'"),
        ({"tokenizer.ggml.pre": "never heard of"}, "tokenizer.ggml.pre 'never heard of'"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens must be a list of texts"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"], "tokenizer.ggml.token_type": [1, 1, 1]}, "appears twice"),
        ({"tokenizer.ggml.tokens": ["a", ""], "tokenizer.ggml.token_type": [1, 1]}, "is empty"),
        ({"tokenizer.ggml.tokens": ["a", "b" * 2000], "tokenizer.ggml.token_type": [1, 1]}, "is longer than 1024"),
        ({"tokenizer.ggml.token_type": [1]}, "tokenizer.ggml.token_type must have a number"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges must be a list"),
        ({"tokenizer.ggml.merges": ["ab"]}, "'ab' is not two tokens"),
        ({"tokenizer.ggml.merges": ["漢 字"]}, "tokenizer.ggml.merges cannot be used"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id 1000000 is not one of"),
        ({"tokenizer.ggml.bos_token_id": "one"}, "tokenizer.ggml.bos_token_id 'one'"),
        ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token must be true or false"),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}, "there is no such token"),
        ({"tokenizer.chat_template": 5}, "is not a chat template"),
        ({"tokenizer.chat_template.../x": "{{ 1 }}"}, "is not a chat template"),
    ],
)
def test_what_is_wrong_is_named(
    change: dict[str, Any], named: str, trained: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="model.gguf: ") as raised:
        write(tmp_path, {**byte_level(trained, "gpt-2"), **change})
    assert named in str(raised.value) and "\n" not in str(raised.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("scores", [None, [1.0], ["high"] * 360, [float("nan")] * 360])
def test_scores_that_are_none(scores: Any, sp_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer.ggml.scores must"):
        write(tmp_path, spelled(sp_model, True, scores=scores))
