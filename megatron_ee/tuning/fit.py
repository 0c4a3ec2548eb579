"""Fits exits in closed form before tuning (``exits.fit``), on the run's own training data.

A stage of all layers runs the data once. Each exit's sums are solved for several ridges. On tokens that are held out,
the exit is measured with its copied weights and with each ridge, then with several shares of the residual and the best
ridge, and keeps the best.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ee import platform
from megatron_ee.checkpoint.initialise import initialise_exit
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import FitConfig, RunConfig
from megatron_ee.data.loader import Batch, PackedBlend
from megatron_ee.errors import UserError
from megatron_ee.exits.exit import Exit
from megatron_ee.exits.fit import MEMORY_SHARE, RIDGES, Fit, Solution, fit_bytes, number_turns
from megatron_ee.exits.registry import body_of
from megatron_ee.exits.stage import Stage
from megatron_ee.model.distillation import Teacher, teacher_top_k
from megatron_ee.model.setup import ModelSetup
from megatron_ee.parallel.layout import Layout
from megatron_ee.progress import Progress, track
from megatron_ee.tables import add_columns, make_console, new_table
from megatron_ee.tuning.fit_tokens import Steps, Tokens, read_tokens
from megatron_ee.tuning.full_model import FullModel
from megatron_ee.tuning.interrupt import Interrupt
from megatron_ee.tuning.schedule import Microbatch, Pipeline
from megatron_ee.tuning.teacher import LastHidden, TopTokens

FEW_PER_FEATURE = 8
"""Tokens for each feature of the MLP below which a warning is due."""
SCALE_TOKENS = 4096
"""Tokens to fit the scale of a norm on that follows the fitted projection."""


@dataclass(frozen=True)
class FitOutcome:
    """What became of one exit, on the tokens that were held out.

    Attributes:
        layer: of the exit.
        ridge: of the solution that it keeps; None if it keeps the copied weights.
        share: c, of the same solution; None also if nothing is added to a residual.
        agreement: share of tokens whose top-1 token is the final exit's: copied, and with the best solution.
        loss: mean cross-entropy with the final exit's top-1 token, in nats, of the same two.
        raised: lines about ridges that had to be raised.
    """

    layer: int
    ridge: float | None
    share: float | None
    agreement: tuple[float, float]
    loss: tuple[float, float]
    raised: tuple[str, ...]


def fit_exits(config: RunConfig, full: FullModel, specs: Sequence[ExitSpec], blend: PackedBlend) -> list[Exit]:
    """The exits of this rank's stage of all layers, initialised, and fitted where ``init`` is ``fit``.

    Prints a table to stderr. Every rank calls this.

    Args:
        config: of the run.
        full: all layers.
        specs: the exits of all stages, ``init`` resolved.
        blend: the training data, read from its beginning.

    Raises:
        CheckpointError: the model's files cannot be read.
        DataError: all tokens are masked.
        UserError: activations are not finite or all 0; names the exit.
        Interrupted: a signal came to one of the ranks; raised on all.
    """
    groups, features = full.setup.groups, full.setup.architecture.ffn_size
    tokens = read_tokens(config, blend, features, groups, full.interrupt)
    if groups.is_main and tokens.num_fitted < FEW_PER_FEATURE * features:
        print(_few(tokens.num_fitted, features, config.fit), file=sys.stderr, flush=True)
    stage, layout = full.with_exits(specs)

    def initialise() -> None:
        for exit_ in stage.exits:
            initialise_exit(exit_, full.model, config.tuning.seed)

    groups.together(initialise)
    fitter = Fitter(stage, layout, specs, tokens, config.fit, full.interrupt, config.loss.chunk_tokens)
    outcomes = fitter.run()
    if groups.is_main:
        _print_outcomes(outcomes, tokens)
    return stage.exits


class Fitter:
    """The fit of all stages' exits, on this rank's stage of all layers."""

    def __init__(
        self,
        stage: Stage,
        layout: Layout,
        specs: Sequence[ExitSpec],
        tokens: Tokens,
        fit: FitConfig,
        interrupt: Interrupt,
        chunk_tokens: int = 512,
    ) -> None:
        """``stage`` is loaded, its exits are initialised, and it holds the final exit if it has the last layer."""
        self._stage, self._layout, self._specs, self._interrupt = stage, layout, specs, interrupt
        self._setup, self._groups, self._tokens = stage.setup, stage.setup.groups, tokens
        self._chunk = chunk_tokens
        self._ridges = [fit.ridge * factor for factor in RIDGES] if fit.ridge else [0.0]
        self._exits = [exit_ for exit_ in stage.exits if exit_.spec.init == "fit"]

    def run(self) -> list[FitOutcome]:
        """Fit the exits whose ``init`` is ``fit``, measure them, and give each its best weights.

        Every rank calls this. The outcomes are those of all stages, by layer. Errors as for ``fit_exits``.
        """
        taught = Pipeline(self._stage, self._layout, self._specs, teacher=LastHidden(self._setup))
        own: list[FitOutcome] = []
        turns = self._turns()
        amount, counted = len(self._tokens.fitted), self._groups.is_main
        with track(len(turns) * amount, "global batches", "fitting exits", enabled=counted) as bar:
            for turn in turns:
                own += self._fit(taught, [exit_ for exit_ in self._exits if exit_.spec.layer in turn], bar)
        first = self._groups.tensor.rank() == self._groups.data.rank() == 0
        gathered = self._groups.gather(own if first else [])
        return sorted((each for rank in gathered for each in rank), key=lambda outcome: outcome.layer)

    def _turns(self) -> list[set[int]]:
        """Layers of the exits that are fitted together, over all stages: as many as the memory holds."""
        name, groups = platform.memory_name(), self._groups
        free = min(groups.gather(platform.free_memory(groups.gather(name).count(name))))
        fitted = {spec.layer: spec for spec in self._specs if spec.init == "fit"}
        turns: list[set[int]] = []
        for place in self._layout.stages:
            own = [fitted[layer] for layer in place.exits if layer in fitted]
            for number, together in enumerate(split_turns(own, self._setup, int(MEMORY_SHARE * free))):
                turns += [set()] if number == len(turns) else []
                turns[number] |= together
        return turns

    def _fit(self, taught: Pipeline, exits: Sequence[Exit], bar: Progress) -> list[FitOutcome]:
        """Fit some exits, and place the best solution of each, or its copied weights.

        The ridge is chosen first, with one share, since the best ridge hardly depends on the share. The best share does
        depend on the ridge. So this finds what all pairs would, or nearly, with half as many measurements.
        """
        fits = {exit_: _fit_of(exit_) for exit_ in exits}
        self._add(taught, self._tokens.fitted, [(exit_, fit, None) for exit_, fit in fits.items()], bar)
        solved: dict[Exit, list[Solution]] = {}
        for exit_, fit in fits.items():
            fit.reduce()
            solved[exit_] = _solve(exit_, fit, self._ridges)
        tried = {exit_: [_copied(fits[exit_]), *found] for exit_, found in solved.items()}
        figures = self._try(taught, fits, tried)
        others = {exit_: tried[exit_][choose(found)[0]].with_other_shares() for exit_, found in figures.items()}
        for exit_, found in self._try(taught, fits, others).items():
            tried[exit_] += others[exit_]
            figures[exit_] += found
        return [
            _keep_best(exit_, tried[exit_], figures[exit_], _raised(exit_.spec.layer, solved[exit_], self._ridges))
            for exit_ in exits
        ]

    def _try(
        self, taught: Pipeline, fits: Mapping[Exit, Fit], candidates: Mapping[Exit, list[Solution]]
    ) -> dict[Exit, list[tuple[float, float]]]:
        """Fit the norms that follow projections to each candidate; then as ``_measure``, of exits with candidates."""
        candidates = {exit_: found for exit_, found in candidates.items() if found}
        if not any(self._groups.gather(bool(candidates))):
            return {}
        pairs = [(exit_, each) for exit_, found in candidates.items() for each in found]
        seconds = [(exit_, second, each) for exit_, each in pairs if (second := fits[exit_].then(each)) is not None]
        if any(self._groups.gather(bool(seconds))):
            self._add(taught, _first(self._tokens, SCALE_TOKENS), seconds, None)
            for _, second, solution in seconds:
                second.reduce()
                solution.values.update(second.solve([0.0])[0].values)
        return self._measure(candidates)

    @torch.no_grad()
    def _add(
        self,
        taught: Pipeline,
        steps: Steps,
        fits: Sequence[tuple[Exit, Fit, Solution | None]],
        bar: Progress | None,
    ) -> None:
        """Run global batches through all layers and add them to ``fits``, each with its solution placed, if any."""

        def add(micro: Microbatch, last: Tensor) -> None:
            for exit_, fit, solution in fits:
                if solution is not None:
                    solution.place()
                x = exit_.attention_half(micro.taps[exit_.spec.layer], micro.positions)
                fit.add(x, last, micro.mask)

        for batches in steps:
            self._interrupt.check_together(self._groups)
            taught.run(batches, add, lambda micro, h: h, taught=True)
            if bar is not None:
                bar.advance()

    @torch.no_grad()
    def _measure(self, candidates: Mapping[Exit, list[Solution]]) -> dict[Exit, list[tuple[float, float]]]:
        """Agreement and loss of each exit with each candidate, on the held-out tokens; labels are the final exit's."""
        sums = {
            exit_: torch.zeros(len(found), 2, dtype=torch.float64, device=platform.device())
            for exit_, found in candidates.items()
        }

        def score(micro: Microbatch, labels: Tensor) -> None:
            for exit_, found in candidates.items():
                for number, solution in enumerate(found):
                    solution.place()
                    tap = micro.taps[exit_.spec.layer]
                    stats = exit_.statistics(tap, micro.positions, labels, chunk_tokens=self._chunk)
                    figures = torch.stack([(stats.top1 == labels).float(), stats.loss])
                    sums[exit_][number] += (figures * micro.mask).sum(dim=1, dtype=torch.float64)

        taught = Pipeline(self._stage, self._layout, self._specs, teacher=TopTokens(1))
        for batches in self._tokens.held_out:
            self._interrupt.check_together(self._groups)
            run_with_top1(taught, batches, score, chunk_tokens=self._chunk)
        means = {}
        for exit_, total in sums.items():
            dist.all_reduce(total, group=self._groups.data)
            means[exit_] = [
                (agreement, loss) for agreement, loss in (total / max(1, self._tokens.num_held_out)).tolist()
            ]
        return means


