"""What the drift tests say of an exit log: a sentence, a table, a plot, and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ee.evaluation.drift.audits import AuditRecord, certificates
from megatron_ee.evaluation.drift.monitor import DriftHistory
from megatron_ee.evaluation.figure import COLOURS, GREY, saved_figure
from megatron_ee.tables import add_columns, make_console, new_table

RECENT = 100
"""Audits whose mean loss is given beside that of all."""
_RAISED = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")
_LARGEST = 700.0  # of a logarithm whose exponential is a float


def drift_dict(history: DriftHistory, audits: Sequence[AuditRecord], uncounted: int) -> dict[str, Any]:
    """The output of ``drift --json``.

    Args:
        history: the tests.
        audits: the requests whose losses they were given.
        uncounted: audited requests that ran in a safer setting, or under another certificate.
    """
    monitor = history.monitor
    recent = history.losses[-RECENT:]
    return {
        "risk": monitor.risk,
        "alarm_level": monitor.alarm_level,
        "audits": monitor.audits,
        "uncounted": uncounted,
        "certificates": certificates(audits),
        "mean_loss": monitor.mean_loss,
        "recent_mean_loss": float(recent.mean()) if len(recent) else None,
        "from_start": {
            "wealth": _exp(monitor.log_wealth),
            "highest_wealth": _exp(monitor.peak),
            "p_value": monitor.p_value,
            "alarm": _place(audits, monitor.alarm),
        },
        "restarting": {
            "sum": monitor.detector,
            "alarms": [_place(audits, audit) for audit in history.restarts],
        },
    }


def judgement(history: DriftHistory) -> str:
    """What the tests say, in a sentence."""
    monitor = history.monitor
    if not monitor.audits:
        return "No audited request counts, so nothing can be said."
    if monitor.alarm is None and not history.restarts:
        return (
            f"No alarm: nothing in {monitor.audits:,} audited requests speaks strongly against a mean loss of at most "
            f"{monitor.risk:.3g}."
        )
    parts: list[str] = []
    if monitor.alarm is not None:
        parts.append(f"the test from the start alarmed at audit {monitor.alarm:,}")
    if history.restarts:
        count, expected = len(history.restarts), monitor.audits * monitor.alarm_level
        times = "once" if count == 1 else f"{count:,} times, last"
        parts.append(
            f"the restarting test alarmed {times} at audit {history.restarts[-1]:,} (false alarms among so many audits "
            f"would be {expected:.2g} on average, at most)"
        )
    return f"ALARM: the mean loss seems to be above the risk of {monitor.risk:.3g}: {'; '.join(parts)}."


def print_drift(history: DriftHistory, audits: Sequence[AuditRecord], uncounted: int) -> None:
    """Print ``drift_dict`` to stdout. The arguments are the same."""
    monitor, console = history.monitor, make_console()
    figures = drift_dict(history, audits, uncounted)
    table = new_table("Drift of audited requests", console)
    add_columns(table, "audits", "not counted", "risk", "mean loss", f"of the last {RECENT}")
    losses = (figures["mean_loss"], figures["recent_mean_loss"])
    means = ("-" if loss is None else f"{loss:.4f}" for loss in losses)
    table.add_row(f"{monitor.audits:,}", f"{uncounted:,}", f"{monitor.risk:g}", *means)
    console.print(table)
    tests = new_table("", console)
    add_columns(tests, "test", words=True)
    add_columns(tests, "now", "alarm at", "alarms", "at audit", "request")
    limit = f"{1 / monitor.alarm_level:g}"
    start, restarts = figures["from_start"], figures["restarting"]["alarms"]
    values = (start["wealth"], monitor.detector)
    for name, value, alarms in zip(
        ("from the start", "restarting"), values, ([start["alarm"]] if start["alarm"] else [], restarts), strict=True
    ):
        last = alarms[-1] if alarms else {"audit": "-", "number": "-"}
        tests.add_row(name, f"{value:.3g}", limit, str(len(alarms)), str(last["audit"]), str(last["number"]))
    console.print(tests)
    console.print(judgement(history))


def plot_drift(history: DriftHistory, path: Path) -> None:
    """Plot the wealth of both tests over the audits, on a logarithmic scale, with the alarms.

    Raises:
        UserError: ``path`` is not a .png, .pdf or .svg, or cannot be written.
        ValueError: there are no audits.
    """
    monitor = history.monitor
    if not monitor.audits:
        raise ValueError("there is no audit to plot")
    at = np.arange(1, monitor.audits + 1)
    wealth = history.log_wealths / math.log(10)
    sums = np.log10(np.maximum(history.detectors, 1e-300))
    limit = -math.log10(monitor.alarm_level)
    with saved_figure(path, (7.5, 4.8)) as figure:
        axes = figure.subplots()
        axes.plot(at, wealth, color=COLOURS[0], lw=1.6, label="from the start")
        axes.plot(at, sums, color=COLOURS[1], lw=1.2, label="restarting")
        axes.axhline(limit, color=GREY, lw=1, ls=":", label=f"alarm at {1 / monitor.alarm_level:g}")
        if monitor.alarm is not None:
            at_alarm = wealth[monitor.alarm - 1]
            axes.plot([monitor.alarm], [at_alarm], "o", color=COLOURS[0], ms=7, label="alarm, from the start")
        if history.restarts:
            heights = [limit] * len(history.restarts)
            axes.plot(history.restarts, heights, "v", color=COLOURS[1], ms=7, label="alarm, restarting")
        axes.set_ylim(bottom=max(-6.0, min(0.0, float(min(wealth.min(), sums.min())))) - 0.3)
        axes.yaxis.set_major_formatter(lambda value, _: "10" + f"{value:g}".translate(_RAISED))
        axes.locator_params(axis="y", integer=True)
        axes.set_xlabel("audited requests, in the order of admission")
        axes.set_ylabel("evidence against the certified risk")
        axes.set_title(f"Drift: is the mean loss still at most {monitor.risk:g}?", loc="left")
        axes.margins(x=0.02)
        axes.legend()


def _place(audits: Sequence[AuditRecord], audit: int | None) -> dict[str, Any] | None:
    """An audit, counted from 1, and its request."""
    if audit is None:
        return None
    record = audits[audit - 1]
    return {"audit": audit, "number": record.number, "id": record.id}


def _exp(logarithm: float) -> float:
    return math.exp(min(logarithm, _LARGEST))
