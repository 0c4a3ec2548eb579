"""Repeated calibrations of synthetic exits whose risk is known: how often the promise fails, and what is gained.

Each trial draws a sample of records and calibrates. A setting of the exits skips a share of the layers, and its
expected loss grows with the square of that share. A record has one difficulty for all settings. A trial violates the
promise if the chosen setting's expected loss is above the risk: this may happen in at most delta of the trials. The
speed is one over the share of the layers that run, 1 for full mode.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from megatron_ee.commands import at_least
from megatron_ee.evaluation.calibration.pvalues import P_VALUES, fixed_sequence
from megatron_ee.evaluation.statistics import Floats
from megatron_ee.inference.certificate import PValue
from megatron_ee.tables import add_columns, make_console, new_table

COUNTS = (50, 200, 1000)
SETTINGS, MOST_SKIPPED, MOST_LOSS = 40, 0.6, 0.5
LOSSES = {
    "0 or 1": "the answer differs",
    "graded": "every tenth to every second answer loses a part, as with ROUGE",
    "small": "every answer loses a little",
}
_AT_ONCE = 50
"""Trials whose losses are in memory at a time."""


@dataclass(frozen=True)
class Row:
    """Trials of one kind of losses, number of records and p-value.

    Attributes:
        losses: key of ``LOSSES``.
        n: records of a sample.
        p_value: its name.
        violations: share of the trials that violate the promise.
        allowed: delta, and three standard deviations of such a share.
        certified: share of the trials that leave full mode.
        speed: mean speed over the trials.
    """

    losses: str
    n: int
    p_value: PValue
    violations: float
    allowed: float
    certified: float
    speed: float


def skipped() -> Floats:
    """Share of the layers that each setting skips, from safe to fast."""
    return np.linspace(0, MOST_SKIPPED, SETTINGS + 1)[1:]


def expected_losses() -> Floats:
    """Expected loss of each setting."""
    return MOST_LOSS * (skipped() / MOST_SKIPPED) ** 2


def draw(kind: str, trials: int, count: int, source: np.random.Generator) -> Floats:
    """Losses with exactly ``expected_losses()``, ``[trials, settings, count]``."""
    means = expected_losses()[:, None]
    difficulty = source.random((trials, 1, count))
    if kind == "0 or 1":
        return np.asarray(difficulty < means, dtype=np.float64)
    sizes = source.beta(4.0, 4.0, (trials, 1, count))  # with mean 1 / 2
    if kind == "graded":
        return np.where(difficulty < 2 * means, sizes, 0.0)
    return 2 * sizes * means


def measure(kind: str, count: int, trials: int, risk: float, delta: float, seed: int) -> list[Row]:
    """Calibrate ``trials`` times with each p-value, on the same samples."""
    source = np.random.default_rng(seed)
    passed: dict[PValue, list[int]] = {name: [] for name in P_VALUES}
    for start in range(0, trials, _AT_ONCE):
        losses = draw(kind, min(_AT_ONCE, trials - start), count, source)
        for name, p_value in P_VALUES.items():
            passed[name] += [fixed_sequence(row, delta) for row in p_value(losses, risk, delta)]
    speeds = np.concatenate(([1.0], 1 / (1 - skipped())))
    safe = int((expected_losses() <= risk).sum())
    allowed = delta + 3 * math.sqrt(delta * (1 - delta) / trials)
    rows = []
    for name, counts in passed.items():
        chosen = np.array(counts)
        violations, certified = float((chosen > safe).mean()), float((chosen > 0).mean())
        rows.append(Row(kind, count, name, violations, allowed, certified, float(speeds[chosen].mean())))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table, or JSON. Status 1 if a promise fails more often than delta allows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.add_argument("--trials", type=at_least(1), default=1000, metavar="N", help="calibrations (default: 1000)")
    parser.add_argument("--risk", type=float, default=0.1, metavar="R", help="default: 0.1")
    parser.add_argument("--delta", type=float, default=0.1, metavar="D", help="default: 0.1")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="default: 0")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    rows = [
        row
        for kind in LOSSES
        for count in COUNTS
        for row in measure(kind, count, arguments.trials, arguments.risk, arguments.delta, arguments.seed)
    ]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        _print(rows, arguments)
    return int(any(row.violations > row.allowed for row in rows))


def _print(rows: Sequence[Row], arguments: argparse.Namespace) -> None:
    console = make_console()
    safe = expected_losses() <= arguments.risk
    best = 1 / (1 - float(skipped()[safe].max(initial=0.0)))
    title = (
        f"{arguments.trials} calibrations, risk {arguments.risk:g}, delta {arguments.delta:g}; safe speed {best:.3f}"
    )
    table = new_table(title, console)
    add_columns(table, "losses", words=True)
    add_columns(table, "n")
    add_columns(table, "p-value", words=True)
    add_columns(table, "violations", "at most", "certified", "speed")
    for row in rows:
        figures = (f"{row.violations:.3f}", f"{row.allowed:.3f}", f"{row.certified:.3f}", f"{row.speed:.4f}")
        table.add_row(row.losses, str(row.n), row.p_value, *figures)
    console.print(table)
    speeds = {(row.losses, row.n, row.p_value): row.speed for row in rows}
    for kind in LOSSES:
        gains = [speeds[kind, n, "betting"] / speeds[kind, n, "hoeffding-bentkus"] - 1 for n in COUNTS]
        listed = ", ".join(f"{gain:+.1%} with n = {n}" for gain, n in zip(gains, COUNTS, strict=True))
        console.print(f"speed of betting over hoeffding-bentkus, losses {kind} ({LOSSES[kind]}): {listed}")


if __name__ == "__main__":
    sys.exit(main())
