"""``status.json``: the state of a run, for the script that started it.

torchrun ends with status 1 after a signal even if every process saved and ended with 0, so a batch script reads this
file to decide whether to start the run again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from megatron_ee.checkpoint.atomic import numbered_directories, write_json
from megatron_ee.config.schema import TuningConfig
from megatron_ee.errors import CheckpointError, Interrupted
from megatron_ee.tuning.interrupt import Interrupt
from megatron_ee.tuning.state import RunProgress

STATUS = "status.json"


def write_status(output: Path, state: str, progress: RunProgress, steps: int) -> None:
    """Write ``output/status.json``.

    Args:
        output: directory of the run.
        state: ``running``, ``finished`` (also early, by ``tuning.patience``), ``interrupted`` (saved; continue with
            ``--resume``) or ``failed``.
        progress: the run's progress.
        steps: number of steps of the whole run.

    Raises:
        CheckpointError: it cannot be written.
    """
    write_json(output / STATUS, {"state": state, "step": progress.step, "steps": steps})


def is_finished(output: Path) -> bool:
    """Whether ``status.json`` says that the run in ``output`` is over."""
    try:
        found = json.loads((output / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("state") == "finished"


def write_failed(output: Path, progress: RunProgress, steps: int) -> None:
    """``write_status`` of a failed run. Errors are ignored: the error that ended the run is reported elsewhere."""
    with contextlib.suppress(CheckpointError):
        write_status(output, "failed", progress, steps)


@contextlib.contextmanager
def reported_status(
    output: Path, tuning: TuningConfig, progress: RunProgress, interrupt: Interrupt, *, enabled: bool
) -> Iterator[None]:
    """Keep ``status.json`` up to date for as long as the run lasts; one of its processes is ``enabled``.

    Raises:
        CheckpointError: it cannot be written.
    """
    if not enabled:
        yield
        return
    steps = tuning.steps
    write_status(output, "running", progress, steps)
    try:
        yield
    except Interrupted:  # before the first step; a resumed run may not have read its progress yet
        saved = [step for step, _ in numbered_directories(output / "checkpoints")]
        write_json(output / STATUS, {"state": "interrupted", "step": max(saved, default=0), "steps": steps})
        raise
    except BaseException:
        write_failed(output, progress, steps)
        raise
    done = (progress.step >= steps and not progress.validation_due) or progress.stopped_early(tuning.patience)
    write_status(output, "interrupted" if interrupt.requested and not done else "finished", progress, steps)
