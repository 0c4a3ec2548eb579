"""Tokenises one piece of an input file; the processes of ``prepare-data`` run this."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ee.data.chat import ChatRenderer, Document
from megatron_ee.data.read import TextPiece
from megatron_ee.data.texts import Hashes, document_texts, hash_texts, message_texts
from megatron_ee.data.tokenizer import load_tokenizer
from megatron_ee.errors import DataError


@dataclass(frozen=True)
class EncodeOptions:
    """Options of tokenisation; see ``prepare_corpus``."""

    tokenizer_path: Path
    text_key: str
    chat: bool
    prepend_bos: bool
    chat_template: str | None = None


@dataclass(frozen=True)
class Encoded:
    """Tokens of a piece.

    Attributes:
        ids: int32 [tokens], all documents concatenated.
        mask: uint8 [tokens] for chat data, else None.
        lengths: tokens of each document, or of the part of a document.
        ends: whether the last document ends here; otherwise the next piece continues it.
        skipped: lines whose text was empty.
        texts: hashes of the documents' texts, see ``data.texts``.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8] | None
    lengths: list[int]
    ends: bool
    skipped: int = 0
    texts: Hashes = field(default_factory=lambda: hash_texts(()))


class PieceEncoder:
    """Converts pieces to tokens.

    Raises:
        DataError: the tokenizer cannot be loaded, or lacks an end-of-text token, a beginning-of-text token if it is
            needed, or a chat template if it is needed.
    """

    def __init__(self, options: EncodeOptions) -> None:
        self.tokenizer = load_tokenizer(options.tokenizer_path)
        self._options = options
        self._chat = ChatRenderer(self.tokenizer, options.chat_template) if options.chat else None
        if self.tokenizer.eos_id is None:
            raise DataError(f"{options.tokenizer_path}: the tokenizer has no end-of-text token; set eos_token")
        self.eos_id: int = self.tokenizer.eos_id
        self._start: list[int] = []
        if options.prepend_bos and not options.chat:
            if self.tokenizer.bos_id is None:
                raise DataError(f"{options.tokenizer_path}: the tokenizer has no beginning-of-text token to prepend")
            self._start = [self.tokenizer.bos_id]

    def __call__(self, piece: TextPiece) -> Encoded:
        """Tokenise one piece.

        Raises:
            DataError: an unreadable file, invalid UTF-8 or JSON, a missing or ill-typed key, an unusable conversation,
                or a token that the model beside the tokenizer has no embedding for; with file and line.
        """
        return self._lines(piece) if piece.lines else self._text(piece)

    def _text(self, piece: TextPiece) -> Encoded:
        text = _decode(piece.read(), piece.path, piece.line, piece.offset)
        if piece.first and piece.last and not text.strip():
            raise DataError(f"{piece.path}: holds only white space; leave it out, or give another")
        ids = [*self._start, *self.tokenizer.encode(text)] if piece.first else self.tokenizer.encode_continuation(text)
        if piece.last:
            ids.append(self.eos_id)
        self._check_known(ids, str(piece.path))
        whole = document_texts(text) if piece.first and piece.last else ()
        return Encoded(np.array(ids, dtype=np.int32), None, [len(ids)], piece.last, texts=hash_texts(whole))

    def _lines(self, piece: TextPiece) -> Encoded:
        ids: list[int] = []
        mask: list[bool] = []
        lengths: list[int] = []
        texts: list[str] = []
        skipped = 0
        for where, record in _records(piece):
            if self._chat is not None:
                documents = self._conversation(self._chat, record, where)
                texts += message_texts(record["messages"])
                for _, document_mask in documents:
                    mask += document_mask
            else:
                text = _value(record, self._options.text_key, where)
                if not isinstance(text, str):
                    raise DataError(f"{where}: {self._options.text_key!r} must be text, not {type(text).__name__}")
                if not text:
                    skipped += 1
                    continue
                texts += document_texts(text)
                documents = [([*self._start, *self.tokenizer.encode(text), self.eos_id], [])]
            for document, _ in documents:
                self._check_known(document, where)
                ids += document
                lengths.append(len(document))
        masks = np.array(mask, dtype=np.uint8) if self._chat is not None else None
        return Encoded(np.array(ids, dtype=np.int32), masks, lengths, True, skipped, hash_texts(texts))

    def _conversation(self, chat: ChatRenderer, record: dict[str, Any], where: str) -> list[Document]:
        messages, tools = _value(record, "messages", where), record.get("tools")
        if "end_token" not in record:
            return chat.encode(messages, where, tools)
        end_token = record["end_token"]  # of an answer from ``regenerate``
        if not isinstance(end_token, str | None):
            raise DataError(f"{where}: end_token must be text or null, not {type(end_token).__name__}")
        return [chat.encode_generated(messages, end_token, where, tools)]

    def _check_known(self, ids: list[int], where: str) -> None:
        size = self.tokenizer.model_vocab_size
        if size is None or self.tokenizer.vocab_size <= size:
            return
        wrong = self.tokenizer.unknown_token(ids, size)
        if wrong is not None:
            raise DataError(
                f"{where}: {wrong}, which config.json gives; remove the token from the text or the template"
            )


def _records(piece: TextPiece) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and object of each line that is not blank."""
    offset = piece.offset
    for number, line in enumerate(piece.read().split(b"\n"), start=piece.line):
        where = f"{piece.path}, line {number}"
        if line.strip():
            text = _decode(line, piece.path, number, offset)
            try:
                record = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{where}: invalid JSON ({error}); each line must be one JSON object") from None
            if not isinstance(record, dict):
                raise DataError(f"{where}: each line must be one JSON object, not {type(record).__name__}")
            if "\\u" in text:
                _check_surrogates(record, where)
            yield where, record
        offset += len(line) + 1


def _decode(data: bytes, path: Path, line: int, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}, line {line}: invalid UTF-8 at byte {offset + error.start} ({error.reason}); convert it to UTF-8"
        ) from None


def _check_surrogates(record: dict[str, Any], where: str) -> None:
    """Refuse lone surrogates. JSON can contain them, but they are not valid Unicode and tokenizers fail on them."""
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: holds half a surrogate pair (\\ud800 to \\udfff); remove it") from None


def _value(record: dict[str, Any], key: str, where: str) -> Any:
    if key not in record:
        keys = ", ".join(sorted(record)[:8]) or "none"
        raise DataError(f"{where}: no key {key!r}; the line has: {keys}")
    return record[key]
