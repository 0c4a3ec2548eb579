"""What exit logs say of each task and day: how deep tokens went, what certificates covered, latency, audits."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ee.evaluation.figure import COLOURS, GREY, saved_figure
from megatron_ee.serving.exit_record import BINS, ExitRecord
from megatron_ee.tables import add_columns, make_console, new_table

PLOTTED_TASKS = 6
Cell = tuple[str | None, str | None]
"""A task and a day; None for all of them."""


@dataclass
class ExitFigures:
    """Sums over requests.

    Attributes:
        requests: number.
        tokens: emitted.
        early: tokens that left before the last layer.
        known: tokens of models whose depth is known; ``early`` is a share of them.
        by_layer: tokens by the layer that emitted them.
        bins: tokens by confidence.
        layer_runs: decoder layers run for tokens after the first of each output.
        later: tokens after the first of each output.
        proposed: tokens that exits proposed as drafts.
        accepted: of them, those that the model accepted.
        modes, statuses, tiers, coverage: requests by them.
        first_token, seconds: of each request.
        audits: audited requests.
        audit_loss: sum of their losses.
    """

    requests: int = 0
    tokens: int = 0
    early: int = 0
    known: int = 0
    by_layer: Counter[int] = field(default_factory=Counter)
    bins: list[int] = field(default_factory=lambda: [0] * BINS)
    layer_runs: float = 0.0
    later: int = 0
    proposed: int = 0
    accepted: int = 0
    modes: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    tiers: Counter[str] = field(default_factory=Counter)
    coverage: Counter[str] = field(default_factory=Counter)
    first_token: array[float] = field(default_factory=lambda: array("d"))
    seconds: array[float] = field(default_factory=lambda: array("d"))
    audits: int = 0
    audit_loss: float = 0.0

    def add(self, record: ExitRecord) -> None:
        """Add a request."""
        self.requests += 1
        self.tokens += record.tokens
        layers = {int(layer): count for layer, count in record.tokens_by_layer.items()}
        self.by_layer.update(layers)
        if record.num_layers is not None:
            self.known += sum(layers.values())
            self.early += sum(count for layer, count in layers.items() if layer < record.num_layers)
        self.bins = [old + new for old, new in zip(self.bins, record.confidences, strict=True)]
        if record.layers_per_token is not None:
            later = max(record.tokens - record.outputs, 1) if record.later_tokens is None else record.later_tokens
            self.later += later
            self.layer_runs += record.layers_per_token * later
        self.proposed += record.proposed
        self.accepted += record.accepted
        self.modes[record.mode] += 1
        self.statuses[record.status] += 1
        self.tiers[record.tier] += 1
        self.coverage["none" if record.calibration is None else record.calibration.status] += 1
        self.seconds.append(record.seconds)
        if record.time_to_first_token is not None:
            self.first_token.append(record.time_to_first_token)
        if record.audit is not None:
            self.audits += 1
            self.audit_loss += record.audit.loss

    @property
    def layers_per_token(self) -> float | None:
        """Mean over the tokens after the first of each output."""
        return self.layer_runs / self.later if self.later else None

    @property
    def early_share(self) -> float | None:
        """Share of the tokens that left before the last layer."""
        return self.early / self.known if self.known else None

    def to_dict(self) -> dict[str, Any]:
        """The figures in JSON types; None where there is nothing to count. Times are in seconds."""
        return {
            "requests": self.requests,
            "tokens": self.tokens,
            "tokens_by_layer": {str(layer): count for layer, count in sorted(self.by_layer.items())},
            "early_share": self.early_share,
            "layers_per_token": self.layers_per_token,
            "confidences": self.bins,
            "proposed": self.proposed,
            "accepted": self.accepted,
            "acceptance_rate": self.accepted / self.proposed if self.proposed else None,
            "modes": dict(sorted(self.modes.items())),
            "statuses": dict(sorted(self.statuses.items())),
            "tiers": dict(sorted(self.tiers.items())),
            "coverage": dict(sorted(self.coverage.items())),
            "time_to_first_token": _quantiles(self.first_token),
            "seconds": _quantiles(self.seconds),
            "audits": self.audits,
            "audit_mean_loss": self.audit_loss / self.audits if self.audits else None,
        }


def exit_figures(records: Iterable[ExitRecord]) -> dict[Cell, ExitFigures]:
    """Figures by task and day, and of all tasks, all days, and both."""
    cells: dict[Cell, ExitFigures] = {}
    for record in records:
        for task in (record.task, None):
            for day in (record.day, None):
                cells.setdefault((task, day), ExitFigures()).add(record)
    return cells


def tasks_of(cells: Mapping[Cell, ExitFigures]) -> list[str]:
    """The tasks, the most frequent first."""
    found = [task for task, day in cells if day is None and task is not None]
    return sorted(found, key=lambda task: (-cells[task, None].requests, task))


def days_of(cells: Mapping[Cell, ExitFigures]) -> list[str]:
    """The days, the first one first."""
    return sorted(day for task, day in cells if task is None and day is not None)


def report_json(cells: Mapping[Cell, ExitFigures]) -> dict[str, Any]:
    """The output of ``exits-report --json``: ``total``, and ``rows`` by task and day."""
    rows = [
        {"task": task, "day": day, **cells[task, day].to_dict()}
        for task in tasks_of(cells)
        for day in days_of(cells)
        if (task, day) in cells
    ]
    total = cells.get((None, None), ExitFigures()).to_dict()
    return {"total": total, "tasks": {task: cells[task, None].to_dict() for task in tasks_of(cells)}, "rows": rows}


def print_exits(cells: Mapping[Cell, ExitFigures]) -> None:
    """Print tables to stdout: requests and exits by task and day, and the tokens by layer of each task."""
    console = make_console()
    if not cells:
        console.print("The logs have no requests.")
        return
    table = new_table("Requests by task and day (UTC)", console)
    add_columns(table, "task", "day", words=True)
    add_columns(table, "requests", "not ok", "full mode", "certified", "tokens", "layers per token", "early")
    add_columns(table, "accepted", "first token p50 s", "first token p95 s", "answer p95 s", "audits", "mean loss")
    tasks, days = tasks_of(cells), days_of(cells)
    for task in _with_all(tasks):
        for day in _with_all(days):
            if (task, day) in cells:
                table.add_row(task or "all", day or "all", *_row(cells[task, day].to_dict()))
    console.print(table)
    layers = sorted(cells[None, None].by_layer)
    exits = new_table("Tokens by the layer that emitted them", console)
    add_columns(exits, "task", words=True)
    add_columns(exits, *(str(layer) for layer in layers))
    for task in _with_all(tasks):
        found = cells[task, None].by_layer
        exits.add_row(task or "all", *(f"{found[layer] / max(found.total(), 1):.1%}" for layer in layers))
    console.print(exits)


def plot_exits(cells: Mapping[Cell, ExitFigures], path: Path) -> None:
    """Plot against the days: layers per token of each task, tokens by layer, and the time to the first token.

    Raises:
        UserError: ``path`` is not a .png, .pdf or .svg, or cannot be written.
        ValueError: there are no requests.
    """
    days, tasks = days_of(cells), tasks_of(cells)
    if not days:
        raise ValueError("there is no request to plot")
    shown = _with_all(tasks) if len(tasks) <= PLOTTED_TASKS else [*tasks[:PLOTTED_TASKS], None]
    with saved_figure(path, (min(16.0, 7.0 + 0.12 * len(days)), 9.5)) as figure:
        top, middle, bottom = figure.subplots(3, 1, sharex=True)
        at = np.arange(len(days))
        for index, task in enumerate(shown):
            found = [cells.get((task, day), ExitFigures()) for day in days]
            colour, label = (GREY, f"all {len(tasks)} tasks") if task is None else (COLOURS[index], task)
            style = {"color": colour, "ms": 4, "lw": 1.6, "label": label}
            top.plot(at, [_number(each.layers_per_token) for each in found], "o-", **style)
            waits = [_number((_quantiles(each.first_token) or {}).get("p95")) for each in found]
            bottom.plot(at, waits, "o-", **style)
        _stack(middle, at, [cells[None, day] for day in days])
        top.set(ylabel="layers per token", ylim=(0, None))
        top.set_title("Layers run per token, by task", loc="left")
        middle.set(ylabel="tokens (%)", ylim=(0, 100))
        middle.set_title("Tokens by the layer that emitted them, all tasks", loc="left")
        bottom.set(ylabel="seconds", ylim=(0, None))
        bottom.set_title("Time to the first token, 95th percentile, by task", loc="left")
        step = max(1, len(days) // 12)
        bottom.set_xticks(at[::step], days[::step], rotation=30, ha="right")
        for axes in (top, middle) if cells[None, None].by_layer else (top,):  # without tokens there are no bars
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _stack(axes: Any, at: np.ndarray, found: Sequence[ExitFigures]) -> None:
    """Bars of shares of tokens by layer, the shallowest at the bottom, darker the deeper."""
    from matplotlib import colormaps

    layers = sorted({layer for each in found for layer in each.by_layer})
    bottoms = np.zeros(len(found))
    for index, layer in enumerate(layers):
        shares = np.array([100 * each.by_layer[layer] / max(each.by_layer.total(), 1) for each in found])
        colour = colormaps["viridis_r"](0.05 + 0.9 * index / max(len(layers) - 1, 1))
        axes.bar(at, shares, bottom=bottoms, width=0.8, color=colour, label=f"layer {layer}")
        bottoms += shares


def _with_all(names: Sequence[str]) -> list[str | None]:
    """The names, and None for all of them if they are several."""
    return [*names, None] if len(names) > 1 else [*names]


def _row(figures: Mapping[str, Any]) -> list[str]:
    """The cells of a row of the first table."""
    count = figures["requests"]
    first, whole = figures["time_to_first_token"] or {}, figures["seconds"] or {}
    return [
        f"{count:,}",
        f"{count - figures['statuses'].get('ok', 0):,}",
        f"{figures['modes'].get('full', 0) / count:.0%}",
        f"{figures['coverage'].get('certified', 0) / count:.0%}",
        f"{figures['tokens']:,}",
        _shown(figures["layers_per_token"], ".1f"),
        _shown(figures["early_share"], ".0%"),
        _shown(figures["acceptance_rate"], ".0%"),
        *(_shown(value, ".3g") for value in (first.get("p50"), first.get("p95"), whole.get("p95"))),
        f"{figures['audits']:,}",
        _shown(figures["audit_mean_loss"], ".4f"),
    ]


def _quantiles(values: Sequence[float]) -> dict[str, float] | None:
    if not len(values):
        return None
    found = np.quantile(np.asarray(values), (0.5, 0.95, 0.99)).tolist()
    return dict(zip(("p50", "p95", "p99"), found, strict=True))


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
