"""Tokenizers: Hugging Face directories and SentencePiece models behind one small interface."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_ee.config.untrusted import read_json
from megatron_ee.errors import CheckpointError, DataError

_UNFINISHED = "\ufffd"  # decoders write it for bytes that are no character, or not yet
_LONGEST = 4  # bytes, and so tokens, that a character is spread over at most
_CONTEXT, _MOST_CONTEXT = 8, 64  # tokens decoded together with the next: enough to see what they begin with

# Continuation pieces are encoded behind this, so that no beginning-of-text space is put before them.
_JOINT = "\n"


class Backend(Protocol):
    """What a tokenizer library must offer; token ids are plain integers."""

    vocab_size: int
    eos_id: int | None
    bos_id: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without special tokens added."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens included."""


class Tokenizer:
    """A tokenizer and where it came from.

    Attributes:
        path: the file or directory it was loaded from.
        vocab_size: one more than the largest token id, added tokens included.
        eos_id: end-of-text token, or None.
        bos_id: beginning-of-text token, or None.
        hf: the transformers tokenizer underneath, or None for SentencePiece; chat templates need it.
    """

    def __init__(self, path: Path, backend: Backend, hf: Any = None) -> None:
        self.path = path
        self.vocab_size = backend.vocab_size
        self.eos_id = backend.eos_id
        self.bos_id = backend.bos_id
        self.hf = hf
        self._backend = backend
        self._joint = backend.encode(_JOINT)

    def encode(self, text: str) -> list[int]:
        """Token ids; no beginning-of-text or end-of-text token is added."""
        return self._backend.encode(text)

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of text that goes on after a line end: without the space some tokenizers put before a text."""
        ids = self._backend.encode(_JOINT + text)
        size = len(self._joint)
        # Where the joint melts into the text's first token, the text stands better alone.
        return ids[size:] if ids[:size] == self._joint else self._backend.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids. Special tokens appear by their names."""
        return self._backend.decode(list(ids))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text each token adds to what stands before it; joined they are ``decode(ids)``.

        A character that is spread over several tokens appears with the last of them.
        """
        stream = Detokenizer(self)
        pieces = [stream.push(token) for token in ids]
        if pieces:
            pieces[-1] += stream.flush()
        return pieces

    def fits(self, model_vocab_size: int) -> None:
        """Check that every token id is in the model's vocabulary.

        Raises:
            DataError: the tokenizer has ids beyond it.
        """
        if self.vocab_size > model_vocab_size:
            raise DataError(
                f"{self.path}: the tokenizer has {self.vocab_size} tokens, but the model's vocabulary has only "
                f"{model_vocab_size}; use the model's own tokenizer"
            )


class Detokenizer:
    """Text of a sequence that grows token by token, at a cost per token that does not grow with it.

    What has come out, joined, is ``decode(context + tokens)`` behind ``decode(context)``. A character that is spread
    over several tokens comes with the last of them. (Where bytes are no text at all, some decoders take back
    characters before them; what has come out stays.)
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        """``context``: tokens before the first one, whose text does not come out."""
        self._decode = tokenizer.decode
        # The last tokens, and the number of characters of their text that have come out.
        self._ids, text = self._tail(context)
        self._given = len(text)
        self._waits = 0  # tokens since the last one that ended with a whole character
        self._limit = len(self._ids) + _CONTEXT

    def push(self, token: int) -> str:
        """The text that is certain once ``token`` is there; empty where it does not complete a character."""
        self._ids.append(token)
        text = self._decode(self._ids)
        certain = len(text.rstrip(_UNFINISHED))
        self._waits = self._waits + 1 if certain < len(text) else 0
        if self._waits >= _LONGEST:  # no character takes so long: only the end may still become one
            certain = max(certain, len(text) - (_LONGEST - 1))
        certain = max(certain, self._given)
        new = text[self._given : certain]
        self._given = certain
        if len(self._ids) >= self._limit and (self._waits == 0 or len(self._ids) > _MOST_CONTEXT):
            held = len(text) - certain
            self._ids, text = self._tail(self._ids)
            self._given = max(len(text) - held, 0)
            self._limit = len(self._ids) + _CONTEXT
        return new

    def flush(self) -> str:
        """What has been held back, when no token follows: half a character, as the decoder shows it."""
        text = self._decode(self._ids)
        new = text[self._given :]
        self._given = len(text)
        return new

    def _tail(self, ids: Sequence[int]) -> tuple[list[int], str]:
        """So many of the last tokens that their text goes on as that of all would; and their text.

        A text that begins amid a character is decoded otherwise, and before a blank one spaces may get lost.
        """
        for count in range(_CONTEXT, min(len(ids), _MOST_CONTEXT)):
            text = self._decode(ids[-count:])
            if text.strip() and not text.startswith(_UNFINISHED):
                return list(ids[-count:]), text
        last = list(ids[-_MOST_CONTEXT:])
        return last, self._decode(last)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a Hugging Face directory, or a SentencePiece ``.model`` file or a directory with only ``tokenizer.model``.

    Code from the directory is never run.

    Raises:
        DataError: nothing there, no tokenizer in it, or one that cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such tokenizer; give a Hugging Face directory or a SentencePiece .model file")
    if path.is_file():
        if path.name == "tokenizer.json":
            return _load_hf(path.parent)
        return _load_sentencepiece(path)
    if (path / "tokenizer.json").is_file() or (path / "tokenizer_config.json").is_file():
        return _load_hf(path)
    if (path / "tokenizer.model").is_file():
        return _load_sentencepiece(path / "tokenizer.model")
    raise DataError(f"{path}: holds neither tokenizer.json, tokenizer_config.json nor tokenizer.model")


