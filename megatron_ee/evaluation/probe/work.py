"""How much a probe does in the time that it is given: which layers, on how many tokens, with which fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.config.architecture import Architecture
from megatron_ee.data.loader import Batch
from megatron_ee.exits.fit import CANDIDATES, RIDGES, TRIALS
from megatron_ee.tuning.schedule import Microbatch, Pipeline

SOLVED, NEWTON_ROWS = 1024, 512
"""Largest matrix whose factorisation is timed, and rows of the product that is timed for gates."""
PER_FEATURE, LEAST_PER_FEATURE = 16, 2
"""Tokens to fit on for each feature of the MLP: wanted, and at least."""
NORM_TOKENS = 4096
"""Tokens to fit the scale of a norm on."""
HELD_OUT, LEAST_HELD_OUT, HELD_OUT_SHARE = 4096, 512, 4
"""Tokens to measure on: wanted, and at least in a short time; at most one in ``HELD_OUT_SHARE`` of the text."""
NEWTON_STEPS = 8
"""Of a gate's fit, about."""
FEW_LAYERS = 3
"""Layers below which the cheaper fit of a norm is preferred, on more of them."""


@dataclass(frozen=True)
class Pace:
    """Measured seconds, in which stages and data-parallel ranks share the work.

    Attributes:
        forward: per token, all layers and the final exit.
        fit: per token and exit: the sums of an ``mlp`` exit's fit.
        measure: per token and exit: body, head and statistics.
        solve: per ``mlp`` exit, for all ridges.
        gate: per token, exit and Newton step: the sums of a gate's fit.
    """

    forward: float
    fit: float
    measure: float
    solve: float
    gate: float

    def fit_gate(self, tokens: int) -> float:
        """One gate, on so many tokens."""
        return tokens * (self.measure + NEWTON_STEPS * self.gate)


@dataclass(frozen=True)
class Work:
    """What a probe does.

    Attributes:
        layers: that get an exit.
        body: of the exits, fitted.
        fitted: tokens to fit on.
        held_out: other tokens to measure on.
        seconds: that it takes, estimated.
    """

    layers: tuple[int, ...]
    body: str
    fitted: int
    held_out: int
    seconds: float


def choose_work(
    pace: Pace, seconds: float, num_layers: int, features: int, available: int, most_exits: int, chosen_on: int
) -> Work:
    """The most that fits into ``seconds``; the least possible if nothing does.

    Tokens are halved first, down to a quarter, then layers, which are evenly spaced, and at last ``mlp`` exits are
    replaced by ``norm`` exits, which are cheaper to fit but know less.

    Args:
        pace: measured.
        seconds: left.
        num_layers: of the model. The last layer gets no exit.
        features: of the MLP.
        available: unmasked tokens of the text.
        most_exits: ``mlp`` exits that the memory holds.
        chosen_on: tokens that the ridge and the share of each exit are chosen on.
    """
    works = list(_works(pace, num_layers, features, available, most_exits, chosen_on))
    return next((work for work in works if work.seconds <= seconds), works[-1])


def _works(
    pace: Pace, num_layers: int, features: int, available: int, most_exits: int, chosen_on: int
) -> Iterator[Work]:
    """From the most wanted to the least."""
    rest = available - available // HELD_OUT_SHARE
    for body in ("mlp", "norm"):
        wanted = PER_FEATURE * features if body == "mlp" else NORM_TOKENS
        if body == "mlp" and rest < LEAST_PER_FEATURE * features:
            continue
        fit, solve = (pace.fit, pace.solve) if body == "mlp" else (0.0, 0.0)
        count = min(num_layers - 1, max(1, most_exits if body == "mlp" else num_layers))
        while count >= (min(FEW_LAYERS, num_layers - 1) if body == "mlp" else 1):
            for share in (1.0, 0.5, 0.25):
                fitted = min(rest, int(share * wanted))
                held = min(available // HELD_OUT_SHARE, max(LEAST_HELD_OUT, int(share * HELD_OUT)))
                once = fitted + held + (TRIALS - 1) * chosen_on
                measured = held + CANDIDATES * chosen_on
                each = fitted * fit + measured * pace.measure + solve
                yield Work(spaced(count, num_layers), body, fitted, held, once * pace.forward + count * each)
            count //= 2


def spaced(count: int, num_layers: int) -> tuple[int, ...]:
    """``count`` layers below the last, evenly spaced."""
    return tuple(round(place * num_layers / (count + 1)) for place in range(1, count + 1))


@torch.no_grad()
def measure_pace(pipeline: Pipeline, batch: Batch, tokens: float) -> Pace:
    """Time one microbatch through all layers, the final exit and one ``mlp`` exit; equal on every rank.

    Args:
        pipeline: the stages, with ``LastHidden`` teachers.
        batch: the same on every rank.
        tokens: of the microbatch, those that are not masked.
    """
    stage, setup = pipeline.stage, pipeline.stage.setup
    own = dict.fromkeys(("whole", "fit", "measure", "solve", "gate"), 0.0)
    fits = {exit_: exit_.body.fit(setup) for exit_ in stage.exits}

    def at_end(micro: Microbatch, h: Tensor) -> Tensor:
        stage.final_statistics(h, micro.labels)
        return h

    def work(micro: Microbatch, last: Any) -> None:
        mask = torch.ones_like(micro.mask)
        for exit_, fit in fits.items():
            assert fit is not None, "an mlp exit has a fit"
            tap = micro.taps[exit_.spec.layer]
            own["fit"] = _timed(lambda: fit.add(exit_.attention_half(tap, micro.positions), last, mask))  # noqa: B023
            own["measure"] = _timed(lambda: exit_.statistics(tap, micro.positions, micro.labels))  # noqa: B023

    def run() -> None:
        pipeline.run([batch], work, at_end, taught=True)

    run()  # the first is slow
    own["whole"] = _timed(run)
    if stage.exits:
        own["solve"] = _time_solve(setup.architecture)
        own["gate"] = _time_newton_step(setup.architecture.hidden_size)
    slowest = {name: max(each[name] for each in setup.groups.gather(own)) for name in own}
    copies, stages = setup.groups.data.size(), setup.groups.pipeline.size()
    forward = max(slowest["whole"] - slowest["fit"] - slowest["measure"], 0.1 * slowest["whole"])
    return Pace(
        forward=forward / tokens / copies,
        fit=slowest["fit"] / tokens / copies / stages,
        measure=slowest["measure"] / tokens / copies / stages,
        solve=slowest["solve"] / stages,
        gate=slowest["gate"] / copies / stages,
    )


def _time_solve(architecture: Architecture) -> float:
    """Seconds to solve the fit of an ``mlp`` exit for all ridges."""
    features = architecture.ffn_size
    size = min(SOLVED, features)
    matrix = torch.eye(size, dtype=torch.float64, device=platform.device())
    factorised = _timed(lambda: torch.linalg.cholesky(matrix))
    # The factorisation is n^3 / 3 products, the two triangular solves of a column n^2.
    columns = 3 * 2 * architecture.hidden_size / features
    return len(RIDGES) * factorised * (features / size) ** 3 * (1 + columns)


def _time_newton_step(hidden_size: int) -> float:
    """Seconds for each token of a gate's fit."""
    rows = torch.ones(NEWTON_ROWS, hidden_size, dtype=torch.float64, device=platform.device())
    return _timed(lambda: rows.t() @ rows) / NEWTON_ROWS


def _timed(work: Callable[[], object]) -> float:
    platform.synchronize()
    began = time.perf_counter()
    work()
    platform.synchronize()
    return time.perf_counter() - began
