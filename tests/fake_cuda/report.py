"""One line for a run."""

from __future__ import annotations

from .runs import Result

HEADER = f"{'plan GB':>8} {'peak GB':>8} {'off':>6} {'launches':>8} {'syncs':>5}  run"


def line(result: Result) -> str:
    """Configuration and rank, memory against the plan, launches and host syncs of a step, or of all requests."""
    return (
        f"{result.planned / 1e9:8.3f} {result.peak / 1e9:8.3f} {result.off:+6.1%} {result.launches:8,} "
        f"{sum(result.syncs.values()):5,}  {result.name}; {result.where}"
    )


def details(result: Result) -> str:
    """Host syncs, attention backends and where most is launched."""
    lines = [f"{count:8,} {kind:11} {where}" for (where, kind), count in sorted(result.syncs.items())]
    lines += [f"{count:8,} attention   {backend}" for backend, count in sorted(result.attention.items())]
    lines += [f"{count:8,} launches    {where}" for where, count in result.launches_by_place.items()]
    lines += [
        f"{sent / 1e6:8,.1f} MB sent     {link} ({planned / 1e6:,.1f} planned)"
        for link, (sent, planned) in result.sent.items()
        if sent or planned
    ]
    lines += [f"{size / 1e6:8,.0f} MB          {where}" for where, size in sorted(result.composition.items())]
    return "\n".join(lines)
