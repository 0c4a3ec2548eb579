"""The tokenizer of a GGUF file as Hugging Face files: ``tokenizer.json``, its settings and its chat templates.

There are two models: ``gpt2`` is byte-level BPE with merges, and ``llama`` is SentencePiece's BPE, whose merges follow
from the scores of its tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from gguf import TokenType
from tokenizers import AddedToken, decoders, models, normalizers, processors

from megatron_ee.errors import CheckpointError, first_line, shown
from megatron_ee.importers.gguf.splitting import SPLITTINGS, UNSTATED

LONGEST = 1024  # characters of a token; ten times the longest of any release
_KEY = "tokenizer.ggml"
_SPACE = "\u2581"  # SentencePiece's spelling of a space
_NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Special token -> its name in the file."""
_ENDS = ("eos", "eot", "eom")
_PLAIN_SPECIAL = ("<unk>", "<s>", "<|endoftext|>")
"""Special tokens of Phi-3 that leave the white space after them to the text."""
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PADDING = re.compile(r"\[PAD\d+\]")
"""Names for rows of the embedding that belong to no token."""
_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


@dataclass(frozen=True)
class Vocabulary:
    """The checked vocabulary of a file.

    Attributes:
        path: the file.
        metadata: of the file.
        architecture: ``general.architecture``.
        tokens: by id.
        types: of the tokens, ``gguf.TokenType``.
    """

    path: Path
    metadata: Mapping[str, Any]
    architecture: str
    tokens: Sequence[str]
    types: Sequence[int]

    def flag(self, key: str, default: bool) -> bool:
        """``tokenizer.ggml.KEY``, true or false. Raises CheckpointError: it is something else."""
        value = self.metadata.get(f"{_KEY}.{key}", default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {_KEY}.{key} must be true or false, not {shown(value)}")
        return value

    def special(self, name: str) -> int | None:
        """The id of a special token, such as ``bos``. Raises CheckpointError: it is not in the vocabulary."""
        key = f"{_KEY}.{name}_token_id"
        value = self.metadata.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < len(self.tokens)):
            raise CheckpointError(f"{self.path}: {key} {shown(value)} is not one of {len(self.tokens)} tokens")
        return value

    def of_type(self, *kinds: TokenType) -> Iterator[tuple[int, str]]:
        """Id and text of the tokens of these types."""
        for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind in kinds:
                yield index, token


