"""A picture of a step over a streamed backbone: transfer of layers against computation."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ee.errors import DataError
from megatron_ee.evaluation.figure import COLOURS, GREY, saved_figure
from megatron_ee.tuning.schedule import Span
from megatron_ee.tuning.trainer import Trainer

RECORDED = 2
"""Steps that are recorded. The last one is drawn, since the first one also allocates memory."""

ROWS = {
    "transfer": {"read": ("read from disk", COLOURS[5]), "copy": ("copied to the device", COLOURS[0])},
    "computation": {
        "layer": ("layers", COLOURS[2]),
        "exits": ("exits", COLOURS[4]),
        "wait": ("waits for a layer", COLOURS[1]),
    },
}
"""By row of the picture: kinds of spans, each with its name in the legend and its colour."""


@contextlib.contextmanager
def drawn_step(trainer: Trainer, path: Path) -> Iterator[None]:
    """Draw a step that ``trainer`` runs over streamed layers while the context is open, and say how much of it waits.

    Args:
        trainer: of a run with ``model.residency`` host or disk.
        path: the file, which the first rank writes.

    Raises:
        UserError: it cannot be written.
    """
    pipeline, recorded = trainer.pipeline, list[list[Span]]()

    @contextlib.contextmanager
    def recording() -> Iterator[None]:
        if len(recorded) == RECORDED:
            yield
            return
        events: list[Span] = []
        pipeline.events = events
        try:
            yield
        finally:
            pipeline.events = None
        recorded.append(events)

    trainer.around_step = recording
    yield
    if recorded and trainer.optimizer.groups.is_main:
        plot_timeline(recorded[-1], path)
        share = waiting_share(recorded[-1])
        line = f"streamed layers: {share:.1%} of a step waited for a layer (without the update); timeline: {path}"
        print(line, file=sys.stderr, flush=True)


def waiting_share(spans: Sequence[Span]) -> float:
    """Share of the time from the first to the last span in which the computation waits for a layer."""
    start, end = _bounds(spans)
    return sum(span.end - span.start for span in spans if span.kind == "wait") / (end - start)


def plot_timeline(spans: Sequence[Span], path: str | Path) -> None:
    """Plot when layers were read and copied, above when layers and exits computed and what they waited for.

    Args:
        spans: of one or several steps, as ``Pipeline.events`` has them where layers share memory.
        path: the file.

    Raises:
        DataError: there are no such spans.
        UserError: ``path`` is not a .png, .pdf or .svg, or cannot be written.
    """
    start, _ = _bounds(spans)
    with saved_figure(path, (9, 2.8)) as figure:
        axes = figure.subplots()
        for height, kinds in enumerate(reversed(ROWS.values())):
            for kind, (name, colour) in kinds.items():
                bars = [(span.start - start, span.end - span.start) for span in spans if span.kind == kind]
                if bars:
                    axes.broken_barh(bars, (height - 0.35, 0.7), color=colour, label=name, lw=0)
            axes.axhline(height, color=GREY, lw=0.4, zorder=0)
        axes.set_yticks(range(len(ROWS)), list(reversed(ROWS)))
        axes.set_xlabel("seconds")
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.01)
        axes.set_title(f"Streamed layers: {waiting_share(spans):.1%} of the time waits for a layer", loc="left")
        figure.legend(loc="outside lower center", ncols=5)


def _bounds(spans: Sequence[Span]) -> tuple[float, float]:
    known = [span for span in spans if any(span.kind in kinds for kinds in ROWS.values())]
    if not known:
        raise DataError("there is no step over streamed layers to plot")
    return min(span.start for span in known), max(span.end for span in known)
