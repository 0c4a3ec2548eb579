"""One interface to the two tokenizer libraries, ``tokenizers`` and ``sentencepiece``."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_ee.data.token_length import longest_token
from megatron_ee.data.tokenizer_files import AddedToken, TokenizerFiles
from megatron_ee.errors import DataError

if TYPE_CHECKING:
    import tokenizers

Span = tuple[int, int]
"""Position of a token in its text: its first character and the one after its last."""

# Fields of a serialised SentencePiece model. Appended to a model, they replace ``normalizer_spec.add_dummy_prefix``.
_PREFIX, _NO_PREFIX = b"\x1a\x02\x18\x01", b"\x1a\x02\x18\x00"


class Backend(Protocol):
    """Interface of a tokenizer library. Token ids are plain integers."""

    vocab_size: int  # one more than the largest id
    eos_id: int | None
    bos_id: int | None
    special: frozenset[str]  # names of the special tokens

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without added special tokens."""

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of the text with the special tokens that the tokenizer adds around it."""

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids of a rendered chat template, which spells special tokens by name, and the span of each token."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens included. Ids that are no token add nothing."""

    def token_id(self, token: str) -> int | None:
        """The id of a token of the vocabulary."""

    def token_name(self, token_id: int) -> str | None:
        """A token as the vocabulary spells it."""

    @property
    def longest_token(self) -> int | None:
        """See ``token_length.longest_token``."""


