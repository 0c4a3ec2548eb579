"""Token ids are those of the library that the tokenizer was released for, whatever class the configuration names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ee.errors import DataError

TEXTS = [
    "the fox",
    " the fox",
    "  the  fox  ",
    "\n\tthe fox\n\n  jumps",
    "1234567 and 3.14",
    "café cafe\u0301 naïve",
    "ＡＢＣ１２ ﬁx",
    "👩🏽‍🚀 😀 漢字",
    "▁the",
    "",
]
SPECIAL_TEXTS = ["the</s> fox", "<s>the fox</s></s>  fox", "</s>", "the <pad> fox"]
WORDS = "the quick brown fox jumps over a lazy dog 0123456789 café"


def byte_level_core(pattern: str) -> Any:
    """Byte-level BPE as Llama 3's or Qwen's; ``pattern`` cuts the text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([WORDS + " 123 4567 the the"] * 20, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return core


def sentencepiece_like_core(prefix: bool, nfkc: bool) -> Any:
    """BPE over "▁" with bytes for the rest, as in Llama 2's tokenizer.json and its variants."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("o", "x"), ("f", "ox"), ("▁", "fox"), ("▁", "▁")]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["▁", *"abcdefghijklmnopqrstuvwxyzé123", *("".join(pair) for pair in merges)]
    vocabulary = {name: index for index, name in enumerate(names)}
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    parts = [normalizers.NFKC()] if nfkc else []
    parts += [normalizers.Prepend("▁")] if prefix else []
    core.normalizer = normalizers.Sequence([*parts, normalizers.Replace(" ", "▁")])
    ends = [decoders.Strip(" ", 1, 0)] if prefix else []
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    return core


def unigram_core() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = ["<unk>", "<s>", "</s>", "▁", "▁the", "▁fox", "the", *"abcdefghijklmnopqrstuvwxyzé0123456789ABC"]
    core = Tokenizer(models.Unigram([(piece, -float(n)) for n, piece in enumerate(pieces)], unk_id=0))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.add_special_tokens(["<s>", "</s>"])
    return core


LLAMA = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
QWEN = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "</s>"}
CORES: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "llama 3": (lambda: byte_level_core(r"\p{N}{1,3}| ?\p{L}+|\s+"), {**LLAMA, "tokenizer_class": "Other"}, "llama"),
    "qwen2, other cuts": (lambda: byte_level_core(r"\p{N}{2}|\p{L}+"), QWEN, "qwen2"),
    "llama 2": (lambda: sentencepiece_like_core(True, False), {**LLAMA, "legacy": True}, "llama"),
    "llama 2, not legacy": (lambda: sentencepiece_like_core(True, False), {**LLAMA, "legacy": False}, "llama"),
    "no prefix": (lambda: sentencepiece_like_core(False, False), {**LLAMA, "legacy": False}, "llama"),
    "nfkc": (lambda: sentencepiece_like_core(False, True), {**LLAMA, "add_prefix_space": True}, "llama"),
    "unigram": (unigram_core, LLAMA, "llama"),
}


@pytest.mark.parametrize("kind", CORES)
def test_tokenizer_json_is_the_tokenizer(kind: str, tmp_path: Path) -> None:
    make, settings, model_type = CORES[kind]
    core = make()
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 1000}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS + SPECIAL_TEXTS:
        ids = core.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == core.decode(ids, skip_special_tokens=False)
        assert tokenizer.encode_prompt(text) == core.encode(text).ids
        assert tokenizer.encode_spans(text) == (ids, core.encode(text, add_special_tokens=False).offsets)
    assert tokenizer.eos_id == core.token_to_id("</s>")
    assert tokenizer.bos_id == (None if kind.startswith("qwen") else core.token_to_id("<s>"))


def test_tokens_that_only_the_files_beside_it_name_are_added(tmp_path: Path) -> None:
    core = sentencepiece_like_core(True, False)
    core.save(str(tmp_path / "tokenizer.json"))
    size = core.get_vocab_size()
    pad = {"content": "<pad>", "lstrip": True, "special": True}
    again = {"content": "</s>", "lstrip": True, "rstrip": True, "special": False}  # tokenizer.json knows better
    config = {**LLAMA, "added_tokens_decoder": {str(size): pad, "2": again}, "extra_special_tokens": ["<end>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<old>": size + 5}))  # superseded by added_tokens_decoder
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == size + 2 and {"<pad>", "<end>", "</s>"} <= tokenizer.special
    ids = tokenizer.encode("the  <pad>fox <end></s> fox")
    assert [tokenizer.name_of(token) for token in ids] == ["▁the", "<pad>", "▁fox", "▁", "<end>", "</s>", "▁", "▁fox"]
    assert ids[1] == size
    config["added_tokens_decoder"] = {str(size + 3): pad}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=rf"give token '<pad>' the id {size + 3}, but tokenizer.json makes it {size};"):
        load_tokenizer(tmp_path)


def test_special_tokens_without_a_configuration_of_the_tokenizer(tmp_path: Path) -> None:
    """Their names, which chat templates write, are those of the ids in the model's configuration."""
    sentencepiece_like_core(True, False).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 0]}))
    assert load_tokenizer(tmp_path).special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": None, "eos_token": {"content": "<unk>"}})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.special_tokens) == (None, 0, {"eos_token": "<unk>"})


