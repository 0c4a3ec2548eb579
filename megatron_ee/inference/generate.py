"""``generate``: from a released model, its exits and a prompt to text and what it took."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ee import platform
from megatron_ee.checkpoint.adapter import Adapter, find_exits, load_exits
from megatron_ee.checkpoint.loading import SavedModel, load_backbone, open_model
from megatron_ee.config.untrusted import read_json
from megatron_ee.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ee.errors import CheckpointError, ConfigError
from megatron_ee.inference.decoder import Emitted, Row, decode
from megatron_ee.inference.policy import ExitPolicy
from megatron_ee.model.setup import build_setup
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.groups import Groups, process_groups, world_size
from megatron_ee.progress import track


@dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
        text: goes on where the prompt ends; without the end-of-text token.
        token_ids: what was emitted, the end-of-text token included.
        layers: the layer that emitted each token, the last for the final exit.
        pieces: the text that each token adds.
        statistics: ``finish_reason`` (``eos``, ``length`` or ``context``), and what ``_statistics`` gives.
    """

    text: str
    token_ids: list[int]
    layers: list[int]
    pieces: list[str]
    statistics: dict[str, Any]


def generate(
    *,
    model: str | Path,
    adapter: str | Path | None,
    prompt: str,
    mode: str | None = None,
    threshold: float = 0.9,
    max_tokens: int = 64,
    dtype: str = "bfloat16",
    verify: bool = True,
) -> Generation:
    """Continue one prompt greedily, until end of text, ``max_tokens``, or the end of the model's context.

    Args:
        model: Hugging Face directory or parallel checkpoint, with its tokenizer.
        adapter: exits, for mode ``threshold``; None takes those that lie with the model.
        prompt: text; the tokenizer's own special tokens are put around it as transformers does.
        mode: ``full`` or ``threshold``; None is ``threshold`` where there are exits.
        threshold: confidence to leave at.
        max_tokens: largest number of tokens to emit.
        dtype: of the model.
        verify: check what is read against its checksums, where there are any.

    Raises:
        ConfigError: an argument that is impossible, or a prompt that fills the context.
        CheckpointError: the model or the adapter cannot be used, or they do not belong together.
        DataError: the tokenizer cannot be used, or has tokens beyond the model's vocabulary.
    """
    _check_arguments(mode, threshold, max_tokens, dtype)
    released = open_model(model, verify=verify)
    opened = find_exits(released, adapter, lambda: _digest(released), verify=verify)
    if opened is None and mode == "threshold":
        raise ConfigError("--mode: threshold needs exits; give their adapter with --adapter DIR")
    arch = released.architecture
    tokenizer = load_tokenizer(model)
    tokenizer.fits(arch.vocab_size)
    prompt_ids = encode_prompt(tokenizer, prompt) if prompt else []
    if not prompt_ids:
        raise ConfigError("--prompt: is empty; give text to continue")
    if len(prompt_ids) >= arch.max_positions:
        raise ConfigError(
            f"--prompt: has {len(prompt_ids)} tokens, but the model has {arch.max_positions} positions; shorten it"
        )
    eos = end_of_text(Path(model), tokenizer)
    policy = ExitPolicy(threshold) if opened is not None and mode != "full" else None
    with process_groups() as groups:
        stage = _load(released, None if policy is None else opened, dtype, groups)
        return continue_prompt(stage, tokenizer, prompt_ids, policy, eos, max_tokens)


def continue_prompt(
    stage: Stage,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    policy: ExitPolicy | None,
    eos: Collection[int],
    max_tokens: int,
) -> Generation:
    """Continue a prompt that leaves room in the model's context; arguments as for ``decode``."""
    positions = stage.setup.architecture.max_positions
    row = Row(stage, positions)
    emitted, times = [], [time.perf_counter()]
    for token in decode(stage, row, prompt_ids, policy, eos, min(max_tokens, positions - len(prompt_ids))):
        emitted.append(token)
        times.append(time.perf_counter())
    ids = [token.token for token in emitted]
    pieces = tokenizer.pieces([*prompt_ids, *ids])[len(prompt_ids) :]
    finish = "eos" if ids[-1] in eos else "length" if len(ids) == max_tokens else "context"
    return Generation(
        text="".join(pieces[:-1] if finish == "eos" else pieces),
        token_ids=ids,
        layers=[token.layer for token in emitted],
        pieces=pieces,
        statistics={"finish_reason": finish, **_statistics(row, len(prompt_ids), emitted, times)},
    )


