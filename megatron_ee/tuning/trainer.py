"""The trainer decides when: to step, log, validate, save and stop. ``tuning.step`` computes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ee.checkpoint.adapter import save_adapter
from megatron_ee.config.schema import RunConfig
from megatron_ee.data.loader import MicrobatchStream
from megatron_ee.model.metrics import Quality
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.optimizer import ExitOptimizer
from megatron_ee.progress import track
from megatron_ee.tuning.interrupt import Interrupt
from megatron_ee.tuning.log import RunLog
from megatron_ee.tuning.state import Progress, save_state
from megatron_ee.tuning.step import StepResult, tuning_step, weight_ramp

Validate = Callable[[Stage, int], Quality]
"""Quality of the stage's exits after so many steps; what is shown and written of it is the callback's business."""


@dataclass
class Trainer:
    """Everything one tuning run holds.

    Attributes:
        validate: called every ``validation.interval`` steps and at both ends; None without validation data.
        description: what identifies the run in its checkpoints and adapters.
    """

    config: RunConfig
    stage: Stage
    optimizer: ExitOptimizer
    stream: MicrobatchStream
    output: Path
    description: dict[str, Any]
    validate: Validate | None = None
    progress: Progress = field(default_factory=Progress)

    def run(self, log: RunLog, interrupt: Interrupt, *, is_main: bool = True) -> bool:
        """Tune until the last step or an interrupt; True if all steps are done.

        Either way the state and the adapter of the last step done are on disk afterwards.
        """
        steps, done = self.config.tuning.steps, self.progress
        if done.step == 0:
            self._validate(log)
        with track(steps, "steps", "tuning", "tokens", completed=done.step, enabled=is_main) as bar:
            while done.step < steps and not interrupt.requested:
                started = time.perf_counter()
                result = self._step()
                elapsed = time.perf_counter() - started
                bar.describe("tuning " + _losses(result))
                bar.advance(1, result.tokens)
                if self._due(self.config.logging.interval):
                    log.step(done.step, result, result.tokens / elapsed)
                if self._due(self.config.validation.interval) or done.step == steps:
                    self._validate(log)
                if self._due(self.config.checkpoint.interval) and done.step < steps and not interrupt.requested:
                    self._save()
            if interrupt.requested:
                bar.note(f"{interrupt.name}: saving after step {done.step}; go on with --resume")
        self._save()
        return done.step >= steps

    def _step(self) -> StepResult:
        ramp = weight_ramp(self.config.loss, self.progress.step, self.config.tuning.steps)
        result = tuning_step(self.stage, self.optimizer, self.stream.step(), self.config.loss, ramp)
        self.progress.step += 1
        self.progress.consumed = self.stream.consumed
        self.progress.tokens += result.tokens
        return result

    def _due(self, interval: int) -> bool:
        return interval > 0 and self.progress.step % interval == 0

    def _validate(self, log: RunLog) -> None:
        """Validate, and keep the adapter if it is the best so far; the untuned exits are measured, not kept."""
        if self.validate is None:
            return
        quality, done = self.validate(self.stage, self.progress.step), self.progress
        log.validation(done.step, quality)
        weights = {exit_.spec.layer: exit_.spec.weight for exit_ in self.stage.exits}
        loss = sum(weights[exit_.layer] * exit_.loss for exit_ in quality.exits) / sum(weights.values())
        if done.step > 0 and (done.best_loss is None or loss < done.best_loss):
            done.best_loss, done.best_step = loss, done.step
            self._save_adapter("adapter-best", {"validation_loss": loss})

    def _save(self) -> None:
        checkpoints = self.output / "checkpoints"
        if not (checkpoints / f"step-{self.progress.step}").exists():
            save_state(
                checkpoints,
                self.stage,
                self.optimizer,
                self.progress,
                self.description,
                self.config.checkpoint.keep,
            )
        self._save_adapter("adapter", {})

    def _save_adapter(self, name: str, extra: dict[str, Any]) -> None:
        save_adapter(
            self.output / name,
            self.stage.exits,
            base_model=self.description["base_model"],
            backbone_sha256=self.description["backbone_sha256"],
            steps=self.progress.step,
            extra=extra,
        )


def _losses(result: StepResult) -> str:
    return " ".join(f"exit {exit_.layer}: {exit_.loss:.3f}" for exit_ in result.exits)
