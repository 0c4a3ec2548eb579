"""Quality per exit, as tables, as files and as a dict for ``--json``."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ee.checkpoint.atomic import write_json
from megatron_ee.config.exits import ExitSpec
from megatron_ee.errors import CheckpointError
from megatron_ee.evaluation.history import Validation
from megatron_ee.evaluation.plots import plot_sweep
from megatron_ee.model.quality import FreeRunning, Quality
from megatron_ee.tables import add_columns, make_console, new_table

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_ee.tables import Table

HISTORY_ROWS = 12


def report_dict(quality: Quality, exits: Sequence[ExitSpec]) -> dict[str, Any]:
    """The output of ``evaluate --json``: ``Quality.to_dict`` with ``body`` and ``head`` added to each exit.

    ``Quality.from_dict`` can read it.
    """
    _check(quality, exits)
    data = quality.to_dict()
    data["exits"] = [
        {"layer": spec.layer, "body": spec.body, "head": spec.head, **entry}
        for spec, entry in zip(exits, data["exits"], strict=True)
    ]
    return data


def write_quality(
    quality: Quality, exits: Sequence[ExitSpec], path: Path, extra: Mapping[str, Any] | None = None
) -> None:
    """Write ``path.json``, with ``extra`` entries, and, if there was a sweep over exits, its plot ``path.png``.

    Raises:
        CheckpointError: they cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path.with_suffix(".json"), {**report_dict(quality, exits), **(extra or {})})
        if quality.exits and quality.sweep:
            plot_sweep(quality, path.with_suffix(".png"))
    except OSError as error:
        raise CheckpointError(f"{path}.json: cannot be written: {error.strerror}") from None


def comparison_dict(
    initial: Quality, tuned: Quality, exits: Sequence[ExitSpec], copied: Quality | None = None
) -> dict[str, Any]:
    """``final_loss``, and per exit its loss, agreement and accuracy before and after tuning, as a dict.

    ``copied``: quality of the exits with copied weights, before the fit, if there was one.
    """
    stages = {"copied": copied, "initial": initial, "tuned": tuned}
    reports = {name: report_dict(quality, exits) for name, quality in stages.items() if quality is not None}
    rows = []
    for place, new in enumerate(reports["tuned"]["exits"]):
        row = {key: new[key] for key in ("layer", "body", "head")}
        for key in ("loss", "agreement", "accuracy"):
            row |= {f"{key}_{name}": report["exits"][place][key] for name, report in reports.items()}
        rows.append(row)
    return {"final_loss": reports["tuned"]["final_loss"], "exits": rows}


def print_quality(
    quality: Quality,
    exits: Sequence[ExitSpec],
    title: str = "Quality per exit",
    *,
    to_stderr: bool = False,
    console: Console | None = None,
) -> None:
    """Print the table per exit and, if they were measured, acceptance, free-running threshold mode and the sweep.

    Args:
        quality: to print.
        exits: the exits, in the same order.
        title: title of the first table.
        to_stderr: print to stderr, not to stdout.
        console: print to this console.

    Raises:
        ValueError: ``exits`` do not match ``quality``.
    """
    _check(quality, exits)
    console = console or make_console(sys.stderr if to_stderr else sys.stdout)
    tables = [_exit_table(quality, exits, title, console)]
    if any(exit_.acceptance is not None for exit_ in quality.exits):
        tables.append(_acceptance_table(quality, exits, console))
    if quality.free_running is not None:
        tables.append(_free_running_table(quality.free_running, quality.num_layers, "", console))
    if quality.sweep and quality.exits:
        tables += [_sweep_table(quality, console), _above_table(quality, console)]
    for index, table in enumerate(tables):
        if index:
            console.print()
        console.print(table)


def print_free_running(found: FreeRunning, num_layers: int, of: str) -> None:
    """Print free-running threshold mode to stderr.

    Args:
        found: what was measured.
        num_layers: the backbone's depth.
        of: which exits, for the title.
    """
    console = make_console(sys.stderr)
    console.print(_free_running_table(found, num_layers, of, console))


def print_comparison(
    initial: Quality,
    tuned: Quality,
    exits: Sequence[ExitSpec],
    copied: Quality | None = None,
    console: Console | None = None,
) -> None:
    """Print the quality of each exit before and after tuning.

    Args:
        initial: before.
        tuned: after.
        exits: the exits, in the same order.
        copied: as for ``comparison_dict``; it takes the place of accuracy, so that a line fits on a terminal.
        console: print to this console, not to stdout.

    Raises:
        ValueError: ``exits`` do not match one of the others.
    """
    stages = [quality for quality in (copied, initial, tuned) if quality is not None]
    for quality in stages:
        _check(quality, exits)
    console = console or make_console()
    title = "Exits before and after tuning" if copied is None else "Exits as copied, as fitted, and tuned"
    table = new_table(f"{title} ({tuned.tokens:,} held-out tokens)", console)
    add_columns(table, "after layer", "exit", words=True)
    names = ("loss", "agreement", "accuracy") if copied is None else ("loss", "agreement")
    add_columns(table, *names)
    for spec, *each in zip(exits, *(quality.exits for quality in stages), strict=True):
        cells = (
            [_number(exit_.loss) for exit_ in each],
            [_percent(exit_.agreement) for exit_ in each],
            [_percent(exit_.accuracy) for exit_ in each],
        )
        table.add_row(str(spec.layer), _label(spec), *map(" -> ".join, cells[: len(names)]))
    final = (_number(tuned.final_loss), _percent(1.0), _percent(tuned.final_accuracy))
    table.add_row(str(tuned.num_layers), "final", *final[: len(names)], style="dim")
    console.print(table)


