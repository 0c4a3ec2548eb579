"""What every run must be."""

from __future__ import annotations

from .host_syncs import not_allowed
from .runs import Result

TOLERANCE = 0.05
"""How far the memory that is held at most may be off the plan."""

LEAST_SENT = 10**7
"""Bytes below which traffic is not compared in proportion: sums of a loss, norms of gradients."""


def problems(result: Result) -> list[str]:
    """A line for each tensor on a wrong device, wait that is not allowed, or memory that was not planned."""
    lines = [f"device: {fault}" for fault in result.faults]
    lines += [f"host sync: {line}" for line in not_allowed(result)]
    if result.off > TOLERANCE or (result.off < -TOLERANCE and not result.planned_for_another):
        lines.append(
            f"memory: {result.peak / 1e9:.3f} GB at most, {result.planned / 1e9:.3f} GB planned, {result.off:+.1%}"
        )
    for link, (sent, planned) in result.sent.items():
        if abs(sent - planned) > TOLERANCE * max(planned, LEAST_SENT):
            lines.append(f"traffic: {sent / 1e6:,.1f} MB sent to {link}, {planned / 1e6:,.1f} MB planned")
    if result.attention.get("math"):
        lines.append(f"attention: {result.attention['math']} calls hold all scores at once")
    return lines
