"""Hashes of a corpus's texts, 8 bytes each, so that a sample can be checked for texts that exits were tuned on.

``PREFIX.texts`` holds them, sorted. Of a conversation the user's messages are hashed, and of a text the whole and its
first line, since a prompt may stand there. Case, white space and compatible characters do not matter.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ee.data.indexed import file_of
from megatron_ee.errors import DataError

SUFFIX = ".texts"
Hashes = NDArray[np.uint64]
_BYTES = 8


def hash_texts(texts: Iterable[str]) -> Hashes:
    """A hash of each text that is not blank, ``[texts]``."""
    plain = (" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts)
    digests = [hashlib.sha256(text.encode("utf-8", "replace")).digest()[:_BYTES] for text in plain if text]
    return np.frombuffer(b"".join(digests), dtype="<u8")


def document_texts(text: str) -> list[str]:
    """What is hashed of a text: all of it, and its first line."""
    first, _, rest = text.strip().partition("\n")
    return [text, first] if rest else [text]


def message_texts(messages: Iterable[Mapping[str, Any]]) -> list[str]:
    """What is hashed of a conversation: the user's messages."""
    return [str(each["content"]) for each in messages if each["role"] == "user" and isinstance(each["content"], str)]


def read_hashes(prefix: str | Path) -> Hashes | None:
    """The hashes of a corpus, sorted; None if it was made without them.

    Raises:
        DataError: the file is damaged.
    """
    path = file_of(prefix, SUFFIX)
    if not path.is_file():
        return None
    if path.stat().st_size % _BYTES:
        raise DataError(f"{path}: damaged; prepare the corpus again")
    found = np.fromfile(path, dtype="<u8")
    if (found[1:] < found[:-1]).any():
        raise DataError(f"{path}: damaged; prepare the corpus again")
    return found


def hashed(texts: Iterable[str], known: Hashes) -> list[bool]:
    """For each text, whether its hash is one of ``known``, which are sorted. A blank text's is not."""

    def one(own: Hashes) -> bool:
        place = int(np.searchsorted(known, own[0])) if len(own) else len(known)
        return place < len(known) and bool(known[place] == own[0])

    return [one(hash_texts([text])) for text in texts]
