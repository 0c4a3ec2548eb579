"""Plots of quality per exit and of a tuning run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ee.evaluation.figure import COLOURS, GREY, saved_figure
from megatron_ee.evaluation.history import Losses, Validation, read_log
from megatron_ee.model.quality import Quality

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTHED_FROM = 60  # steps; with fewer the curve is not smoothed


def plot_sweep(quality: Quality, path: str | Path, title: str = "Early exit: what a threshold saves and costs") -> None:
    """Plot agreement and accuracy of the emitted tokens against layers per token, one point per threshold.

    For comparison, hollow markers show each exit used for every token. A threshold is useful if its line is above the
    markers.

    Raises:
        UserError: ``path`` is not a .png, .pdf or .svg, or cannot be written.
        ValueError: there are no exits or no thresholds.
    """
    if not quality.exits or not quality.sweep:
        raise ValueError("there is no sweep to plot: no exits or no thresholds")
    points = sorted(quality.sweep, key=lambda point: point.mean_layers)
    layers = [point.mean_layers for point in points]
    single = [exit_.layer for exit_ in quality.exits] + [quality.num_layers]
    with saved_figure(path, (7.5, 4.8)) as figure:
        from matplotlib.legend_handler import HandlerTuple

        axes, hollow = figure.subplots(), []
        curves = (
            ("agreement", "agreement with the final exit", COLOURS[0], "o", 1.0),
            ("accuracy", "accuracy (next token of the text)", COLOURS[1], "s", quality.final_accuracy),
        )
        for name, label, colour, marker, final in curves:
            alone = [getattr(exit_, name) for exit_ in quality.exits] + [final]
            hollow += axes.plot(single, _percents(alone), marker, mfc="white", mec=colour, ms=6, zorder=3)
            values = _percents([getattr(point, name) for point in points])
            axes.plot(layers, values, marker + "-", color=colour, ms=5, label=label, zorder=4)
        axes.axvline(quality.num_layers, color=GREY, lw=1, ls=":")
        axes.set_xlim(0, quality.num_layers * 1.04)
        axes.set_ylim(0, 107)
        axes.set_xlabel(f"layers run per token (mean; the model has {quality.num_layers})")
        axes.set_ylabel("tokens (%)")
        axes.set_title(title, loc="left")
        lines, labels = axes.get_legend_handles_labels()
        handles: list[Any] = [*lines, tuple(hollow)]
        figure.legend(
            handles,
            [*labels, "one exit for all tokens"],
            handler_map={tuple: HandlerTuple(ndivide=None)},
            loc="outside lower center",
            ncols=3,
        )
        texts = [(point.mean_layers, point.agreement * 100, f"{point.threshold:g}") for point in points]
        _annotate(figure, axes, texts, "threshold ")


def plot_reliability(quality: Quality, path: str | Path, title: str = "Reliability of the exits' confidence") -> None:
    """Plot per exit accuracy and agreement against confidence, and the share of tokens at each confidence.

    Raises:
        UserError: ``path`` is not a .png, .pdf or .svg, or cannot be written.
        ValueError: there are no exits.
    """
    if not quality.exits:
        raise ValueError("there is no exit to plot")
    rows = math.ceil(len(quality.exits) / 4)
    columns = math.ceil(len(quality.exits) / rows)
    with saved_figure(path, (3.1 * columns + 0.5, 3.2 * rows + 0.7)) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(quality.exits) :]:
            axes.set_visible(False)
        for axes, exit_ in zip(grid.flat, quality.exits, strict=False):
            shares = [100 * bin_.tokens / quality.tokens for bin_ in exit_.bins]
            lower, width = [100 * bin_.lower for bin_ in exit_.bins], 100 / len(exit_.bins)
            axes.bar(lower, shares, width=width * 0.92, align="edge", color="#d9d9d9", label="share of tokens")
            axes.plot([0, 100], [0, 100], color=GREY, lw=1, ls=":", label="perfectly calibrated")
            filled = [bin_ for bin_ in exit_.bins if bin_.tokens]
            confidence = _percents([bin_.confidence for bin_ in filled])
            for name, colour, marker in (("agreement", COLOURS[0], "o"), ("accuracy", COLOURS[1], "s")):
                values = _percents([getattr(bin_, name) for bin_ in filled])
                axes.plot(confidence, values, marker + "-", color=colour, ms=4, lw=1.2, label=name)
            axes.set_title(f"after layer {exit_.layer}: ECE {exit_.ece:.1%}", loc="left")
            axes.set(xlim=(0, 100), ylim=(0, 103), xticks=range(0, 100, 20), yticks=range(0, 101, 20))
        for axes in grid[:, 0]:
            axes.set_ylabel("tokens (%)")
        for axes in grid.flat[max(0, len(quality.exits) - columns) : len(quality.exits)]:  # the bottom row of plots
            axes.set_xlabel("confidence (%)")
            axes.tick_params(labelbottom=True)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)


def plot_training(log: str | Path, path: str | Path, title: str = "Loss of each exit while tuning") -> None:
    """Plot one loss curve per exit from a run's JSONL log, with its validations as markers.

    Raises:
        DataError: the log cannot be read, or has neither steps nor validations.
        UserError: ``path`` is not a .png, .pdf or .svg, or cannot be written.
    """
    steps, validations = read_log(log)
    layers = sorted({layer for losses in (*steps.values(), *validations.values()) for layer in losses})
    finals = [losses[0] for losses in validations.values() if 0 in losses]
    with saved_figure(path, (7.5, 4.8)) as figure:
        axes = figure.subplots()
        for index, layer in enumerate(layer for layer in layers if layer):
            colour = COLOURS[index % len(COLOURS)]
            at, losses = _curve(steps, layer)
            if len(at) >= SMOOTHED_FROM:
                axes.plot(at, losses, color=colour, lw=0.7, alpha=0.25)
                losses = _smooth(losses)
            axes.plot(at, losses, color=colour, lw=1.6, label=f"exit after layer {layer}")
            at, losses = _curve(validations, layer)
            axes.plot(
                at, losses, "o--", color=colour, mfc="white", ms=5, lw=1, label=None if steps else f"exit {layer}"
            )
        if validations:
            axes.plot([], [], "o--", color=GREY, mfc="white", ms=5, lw=1, label="on validation data")
        if finals:
            axes.axhline(finals[-1], color=GREY, lw=1, ls=":", label="final exit, on validation data")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss (nats per token)")
        axes.set_title(title, loc="left")
        axes.margins(x=0.02)
        axes.legend()


def plot_agreement(validations: Sequence[Validation], best_step: int | None, path: str | Path) -> None:
    """Plot each exit's agreement with the final exit against the tokens seen, one line per exit.

    Args:
        validations: in the order of their steps.
        best_step: step of the best adapter, which is marked; None if there is none.
        path: the file.

    Raises:
        UserError: ``path`` is not a .png, .pdf or .svg, or cannot be written.
        ValueError: there is no validation.
    """
    with _against_tokens_seen(validations, best_step, path) as axes:
        shares = [{layer: 100 * share for layer, share in each.agreements.items()} for each in validations]
        _plot_lines(axes, validations, shares)
        axes.set_ylabel("agreement with the final exit (% of tokens)")
        axes.set_title("Agreement of each exit while tuning", loc="left")


def plot_acceptance(validations: Sequence[Validation], best_step: int | None, path: str | Path) -> None:
    """Tokens per round of speculative decoding with each exit's drafts, against the tokens seen.

    Arguments and errors as for ``plot_agreement``.
    """
    with _against_tokens_seen(validations, best_step, path) as axes:
        _plot_lines(axes, validations, [each.acceptance for each in validations])
        axes.set_ylabel("acceptance length (tokens per round)")
        axes.set_title("Speculative decoding with each exit's drafts while tuning", loc="left")


def plot_free_running(validations: Sequence[Validation], best_step: int | None, path: str | Path) -> None:
    """Share of tokens that free-running threshold mode has in common with the full model, against the tokens seen.

    Arguments and errors as for ``plot_agreement``.
    """
    with _against_tokens_seen(validations, best_step, path) as axes:
        measured = [(each.tokens_seen, each.free_running) for each in validations if each.free_running is not None]
        seen, shares = [tokens for tokens, _ in measured], [100 * found[0] for _, found in measured]
        axes.plot(seen, shares, "o-", color=COLOURS[0], ms=4, lw=1.6, label="all exits together")
        for tokens, (share, layers) in measured:
            axes.annotate(f"{layers:.1f}", (tokens, 100 * share), (0, 6), textcoords="offset points", ha="center")
        axes.set_ylabel("tokens equal to the full model's (%)")
        axes.set_title("Free-running threshold mode while tuning; labels: layers per token", loc="left")


@contextmanager
def _against_tokens_seen(validations: Sequence[Validation], best_step: int | None, path: str | Path) -> Iterator[Axes]:
    """Axes to draw validations on, with the best step marked; saved at the end."""
    if not validations:
        raise ValueError("there is no validation to plot")
    from matplotlib.ticker import EngFormatter

    with saved_figure(path, (7.5, 4.8)) as figure:
        axes = figure.subplots()
        yield axes
        for validation in validations:
            if validation.step == best_step:
                label = f"lowest validation loss (step {best_step})"
                axes.axvline(validation.tokens_seen, color=GREY, lw=1, ls=":", label=label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("tokens seen (labels that the exits were trained on)")
        axes.margins(x=0.02)
        axes.legend()


def _plot_lines(axes: Axes, validations: Sequence[Validation], values: Sequence[Mapping[int, float]]) -> None:
    """One line per exit, of its value in each validation."""
    seen = [validation.tokens_seen for validation in validations]
    for index, layer in enumerate(sorted(values[-1])):
        line = [each.get(layer, math.nan) for each in values]
        label = f"exit after layer {layer}"
        axes.plot(seen, line, "o-", color=COLOURS[index % len(COLOURS)], ms=4, lw=1.6, label=label)


def _curve(losses: Losses, layer: int) -> tuple[list[int], list[float]]:
    at = sorted(step for step in losses if layer in losses[step])
    return at, [losses[step][layer] for step in at]


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about 1/30 of the values, with bias correction."""
    keep = 1 - 30 / len(values) if len(values) > 60 else 0.5
    mean = weight = 0.0
    result = []
    for value in values:
        if math.isfinite(value):
            mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(mean / weight if weight else math.nan)
    return result


def _percents(shares: Sequence[float]) -> list[float]:
    return [100 * share for share in shares]


def _annotate(figure: Figure, axes: Axes, texts: list[tuple[float, float, str]], prefix: str) -> None:
    """Write each text above its point, the first with ``prefix``. Leave out texts that would overlap."""
    figure.canvas.draw()  # fixes the layout, which determines positions in pixels
    taken: list[Any] = []
    for index, (x, y, text) in enumerate(texts):
        note = axes.annotate(
            prefix + text if index == 0 else text,
            (x, y),
            xytext=(0, 8),
            textcoords="offset points",
            ha="right" if index == 0 and prefix else "center",
            fontsize=8.5,
            color="#333333",
            zorder=5,
        )
        box = note.get_window_extent()
        if any(box.overlaps(other) for other in taken):
            note.remove()
        else:
            taken.append(box)
