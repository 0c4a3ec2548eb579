"""The trainer decides when to step, log, validate, save and stop. ``tuning.step`` computes."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_ee.checkpoint.adapter import DATA, SETTINGS, Adapter
from megatron_ee.checkpoint.adapter_writing import extract_adapter, save_adapter
from megatron_ee.checkpoint.saving import Saver, group_saver
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import RunConfig
from megatron_ee.data.loader import MicrobatchStream, ValidationWindows
from megatron_ee.errors import Interrupted, UserError
from megatron_ee.model.quality import FreeRunning, Quality
from megatron_ee.parallel.groups import Groups
from megatron_ee.parallel.optimizer import ExitOptimizer
from megatron_ee.progress import track
from megatron_ee.tuning.full_model import FullModel
from megatron_ee.tuning.interrupt import Interrupt
from megatron_ee.tuning.log import RunLog
from megatron_ee.tuning.schedule import Pipeline
from megatron_ee.tuning.state import RunProgress, save_state, saved_step
from megatron_ee.tuning.step import StepResult, tuning_step, weight_ramp

BEST = "adapter-best"
"""Directory of the exits with the lowest validation loss."""
Validate = Callable[[Pipeline, int], Quality]
"""Measures the exits of all stages after a number of steps, and returns the result on every rank. The callback also
prints and writes it."""
FitGates = Callable[[Pipeline, RunProgress], None]
"""Fits the gates to the exits as they are; see ``tuning.gates.fit_next``."""


@dataclass(frozen=True)
class ValidationInputs:
    """What validation is prepared from.

    Attributes:
        config: of the run.
        backbone_sha256: the backbone's hash.
        windows: validation windows.
    """

    config: RunConfig
    backbone_sha256: str
    windows: ValidationWindows


class Validator(Protocol):
    """Measures exits on validation data, and prints and writes what it finds. Every rank calls its methods."""

    def validate(self, pipeline: Pipeline, step: int) -> Quality:
        """See ``Validate``."""

    def free_running(self, full: FullModel, adapter: Adapter) -> FreeRunning | None:
        """Free-running threshold mode with the exits of an adapter; None if there are no prompts for it."""


MakeValidator = Callable[[ValidationInputs, FullModel], Validator]
"""Prepares validation. The layers of the ``FullModel`` are loaded for it, and may be freed afterwards."""


@dataclass
class Trainer:
    """The state of one tuning run.

    Attributes:
        validate: called every ``validation.interval`` steps and at both ends; None without validation data.
        fit_gates: called before each validation and each save, so that every adapter has the gates of its own step;
            None if gates are not fitted while tuning.
        description: identification of the run in its checkpoints and adapters.
        resumed: whether the state is that of a checkpoint in ``output``.
        keep_initial: whether the exits before the first step may be the best. Fitted exits may, copied ones need not be
            kept.
        around_step: makes a context for each step, such as one that records its events.
    """

    config: RunConfig
    pipeline: Pipeline
    optimizer: ExitOptimizer
    stream: MicrobatchStream
    output: Path
    description: dict[str, Any]
    validate: Validate | None = None
    fit_gates: FitGates | None = None
    progress: RunProgress = field(default_factory=RunProgress)
    resumed: bool = False
    keep_initial: bool = False
    around_step: Callable[[], AbstractContextManager[None]] = nullcontext

    def __post_init__(self) -> None:
        self._started = self._saved = self.progress.step if self.resumed else None

    def run(self, log: RunLog, interrupt: Interrupt) -> bool:
        """Tune until the last step, or until patience or an interrupt ends the run earlier. Every rank calls this.

        In all cases the state and the adapter after the last completed step are on disk afterwards. An interrupt lets
        the current step finish. A validation ends at its next microbatch, and a resumed run repeats it. A fit of gates
        ends too: the adapter then has none until a resumed run fits them. A run that patience ended does nothing more
        when it is resumed.

        Returns:
            Whether the run is over: False if an interrupt left steps to do.

        Raises:
            UserError: more steps in a row than ``tuning.skip_limit`` had a loss or gradient that is not finite.
            CheckpointError: a save failed. A failed save in the background raises at the next step.
        """
        steps, done, is_main = self.config.tuning.steps, self.progress, self._groups.is_main
        if done.step == 0 or done.validation_due:
            self._validate(log)
        with (
            track(steps, "steps", "tuning", "tokens", completed=done.step, enabled=is_main) as bar,
            group_saver(self._groups, self.config.checkpoint.asynchronous, bar.note) as saver,
        ):
            while done.step < steps and not self._stopped_early and not self._told_to_stop(interrupt, saver):
                started = time.perf_counter()
                result = self._step()
                elapsed = time.perf_counter() - started
                bar.describe("tuning " + _losses(result))
                bar.advance(1, result.tokens)
                if result.skipped:
                    bar.note(f"step {done.step} skipped, nothing was updated: {result.skipped}")
                if self._due(self.config.logging.interval) or result.skipped:
                    log.step(done.step, result, result.tokens / elapsed)
                self._check_skips(result)
                if self._due(self.config.validation.interval) or done.step == steps:
                    self._validate(log)
                if self._due(self.config.checkpoint.interval) and done.step < steps:
                    self._save(saver)
                self._log_saves(log, saver)
            if self._stopped_early:
                bar.note(self._early_stop())
            elif interrupt.requested:
                bar.note(f"{interrupt.name}: saving after step {done.step}; continue with --resume")
            self._finish(saver)
            self._log_saves(log, saver)
        return done.step >= steps or self._stopped_early

    @property
    def _groups(self) -> Groups:
        return self.optimizer.groups

    @property
    def _stopped_early(self) -> bool:
        tuning, done = self.config.tuning, self.progress
        return done.step < tuning.steps and done.stopped_early(tuning.patience)

    def _early_stop(self) -> str:
        """Message that a run has stopped early, now or before it was resumed, and where its best exits are."""
        done, resumed = self.progress, self.progress.step == self._started
        best = f"no validation loss was finite; the last exits are in {self.output / 'adapter'}"
        if done.best_loss is not None:
            best = f"the best exits are those of step {done.best_step}, with validation loss {done.best_loss:.4f}, in "
            best += str(self.output / BEST)
        return (
            f"{'had ' if resumed else ''}stopped early, after step {done.step}: no lower validation loss in "
            f"{done.stale_validations} validations (tuning.patience is {self.config.tuning.patience}); {best}"
            + ("; resume with a higher tuning.patience to go on" if resumed else "")
        )

    def _told_to_stop(self, interrupt: Interrupt, saver: Saver) -> bool:
        """Whether any rank received a signal. All ranks then stop after the same step, even if a save in progress
        failed."""
        own = (interrupt.name, saver.failure)
        names, failures = zip(*(self._groups.gather(own) if self._groups.world.size() > 1 else [own]), strict=True)
        saver.check(failures)
        interrupt.name = interrupt.name or next((name for name in names if name is not None), None)
        return interrupt.requested

    def _step(self) -> StepResult:
        ramp = weight_ramp(self.config.loss, self.progress.step, self.config.tuning.steps)
        batches = self.stream.step()
        with self.around_step():
            result = tuning_step(self.pipeline, self.optimizer, batches, self.config.loss, ramp)
        self.progress.step += 1
        self.progress.consumed = self.stream.consumed
        self.progress.tokens += result.tokens
        self.progress.skipped = self.progress.skipped + 1 if result.skipped else 0
        return result

    def _check_skips(self, result: StepResult) -> None:
        limit, skipped = self.config.tuning.skip_limit, self.progress.skipped
        if skipped > limit:
            error = UserError(
                f"step {self.progress.step}: {result.skipped}; {skipped} steps in a row were not finite, and "
                f"tuning.skip_limit is {limit}: lower optimizer.lr, or check these sequences of the data"
            )
            error.common = True
            raise error

    def _due(self, interval: int) -> bool:
        return interval > 0 and self.progress.step % interval == 0

    def _validate(self, log: RunLog) -> None:
        """Validate, and keep the adapter if it is the best so far."""
        if self.validate is None:
            return
        done = self.progress
        may_be_best = done.step > 0 or self.keep_initial
        done.validation_due = True
        try:
            if may_be_best:
                self._fit_gates()
            quality = self.validate(self.pipeline, done.step)
        except Interrupted:
            return
        done.validation_due = False
        log.validation(done.step, done.tokens, quality)
        loss = validation_loss(quality, self.pipeline.specs)
        if self._groups.is_main and (not_finite := _not_finite(quality)):
            best = "" if math.isfinite(loss) else f"; these exits are not kept as {BEST}"
            line = f"validation after step {done.step}: the loss is not finite at {not_finite}{best}"
            print(line, file=sys.stderr, flush=True)
        if not may_be_best:
            return
        if math.isfinite(loss) and (done.best_loss is None or loss < done.best_loss):
            done.best_loss, done.best_step, done.stale_validations = loss, done.step, 0
            self._save_adapter(BEST, {"validation_loss": loss})
        else:
            done.stale_validations += 1

    def _fit_gates(self) -> None:
        """Fit the gates, unless they are those of this step already. Raises ``Interrupted`` after a signal."""
        done = self.progress
        if self.fit_gates is not None and done.gates_step != done.step:
            self.fit_gates(self.pipeline, done)
            done.gates_step = done.step

    def _save(self, saver: Saver, *, wait: bool = False) -> None:
        """Save the state, and the adapter, which is made from the checkpoint."""
        with contextlib.suppress(Interrupted):
            self._fit_gates()
        save_state(
            self.output / "checkpoints",
            self.pipeline.stage,
            self.optimizer,
            self.progress,
            self.description,
            self.config.checkpoint.keep,
            saver,
            then=lambda checkpoint: extract_adapter(checkpoint, self.output / "adapter"),
            wait=wait,
        )
        self._saved = self.progress.step

    def _finish(self, saver: Saver) -> None:
        """Make sure that state and adapter of the last step are on disk."""
        if self.progress.step != self._saved:
            self._save(saver, wait=True)
        saver.wait()
        if self.progress.step == self._started:
            with contextlib.suppress(Interrupted):
                self._fit_gates()  # a signal may have ended the earlier run's fit
                self._save_adapter("adapter", {})  # and it may have been killed between the two saves

    def _log_saves(self, log: RunLog, saver: Saver) -> None:
        for save in saver.finished():
            log.save(saved_step(save.final), save.stopped, save.writing)

    def _save_adapter(self, name: str, extra: dict[str, Any]) -> None:
        save_adapter(
            self.output / name,
            self.pipeline.stage.exits,
            self.pipeline.specs,
            self._groups,
            base_model=self.description["base_model"],
            backbone_sha256=self.description["backbone_sha256"],
            steps=self.progress.step,
            settings=self.description[SETTINGS],
            extra={DATA: {"train": self.description["data"]["train"]}, **extra},
        )


def validation_loss(quality: Quality, specs: Sequence[ExitSpec]) -> float:
    """Mean validation loss of the exits, weighted by their loss weights. ``adapter-best`` is the adapter with the
    lowest."""
    weights = {spec.layer: spec.weight for spec in specs}
    return sum(weights[exit_.layer] * exit_.loss for exit_ in quality.exits) / sum(weights.values())


def _not_finite(quality: Quality) -> str:
    """Message that names the exits whose loss is NaN or infinite; empty if there are none."""
    losses = [(f"the exit after layer {exit_.layer}", exit_.loss) for exit_ in quality.exits]
    losses.append(("the final exit", quality.final_loss))
    return ", ".join(f"{name} ({loss})" for name, loss in losses if not math.isfinite(loss))


def _losses(result: StepResult) -> str:
    return " ".join(f"exit {exit_.layer}: {exit_.loss:.3f}" for exit_ in result.exits)
