"""Fits the gates of exits (``exits.gate``) after tuning, on the run's own training data, and adds them to its adapters.

Whether an exit agrees with the final exit is known only after all layers, and a gate goes stale as its exit changes. So
it is fitted once at the end. A stage of all layers runs the data once for each adapter. Several ridges are solved, and
the one with the lowest loss on tokens that are held out is kept.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_ee import platform
from megatron_ee.checkpoint.adapter import DESCRIPTION, MAX_DESCRIPTION, describe_exits, open_adapter
from megatron_ee.checkpoint.adapter_writing import save_adapter
from megatron_ee.checkpoint.loading import load_exits
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import RunConfig
from megatron_ee.config.untrusted import read_json
from megatron_ee.data.loader import PackedBlend
from megatron_ee.exits.exit import Exit
from megatron_ee.exits.gate import RIDGES, logistic_regression
from megatron_ee.exits.stage import Stage
from megatron_ee.parallel.agreement import each_own
from megatron_ee.parallel.layout import Layout
from megatron_ee.planning.storage import gate_tokens
from megatron_ee.progress import Progress, track
from megatron_ee.tables import add_columns, make_console, new_table
from megatron_ee.tuning.fit import run_with_top1
from megatron_ee.tuning.fit_tokens import Steps, Tokens, read_tokens
from megatron_ee.tuning.full_model import FullModel
from megatron_ee.tuning.interrupt import Interrupt
from megatron_ee.tuning.schedule import Microbatch, Pipeline
from megatron_ee.tuning.teacher import TopTokens

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


def add_gates(
    config: RunConfig, full: FullModel, adapters: Sequence[Path], layers: Collection[int], blend: PackedBlend
) -> None:
    """Fit the gates of the exits after ``layers`` in each adapter that lacks them, and replace the adapter atomically.

    Prints a table of each to stderr. Every rank calls this.

    Args:
        config: of the run.
        full: all layers.
        adapters: directories; those that do not exist are left out.
        layers: of the exits.
        blend: the training data, read from its beginning: ``fit.tokens`` of them, at most 16 for each feature.

    Raises:
        CheckpointError: an adapter cannot be read or written.
        DataError: all tokens are masked.
        Interrupted: a signal came to one of the ranks; raised on all.
    """
    groups, hidden = full.setup.groups, full.setup.architecture.hidden_size
    todo = groups.together(lambda: _without_gates(adapters, layers) if groups.is_main else [])[0]
    if not todo:
        return
    amount = gate_tokens(config, full.setup.architecture)
    limited = dataclasses.replace(config, fit=dataclasses.replace(config.fit, tokens=amount))
    tokens = read_tokens(limited, blend, hidden, groups, full.interrupt)
    stage, fitted = None, -1
    for path in todo:
        adapter = each_own(groups.gather, lambda path=path: open_adapter(path, verify=False))  # type: ignore[misc]
        specs = tuple(dataclasses.replace(spec, gate=spec.layer in layers) for spec in adapter.exits)
        if stage is None:
            stage, layout = full.with_exits(specs)
        if adapter.steps != fitted:  # exits after the same step are the same
            groups.together(lambda stage=stage, adapter=adapter: load_exits(stage.exits, adapter, full.model))  # type: ignore[misc]
            qualities = fit_gates(stage, layout, specs, tokens, config.loss.chunk_tokens, full.interrupt)
            fitted = adapter.steps
            if groups.is_main:
                _print(qualities, tokens, path.name)
        save_adapter(
            path,
            stage.exits,
            specs,
            groups,
            base_model=adapter.base_model,
            backbone_sha256=adapter.backbone_sha256,
            steps=adapter.steps,
            settings=adapter.settings,
            extra=groups.together(lambda path=path: _further(path) if groups.is_main else {})[0],  # type: ignore[misc]
        )


def _without_gates(adapters: Sequence[Path], layers: Collection[int]) -> list[Path]:
    """The adapters that exist and lack a gate of one of these exits."""
    found = {path: open_adapter(path, verify=False) for path in adapters if path.exists()}
    return [path for path, adapter in found.items() if {s.layer for s in adapter.exits if s.gate} != set(layers)]


def _further(path: Path) -> dict[str, Any]:
    """Entries of an adapter's description that not every adapter has, such as its validation loss."""
    content, known = read_json(path / DESCRIPTION, MAX_DESCRIPTION), describe_exits((), "", "", 0, "", {})
    return {key: value for key, value in content.items() if key not in known}


