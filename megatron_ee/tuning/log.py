"""Logs of a run: ``log.jsonl``, TensorBoard and wandb.

Each has loss, weight and gradient norm per exit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_ee.config.schema import LoggingConfig
from megatron_ee.errors import UserError, storage_errors
from megatron_ee.model.quality import FreeRunning, Quality, strict_json
from megatron_ee.tuning.step import StepResult
from megatron_ee.tuning.wandb_run import WandbRun, start_run

LOG = "log.jsonl"
SESSION = "session"
"""Key of the line about a process of the run that ended by itself."""


class RunLog:
    """Writes one JSON object per line, each flushed, and the same figures to TensorBoard and wandb.

    A resumed run appends to the same file, after it has removed the lines after the checkpoint's step.
    """

    def __init__(
        self,
        output: Path,
        config: LoggingConfig,
        step: int,
        *,
        settings: Mapping[str, Any] | None = None,
        enabled: bool = True,
    ) -> None:
        """Open the log, TensorBoard and wandb.

        Args:
            output: the run's directory.
            config: which logs to write.
            step: steps done.
            settings: the run's configuration, which wandb records.
            enabled: False on processes that do not write.

        Raises:
            UserError: the log or wandb's run cannot be opened.
        """
        self._file = None
        self._board: Any = None
        self._wandb: WandbRun | None = None
        self._where = path = output / LOG
        if not enabled:
            return
        try:
            _take_back(path, step)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None
        if config.tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)
        if config.wandb.project:
            self._wandb = start_run(output, config.wandb, step, settings or {})

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # The error was already reported; closing would try the failed write again.
        with contextlib.suppress(OSError) if error is not None else storage_errors(self._where, "write"):
            if self._file is not None:
                self._file.close()
            if self._board is not None:
                self._board.close()
            if self._wandb is not None:
                self._wandb.finish(failed=error is not None)

    def step(self, step: int, result: StepResult, tokens_per_second: float) -> None:
        """One finished step, counted from 1."""
        exits = [dataclasses.asdict(exit_) for exit_ in result.exits]
        line = {"step": step, "tokens": result.tokens, "lr": result.lr, "grad_norm": result.grad_norm}
        skipped = {"skipped": result.skipped} if result.skipped else {}
        self._write(strict_json({**line, "tokens_per_second": round(tokens_per_second, 1), "exits": exits, **skipped}))
        points = {"lr": result.lr, "grad_norm": result.grad_norm, "tokens_per_second": tokens_per_second}
        for exit_ in result.exits:
            for name in ("loss", "weight", "grad_norm"):
                points[f"exit_{exit_.layer}/{name}"] = getattr(exit_, name)
        self._plot(points, step)

    def validation(self, step: int, tokens_seen: int, quality: Quality) -> None:
        """One validation after ``step`` steps on so many labels."""
        self._write({"step": step, "tokens_seen": tokens_seen, "validation": quality.to_dict()})
        points = {"validation/final_loss": quality.final_loss}
        for exit_ in quality.exits:
            for name in ("loss", "agreement", "mean_confidence", "ece"):
                points[f"validation/exit_{exit_.layer}/{name}"] = getattr(exit_, name)
            if exit_.acceptance is not None:
                points[f"validation/exit_{exit_.layer}/acceptance_length"] = exit_.acceptance.length
                points[f"validation/exit_{exit_.layer}/acceptance_rate"] = exit_.acceptance.rate
        if quality.free_running is not None:
            points |= _points(quality.free_running)
        self._plot(points, step)

    def free_running(self, step: int, adapter: str, found: FreeRunning) -> None:
        """Free-running threshold mode with the exits of an adapter, which are those after ``step`` steps."""
        self._write({"step": step, "adapter": adapter, "free_running": found.to_dict()})
        self._plot(_points(found), step)

    def save(self, step: int, stopped_seconds: float, write_seconds: float) -> None:
        """Log a finished save of the state after ``step`` steps: how long tuning waited and how long writing took."""
        seconds = {"stopped_seconds": round(stopped_seconds, 4), "write_seconds": round(write_seconds, 4)}
        self._write({"step": step, "save": seconds})
        self._plot({f"save/{name}": value for name, value in seconds.items()}, step)

    def session(self, step: int, seconds: float, processes: int, device: str) -> None:
        """Log what this session of the run took, from its start to the state after ``step`` steps."""
        took = {"seconds": round(seconds, 1), "processes": processes, "device": device}
        self._write({"step": step, SESSION: took})

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            with storage_errors(self._where, "write"):
                self._file.write(json.dumps(line, allow_nan=False) + "\n")
                self._file.flush()

    def _plot(self, points: dict[str, float], step: int) -> None:
        if self._board is not None:
            with storage_errors(self._where.parent / "tensorboard", "write"):
                for name, value in points.items():
                    self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(points, step)


def free_running_steps(output: Path) -> set[int]:
    """Steps after which the log of a run holds a measurement of free-running threshold mode."""
    found = set()
    for line in (output / LOG).read_text(encoding="utf-8", errors="replace").splitlines():
        record = json.loads(line)
        if (record.get("validation") or record).get("free_running"):
            found.add(record["step"])
    return found


def _points(found: FreeRunning) -> dict[str, float]:
    names = ("agreement", "departure", "layers_per_token")
    return {f"validation/free_running/{name}": getattr(found, name) for name in names}


def _take_back(path: Path, step: int) -> None:
    """Keep the lines up to ``step``. Remove the others, and a line that a crash cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] > step:
                continue
        except (ValueError, KeyError, TypeError):
            continue
        kept.append(line + "\n")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