def test_the_vocabulary_files_of_an_older_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    core = byte_level_core(r"\p{N}| ?\p{L}+|\s+")
    model = json.loads(core.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(QWEN))
    tokenizer, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS + SPECIAL_TEXTS:
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)


# -- SentencePiece

TRAINING: dict[str, dict[str, Any]] = {
    "llama 2": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "vocab_size": 330}
    | {"remove_extra_whitespaces": False, "split_digits": True},
    "nfkc, spaces removed": {"model_type": "unigram", "vocab_size": 60},
    "no prefix": {"model_type": "bpe", "add_dummy_prefix": False, "byte_fallback": True, "vocab_size": 330},
    "user-defined": {"model_type": "bpe", "user_defined_symbols": ["<mask>", "  "], "byte_fallback": True}
    | {"remove_extra_whitespaces": False, "vocab_size": 330},
}


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    import sentencepiece

    made: dict[str, bytes] = {}

    def make(kind: str) -> bytes:
        if kind not in made:
            path = tmp_path_factory.mktemp("sentencepiece") / "m"
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter([WORDS] * 20),
                model_prefix=str(path),
                hard_vocab_limit=False,
                minloglevel=2,
                **TRAINING[kind],
            )
            made[kind] = path.with_suffix(".model").read_bytes()
        return made[kind]

    return make


def loaded(directory: Path, model: bytes, config: dict[str, Any] | None, **files: Any) -> Tokenizer:
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model)
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return load_tokenizer(directory)


@pytest.mark.parametrize("kind", TRAINING)
def test_tokenizer_model_alone_and_with_a_configuration(
    kind: str, sentencepiece_model: Callable[[str], bytes], tmp_path: Path
) -> None:
    import sentencepiece

    model = sentencepiece_model(kind)
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    alone = loaded(tmp_path / "alone", model, None)
    plain = loaded(tmp_path / "plain", model, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True})
    named = loaded(tmp_path / "named", model, {**LLAMA, "legacy": True})
    newer = loaded(tmp_path / "newer", model, {**LLAMA, "legacy": False})
    for text in TEXTS:
        ids = library.encode(text)
        for tokenizer in (alone, plain, named, newer):
            assert tokenizer.encode(text) == ids, text
            assert tokenizer.encode_spans(text)[0] == ids
            assert tokenizer.encode_prompt(text) == [library.bos_id(), *ids]
        assert alone.decode(ids) == plain.decode(ids) == library.decode(ids)
    for text in SPECIAL_TEXTS:  # nothing but the library's own: no file names a token to look for
        assert alone.encode(text) == plain.encode(text) == library.encode(text)
    for tokenizer in (alone, plain, named, newer):
        assert (tokenizer.bos_id, tokenizer.eos_id) == (library.bos_id(), library.eos_id())
        assert tokenizer.special_tokens["eos_token"] == "</s>"


def test_spans_of_sentencepiece_tokens(sentencepiece_model: Callable[[str], bytes], tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path, sentencepiece_model("llama 2"), LLAMA)
    text = "漢 the</s>fox"
    ids, spans = tokenizer.encode_spans(text)
    assert [text[start:end] for start, end in spans][-3:] == [" the", "</s>", "fox"]
    assert len(ids) == len(spans) and [start for start, _ in spans] == sorted(start for start, _ in spans)