def run_with_top1(
    taught: Pipeline, batches: Sequence[Batch], score: Callable[[Microbatch, Tensor], None], *, chunk_tokens: int
) -> None:
    """Run a global batch through a stage of all layers. ``score`` receives the final exit's top-1 tokens.

    Args:
        taught: with ``TopTokens``.
        batches: of this data-parallel rank.
        score: called for each microbatch with token ids ``[seq * batch]``.
        chunk_tokens: maximum number of tokens whose logits exist at a time; ``tiles.logit_tokens`` also limits it.
    """
    stage, message = taught.stage, taught.teacher
    assert isinstance(message, TopTokens), "the final exit's top-1 tokens come back"
    k, chunk = message.k, min(chunk_tokens, stage.setup.tiles.logit_tokens)

    def teach(micro: Microbatch, h: Tensor) -> Teacher:
        assert stage.backbone.head is not None, "the last stage holds the final exit"
        z = stage.final_features(h).flatten(0, 1)
        return teacher_top_k(z, stage.backbone.head, stage.setup.groups.tensor, k, chunk_tokens=chunk)

    taught.run(batches, lambda micro, teacher: score(micro, teacher.ids[:, 0]), teach, taught=True)


def choose(figures: Sequence[tuple[float, float]]) -> tuple[int, bool]:
    """The solution with the lowest loss, and whether it agrees with the final exit more often than the copy.

    ``figures``: agreement and loss of the copy, then of each solution.
    """
    best = min(range(1, len(figures)), key=lambda n: figures[n][1] if math.isfinite(figures[n][1]) else math.inf)
    return best, figures[best][0] > figures[0][0]