def _check_arguments(mode: str | None, threshold: float, max_tokens: int, dtype: str) -> None:
    if mode not in (None, "full", "threshold"):
        raise ConfigError(f"--mode: {mode!r} is not available; choose full or threshold")
    if not threshold > 0:
        raise ConfigError(f"--threshold: must be above 0, not {threshold}; above 1 no token leaves early")
    if max_tokens < 1:
        raise ConfigError(f"--max-tokens: must be at least 1, not {max_tokens}")
    if dtype not in platform.DTYPES:
        raise ConfigError(f"--dtype: {dtype!r} is unknown; possible: {', '.join(platform.DTYPES)}")
    if world_size() > 1:
        raise ConfigError(f"generate runs on one process, not {world_size()}; start it without torchrun")


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids with the special tokens that the tokenizer puts around a text: for many a beginning-of-text token."""
    if tokenizer.hf is not None:
        return list(tokenizer.hf.encode(prompt))
    # A bare SentencePiece model is of the Llama kind, whose texts begin with that token.
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [*start, *tokenizer.encode(prompt)]


def end_of_text(directory: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end generation: what the model's configuration names (one or several), or else the tokenizer's own.

    Raises:
        CheckpointError: ``eos_token_id`` is not a token id or a list of them.
    """
    for path in (directory / "generation_config.json", directory / "config.json"):
        content = read_json(path) if path.is_file() else None
        value = content.get("eos_token_id") if isinstance(content, dict) else None
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(token) is int for token in ids):
            raise CheckpointError(f"{path}: eos_token_id must be a token id or a list of them, not {value!r}")
        return frozenset(ids)
    return frozenset() if tokenizer.eos_id is None else frozenset([tokenizer.eos_id])


def _digest(released: SavedModel) -> str:
    total = sum(entry.nbytes for entry in released.weights.values())
    with track(total, "B", "hashing the backbone") as bar:
        return released.digest(advance=bar.advance)


def _load(released: SavedModel, adapter: Adapter | None, dtype: str, groups: Groups) -> Stage:
    """The whole backbone, and the adapter's exits where there is one."""
    arch = released.architecture
    setup = build_setup(arch, platform.DTYPES[dtype], groups)
    specs = () if adapter is None else adapter.exits
    stage = Stage(setup, range(1, arch.num_layers + 1), specs, final_exit=True)
    total = sum(parameter.numel() * parameter.element_size() for parameter in stage.backbone.parameters())
    with track(total, "B", "loading") as bar:
        load_backbone(stage, released, bar.advance)
    if adapter is not None:
        load_exits(stage.exits, adapter, released)
    return stage


def _statistics(row: Row, prompt_tokens: int, emitted: Sequence[Emitted], times: Sequence[float]) -> dict[str, Any]:
    """Figures as JSON takes them; None where one token is too few to tell.

    ``mean_exit_layer`` is over all tokens. ``layers_per_token`` is what was paid: decoder layers run, those of
    deferred tokens and of ``layer`` exits included, per pass after the prompt's. Times are in seconds, after loading;
    ``tokens_per_second`` leaves out the prompt and the first token.
    """
    count = len(emitted)
    caches = [*row.caches.values(), *row.exit_caches.values()]
    work = sum(cache.length - prompt_tokens for cache in caches)
    return {
        "prompt_tokens": prompt_tokens,
        "tokens": count,
        "tokens_by_layer": {str(layer): number for layer, number in sorted(Counter(e.layer for e in emitted).items())},
        "mean_exit_layer": sum(e.layer for e in emitted) / count,
        "layers_per_token": work / (count - 1) if count > 1 else None,
        "deferred_tokens": row.deferred,
        "time_to_first_token": times[1] - times[0],
        "tokens_per_second": (count - 1) / (times[-1] - times[1]) if count > 1 else None,
        "confidences": [e.confidence for e in emitted],
    }
