"""Fits the gates of exits (``exits.gate``) on the run's own training data.

Whether an exit agrees with the final exit is known only after all layers, and a gate goes stale as its exit changes. A
run that distils runs all layers anyway, so it fits its gates before each validation and each save. Other runs fit them
once at the end (``tuning.finish``). Several ridges are solved, and the one with the lowest loss on tokens that are held
out is kept.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_ee import platform
from megatron_ee.config.schema import RunConfig
from megatron_ee.data.loader import PackedBlend
from megatron_ee.exits.exit import Exit
from megatron_ee.exits.gate import RIDGES, logistic_regression
from megatron_ee.model.setup import ModelSetup
from megatron_ee.planning.storage import gate_tokens
from megatron_ee.progress import Progress, track
from megatron_ee.tables import add_columns, make_console, new_table
from megatron_ee.tuning.fit import run_with_top1
from megatron_ee.tuning.fit_tokens import Steps, Tokens, read_tokens
from megatron_ee.tuning.interrupt import Interrupt
from megatron_ee.tuning.schedule import Microbatch, Pipeline
from megatron_ee.tuning.state import RunProgress

BINS = 15
"""Equal bins of probability in the calibration error."""


@dataclass(frozen=True)
class GateTokens:
    """Tokens of this rank, in host memory.

    Attributes:
        z: ``[tokens, hidden]``, the head's input, in the model's dtype.
        agrees: ``[tokens]`` bool, whether the exit's top-1 token is the final exit's.
        confidence: ``[tokens]`` float32, the maximum probability.
    """

    z: Tensor
    agrees: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class GateQuality:
    """One exit's gate, on the tokens that were held out.

    Attributes:
        layer: of the exit.
        ridge: that was chosen.
        agreement: share of tokens whose top-1 token is the final exit's.
        auc: probability that a token that agrees is ranked above one that does not: by the gate, and by the maximum
            probability of the head. NaN if there is only one kind.
        ece: expected calibration error of the two, as predictions of agreement.
    """

    layer: int
    ridge: float
    agreement: float
    auc: tuple[float, float]
    ece: tuple[float, float]


def fit_next(
    config: RunConfig, blend: PackedBlend, interrupt: Interrupt, pipeline: Pipeline, progress: RunProgress
) -> None:
    """Fit the gates of a run that distils, on the tokens that it would be trained on next, and print a table to stderr.

    Every rank calls this. If it raises, the gates are unchanged.

    Args:
        config: of the run.
        blend: the training data.
        interrupt: checked between global batches.
        pipeline: of the run, with all layers and the final exit.
        progress: of the run.

    Raises:
        DataError: all tokens are masked.
        Interrupted: a signal came to one of the ranks; raised on all.
    """
    setup, stage = pipeline.stage.setup, pipeline.stage
    tokens = read_gate_tokens(config, blend, setup, interrupt, progress.consumed)
    (qualities,) = fit_gates(pipeline, [stage.exits], tokens, config.loss.chunk_tokens, interrupt)
    if setup.groups.is_main:
        print_gates(qualities, tokens, f"after step {progress.step}")


def read_gate_tokens(
    config: RunConfig, blend: PackedBlend, setup: ModelSetup, interrupt: Interrupt, start: int = 0
) -> Tokens:
    """The tokens from sequence ``start`` on: ``fit.tokens``, at most 16 for each feature. Raises as ``fit_next``."""
    amount = gate_tokens(config, setup.architecture)
    limited = dataclasses.replace(config, fit=dataclasses.replace(config.fit, tokens=amount))
    return read_tokens(limited, blend, setup.architecture.hidden_size, setup.groups, interrupt, start)


def fit_gates(
    taught: Pipeline,
    sets: Sequence[Sequence[Exit]],
    tokens: Tokens,
    chunk_tokens: int,
    interrupt: Interrupt,
    ridges: Sequence[float] = RIDGES,
) -> list[list[GateQuality]]:
    """Fit gates in one pass through all layers, and measure them; for each set the qualities of all stages, by layer.

    Every rank calls this. The tensor-parallel ranks of a stage compute the same.

    Args:
        taught: all layers, with the final exit and ``TopTokens``.
        sets: the exits of this stage, loaded. There may be several sets of the same exits, after different steps.
        tokens: to fit and measure on.
        chunk_tokens: tokens whose logits exist at a time.
        interrupt: checked between global batches. After the last one all gates are fitted.
        ridges: that are tried.
    """
    groups = taught.stage.setup.groups
    gated = [exit_ for exits in sets for exit_ in exits if exit_.gate is not None]
    amount = len(tokens.fitted) + len(tokens.held_out)
    with track(amount, "global batches", "fitting gates", enabled=groups.is_main) as bar:
        fitted, held_out = (
            _collect(taught, gated, steps, chunk_tokens, interrupt, bar) for steps in (tokens.fitted, tokens.held_out)
        )
    own = []
    for number, exits in enumerate(sets):
        for exit_ in (exit_ for exit_ in exits if exit_.gate is not None):
            ridge = _fit(exit_, fitted[exit_], held_out[exit_], ridges)
            own.append((number, exit_.spec.layer, ridge, _figures(exit_, held_out[exit_])))
    gathered = groups.gather(own if groups.tensor.rank() == 0 else [])
    parts: dict[tuple[int, int], tuple[float, list[Tensor]]] = {}
    for number, layer, ridge, part in (each for rank in gathered for each in rank):
        parts.setdefault((number, layer), (ridge, []))[1].append(part)
    qualities: list[list[GateQuality]] = [[] for _ in sets]
    for (number, layer), (ridge, found) in sorted(parts.items()):
        qualities[number].append(_quality(layer, ridge, torch.cat(found, dim=1)))
    return qualities


@torch.no_grad()
def _collect(
    taught: Pipeline, exits: Sequence[Exit], steps: Steps, chunk_tokens: int, interrupt: Interrupt, bar: Progress
) -> dict[Exit, GateTokens]:
    """The unmasked tokens of some global batches, for each of ``exits``, if its features are finite."""
    found: dict[Exit, list[GateTokens]] = {exit_: [] for exit_ in exits}

    def score(micro: Microbatch, labels: Tensor) -> None:
        for exit_, parts in found.items():
            z = exit_.features(micro.taps[exit_.spec.layer], micro.positions).flatten(0, 1)
            stats = exit_.head_statistics(z, labels, chunk_tokens=chunk_tokens)
            kept = (micro.mask > 0) & z.isfinite().all(dim=1)
            rows = (z[kept], stats.top1[kept] == labels[kept], stats.confidence[kept])
            parts.append(GateTokens(*(each.cpu() for each in rows)))

    for batches in steps:
        interrupt.check_together(taught.stage.setup.groups)
        run_with_top1(taught, batches, score, chunk_tokens=chunk_tokens)
        bar.advance()
    return {
        exit_: GateTokens(
            *(torch.cat([getattr(part, name) for part in parts]) for name in ("z", "agrees", "confidence"))
        )
        for exit_, parts in found.items()
    }


def _fit(exit_: Exit, rows: GateTokens, held_out: GateTokens, ridges: Sequence[float]) -> float:
    """Fit an exit's gate, and return the ridge with the lowest loss on held-out tokens."""
    groups, device, gate = exit_.setup.groups, platform.device(), exit_.gate
    assert gate is not None

    def reduce(sums: Tensor) -> None:
        dist.all_reduce(sums, group=groups.data)

    best = math.inf
    for ridge in ridges:
        solution = logistic_regression(rows.z, rows.agrees, ridge, device, reduce)
        logits = held_out.z.double() @ solution[:-1] + solution[-1]
        loss = F.binary_cross_entropy_with_logits(logits, held_out.agrees.double(), reduction="sum").to(device)
        reduce(loss)
        if float(loss) < best:
            best, chosen = float(loss), ridge
            gate.place(solution)
    return chosen