def split_turns(specs: Sequence[ExitSpec], setup: ModelSetup, free: int) -> list[set[int]]:
    """Exits of one stage, by layer, in groups whose sums are in memory together; an exit alone if it is too large.

    ``free``: bytes for the sums, and for solving one fit at a time.
    """
    arch, tensor = setup.architecture, setup.groups.tensor.size()
    needed = [fit_bytes(body_of(spec).fitted_rows(arch) or 0, arch.hidden_size, tensor) for spec in specs]
    turns: list[set[int]] = []
    for spec, number in zip(specs, number_turns(needed, free), strict=True):
        turns += [set()] if number == len(turns) else []
        turns[number].add(spec.layer)
    return turns


def _fit_of(exit_: Exit) -> Fit:
    fit = exit_.body.fit(exit_.setup)
    assert fit is not None, "a body with nothing to fit was refused"
    return fit


def _solve(exit_: Exit, fit: Fit, ridges: Sequence[float]) -> list[Solution]:
    try:
        return fit.solve(ridges)
    except UserError as error:
        raise UserError(
            f"the exit after layer {exit_.spec.layer} cannot be fitted: {error}; check the model's weights, or give "
            "this exit init: copy"
        ) from error


def _copied(fit: Fit) -> Solution:
    """The present values of the parameters that a fit changes."""
    return Solution({parameter: parameter.detach().clone() for parameter in fit.parameters})


