"""Validation in ``tune``: quality and acceptance of the exits while they are tuned, and their history afterwards."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megatron_ee.checkpoint.adapter import Adapter, open_adapter
from megatron_ee.checkpoint.loading import load_exits
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import RunConfig
from megatron_ee.data.loader import ValidationWindows
from megatron_ee.data.prompts import held_out_prompts
from megatron_ee.data.tokenizer_files import eos_token_ids
from megatron_ee.evaluation.acceptance import measure_acceptance, with_acceptance
from megatron_ee.evaluation.continuations import Continuation, continuations
from megatron_ee.evaluation.final_exit import FinalExit, final_exit
from megatron_ee.evaluation.free_running import measure_free_running
from megatron_ee.evaluation.history import read_validations
from megatron_ee.evaluation.plots import plot_acceptance, plot_agreement, plot_free_running
from megatron_ee.evaluation.quality import measure
from megatron_ee.evaluation.report import print_free_running, print_history, print_quality, write_quality
from megatron_ee.exits.stage import Stage
from megatron_ee.model.quality import FreeRunning, Quality
from megatron_ee.parallel.layout import Layout
from megatron_ee.tuning.full_model import FullModel
from megatron_ee.tuning.interrupt import Interrupt
from megatron_ee.tuning.log import LOG
from megatron_ee.tuning.schedule import Pipeline
from megatron_ee.tuning.trainer import BEST, ValidationInputs


def make_validator(output: Path, inputs: ValidationInputs, full: FullModel) -> RunValidator:
    """Compute now what validation needs of all layers. Raises ``Interrupted`` on all ranks soon after a signal."""
    config, windows, groups = inputs.config, inputs.windows, full.setup.groups
    batch, chunk = config.tuning.micro_batch_size, config.loss.chunk_tokens
    final = final_exit(full, inputs.backbone_sha256, windows, batch, chunk)
    own = {corpus.metadata.eos_id for corpus in windows.corpora if corpus.metadata is not None}
    eos = frozenset(groups.together(lambda: tuple(own.union(eos_token_ids(full.model.path))))[0])
    return RunValidator(output, config, windows, final, _continuations(inputs, full, eos), eos, full.interrupt)


@dataclass(frozen=True)
class RunValidator:
    """A ``Validator``. Its methods raise ``Interrupted`` on all ranks soon after a signal.

    Attributes:
        output: directory of the run.
        config: of the run.
        windows: validation windows.
        final: the final exit's results on them.
        continuations: the full model's, of held-out prompts; empty if none are wanted.
        eos: end-of-text tokens that end a continuation.
        interrupt: of the run.
    """

    output: Path
    config: RunConfig
    windows: ValidationWindows
    final: FinalExit
    continuations: tuple[Continuation, ...]
    eos: frozenset[int]
    interrupt: Interrupt

    def validate(self, pipeline: Pipeline, step: int) -> Quality:
        """Quality and acceptance of the exits, and with ``validation.free_running`` threshold mode.

        Prints tables to stderr, and writes ``validation/step-N.json`` and ``.png`` under ``output``.
        """
        config, groups = self.config, pipeline.stage.setup.groups
        settings, batch, chunk = config.validation, config.tuning.micro_batch_size, config.loss.chunk_tokens
        check = partial(self.interrupt.check_together, groups)
        quality = measure(
            pipeline,
            self.windows,
            settings.thresholds,
            final=self.final,
            batch_size=batch,
            chunk_tokens=chunk,
            check=check,
        )
        if self.continuations:
            length, tokens = settings.acceptance.draft_length, batch * self.windows.sequence_length
            acceptance = measure_acceptance(
                pipeline, self.continuations, length, batch_tokens=tokens, chunk_tokens=chunk, check=check
            )
            quality = with_acceptance(quality, acceptance)
            if settings.free_running:
                found = self._free_running(pipeline.stage, pipeline.layout.whole, pipeline.specs)
                quality = replace(quality, free_running=found)
        if groups.is_main:
            write_quality(quality, pipeline.specs, self.output / "validation" / f"step-{step}")
            print_quality(quality, pipeline.specs, f"Quality per exit after step {step}", to_stderr=True)
        return quality

    def free_running(self, full: FullModel, adapter: Adapter) -> FreeRunning | None:
        """Free-running threshold mode with the exits of an adapter, printed; None if there are no continuations."""
        if not self.continuations:
            return None
        groups = full.setup.groups
        stage, layout = full.with_exits(adapter.exits)
        groups.together(lambda: load_exits(stage.exits, adapter, full.model))
        found = self._free_running(stage, layout, adapter.exits)
        if groups.is_main:
            of = f"with the exits of {adapter.path.name} (step {adapter.steps})"
            print_free_running(found, full.setup.architecture.num_layers, of)
        return found

    def _free_running(self, stage: Stage, layout: Layout, specs: Sequence[ExitSpec]) -> FreeRunning:
        threshold = self.config.validation.free_running_threshold
        return measure_free_running(stage, layout, specs, self.continuations, threshold, self.eos, self.interrupt)


def _continuations(inputs: ValidationInputs, full: FullModel, eos: frozenset[int]) -> tuple[Continuation, ...]:
    """The full model's continuations of held-out prompts; none where nothing is measured on them."""
    arch, settings, windows = full.setup.architecture, inputs.config.validation.acceptance, inputs.windows
    # A prompt with its continuation is no longer than a sequence, so it needs no more memory.
    longest = min(windows.sequence_length, arch.max_generated_positions)
    limit = min(settings.tokens, longest // 2)
    # The engine runs on stages that all hold layers. A continuation of one token has no round.
    if not settings.prompts or limit < 2 or not full.layout.decodes:
        return ()
    most = longest - limit
    prompts = held_out_prompts(windows.ranges, settings.prompts, min(settings.prompt_tokens, most), most)
    return continuations(full, inputs.backbone_sha256, prompts, limit, eos)


def show_history(output: Path) -> None:
    """Of a run in ``output``: print its validations as a table to stderr, and plot agreement and acceptance.

    The plots are ``validation/agreement.png`` and, where they were measured in the validations,
    ``validation/acceptance.png`` and ``validation/free-running.png``. Nothing is shown before the second validation.

    Raises:
        DataError: its log cannot be read.
        UserError: the plot cannot be written.
    """
    validations = read_validations(output / LOG)
    if len(validations) < 2:
        return
    best = output / BEST
    steps = open_adapter(best, verify=False).steps if best.exists() else None
    print_history(validations, steps)
    plot = output / "validation" / "agreement.png"
    plot_agreement(validations, steps, plot)
    kept = f"; the exits with the lowest loss, of step {steps}, are in {best}" if steps is not None else ""
    print(f"agreement against tokens seen: {plot}{kept}", file=sys.stderr, flush=True)
    if sum(validation.free_running is not None for validation in validations) > 1:
        plot = output / "validation" / "free-running.png"
        plot_free_running(validations, steps, plot)
        print(f"free-running threshold mode against tokens seen: {plot}", file=sys.stderr, flush=True)
    if any(validation.acceptance for validation in validations):
        plot = output / "validation" / "acceptance.png"
        plot_acceptance(validations, steps, plot)
        print(f"tokens per round of speculative decoding against tokens seen: {plot}", file=sys.stderr, flush=True)
