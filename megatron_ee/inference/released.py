"""Opens a released model with its exits and its tokenizer. The weights are loaded later; see ``loading``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from megatron_ee.checkpoint.adapter import Adapter, check_hash, find_exits
from megatron_ee.checkpoint.digest import backbone_digest, hash_backbone
from megatron_ee.checkpoint.saved_model import SavedModel, open_model, quantise_layers
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import Quantise
from megatron_ee.data.fingerprint import tokenizer_digests
from megatron_ee.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ee.data.tokenizer_files import eos_token_ids


@dataclass(frozen=True)
class Released:
    """A model, its exits and its tokenizer, opened and checked. The weights are not loaded yet."""

    path: Path
    model: SavedModel
    adapter: Adapter | None
    tokenizer: Tokenizer
    eos: frozenset[int]

    @property
    def exits(self) -> tuple[ExitSpec, ...]:
        """The exits of the adapter."""
        return () if self.adapter is None else self.adapter.exits


def open_released(
    model: str | Path, adapter: str | Path | None = None, *, verify: bool = True, quantise: Quantise = "none"
) -> Released:
    """Open and check a model, its tokenizer and its exits.

    Args:
        model: Hugging Face directory or parallel checkpoint, with its tokenizer.
        adapter: directory of the exits; None for the exits in the model's directory, if any.
        verify: verify checksums of the files, if there are any.
        quantise: quantise the layers of a plain model as they are loaded, see ``ModelConfig``.

    Raises:
        ConfigError: the model cannot be quantised.
        CheckpointError: the model or the adapter is invalid, or the adapter is for another model.
        DataError: the tokenizer is invalid.
    """
    released = quantise_layers(open_model(model, verify=verify), quantise, "quantise")
    opened = find_exits(released, adapter, verify=verify)
    tokenizer = load_tokenizer(model)
    if opened is not None:
        check_hash(opened, released, lambda: hash_backbone(released.stored_weights))
    return Released(Path(model), released, opened, tokenizer, end_of_text(Path(model), tokenizer))


def end_of_text(directory: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The end-of-text tokens of the model's configuration, its generation configuration and its tokenizer.

    All are needed: one may end a turn of the chat template and another a document.

    Raises:
        DataError: ``eos_token_id`` is not a token id or a list of them.
    """
    own = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    return frozenset((*eos_token_ids(directory), *own))


def released_digests(released: Released, *, show: bool = True) -> dict[str, str | None]:
    """SHA-256 (hex) of everything that an output depends on, besides the settings of the engine and the request.

    Args:
        released: the model.
        show: show the progress of hashing the backbone.

    Returns:
        ``model_sha256``: the backbone's hash; ``adapter_sha256``: of the exits and their weights, None without exits;
        ``tokenizer_sha256``: of the tokenizer, its chat templates and the end-of-text tokens.

    Raises:
        CheckpointError: a file cannot be read.
        DataError: the tokenizer's files are damaged.
    """
    adapter, tokenizer = released.adapter, released.tokenizer
    return {
        "model_sha256": hash_backbone(released.model.stored_weights, enabled=show),
        "adapter_sha256": None if adapter is None else exits_digest(adapter),
        "tokenizer_sha256": _digest(
            [tokenizer_digests(released.path), dict(tokenizer.templates), sorted(released.eos)]
        ),
    }


def exits_digest(adapter: Adapter) -> str:
    """SHA-256 (hex) of exits and their weights.

    Raises:
        CheckpointError: a file cannot be read.
    """
    return _digest([[dataclasses.asdict(spec) for spec in adapter.exits], backbone_digest(adapter.weights)])


def _digest(content: list[object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