def _keep_best(
    exit_: Exit, tried: Sequence[Solution], figures: Sequence[tuple[float, float]], raised: tuple[str, ...]
) -> FitOutcome:
    """Place the best solution, unless the copy, which is the first, is kept."""
    best, better = choose(figures)
    kept = tried[best if better else 0]
    kept.place()
    (copied_agreement, copied_loss), (agreement, loss) = figures[0], figures[best]
    return FitOutcome(
        exit_.spec.layer,
        kept.ridge if better else None,
        kept.share,
        (copied_agreement, agreement),
        (copied_loss, loss),
        raised,
    )


def _first(tokens: Tokens, count: int) -> Steps:
    """The first global batches with about ``count`` tokens, the same number on every rank."""
    share = min(1.0, count / tokens.num_fitted)
    return tokens.fitted[: math.ceil(share * len(tokens.fitted))]


def _raised(layer: int, solutions: Sequence[Solution], ridges: Sequence[float]) -> tuple[str, ...]:
    pairs = zip(ridges, solutions, strict=False)
    return tuple(
        f"fit: exit after layer {layer}: features depend on each other, so ridge {wanted:g} was raised to "
        f"{solution.ridge:g}"
        for wanted, solution in pairs
        if solution.ridge > wanted
    )


def _few(tokens: int, features: int, fit: FitConfig) -> str:
    more = "" if fit.tokens == "auto" else ", or raise fit.tokens"
    return (
        f"fit: {tokens:,} unmasked tokens are {tokens / features:.1f} for each of the MLP's {features:,} features; "
        f"fewer than {FEW_PER_FEATURE} fit poorly: give more data{more}"
    )


def _print_outcomes(outcomes: Iterable[FitOutcome], tokens: Tokens) -> None:
    """A table of the fitted exits on stderr."""
    console = make_console(sys.stderr)
    held = f"{tokens.num_held_out:,} other tokens"
    table = new_table(
        f"Exits fitted on {tokens.num_fitted:,} tokens; agreement and loss (final top-1) on {held}", console
    )
    add_columns(table, "exit after", "ridge", "c", "agreement copied", "fitted", "loss copied", "fitted")
    for outcome in outcomes:
        for line in outcome.raised:
            console.print(line)
        table.add_row(
            str(outcome.layer),
            *("-" if value is None else f"{value:g}" for value in (outcome.ridge, outcome.share)),
            *(f"{value:.3f}" for value in (*outcome.agreement, *outcome.loss)),
        )
    console.print(table)
    for outcome in outcomes:
        if outcome.ridge is None:
            console.print(
                f"fit: exit after layer {outcome.layer}: keeps its copied weights, since the fit agrees with the final "
                "exit no more often"
            )