class _HuggingFace:
    def __init__(self, directory: Path, tokenizer: Any) -> None:
        # Long texts are the rule here: no warning about the model's context.
        tokenizer.model_max_length = int(1e30)
        self._tokenizer = tokenizer
        self._core = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        if self._core is not None:
            self._core.no_truncation()
            self._core.no_padding()
        self.vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
        self.bos_id = tokenizer.bos_token_id
        self.eos_id = tokenizer.eos_token_id
        if self.eos_id is None:
            self.eos_id = _eos_of_config(directory)

    def encode(self, text: str) -> list[int]:
        if self._core is None:
            return list(self._tokenizer.encode(text, add_special_tokens=False))
        # The same ids without their places in the text: 1.5 times as fast.
        return list(self._core.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def decode(self, ids: Sequence[int]) -> str:
        if self._core is not None:  # the same text ten times as fast: a stream decodes at each token
            return str(self._core.decode(ids, skip_special_tokens=False))
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class _SentencePiece:
    def __init__(self, path: Path) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        self.vocab_size = int(self._processor.vocab_size())
        eos, bos = int(self._processor.eos_id()), int(self._processor.bos_id())
        self.eos_id = eos if eos >= 0 else None
        self.bos_id = bos if bos >= 0 else None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        # Control tokens decode to nothing by themselves; name them, as Hugging Face does.
        parts: list[str] = []
        run: list[int] = []
        for token in ids:
            if self._processor.is_control(token):
                parts += [self._processor.decode(run), self._processor.id_to_piece(token)]
                run = []
            else:
                run.append(token)
        return "".join([*parts, self._processor.decode(run)])


def _load_sentencepiece(path: Path) -> Tokenizer:
    try:
        backend = _SentencePiece(path)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: not a SentencePiece model: {_one_line(error)}") from None
    return Tokenizer(path, backend)


def _load_hf(directory: Path) -> Tokenizer:
    config = _json_object(directory / "tokenizer_config.json")
    if config.get("auto_map"):
        raise DataError(f"{directory / 'tokenizer_config.json'}: auto_map asks for code from the checkpoint; never run")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if config or (directory / "config.json").is_file():
            # Spelt out: left open, transformers would ask on the terminal.
            hf = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
        else:
            hf = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
        backend = _HuggingFace(directory, hf)
        return Tokenizer(directory, backend, hf)
    except DataError:
        raise
    except Exception as error:  # the libraries raise anything, bare Exception included, on a damaged file
        raise DataError(f"{directory}: the tokenizer cannot be loaded: {_one_line(error)}") from None


def _eos_of_config(directory: Path) -> int | None:
    """End-of-text id that the model's own configuration names, for tokenizers that do not say."""
    for name in ("generation_config.json", "config.json"):
        value = _json_object(directory / name).get("eos_token_id")
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = read_json(path)
    except CheckpointError as error:
        raise DataError(str(error)) from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object")
    return value


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__