def read_vocabulary(path: Path, metadata: Mapping[str, Any], architecture: str) -> Vocabulary:
    """The vocabulary in ``metadata``.

    Raises:
        CheckpointError: it is missing, or not one.
    """
    tokens = _texts(path, metadata, "tokens")
    if not tokens:
        raise CheckpointError(f"{path}: {_KEY}.tokens is empty")
    types = metadata.get(f"{_KEY}.token_type", [TokenType.NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens) or any(type(kind) is not int for kind in types):
        raise CheckpointError(f"{path}: {_KEY}.token_type must have a number for each of {len(tokens)} tokens")
    seen: set[str] = set()
    for index, token in enumerate(tokens):
        if not 0 < len(token) <= LONGEST or token in seen:
            wrong = (
                "is empty" if not token else f"is longer than {LONGEST}" if len(token) > LONGEST else "appears twice"
            )
            raise CheckpointError(f"{path}: {_KEY}.tokens: token {index}, {shown(token)}, {wrong}")
        seen.add(token)
    return Vocabulary(path, metadata, architecture, tokens, types)


def tokenizer_files(vocabulary: Vocabulary) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The small files of the tokenizer by name, and notices for the user.

    Raises:
        CheckpointError: a key of the tokenizer is missing, of a wrong type, or not supported.
    """
    model = vocabulary.metadata.get(f"{_KEY}.model")
    notes: tuple[str, ...] = ()
    if model == "gpt2":
        core, add_bos, notes = _byte_level(vocabulary)
    elif model == "llama":
        core, add_bos = _sentencepiece(vocabulary), True
    else:
        raise CheckpointError(f"{vocabulary.path}: {_KEY}.model {shown(model)} is not supported, only gpt2 and llama")
    core.add_special_tokens([_added(vocabulary, token, special=True) for _, token in _control(vocabulary)])
    core.add_tokens(
        [_added(vocabulary, token, special=False) for _, token in vocabulary.of_type(TokenType.USER_DEFINED)]
    )
    add_bos, add_eos = vocabulary.flag("add_bos_token", add_bos), vocabulary.flag("add_eos_token", False)
    _add_around(core, vocabulary, add_bos, add_eos)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {"add_bos_token": add_bos, "add_eos_token": add_eos}
    for name, spelled in _NAMED.items():
        index = vocabulary.special(spelled)
        if index is not None:
            settings[f"{name}_token"] = vocabulary.tokens[index]
    files = {"tokenizer.json": core.to_str(pretty=False).encode("utf-8"), "tokenizer_config.json": to_json(settings)}
    return {**files, **_templates(vocabulary)}, notes


def generation_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """``generation_config.json``: all tokens that end a text, and the sampling that the file recommends.

    Raises:
        CheckpointError: a special token is not in the vocabulary, or a value is not a number.
    """
    ends = list(dict.fromkeys(index for name in _ENDS if (index := vocabulary.special(name)) is not None))
    found: dict[str, Any] = {"bos_token_id": vocabulary.special("bos"), "pad_token_id": vocabulary.special("padding")}
    found["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    for key, name in _SAMPLING.items():
        value = vocabulary.metadata.get(key)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise CheckpointError(f"{vocabulary.path}: {key} must be a number from 0, not {shown(value)}")
            found |= {name: round(value, 6), "do_sample": True}
    return {key: value for key, value in found.items() if value is not None}


def to_json(content: Mapping[str, Any]) -> bytes:
    """``content`` as a JSON file."""
    return json.dumps(content, indent=2, ensure_ascii=False).encode("utf-8") + b"\n"


def _texts(path: Path, metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata.get(f"{_KEY}.{key}")
    if not isinstance(values, list) or any(not isinstance(value, str) for value in values):
        raise CheckpointError(f"{path}: {_KEY}.{key} must be a list of texts, not {shown(values)}")
    return values


def _byte_level(vocabulary: Vocabulary) -> tuple[tokenizers.Tokenizer, bool, tuple[str, ...]]:
    """The tokenizer, whether it adds beginning-of-text by default, and notices."""
    path, name = vocabulary.path, vocabulary.metadata.get(f"{_KEY}.pre", "default")
    notes: tuple[str, ...] = ()
    if name == "default":
        notes = (f"{path}: does not say how its tokenizer splits text ({_KEY}.pre): GPT-2's way is used",)
    elif name not in SPLITTINGS:
        raise CheckpointError(f"{path}: {_KEY}.pre {shown(name)} is not supported; supported: {', '.join(SPLITTINGS)}")
    splitting = UNSTATED if name == "default" else SPLITTINGS[name]
    merges = []
    for merge in _texts(path, vocabulary.metadata, "merges"):
        left, _, right = merge.partition(" ")
        if not left or not right:
            raise CheckpointError(f"{path}: {_KEY}.merges: {shown(merge)} is not two tokens")
        merges.append((left, right))
    core = _bpe(vocabulary, merges, ignore_merges=splitting.whole_words)
    if splitting.normalizer is not None:
        core.normalizer = splitting.normalizer
    core.pre_tokenizer = splitting.make()
    core.decoder = decoders.ByteLevel()
    return core, splitting.add_bos, notes


def _sentencepiece(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    if vocabulary.flag("remove_extra_whitespaces", False):
        raise CheckpointError(f"{vocabulary.path}: {_KEY}.remove_extra_whitespaces is not supported")
    prefix = vocabulary.flag("add_space_prefix", True)
    unknown = vocabulary.special("unknown")
    if unknown is None:
        unknown = next((index for index, _ in vocabulary.of_type(TokenType.UNKNOWN)), None)
    core = _bpe(
        vocabulary,
        _merges_of_scores(vocabulary),
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    spaces = normalizers.Replace(" ", _SPACE)
    core.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, *([decoders.Strip(content=" ", left=1)] if prefix else [])])
    return core


def _merges_of_scores(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every pair of tokens that make a third one, those of the best third one first.

    The best is the one of the highest score. Gemma's scores are not in the order of its merges, but its tokens are.
    """
    scores = vocabulary.metadata.get(f"{_KEY}.scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary.tokens):
        raise CheckpointError(
            f"{vocabulary.path}: {_KEY}.scores must have a number for each of {len(vocabulary.tokens)} tokens"
        )
    if any(not isinstance(score, (int, float)) or score != score for score in scores):
        raise CheckpointError(f"{vocabulary.path}: {_KEY}.scores must be numbers")
    if vocabulary.architecture.startswith("gemma"):
        scores = [0.0] * len(scores)
    ids = {token: index for index, token in vocabulary.of_type(TokenType.NORMAL)}
    found = []
    for token, index in ids.items():
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[index], index, left, right))
    return [(vocabulary.tokens[left], vocabulary.tokens[right]) for _, _, left, right in sorted(found)]


