"""The picture of a step over streamed layers: what it shows, and what is refused."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ee.errors import DataError
from megatron_ee.evaluation.timeline import drawn_step, plot_timeline, waiting_share
from megatron_ee.tuning.schedule import Span

SPANS = [
    Span("read", 1, 10.0, 12.0),
    Span("wait", 1, 10.0, 12.0),
    Span("copy", 1, 11.0, 12.0),
    Span("layer", 1, 12.0, 15.0),
    Span("exits", 1, 15.0, 18.0),
]


def test_the_share_of_time_that_waits() -> None:
    assert waiting_share(SPANS) == pytest.approx(0.25)
    assert waiting_share(SPANS[3:]) == 0


def test_what_is_drawn(tmp_path: Path) -> None:
    plot_timeline([*SPANS, Span("send", 0, 0.0, 100.0)], tmp_path / "step.svg")
    text = (tmp_path / "step.svg").read_text()
    for drawn in ("transfer", "computation", "read from disk", "waits for a layer", "25.0% of the time"):
        assert f"<!-- {drawn}" in text or drawn in text, drawn


def test_other_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no step over streamed layers"):
        plot_timeline([Span("forward", 0, 0.0, 1.0)], tmp_path / "step.png")


def test_the_second_step_is_drawn_and_later_ones_are_not_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optimizer = SimpleNamespace(groups=SimpleNamespace(is_main=True))
    trainer: Any = SimpleNamespace(pipeline=SimpleNamespace(events=None), optimizer=optimizer, around_step=nullcontext)
    recorded = []
    with drawn_step(trainer, tmp_path / "step.svg"):
        for step in range(4):
            with trainer.around_step():
                events = trainer.pipeline.events
                recorded.append(events is not None)
                if events is not None:
                    events += SPANS if step == 1 else SPANS[3:]
            assert trainer.pipeline.events is None, "validation comes between steps"
    assert recorded == [True, True, False, False]
    assert "25.0% of a step waited" in capsys.readouterr().err and (tmp_path / "step.svg").is_file()
