"""Lower bounds of the number of tokens: never above the real number, and none where a tokenizer may drop text."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

from megatron_ee.data.token_length import count_characters, longest_token

TEXT = ["the quick brown fox", "==========", "a\u0301 e\u0301", "\u4f60\u597d \U0001f71a", "  x\n\n"] * 20


def trained(model: models.Model, normalizer: Any, split: Any, alphabet: list[str]) -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(model)
    if normalizer is not None:
        core.normalizer = normalizer
    core.pre_tokenizer = split
    tokens = [f"<0x{value:02X}>" for value in range(256)] if not alphabet else ["<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=tokens, show_progress=False, max_token_length=20
    )
    core.train_from_iterator(TEXT, trainer)
    return core


BYTES = pre_tokenizers.ByteLevel.alphabet()
LETTERS = list("abcdefghijklmnopqrstuvwxyz=")
METASPACE = pre_tokenizers.Metaspace(split=False)
KNOWN = {
    "bytes": trained(models.BPE(), None, pre_tokenizers.ByteLevel(add_prefix_space=False), BYTES),
    "composed bytes": trained(models.BPE(), normalizers.NFC(), pre_tokenizers.ByteLevel(), BYTES),
    "byte fallback": trained(models.BPE(byte_fallback=True), None, METASPACE, []),
    "unknown characters": trained(models.BPE(unk_token="<unk>"), None, METASPACE, LETTERS),
    "no white space": trained(
        models.BPE(unk_token="<unk>"), normalizers.Replace(" ", "\u2581"), pre_tokenizers.Whitespace(), LETTERS
    ),
}


@pytest.mark.parametrize("name", KNOWN)
@settings(max_examples=100, deadline=None, derandomize=True)
@example(text="=" * 200)
@example(text="a\u0301" * 50)
@example(text="\u1f00\u0300\u0345" * 40)  # composed to one character each
@example(text=" \u2581\x1d" * 99)
@given(text=st.text(max_size=80))
def test_no_text_has_fewer_tokens_than_the_bound(name: str, text: str) -> None:
    core = KNOWN[name]
    longest = longest_token(core)
    assert longest is not None and 10 <= longest <= 80
    assert len(core.encode(text).ids) * longest >= count_characters(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"unk_token": None}},
        {"model": {"fuse_unk": True}},
        {"normalizer": {"type": "StripAccents"}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "ab"}, "content": ""}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "a"}},
        {"pre_tokenizer": {"type": "CharDelimiterSplit", "delimiter": "a"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"String": "a"}, "behavior": "Removed", "invert": False}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "a", "prepend_scheme": "never", "split": False}},
    ],
)
def test_no_bound_where_characters_may_be_dropped(changes: dict[str, Any]) -> None:
    settings = json.loads(KNOWN["unknown characters"].to_str())
    for key, value in changes.items():
        settings[key] = {**settings[key], **value} if key == "model" else value
    assert longest_token(tokenizers.Tokenizer.from_str(json.dumps(settings))) is None
