"""Digests of a tokenizer's files, which identify it. The tokenizer itself is not loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_ee.config.untrusted import read_json
from megatron_ee.data.indexed import sha256
from megatron_ee.data.tokenizer_files import read_object
from megatron_ee.errors import CheckpointError

# Keys of tokenizer.json. The others (truncation, padding, post_processor, decoder) do not change the ids of a text.
_DECISIVE = ("normalizer", "pre_tokenizer", "model", "added_tokens")
_TOKEN = ("id", "content", "single_word", "lstrip", "rstrip", "normalized")
# Keys of tokenizer_config.json, used if there is no tokenizer.json.
_SETTINGS = ("legacy", "add_prefix_space", "do_lower_case", "added_tokens_decoder")
_VOCABULARIES = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")


def tokenizer_digests(path: Path) -> tuple[str, ...]:
    """SHA-256 (hex) of everything that affects the ids of a text, without templates and roles of special tokens.

    A directory may hold the same tokenizer in two forms, ``tokenizer.json`` and ``tokenizer.model``. The first digest
    is for the form that ``load_tokenizer`` uses. A corpus that was made from either form fits.

    Args:
        path: a directory, or one of its files, as ``load_tokenizer`` takes it.

    Returns:
        One digest per form; empty if there is no tokenizer.

    Raises:
        DataError: ``tokenizer_config.json`` is damaged.
    """
    if path.is_file() and path.name != "tokenizer.json":
        return (_digest([sha256(path)]),)
    directory = path.parent if path.is_file() else path
    digests = []
    if (directory / "tokenizer.json").is_file():
        digests.append(_of_tokenizer_json(directory / "tokenizer.json"))
    files = [directory / name for name in _VOCABULARIES if (directory / name).is_file()]
    if files:
        config = read_object(directory / "tokenizer_config.json")
        settings = {key: config[key] for key in _SETTINGS if config.get(key) is not None}
        digests.append(_digest([*map(sha256, files), *([settings] if settings else [])]))
    if (directory / "tokenizer.model").is_file():
        digests.append(_digest([sha256(directory / "tokenizer.model")]))
    return tuple(dict.fromkeys(digests))


def _of_tokenizer_json(path: Path) -> str:
    """Digest of the keys that matter, whatever the file's formatting; of the bytes if the file is not valid JSON."""
    try:
        content = read_json(path)
    except CheckpointError:
        content = None
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(model, dict):
        return _digest([sha256(path)])
    parts, added = {key: content.get(key) for key in _DECISIVE}, content.get("added_tokens")
    if isinstance(model.get("merges"), list):  # pairs, formerly one text each
        merges = [merge if isinstance(merge, str) else " ".join(map(str, merge)) for merge in model["merges"]]
        model = {**model, "merges": merges}
    # Newer releases of the library also write settings that are off.
    parts["model"] = {key: value for key, value in model.items() if value is not None and value is not False}
    if isinstance(added, list):
        parts["added_tokens"] = [{key: token.get(key) for key in _TOKEN} for token in added if isinstance(token, dict)]
    return _digest([parts])


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