def _figures(exit_: Exit, measured: GateTokens) -> Tensor:
    """The gate's probability, the confidence, and 1 where the exit agrees: ``[3, tokens]`` float32 on the CPU."""
    assert exit_.gate is not None
    chance = exit_.gate(measured.z.to(exit_.gate.weight.device)).cpu()
    return torch.stack((chance, measured.confidence, measured.agrees.float()))


def _quality(layer: int, ridge: float, values: Tensor) -> GateQuality:
    """From the ``_figures`` of all data-parallel ranks."""
    gate, confidence, agrees = values.double()
    hits = agrees > 0
    auc = ranking_quality(gate, hits), ranking_quality(confidence, hits)
    return GateQuality(
        layer, ridge, float(agrees.mean()), auc, (calibration_error(gate, hits), calibration_error(confidence, hits))
    )


def ranking_quality(scores: Tensor, hits: Tensor) -> float:
    """Area under the ROC curve of ``scores`` ``[n]`` for ``hits`` ``[n]`` bool; NaN if there is only one kind."""
    positive, negative = scores[hits], scores[~hits].sort().values
    if not len(positive) or not len(negative):
        return math.nan
    below = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
    return float(below.double().mean()) / 2 / len(negative)


def calibration_error(chances: Tensor, hits: Tensor) -> float:
    """Expected calibration error of probabilities ``[n]`` for ``hits`` ``[n]`` bool, in equal bins."""
    bins = (chances * BINS).long().clamp(0, BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, chances.double() - hits.double())
    return float(gaps.abs().sum()) / max(1, len(chances))


def print_gates(qualities: Sequence[GateQuality], tokens: Tokens, which: str) -> None:
    """A table on stderr. ``which`` completes "Gates ..."."""
    console = make_console(sys.stderr)
    title = f"Gates {which}, fitted on {tokens.num_fitted:,} tokens; how they predict agreement with the final exit"
    table = new_table(f"{title} on {tokens.num_held_out:,} other tokens, beside the maximum probability", console)
    add_columns(table, "exit after", "ridge", "agreement", "AUC gate", "AUC max", "ECE gate", "ECE max")
    for each in qualities:
        figures = (f"{value:.3f}" for value in (each.agreement, *each.auc, *each.ece))
        table.add_row(str(each.layer), f"{each.ridge:g}", *figures)
    console.print(table)