PAD = {"content": "<pad>", "special": True}
WHOLE_WORD = ["▁a", "▁dog", "o", "▁", "dog"]
CASES = {
    # The prefix comes before every part of the text, as in the first releases.
    "legacy": ({"legacy": True}, "the<pad>the", ["▁the", "<pad>", "▁the"]),
    "legacy by default": ({}, "<pad>the", ["<pad>", "▁the"]),
    "a part's own space": ({"legacy": True}, "the<pad> the", ["▁the", "<pad>", "▁", "▁the"]),
    # Only where the text begins.
    "first": ({"legacy": False}, "the<pad>fox", ["▁the", "<pad>", "fox"]),
    "not first": ({"legacy": False}, "<pad>fox", ["<pad>", "fox"]),
    "only the text's space": ({"legacy": False}, "the<pad> fox", ["▁the", "<pad>", "▁fox"]),
    "never": ({"legacy": False, "add_prefix_space": False}, "fox<pad> the", ["fox", "<pad>", "▁the"]),
    "never, legacy": ({"add_prefix_space": False}, "fox<pad>fox", ["fox", "<pad>", "fox"]),
    "space before": ({"legacy": False, "pad": {**PAD, "lstrip": True}}, "the  <pad> fox", ["▁the", "<pad>", "▁fox"]),
    "space after": ({"legacy": False, "pad": {**PAD, "rstrip": True}}, "the<pad>  fox", ["▁the", "<pad>", "fox"]),
    "whole word": ({"legacy": False, "pad": {"content": "dog", "single_word": True}}, "a dogo dog", WHOLE_WORD),
}


@pytest.mark.parametrize("case", CASES)
def test_a_configuration_that_changes_tokenisation(
    case: str, sentencepiece_model: Callable[[str], bytes], tmp_path: Path
) -> None:
    config, text, expected = CASES[case]
    pad = config.get("pad", PAD)
    model = sentencepiece_model("llama 2")
    alone = loaded(tmp_path / "alone", model, None)
    added = {str(alone.vocab_size): pad}
    tokenizer = loaded(tmp_path / "m", model, {**LLAMA, **config, "added_tokens_decoder": added})
    ids = tokenizer.encode(text)
    assert [tokenizer.name_of(token) for token in ids] == expected
    assert alone.vocab_size in ids and tokenizer.vocab_size == alone.vocab_size + 1
    if not pad.get("lstrip") and not pad.get("rstrip"):
        assert tokenizer.decode(ids) == text
    ids, spans = tokenizer.encode_spans(text)
    assert ids == tokenizer.encode(text) and text[slice(*spans[ids.index(alone.vocab_size)])].strip() == pad["content"]


def test_a_space_behind_an_added_token_of_a_model_that_removes_spaces(
    sentencepiece_model: Callable[[str], bytes], tmp_path: Path
) -> None:
    tokenizer = loaded(tmp_path, sentencepiece_model("nfkc, spaces removed"), {**LLAMA, "legacy": False})
    names = [tokenizer.name_of(token) for token in tokenizer.encode("a</s>a</s> a")]
    assert names == ["▁a", "</s>", "a", "</s>", "▁a"] or names == ["▁", "a", "</s>", "a", "</s>", "▁", "a"]


def test_added_tokens_in_files_of_their_own(sentencepiece_model: Callable[[str], bytes], tmp_path: Path) -> None:
    model = sentencepiece_model("llama 2")
    size = loaded(tmp_path / "alone", model, None).vocab_size
    special = {"eos_token": {"content": "<end>"}, "pad_token": "<pad>", "bos_token": "<s>"}
    config = {**LLAMA, "add_bos_token": False, "add_eos_token": True}
    files = {"added_tokens": {"<end>": size + 4, "<x>": size}, "special_tokens_map": special}
    tokenizer = loaded(tmp_path / "m", model, config, **files)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (size + 4, size + 6)  # <pad> has no id, so it is the next
    assert tokenizer.encode("<x><pad></s><end>") == [size, size + 5, *tokenizer.encode("</s>"), size + 4]
    assert tokenizer.encode_prompt("the") == [*tokenizer.encode("the"), size + 4]
    assert tokenizer.decode([size + 2, size + 4, size + 100, 10**6]) == "<end>"
    assert "<x>" not in tokenizer.special and "<end>" in tokenizer.special
