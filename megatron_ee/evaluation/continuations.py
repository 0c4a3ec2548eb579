"""The full model's greedy continuations of held-out prompts, generated once before tuning and cached."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ee.checkpoint.atomic import write_json
from megatron_ee.checkpoint.digest import cache_directory
from megatron_ee.config.architecture import outputs_digest
from megatron_ee.errors import CheckpointError
from megatron_ee.evaluation.decoding import Tokens, decode
from megatron_ee.inference.requests import Request
from megatron_ee.tuning.full_model import FullModel

VERSION = 1
"""Part of the cache's key. Raise it if the same model and prompts give another result in a new version."""


@dataclass(frozen=True)
class Continuation:
    """What the full model writes after one prompt.

    Attributes:
        prompt: token ids.
        tokens: token ids, at most ``limit``; fewer if the last one is an end of text.
        limit: largest number of tokens.
    """

    prompt: Tokens
    tokens: Tokens
    limit: int


def continuations(
    full: FullModel, digest: str, prompts: Sequence[Tokens], limit: int, eos: frozenset[int]
) -> tuple[Continuation, ...]:
    """Return the continuations of ``prompts`` from the cache, or generate and cache them. Every rank calls this.

    The result is equal on all ranks. A prompt after which the logits are not finite is left out. The cache key consists
    of the backbone's hash and settings, the dtype, the prompts, ``limit`` and ``eos``. Continuations with other layouts
    may differ by rounding, and share an entry.

    Args:
        full: all layers.
        digest: the backbone's hash.
        prompts: spread over the data-parallel ranks.
        limit: tokens per continuation.
        eos: end-of-text tokens.

    Raises:
        CheckpointError: the model's files cannot be read.
        ConfigError: there is not enough memory for the KV cache.
        Interrupted: one of the ranks received a signal; raised on all ranks.
    """
    groups, architecture = full.setup.groups, full.model.architecture
    weights = () if full.model.rounding == "none" else (full.model.rounding,)
    settings = outputs_digest(architecture)
    key = (VERSION, digest, settings, str(full.setup.dtype), tuple(prompts), limit, sorted(eos), *weights)
    path = cache_directory() / "continuations" / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.json"
    found = groups.gather(_read(path, len(prompts), limit, architecture.vocab_size) if groups.is_main else None)[0]
    if found is None:
        requests = [Request(prompt=prompt, max_tokens=limit) for prompt in prompts]
        title = "continuing validation prompts"
        outputs = decode(full.stage, full.layout, (), requests, eos, full.interrupt, title)
        found = [() if output is None else output.tokens for output in outputs]
        if groups.is_main:
            _write(path, found)
    pairs = zip(prompts, found, strict=True)
    return tuple(Continuation(prompt, tokens, limit) for prompt, tokens in pairs if tokens)


def _read(path: Path, count: int, limit: int, vocab_size: int) -> list[Tokens] | None:
    """The cached continuations; None if there are no usable ones."""
    try:
        found = [tuple(tokens) for tokens in json.loads(path.read_text(encoding="utf-8"))["continuations"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    usable = all(
        len(tokens) <= limit and all(type(token) is int and 0 <= token < vocab_size for token in tokens)
        for tokens in found
    )
    return found if usable and len(found) == count else None


def _write(path: Path, found: Sequence[Tokens]) -> None:
    """Write the cache. If this fails, continue without it."""
    with contextlib.suppress(OSError, CheckpointError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"continuations": found})
