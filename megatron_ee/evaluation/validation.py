"""Validation in ``tune``: quality and acceptance of the exits while they are tuned, and their history afterwards."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from megatron_ee.checkpoint.adapter import open_adapter
from megatron_ee.data.prompts import held_out_prompts
from megatron_ee.evaluation.acceptance import measure_acceptance, with_acceptance
from megatron_ee.evaluation.continuations import Continuation, continuations
from megatron_ee.evaluation.final_exit import final_exit
from megatron_ee.evaluation.history import read_validations
from megatron_ee.evaluation.plots import plot_acceptance, plot_agreement
from megatron_ee.evaluation.quality import measure
from megatron_ee.evaluation.report import print_history, print_quality, write_quality
from megatron_ee.model.quality import Quality
from megatron_ee.tuning.full_model import FullModel
from megatron_ee.tuning.log import LOG
from megatron_ee.tuning.schedule import Pipeline
from megatron_ee.tuning.trainer import BEST, Validate, ValidationInputs


def make_validator(output: Path, inputs: ValidationInputs, full: FullModel) -> Validate:
    """Compute now what validation needs of all layers, and return the validation function for ``tune``.

    Both raise ``Interrupted`` on all ranks soon after a signal. Each validation prints tables to stderr and writes
    ``validation/step-N.json`` and ``.png`` under ``output``.
    """
    config, windows, groups = inputs.config, inputs.windows, full.setup.groups
    batch, chunk = config.tuning.micro_batch_size, config.loss.chunk_tokens
    final = final_exit(full, inputs.backbone_sha256, windows, batch, chunk)
    paths = _continuations(inputs, full)
    check = partial(full.interrupt.check_together, groups)

    def validate(pipeline: Pipeline, step: int) -> Quality:
        thresholds = config.validation.thresholds
        quality = measure(pipeline, windows, thresholds, final=final, batch_size=batch, chunk_tokens=chunk, check=check)
        if paths:
            length, tokens = config.validation.acceptance.draft_length, batch * windows.sequence_length
            acceptance = measure_acceptance(
                pipeline, paths, length, batch_tokens=tokens, chunk_tokens=chunk, check=check
            )
            quality = with_acceptance(quality, acceptance)
        if groups.is_main:
            write_quality(quality, pipeline.specs, output / "validation" / f"step-{step}")
            print_quality(quality, pipeline.specs, f"Quality per exit after step {step}", to_stderr=True)
        return quality

    return validate


def _continuations(inputs: ValidationInputs, full: FullModel) -> tuple[Continuation, ...]:
    """The full model's continuations of held-out prompts, to measure acceptance on; none where it is not measured."""
    arch, settings, windows = full.setup.architecture, inputs.config.validation.acceptance, inputs.windows
    # A prompt with its continuation is no longer than a sequence, so it needs no more memory.
    longest = min(windows.sequence_length, arch.max_generated_positions)
    limit = min(settings.tokens, longest // 2)
    # The engine runs on stages that all hold layers. A continuation of one token has no round.
    if not settings.prompts or limit < 2 or not all(stage.layers for stage in full.layout.stages):
        return ()
    most = longest - limit
    prompts = held_out_prompts(windows.ranges, settings.prompts, min(settings.prompt_tokens, most), most)
    eos = frozenset(corpus.metadata.eos_id for corpus in windows.corpora if corpus.metadata is not None)
    return continuations(full, inputs.backbone_sha256, prompts, limit, eos)


def show_history(output: Path) -> None:
    """Of a run in ``output``: print its validations as a table to stderr, and plot agreement and acceptance.

    The plots are ``validation/agreement.png`` and, if acceptance was measured, ``validation/acceptance.png``. Nothing
    is shown before the second validation.

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
    if any(validation.acceptance for validation in validations):
        plot = output / "validation" / "acceptance.png"
        plot_acceptance(validations, steps, plot)
        print(f"tokens per round of speculative decoding against tokens seen: {plot}", file=sys.stderr, flush=True)
