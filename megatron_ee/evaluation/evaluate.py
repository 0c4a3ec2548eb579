"""``evaluate``: a model's exits on a corpus; and the validation that ``tune`` calls while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ee import platform
from megatron_ee.checkpoint.adapter import find_exits, load_exits
from megatron_ee.checkpoint.atomic import write_json
from megatron_ee.checkpoint.loading import SavedModel, load_backbone, open_model
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import RunConfig, ValidationConfig
from megatron_ee.data.indexed import open_corpus
from megatron_ee.data.loader import ValidationWindows, validation_windows
from megatron_ee.errors import CheckpointError, ConfigError
from megatron_ee.evaluation.final_exit import final_exit
from megatron_ee.evaluation.plots import plot_sweep
from megatron_ee.evaluation.quality import measure
from megatron_ee.evaluation.report import print_quality, report_dict
from megatron_ee.model.quality import Quality
from megatron_ee.model.setup import ModelSetup, build_setup
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.groups import process_groups
from megatron_ee.parallel.layout import Layout
from megatron_ee.progress import track
from megatron_ee.tuning.schedule import Pipeline, one_stage
from megatron_ee.tuning.trainer import Validate

DEFAULT_SEQUENCE_LENGTH = 2048


@dataclass(frozen=True)
class Evaluation:
    """Quality of a model's exits, with what was measured.

    Attributes:
        quality: the figures.
        exits: what the exits are, in the same order.
        model: the model's directory.
        adapter: the exits' directory, if any.
        sequence_length: tokens per window.
    """

    quality: Quality
    exits: tuple[ExitSpec, ...]
    model: str
    adapter: str | None
    sequence_length: int

    def to_dict(self) -> dict[str, Any]:
        """``final_loss``, ``exits`` and the rest of ``report_dict``, with what was measured."""
        what = {"model": self.model, "adapter": self.adapter, "sequence_length": self.sequence_length}
        return {**what, **report_dict(self.quality, self.exits)}


def evaluate(
    *,
    model: str | Path,
    adapter: str | Path | None,
    data: str | Path,
    sequence_length: int | None = None,
    sequences: int = 256,
    batch_size: int = 1,
    dtype: str = "bfloat16",
    thresholds: Sequence[float] | None = None,
    verify: bool = True,
) -> Evaluation:
    """Score the final exit, and the exits of ``adapter``, on a corpus.

    Args:
        model: Hugging Face directory or parallel checkpoint.
        adapter: exits; None takes those that lie with the model, or scores the final exit alone.
        data: prefix of a corpus.
        sequence_length: tokens per window; default 2048, or the model's positions where these are fewer.
        sequences: largest number of windows, 0 for all.
        batch_size: windows at a time.
        dtype: of the model.
        thresholds: of the sweep, empty for none; default as for validation while tuning.
        verify: check what is read against its checksums, where there are any.

    Raises:
        ConfigError: the sequence is longer than the model's positions.
        CheckpointError: the model or the adapter cannot be used, or they do not belong together.
        DataError: the corpus cannot be used.
    """
    released = open_model(model, verify=verify)
    arch = released.architecture
    length = sequence_length or min(DEFAULT_SEQUENCE_LENGTH, arch.max_positions)
    if length > arch.max_positions:
        raise ConfigError(f"--sequence-length: {length} is more than the model's {arch.max_positions} positions")
    opened = find_exits(released, adapter, released.digest, verify=verify)
    corpus = open_corpus(data)
    corpus.check_vocabulary(arch.vocab_size)
    windows = validation_windows([corpus], length, sequences)
    specs = opened.exits if opened is not None else ()
    with process_groups() as groups:
        setup = build_setup(arch, platform.DTYPES[dtype], groups)
        stage = Stage(setup, range(1, arch.num_layers + 1), specs, final_exit=True)
        total = sum(parameter.numel() * parameter.element_size() for parameter in stage.backbone.parameters())
        with track(total, "B", "loading") as bar:
            load_backbone(stage, released, bar.advance)
        if opened is not None:
            load_exits(stage.exits, opened, released)
        quality = measure(one_stage(stage), windows, thresholds or ValidationConfig().thresholds, batch_size=batch_size)
    return Evaluation(quality, specs, str(model), None if opened is None else str(opened.path), length)


def make_validator(
    output: Path,
    config: RunConfig,
    setup: ModelSetup,
    model: SavedModel,
    digest: str,
    windows: ValidationWindows,
    layout: Layout,
) -> Validate:
    """Validation for ``tune``: computes the final exit's share now, and returns what is called while tuning.

    Each call prints tables to stderr and writes ``validation/step-N.json`` and ``.png`` under ``output``.
    """
    batch, chunk = config.tuning.micro_batch_size, config.loss.chunk_tokens
    final = final_exit(setup, model, digest, windows, layout, batch, chunk)

    def validate(pipeline: Pipeline, step: int) -> Quality:
        thresholds = config.validation.thresholds
        quality = measure(pipeline, windows, thresholds, final=final, batch_size=batch, chunk_tokens=chunk)
        if setup.groups.is_main:
            write_quality(quality, pipeline.specs, output / "validation" / f"step-{step}")
            print_quality(quality, pipeline.specs, f"Quality per exit after step {step}", to_stderr=True)
        return quality

    return validate


def write_quality(quality: Quality, exits: Sequence[ExitSpec], path: Path) -> None:
    """Write ``path.json`` and, where exits were swept, the plot of the sweep, ``path.png``.

    Raises:
        CheckpointError: they cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path.with_suffix(".json"), report_dict(quality, exits))
        if quality.exits and quality.sweep:
            plot_sweep(quality, path.with_suffix(".png"))
    except OSError as error:
        raise CheckpointError(f"{path}.json: cannot be written: {error.strerror}") from None