class TokenizersBackend:
    """A tokenizer of the ``tokenizers`` library, from ``tokenizer.json``.

    Tokens that only the files beside it list are added. Its own tokens are not changed.
    """

    def __init__(self, core: tokenizers.Tokenizer, files: TokenizerFiles, where: Path) -> None:
        """Take over ``core``.

        Raises:
            DataError: a file beside it gives a token another id.
        """
        import tokenizers

        core.no_truncation()
        core.no_padding()
        known = {token.content for token in core.get_added_tokens_decoder().values()}
        missing = [token for token in files.added if token.content not in known]
        for token in missing:
            flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word", "normalized")}
            core.add_tokens([tokenizers.AddedToken(token.content, special=token.special, **flags)])
            if token.id not in (None, core.token_to_id(token.content)):
                raise DataError(
                    f"{where}: the files beside tokenizer.json give token {token.content!r} the id {token.id}, but "
                    f"tokenizer.json makes it {core.token_to_id(token.content)}; add the token to tokenizer.json"
                )
        self._core = core
        self.vocab_size = max(core.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.special = frozenset(token.content for token in core.get_added_tokens_decoder().values() if token.special)
        self.eos_id, self.bos_id = _named_id(self, files, "eos_token"), _named_id(self, files, "bos_token")

    # ``encode_batch`` lets other threads run meanwhile. The library's ``encode`` does not, and would stop a server for
    # seconds with a long text. ``encode_batch_fast`` gives the same ids without offsets, 1.5 times as fast.

    def encode(self, text: str) -> list[int]:
        return list(self._core.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def encode_prompt(self, text: str) -> list[int]:
        return list(self._core.encode_batch_fast([text])[0].ids)

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        [encoding] = self._core.encode_batch([text], add_special_tokens=False)
        return list(encoding.ids), list(encoding.offsets)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._core.decode(list(ids), skip_special_tokens=False))

    def token_id(self, token: str) -> int | None:
        return self._core.token_to_id(token)

    def token_name(self, token_id: int) -> str | None:
        return self._core.id_to_token(token_id)

    @functools.cached_property
    def longest_token(self) -> int | None:
        return longest_token(self._core)


class SentencePieceBackend:
    """A SentencePiece model, with the tokens and settings of ``tokenizer_config.json`` if it exists.

    Without it, ids are the library's own. With it, added and special tokens are cut out of the text first, and the
    text between them is encoded by the library. ``add_prefix_space`` replaces the model's own ``add_dummy_prefix``.
    The prefix comes before every such part, or with ``legacy: false`` only where a part begins the text.
    """

    def __init__(self, model: bytes, files: TokenizerFiles) -> None:
        """Load a serialised model.

        Raises:
            RuntimeError: it is not a SentencePiece model.
        """
        import sentencepiece

        prefix = {None: b"", True: _PREFIX, False: _NO_PREFIX}[_flag(files, "add_prefix_space")]
        self._first = sentencepiece.SentencePieceProcessor(model_proto=model + prefix)
        self._later = self._first
        if _flag(files, "legacy") is False:
            self._later = sentencepiece.SentencePieceProcessor(model_proto=model + _NO_PREFIX)
        # A model that removes extra spaces would also lose a single space before a part. The prefix replaces this
        # space.
        spaced = sentencepiece.SentencePieceProcessor(model_proto=model + _PREFIX)
        self._spaced = None if spaced.encode(" ") else spaced
        self._pieces = int(self._first.vocab_size())
        self._add_bos = _flag(files, "add_bos_token") is not False
        self._add_eos = _flag(files, "add_eos_token") is True

        controls = self._first.is_control(list(range(self._pieces)))
        self._names = {index: self._first.id_to_piece(index) for index, control in enumerate(controls) if control}
        controls_as_added = [AddedToken(name) for name in self._names.values()]
        self._ids = {name: index for index, name in self._names.items()}
        self.vocab_size = self._pieces
        for token in files.added:
            index = token.id if token.id is not None else self.token_id(token.content)
            index = self.vocab_size if index is None else index
            self._ids[token.content], self._names[index] = index, token.content
            self.vocab_size = max(self.vocab_size, index + 1)
        self.eos_id = _named_id(self, files, "eos_token", int(self._first.eos_id()))
        self.bos_id = _named_id(self, files, "bos_token", int(self._first.bos_id()))
        self._added = _Matcher(files.added)
        contents = {token.content for token in files.added}
        self._rendered = _Matcher([*files.added, *(t for t in controls_as_added if t.content not in contents)])
        self.special = frozenset(t.content for t in [*controls_as_added, *files.added] if t.special and t.content)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for start, end, token in self._added.split(text):
            if token is not None:
                ids.append(self._ids[token])
            else:
                ids += self._processor(start == 0, text[start]).encode(text[start:end])
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        before = [self.bos_id] if self._add_bos and self.bos_id is not None else []
        after = [self.eos_id] if self._add_eos and self.eos_id is not None else []
        return [*before, *self.encode(text), *after]

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        ids: list[int] = []
        spans: list[Span] = []
        for start, end, token in self._rendered.split(text):
            if token is not None:
                ids.append(self._ids[token])
                spans.append((start, end))
                continue
            processor = self._processor(start == 0, text[start])
            encoded = processor.encode(text[start:end], return_type="offset_mapping")
            ids += encoded["ids"]
            spans += [(start + begin, start + stop) for begin, stop in encoded["offsets"]]
        return ids, spans

    def decode(self, ids: Sequence[int]) -> str:
        # The library decodes control tokens to nothing. Here they are named, as in Hugging Face.
        parts: list[str] = []
        run: list[int] = []
        processor = self._first
        for token in ids:
            if token in self._names:
                parts += [processor.decode(run), self._names[token]]
                run, processor = [], self._later
            elif 0 <= token < self._pieces:
                run.append(token)
        return "".join([*parts, processor.decode(run)])

    def token_id(self, token: str) -> int | None:
        if token in self._ids:
            return self._ids[token]
        index = int(self._first.piece_to_id(token))
        return index if self._first.id_to_piece(index) == token else None

    def token_name(self, token_id: int) -> str | None:
        if token_id in self._names:
            return self._names[token_id]
        return str(self._first.id_to_piece(token_id)) if 0 <= token_id < self._pieces else None

    @property
    def longest_token(self) -> int | None:
        return None  # its normalizer may drop characters; it takes seconds for megabytes

    def _processor(self, first: bool, character: str) -> Any:
        """The processor for a part of a text that begins with ``character``."""
        if first or self._later is self._first:
            return self._first
        return self._spaced if character == " " and self._spaced is not None else self._later


class _Matcher:
    """Finds added tokens in text, from left to right; at one position the longest matches."""

    def __init__(self, tokens: Sequence[AddedToken]) -> None:
        self._tokens = sorted((token for token in tokens), key=lambda token: -len(token.content))
        self._pattern = re.compile("|".join(map(_pattern, self._tokens))) if tokens else None

    def split(self, text: str) -> Iterator[tuple[int, int, str | None]]:
        """Start, end and content of each added token and of the text between them, whose content is None."""
        done = 0
        for match in self._pattern.finditer(text) if self._pattern is not None else ():
            if match.start() > done:
                yield done, match.start(), None
            assert match.lastindex is not None
            yield match.start(), match.end(), self._tokens[match.lastindex - 1].content
            done = match.end()
        if done < len(text):
            yield done, len(text), None


def _pattern(token: AddedToken) -> str:
    pattern = f"({re.escape(token.content)})"
    if token.single_word:
        pattern = rf"(?<!\w){pattern}(?!\w)"
    return (r"\s*" if token.lstrip else "") + pattern + (r"\s*" if token.rstrip else "")


def _named_id(backend: Backend, files: TokenizerFiles, name: str, own: int = -1) -> int | None:
    """The id of a special token from the files, or else the model's ``own`` (negative for none)."""
    if name in files.special:
        content = files.special[name]
        return None if content is None else backend.token_id(content)
    return own if own >= 0 else None


def _flag(files: TokenizerFiles, name: str) -> bool | None:
    value = files.settings.get(name)
    return value if isinstance(value, bool) else None
