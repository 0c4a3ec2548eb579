"""A picture of a pipeline's step: one row per stage."""

from __future__ import annotations

from pathlib import Path

from megatron_ee.benchmark.results import PipelineBenchmark, Span
from megatron_ee.evaluation.plots import COLOURS, saved_figure

SHOWN = {"forward": ("forward", COLOURS[5]), "teach": ("final exit", COLOURS[2]), "exits": ("exits", COLOURS[1])}
WAITING = "#ececec"
VISIBLE = 1.0  # ms per second of the picture's width: below that a bar is only its edges
READABLE = 0.018  # of the width of the picture, from which on a microbatch's number fits its bar


def plot_timeline(result: PipelineBenchmark, path: str | Path) -> None:
    """What each stage did in the median step, with the numbers of the microbatches where they fit.

    Raises:
        UserError: not a .png, .pdf or .svg, or it cannot be written.
    """
    stages = len(result.timeline)
    end = max(span.end for spans in result.timeline for span in spans)
    with saved_figure(path, (9.0, 1.4 + 0.55 * stages)) as figure:
        axes = figure.subplots()
        axes.grid(False)
        for index, (spans, stage) in enumerate(zip(result.timeline, result.stages, strict=True)):
            axes.broken_barh([(0, 1e3 * end)], (index - 0.36, 0.72), color=WAITING)
            for kind, (_, colour) in SHOWN.items():
                bars = [(1e3 * span.start, 1e3 * _length(span)) for span in spans if span.kind == kind]
                bars = [bar for bar in bars if bar[1] > VISIBLE * end]
                axes.broken_barh(bars, (index - 0.36, 0.72), facecolor=colour, edgecolor="white", linewidth=0.4)
            for span in spans:
                if span.kind in SHOWN and _length(span) > READABLE * end:
                    middle = 500 * (span.start + span.end)
                    axes.text(middle, index, str(span.microbatch + 1), ha="center", va="center", fontsize=7.5)
            axes.text(1e3 * end * 1.01, index, f"{stage.busy:.0%}", va="center", fontsize=9)
        for kind, (label, colour) in SHOWN.items():
            if _any(result.timeline, kind):
                axes.broken_barh([], (0, 0), facecolor=colour, label=label)
        axes.broken_barh([], (0, 0), facecolor=WAITING, label="waiting")
        axes.set_yticks(range(stages), [f"stage {index}" for index in range(stages)])
        axes.set_ylim(stages - 0.5, -0.5)
        axes.set_xlim(0, 1e3 * end)
        axes.set_xlabel("ms; numbers are microbatches, shares at the right are of all measured steps")
        title = f"{stages} stages, {result.model['microbatches']} microbatches: computing {result.efficiency:.1%}"
        axes.set_title(f"{title} of the time, {result.expected:.1%} expected", loc="left")
        figure.legend(loc="outside lower center", ncols=4)


def _length(span: Span) -> float:
    return span.end - span.start


def _any(timeline: list[list[Span]], kind: str) -> bool:
    return any(span.kind == kind for spans in timeline for span in spans)
