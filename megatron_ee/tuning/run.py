"""From a configuration to tuned exits: check, load, tune."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ee import platform
from megatron_ee.checkpoint.adapter import Adapter, check_backbone, load_exits, open_adapter
from megatron_ee.checkpoint.atomic import numbered_directories, writer_lock
from megatron_ee.checkpoint.loading import ReleasedModel, initialise_exit, load_backbone, open_released
from megatron_ee.checkpoint.store import load_latest
from megatron_ee.config.check import check_run
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.load import config_to_dict
from megatron_ee.config.schema import RunConfig
from megatron_ee.data.loader import MicrobatchStream, PackedBlend, ValidationWindows, open_data
from megatron_ee.errors import CheckpointError, ConfigError
from megatron_ee.model.setup import ModelSetup, build_setup
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.groups import Groups, process_groups, world_size
from megatron_ee.parallel.optimizer import ExitOptimizer
from megatron_ee.progress import track
from megatron_ee.tuning.interrupt import watch_signals
from megatron_ee.tuning.log import RunLog
from megatron_ee.tuning.state import Progress, load_state
from megatron_ee.tuning.trainer import Trainer, Validate

MakeValidator = Callable[[RunConfig, ModelSetup, ReleasedModel, str, ValidationWindows], Validate]
"""Prepares validation before tuning takes its memory; gets the backbone's hash and the windows."""


def tune(
    config: RunConfig, *, output: Path, resume: bool, init_adapter: Path | None, make_validator: MakeValidator
) -> int:
    """Tune the exits that ``config`` asks for; exit status 0 when done, or saved after a signal.

    Leaves in ``output``: ``adapter/``, ``adapter-best/``, ``checkpoints/step-N/``, ``log.jsonl``, ``tensorboard/``,
    ``config.json``.

    Raises:
        ConfigError: a setting that is impossible for this model, or ``output`` holds another run.
        CheckpointError: the model, adapter or checkpoint cannot be used.
        DataError: a corpus cannot be used.
    """
    # Signals are watched from the start: loading takes long, and a stop there must not look like a crash.
    with watch_signals() as interrupt:
        model = open_released(config.model.path)
        specs = check_run(config, model.architecture, world_size())
        adapter = open_adapter(init_adapter) if init_adapter is not None else None
        blend, windows = open_data(config.data, model.architecture.vocab_size, config.validation.sequences)
        parallel = config.parallel
        with process_groups(parallel.tensor, parallel.pipeline) as groups, writer_lock(output):
            _check_output(output, resume)
            digest = _backbone_digest(model)
            if adapter is not None:
                check_backbone(adapter, digest, config.model.path)
            setup = build_setup(model.architecture, platform.DTYPES[config.model.dtype], groups)
            validate = None
            if windows is not None:
                validate = make_validator(config, setup, model, digest, windows)
            stage = _load_stage(setup, model, specs, adapter, config.tuning.seed)
            optimizer = ExitOptimizer(
                stage.exits, setup.config, groups, config.optimizer, config.schedule, config.tuning.steps
            )
            description = _description(config, specs, digest)
            progress = Progress()
            if resume:
                progress = _resume(output, stage, optimizer, description)
            _write_config(output, config)
            trainer = Trainer(
                config=config,
                stage=stage,
                optimizer=optimizer,
                stream=_stream(config, blend, groups, progress),
                output=output,
                description=description,
                validate=validate,
                progress=progress,
            )
            with RunLog(output, config.logging, progress.step, enabled=groups.is_main) as log:
                trainer.run(log, interrupt, is_main=groups.is_main)
    return 0


def _check_output(output: Path, resume: bool) -> None:
    if not resume and (numbered_directories(output / "checkpoints") or (output / "adapter").exists()):
        raise ConfigError(f"--output: {output} holds a run already; go on with --resume, or choose another directory")


def _backbone_digest(model: ReleasedModel) -> str:
    total = sum(entry.nbytes for entry in model.weights.values())
    with track(total, "B", "hashing the backbone") as bar:
        return model.digest(advance=bar.advance)


def _load_stage(
    setup: ModelSetup, model: ReleasedModel, specs: tuple[ExitSpec, ...], adapter: Adapter | None, seed: int
) -> Stage:
    """The layers up to the deepest exit, and the exits with their first values."""
    deepest = max(spec.layer for spec in specs)
    stage = Stage(setup, range(1, deepest + 1), specs)
    total = sum(p.numel() * p.element_size() for p in stage.parameters() if not p.requires_grad)
    with track(total, "B", f"loading layers 1 to {deepest}") as bar:
        load_backbone(stage, model, bar.advance)
    if adapter is not None:
        load_exits(stage.exits, adapter, model)
    else:
        for exit_ in stage.exits:
            initialise_exit(exit_, model, seed)
    return stage


def _resume(output: Path, stage: Stage, optimizer: ExitOptimizer, description: dict[str, Any]) -> Progress:
    """Go on from the newest good checkpoint, or from the beginning where there is none yet."""

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def load(checkpoint: Any) -> tuple[Progress, dict[str, Any]]:
        return load_state(checkpoint, stage, optimizer, description), checkpoint.metadata["config"]

    found = load_latest(output / "checkpoints", load, report)
    if found is None:
        report(f"{output}: no checkpoint yet; starting from the beginning")
        return Progress()
    progress, before = found
    changed = [name for name, value in description["config"].items() if before.get(name) != value]
    if changed:
        report(f"the configuration changed since the checkpoint was made, in: {', '.join(changed)}")
    report(f"going on after step {progress.step}")
    return progress


def _description(config: RunConfig, specs: tuple[ExitSpec, ...], digest: str) -> dict[str, Any]:
    return {
        "base_model": str(Path(config.model.path).resolve()),
        "backbone_sha256": digest,
        "dtype": config.model.dtype,
        "exits": [dataclasses.asdict(spec) for spec in specs],
        "config": config_to_dict(config),
    }


def _stream(config: RunConfig, blend: PackedBlend, groups: Groups, progress: Progress) -> MicrobatchStream:
    return MicrobatchStream(
        blend,
        config.tuning.micro_batch_size,
        config.tuning.global_batch_size,
        groups.data.rank(),
        groups.data.size(),
        progress.consumed,
    )


def _write_config(output: Path, config: RunConfig) -> None:
    path = output / "config.json"
    try:
        path.write_text(json.dumps(config_to_dict(config), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from None