def print_history(validations: Sequence[Validation], best_step: int | None, console: Console | None = None) -> None:
    """Print loss and agreement per exit against the tokens seen, to stderr by default.

    Of many validations ``HISTORY_ROWS`` are shown, evenly spread, with the first, the best and the last.

    Args:
        validations: at least one, by step.
        best_step: step of the adapter that is kept as the best; its row is marked.
    """
    console = console or make_console(sys.stderr)
    final = _number(validations[-1].final_loss)
    table = new_table(f"Exits while tuning, on validation data (final exit: loss {final})", console)
    add_columns(table, "after step", "tokens seen")
    layers = sorted(validations[-1].losses)
    for layer in layers:
        add_columns(table, f"exit {layer}: loss", f"exit {layer}: agreement")
    free_running = any(each.free_running is not None for each in validations)
    if free_running:
        add_columns(table, "threshold mode: equal", "layers per token")
    add_columns(table, "kept as", words=True)
    for row in _spread(validations, best_step):
        cells = [
            text
            for layer in layers
            for text in (_number(row.losses.get(layer, math.nan)), _percent(row.agreements.get(layer, math.nan)))
        ]
        if free_running:
            equal, layers_per_token = row.free_running or (math.nan, math.nan)
            cells += [_percent(equal), _number(layers_per_token, 2)]
        table.add_row(f"{row.step:,}", f"{row.tokens_seen:,}", *cells, "adapter-best" if row.step == best_step else "")
    console.print(table)


def _spread(validations: Sequence[Validation], best_step: int | None) -> list[Validation]:
    last = len(validations) - 1
    shown = {round(last * row / (HISTORY_ROWS - 1)) for row in range(HISTORY_ROWS)} if last >= HISTORY_ROWS else None
    return [
        validation
        for place, validation in enumerate(validations)
        if shown is None or place in shown or validation.step == best_step
    ]


def _exit_table(quality: Quality, exits: Sequence[ExitSpec], title: str, console: Console) -> Table:
    table = new_table(f"{title} ({quality.tokens:,} tokens)", console)
    add_columns(table, "after layer", "exit", words=True)
    add_columns(table, "loss", "perplexity", "accuracy", "agreement", "confidence", "ECE")
    for spec, exit_ in zip(exits, quality.exits, strict=True):
        shares = (exit_.accuracy, exit_.agreement, exit_.mean_confidence, exit_.ece)
        table.add_row(
            str(spec.layer),
            _label(spec),
            _number(exit_.loss),
            _number(exit_.perplexity, 1),
            *(_percent(share) for share in shares),
        )
    table.add_row(
        str(quality.num_layers),
        "final",
        _number(quality.final_loss),
        _number(quality.final_perplexity, 1),
        _percent(quality.final_accuracy),
        _percent(1.0),
        *("",) * 2,
        style="dim",
    )
    return table


def _acceptance_table(quality: Quality, exits: Sequence[ExitSpec], console: Console) -> Table:
    measured = [(spec, e.acceptance) for spec, e in zip(exits, quality.exits, strict=True) if e.acceptance is not None]
    length = measured[0][1].draft_length
    table = new_table(f"Speculative decoding, drafts of {length} tokens", console)
    add_columns(table, "after layer", "exit", words=True)
    add_columns(table, "tokens per round", "proposals accepted")
    for spec, drafts in measured:
        table.add_row(str(spec.layer), _label(spec), _number(drafts.length, 2), _percent(drafts.rate))
    return table


def _free_running_table(found: FreeRunning, num_layers: int, of: str, console: Console) -> Table:
    title = f"Free-running threshold mode{' ' * bool(of)}{of}, beside the full model on {found.prompts} prompts"
    table = new_table(f"{title} (of {num_layers} layers)", console)
    add_columns(table, "threshold", "layers per token", "equal tokens", "tokens before the first other one")
    table.add_row(
        f"{found.threshold:g}",
        _number(found.layers_per_token, 2),
        _percent(found.agreement),
        f"{_number(found.departure, 1)} of {_number(found.tokens / found.prompts, 1)}",
    )
    return table


def _sweep_table(quality: Quality, console: Console) -> Table:
    table = new_table(f"Leaving at the first exit that is confident enough (of {quality.num_layers} layers)", console)
    add_columns(table, "threshold", "layers per token", "agreement", "accuracy")
    add_columns(table, *(f"leave at {exit_.layer}" for exit_ in quality.exits), "final")
    for point in quality.sweep:
        table.add_row(
            f"{point.threshold:g}",
            _number(point.mean_layers, 2),
            _percent(point.agreement),
            _percent(point.accuracy),
            *(_percent(share) for share in point.shares),
        )
    return table


def _above_table(quality: Quality, console: Console) -> Table:
    table = new_table("Each exit alone: tokens at or above the threshold, and agreement among them", console)
    add_columns(table, "threshold")
    for exit_ in quality.exits:
        add_columns(table, f"exit {exit_.layer}: tokens", f"exit {exit_.layer}: agreement")
    for point in quality.sweep:
        cells = (text for above in point.above for text in (_percent(above.share), _percent(above.agreement)))
        table.add_row(f"{point.threshold:g}", *cells)
    return table


def _label(spec: ExitSpec) -> str:
    return spec.body if spec.head == "own" else f"{spec.body}, {spec.head}"


def _number(value: float, digits: int = 3) -> str:
    return f"{value:,.{digits}f}" if math.isfinite(value) else "-"


def _percent(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else "-"


def _check(quality: Quality, exits: Sequence[ExitSpec]) -> None:
    measured, given = [exit_.layer for exit_ in quality.exits], [spec.layer for spec in exits]
    if measured != given:
        raise ValueError(f"quality is of exits after layers {measured}, not {given}")