def fit_gates(
    stage: Stage,
    layout: Layout,
    specs: Sequence[ExitSpec],
    tokens: Tokens,
    chunk_tokens: int,
    interrupt: Interrupt,
    ridges: Sequence[float] = RIDGES,
) -> list[GateQuality]:
    """Fit the gates of a stage of all layers, and measure them; the qualities of all stages, by layer.

    Every rank calls this. The tensor-parallel ranks of a stage compute the same.

    Args:
        stage: of ``layout``, its exits loaded, with the final exit on the stage of the last layer.
        layout: of all stages.
        specs: the exits of all stages.
        tokens: to fit and measure on.
        chunk_tokens: tokens whose logits exist at a time.
        interrupt: checked between global batches.
        ridges: that are tried.
    """
    groups = stage.setup.groups
    taught = Pipeline(stage, layout, specs, teacher=TopTokens(1))
    amount = len(tokens.fitted) + len(tokens.held_out)
    with track(amount, "global batches", "fitting gates", enabled=groups.is_main) as bar:
        fitted, held_out = (
            _collect(taught, steps, chunk_tokens, interrupt, bar) for steps in (tokens.fitted, tokens.held_out)
        )
    own = []
    for exit_, rows in fitted.items():
        ridge = _fit(exit_, rows, held_out[exit_], ridges)
        gate, measured = exit_.gate, held_out[exit_]
        assert gate is not None
        chance = gate(measured.z.to(gate.weight.device)).cpu()
        own.append((exit_.spec.layer, ridge, torch.stack((chance, measured.confidence, measured.agrees.float()))))
    gathered = groups.gather(own if groups.tensor.rank() == 0 else [])
    parts: dict[int, tuple[float, list[Tensor]]] = {}
    for layer, ridge, part in (each for rank in gathered for each in rank):
        parts.setdefault(layer, (ridge, []))[1].append(part)
    return [_quality(layer, ridge, torch.cat(found, dim=1)) for layer, (ridge, found) in sorted(parts.items())]


@torch.no_grad()
def _collect(
    taught: Pipeline, steps: Steps, chunk_tokens: int, interrupt: Interrupt, bar: Progress
) -> dict[Exit, GateTokens]:
    """The unmasked tokens of some global batches, for each exit with a gate."""
    found: dict[Exit, list[GateTokens]] = {exit_: [] for exit_ in taught.stage.exits if exit_.gate is not None}

    def score(micro: Microbatch, labels: Tensor) -> None:
        kept = micro.mask > 0
        for exit_, parts in found.items():
            z = exit_.features(micro.taps[exit_.spec.layer], micro.positions).flatten(0, 1)
            stats = exit_.head_statistics(z, labels, chunk_tokens=chunk_tokens)
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


def _quality(layer: int, ridge: float, values: Tensor) -> GateQuality:
    """From the gate's probability, the confidence, and 1 where the exit agrees: ``[3, tokens]``."""
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


def _print(qualities: Sequence[GateQuality], tokens: Tokens, name: str) -> None:
    """A table on stderr."""
    console = make_console(sys.stderr)
    title = f"Gates of {name}, fitted on {tokens.num_fitted:,} tokens; how they predict agreement with the final exit"
    table = new_table(f"{title} on {tokens.num_held_out:,} other tokens, beside the maximum probability", console)
    add_columns(table, "exit after", "ridge", "agreement", "AUC gate", "AUC max", "ECE gate", "ECE max")
    for each in qualities:
        figures = (f"{value:.3f}" for value in (each.agreement, *each.auc, *each.ece))
        table.add_row(str(each.layer), f"{each.ridge:g}", *figures)
    console.print(table)