def _bpe(vocabulary: Vocabulary, merges: list[tuple[str, str]], **options: Any) -> tokenizers.Tokenizer:
    padding = {index for index, token in vocabulary.of_type(TokenType.UNUSED) if _PADDING.fullmatch(token)}
    ids = {token: index for index, token in enumerate(vocabulary.tokens) if index not in padding}
    try:
        return tokenizers.Tokenizer(models.BPE(ids, merges, **options))
    except Exception as error:  # the library raises bare Exception for a merge of tokens that are not there
        raise CheckpointError(f"{vocabulary.path}: {_KEY}.merges cannot be used: {first_line(error)}") from None


def _control(vocabulary: Vocabulary) -> Iterator[tuple[int, str]]:
    return vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN)


def _added(vocabulary: Vocabulary, token: str, *, special: bool) -> AddedToken:
    # Released Phi-3 tokenizers say so of each token, for which the file has no place.
    spaces = vocabulary.architecture == "phi3" and vocabulary.metadata.get(f"{_KEY}.model") == "llama"
    rstrip = special and spaces and token not in _PLAIN_SPECIAL
    return AddedToken(token, special=special, normalized=False, rstrip=rstrip)


def _add_around(core: tokenizers.Tokenizer, vocabulary: Vocabulary, add_bos: bool, add_eos: bool) -> None:
    """Make the tokenizer add beginning-of-text and end-of-text to a prompt."""
    pieces, special = ["$A"], []
    for name, wanted in (("bos", add_bos), ("eos", add_eos)):
        if not wanted:
            continue
        index = vocabulary.special(name)
        if index is None:
            raise CheckpointError(f"{vocabulary.path}: {_KEY}.add_{name}_token is true, but there is no such token")
        token = vocabulary.tokens[index]
        pieces = [token, *pieces] if name == "bos" else [*pieces, token]
        special.append((token, index))
    if special:
        pair = [*pieces, *(f"{piece}:1" if piece != "$A" else "$B:1" for piece in pieces)]
        core.post_processor = processors.TemplateProcessing(single=pieces, pair=pair, special_tokens=special)


def _templates(vocabulary: Vocabulary) -> dict[str, bytes]:
    """The chat templates: the default one, and named ones."""
    files: dict[str, bytes] = {}
    for key, value in vocabulary.metadata.items():
        base, _, name = key.partition("tokenizer.chat_template")[2].partition(".")
        if not key.startswith("tokenizer.chat_template") or base:
            continue
        if not isinstance(value, str) or (key != "tokenizer.chat_template" and not _TEMPLATE_NAME.fullmatch(name)):
            raise CheckpointError(f"{vocabulary.path}: {shown(key)} is not a chat template: {shown(value)}")
        place = f"additional_chat_templates/{name}.jinja" if name else "chat_template.jinja"
        files[place] = value.encode("utf-8")
    return files
