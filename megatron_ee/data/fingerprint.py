"""What identifies a tokenizer: digests of its files, which take no loading."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_ee.config.untrusted import read_json
from megatron_ee.data.indexed import sha256
from megatron_ee.errors import CheckpointError

# Of tokenizer.json. What else there is (truncation, padding, post_processor, decoder) changes no id of a text.
_DECISIVE = ("normalizer", "pre_tokenizer", "model", "added_tokens")
_TOKEN = ("id", "content", "single_word", "lstrip", "rstrip", "normalized")
# Of tokenizer_config.json, where there is no tokenizer.json.
_SETTINGS = ("legacy", "add_prefix_space", "do_lower_case", "added_tokens_decoder")
_VOCABULARIES = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")


def tokenizer_digests(path: Path) -> tuple[str, ...]:
    """Digests of what decides the ids of a text, by files alone. Templates and special roles do not count.

    A directory may hold the same tokenizer in two forms, ``tokenizer.json`` and ``tokenizer.model``. The first digest
    is of the form that is used; a corpus made from any of them fits.

    Args:
        path: of a directory, or of one of its files, as ``load_tokenizer`` takes it.

    Returns:
        Nothing where there is no tokenizer.
    """
    if path.is_file() and path.name != "tokenizer.json":
        return (_digest([sha256(path)]),)
    directory = path.parent if path.is_file() else path
    digests = []
    if (directory / "tokenizer.json").is_file():
        digests.append(_of_tokenizer_json(directory / "tokenizer.json"))
    files = [directory / name for name in _VOCABULARIES if (directory / name).is_file()]
    if files:
        config = _read(directory / "tokenizer_config.json")
        settings = {key: config[key] for key in _SETTINGS if config.get(key) is not None}
        digests.append(_digest([*map(sha256, files), *([settings] if settings else [])]))
    if (directory / "tokenizer.model").is_file():
        digests.append(_digest([sha256(directory / "tokenizer.model")]))
    return tuple(dict.fromkeys(digests))


def end_of_text_ids(directory: Path) -> set[int]:
    """End-of-text tokens that a model's ``config.json`` and ``generation_config.json`` name."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        value = _read(directory / name).get("eos_token_id")
        values = value if isinstance(value, list) else [value]
        found |= {number for number in values if isinstance(number, int) and not isinstance(number, bool)}
    return found


def _of_tokenizer_json(path: Path) -> str:
    """Independent of how the file is laid out, and of the release of ``tokenizers`` that wrote it."""
    content = _read(path)
    parts = {key: content.get(key) for key in _DECISIVE}
    model, added = parts["model"], parts["added_tokens"]
    if not isinstance(model, dict):
        return _digest([sha256(path)])  # nothing that the library would read
    if isinstance(model.get("merges"), list):  # pairs, formerly one text each
        merges = [merge if isinstance(merge, str) else " ".join(map(str, merge)) for merge in model["merges"]]
        model = {**model, "merges": merges}
    # Newer releases write out what is off.
    parts["model"] = {key: value for key, value in model.items() if value is not None and value is not False}
    if isinstance(added, list):
        parts["added_tokens"] = [{key: token.get(key) for key in _TOKEN} for token in added if isinstance(token, dict)]
    return _digest([parts])


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    try:
        content = read_json(path) if path.is_file() else {}
    except CheckpointError:
        return {}
    return content if isinstance(content, dict) else {}


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
