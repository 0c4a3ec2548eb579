"""Decoding against transformers, against our own full mode, and against the machine. This process imports no torch.

Whatever is compared runs in turns in one process, so that both sides see the same machine; medians count.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ee.benchmark.shape import Shape, spread_exits
from megatron_ee.benchmark.worker import Worker, quiet_enough, start_worker
from megatron_ee.progress import track

_PACKAGE = "megatron_ee.benchmark"
_POSITIONS = 2048
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
BATCHES = (1, 4, 16)


@dataclass(frozen=True)
class FullMode:
    """Full mode against transformers' ``generate``; tokens per second, all prompts of a batch together.

    Attributes:
        ratio: ours over theirs.
        bandwidth_share: bytes of weights that ours reads per second while decoding, as a share of what ``torch.mv``
            reads; at batch 1 only.
        fastest_share: the same, of the fastest product that this package knows here.
        products_share: time that the model's own products take one after another, as a share of decoding; likewise.
        same: whether both said the same (in bfloat16 they need not).
    """

    batch: int
    ours: float
    transformers: float
    ratio: float
    bandwidth_share: float | None
    fastest_share: float | None
    products_share: float | None
    same: bool


@dataclass(frozen=True)
class Way:
    """One way of saying what full mode says, or something close to it.

    Attributes:
        name: of the way.
        tokens_per_second: at batch 1.
        speedup: over our own full mode.
        decoding: the same without the prompts; None where it is not known.
        acceptance: share of the proposals that stood; None where it is not known.
        layers_per_token: decoder layers run per token.
        same: share of the prompts for which the whole output is full mode's.
    """

    name: str
    tokens_per_second: float
    speedup: float
    decoding: float | None
    acceptance: float | None
    layers_per_token: float | None
    same: float


@dataclass(frozen=True)
class ThresholdPoint:
    """Threshold mode at one threshold.

    Attributes:
        agreement: share of positions along full mode's own output at which the same token is emitted.
        speedup: over full mode, both along that output.
        layers_per_token: decoder layers run per token, likewise.
        departure: mean position at which free generation first differs from full mode's output, at most its length.
    """

    threshold: float
    agreement: float
    speedup: float
    layers_per_token: float
    departure: float


@dataclass(frozen=True)
class Overhead:
    """Decoding with decisions from a trace, against its chains of layers timed one by one.

    Attributes:
        ratio: measured over the sum.
    """

    seconds: float
    chains: float
    count: int
    ratio: float


@dataclass(frozen=True)
class Batch:
    """Tokens per second of a batch whose rows leave at mixed exits, and of full mode."""

    rows: int
    mixed: float
    full: float
    ratio: float


@dataclass
class GenerateBenchmark:
    """All of it; what was not asked for is empty."""

    machine: dict[str, Any]
    model: dict[str, Any]
    full: list[FullMode] = field(default_factory=list)
    speculative: list[Way] = field(default_factory=list)
    threshold: list[ThresholdPoint] = field(default_factory=list)
    overhead: Overhead | None = None
    batch: list[Batch] = field(default_factory=list)


@dataclass(frozen=True)
class Load:
    """What is generated.

    Attributes:
        texts: files that prompts are cut from; random tokens without any.
        prompts: number of prompts, one after another, where batch 1 is measured.
        prompt_tokens: length of each.
        tokens: emitted for each.
        repeats: rounds, of which the median counts.
    """

    texts: tuple[str, ...] = ()
    prompts: int = 4
    prompt_tokens: int = 64
    tokens: int = 96
    repeats: int = 3


def benchmark_generate(
    model: Path | None,
    adapter: Path | None,
    shape: Shape,
    load: Load,
    *,
    parts: Sequence[str],
    batches: Sequence[int],
    exits: int,
    dtype: str,
    compiled: bool = False,
) -> GenerateBenchmark:
    """Measure ``parts``.

    Args:
        model: Hugging Face directory; None for a random model of ``shape``.
        adapter: its exits; None for untuned ones, which say little but take as long.
        batches: sizes for ``full``.
        exits: how many a random model has.
        compiled: our side's layers are.

    Raises:
        UserError: the model cannot be used, or the process did not survive.
    """
    before = quiet_enough()
    with tempfile.TemporaryDirectory(prefix="megatron-ee-") as temporary:
        directory = str(model) if model is not None else f"{temporary}/model"
        with start_worker("the machine", f"{_PACKAGE}.machine:machine") as machine:
            described = machine.call("describe")
            if model is None:
                machine.call("make_model", directory, shape, dtype, _POSITIONS)
        layers = [] if adapter is not None else spread_exits(exits, _depth(directory))
        target = None if adapter is None else str(adapter)
        made = (f"{_PACKAGE}.decoding:decoding", directory, target, layers, dtype, compiled)
        with start_worker("decoding", *made, alone=True) as worker:
            result = GenerateBenchmark({**described, "load_before": before}, worker.call("describe"))
            works: dict[str, Callable[[], None]] = {
                "full": lambda: _full(worker, load, batches, result),
                "speculative": lambda: _speculative(
                    worker, load, result, _assistants(worker, result, adapter, temporary)
                ),
                "threshold": lambda: _threshold(worker, load, result),
                "overhead": lambda: _overhead(worker, load, result),
                "batch": lambda: _batch(worker, load, result),
            }
            with track(len(parts), "parts", "benchmark generate") as bar:
                for part in parts:
                    bar.describe(f"benchmark generate {part}")
                    works[part]()
                    bar.advance()
    return result


def _depth(directory: str) -> int:
    from megatron_ee.config.architecture import read_architecture

    return read_architecture(Path(directory)).num_layers


def _full(worker: Worker, load: Load, batches: Sequence[int], result: GenerateBenchmark) -> None:
    for batch in batches:
        prompts = worker.call("prompts", load.texts, batch, load.prompt_tokens)
        ours, theirs, products_shares = [], [], []
        shares: list[list[float]] = [[], []]
        for number in range(1 + load.repeats):  # the first is not measured: it loads and warms
            before = worker.call("matvec_rates")
            mine = worker.call("full", prompts, load.tokens)
            after = worker.call("matvec_rates")
            bare = worker.call("products_seconds")
            peer = worker.call("transformers", prompts, load.tokens)
            if number > 0:
                token = mine["decode"] / (load.tokens - 1)
                ours.append(mine["seconds"])
                theirs.append(peer["seconds"])
                # With what the machine reads just then: it is seldom the same a minute later.
                for share, *rates in zip(shares, before, after, strict=True):
                    share.append(result.model["bytes_per_token"] / token / statistics.fmean(rates))
                products_shares.append(bare / token)
        count, mine_seconds, peer_seconds = batch * load.tokens, statistics.median(ours), statistics.median(theirs)
        bandwidth, fastest, products = (
            statistics.median(share) if batch == 1 else None for share in (*shares, products_shares)
        )
        result.full.append(
            FullMode(
                batch,
                count / mine_seconds,
                count / peer_seconds,
                peer_seconds / mine_seconds,
                bandwidth,
                fastest,
                products,
                mine["ids"] == peer["ids"],
            )
        )


def _assistants(worker: Worker, result: GenerateBenchmark, adapter: Path | None, temporary: str) -> dict[int, str]:
    """By layer, each exit of the adapter as a model of its own."""
    if adapter is None:
        return {}
    places = {layer: f"{temporary}/assistant-{layer}" for layer in result.model["exits"]}
    for layer, place in places.items():
        worker.call("export", str(adapter), layer, place)
    return places


def _speculative(worker: Worker, load: Load, result: GenerateBenchmark, assistants: dict[int, str]) -> None:
    prompts = worker.call("prompts", load.texts, load.prompts, load.prompt_tokens)
    exits = result.model["exits"]
    ways: dict[str, tuple[str, tuple[Any, ...]]] = {
        "full mode": ("full", ()),
        "speculative": ("speculative", ()),
        **{f"speculative, exit {k}, 3": ("speculative", (k, 3)) for k in exits},
        "transformers": ("transformers", ()),
        **{f"transformers, assistant_early_exit={k}": ("transformers", (k,)) for k in exits},
        **{f"transformers, exit {k} as assistant_model": ("transformers", (None, p)) for k, p in assistants.items()},
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    decoding: dict[str, list[float]] = {name: [] for name in ways}
    last: dict[str, list[dict[str, Any]]] = {}
    for number in range(1 + load.repeats):
        for name, (method, arguments) in ways.items():
            runs = [worker.call(method, [prompt], load.tokens, *arguments) for prompt in prompts]
            if number > 0:
                times[name].append(sum(run["seconds"] for run in runs))
                if method != "transformers":
                    decoding[name].append(sum(run["decode"] for run in runs))
            last[name] = runs
    plain, alone = statistics.median(times["full mode"]), statistics.median(decoding["full mode"])
    for name, runs in last.items():
        same = [mine["ids"] == full["ids"] for mine, full in zip(runs, last["full mode"], strict=True)]
        known = [run["acceptance"] for run in runs if run.get("acceptance") is not None]
        depth = [run["layers_per_token"] for run in runs if "layers_per_token" in run]
        elapsed = statistics.median(times[name])
        result.speculative.append(
            Way(
                name,
                len(prompts) * load.tokens / elapsed,
                plain / elapsed,
                alone / statistics.median(decoding[name]) if decoding[name] else None,
                statistics.fmean(known) if known else None,
                statistics.fmean(depth) if depth else None,
                statistics.fmean(same),
            )
        )


def _threshold(worker: Worker, load: Load, result: GenerateBenchmark) -> None:
    prompts = worker.call("prompts", load.texts, load.prompts, load.prompt_tokens)
    truth = [worker.call("full", [prompt], load.tokens)["ids"][0] for prompt in prompts]
    times: dict[float | None, list[float]] = {threshold: [] for threshold in (None, *THRESHOLDS)}
    last: dict[float | None, list[dict[str, Any]]] = {}
    for _ in range(load.repeats):
        for threshold, taken in times.items():
            pairs = zip(prompts, truth, strict=True)
            runs = [worker.call("following", [prompt], [said], threshold) for prompt, said in pairs]
            taken.append(sum(run["decode"] for run in runs))
            last[threshold] = runs
    plain = statistics.median(times[None])
    for threshold in THRESHOLDS:
        said = [token for run in last[threshold] for token in run["ids"][0]]
        free = [worker.call("threshold", [prompt], load.tokens, threshold)["ids"][0] for prompt in prompts]
        result.threshold.append(
            ThresholdPoint(
                threshold,
                statistics.fmean(a == b for a, b in zip(said, sum(truth, []), strict=True)),
                plain / statistics.median(times[threshold]),
                statistics.fmean(run["layers_per_token"] for run in last[threshold]),
                statistics.fmean(_departure(a, b) for a, b in zip(free, truth, strict=True)),
            )
        )


def _departure(said: Sequence[int], truth: Sequence[int]) -> int:
    """First position at which two outputs differ."""
    return next((number for number, pair in enumerate(zip(said, truth, strict=False)) if pair[0] != pair[1]), len(said))


def _trace(model: Mapping[str, Any], tokens: int, seed: int) -> list[int]:
    """Layers that emit, at random but for the rule that the first token and one after so many early ones run all."""
    chance, layers, early = random.Random(seed), [model["layers"]], 0
    while len(layers) < tokens:
        at_all = early == model["max_deferred"]
        layer = model["layers"] if at_all else chance.choice([*model["exits"], model["layers"]])
        early = 0 if layer == model["layers"] else early + 1
        layers.append(layer)
    return layers


def _traced(model: Mapping[str, Any], tokens: int, seed: int) -> list[int]:
    """A trace for the tokens whose exits are asked, which the first is not, nor one that the cap makes run on."""
    early, asked = 0, []
    for layer in _trace(model, tokens, seed)[1:]:
        if early < model["max_deferred"]:
            asked.append(layer)
        early = 0 if layer == model["layers"] else early + 1
    return asked


def _overhead(worker: Worker, load: Load, result: GenerateBenchmark) -> None:
    (prompt,) = worker.call("prompts", load.texts, 1, load.prompt_tokens)
    runs = [worker.call("overhead", prompt, _traced(result.model, load.tokens, 1)) for _ in range(1 + load.repeats)][1:]
    best = sorted(runs, key=lambda run: run["seconds"] / run["chains"])[len(runs) // 2]
    result.overhead = Overhead(best["seconds"], best["chains"], best["count"], best["seconds"] / best["chains"])


def _batch(worker: Worker, load: Load, result: GenerateBenchmark) -> None:
    for rows in BATCHES:
        prompts = worker.call("prompts", load.texts, rows, load.prompt_tokens)
        traces = [_traced(result.model, load.tokens, seed) for seed in range(len(prompts))]
        mixed, full = [], []
        for number in range(1 + load.repeats):
            ours = worker.call("mixed", prompts, load.tokens, traces)["seconds"]
            plain = worker.call("full", prompts, load.tokens)["seconds"]
            if number > 0:
                mixed.append(ours)
                full.append(plain)
        count = len(prompts) * load.tokens
        a, b = count / statistics.median(mixed), count / statistics.median(full)
        result.batch.append(Batch(len(prompts), a, b, a / b))
