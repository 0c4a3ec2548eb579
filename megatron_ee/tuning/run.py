"""From a configuration to tuned exits: check, load, tune."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ee import platform
from megatron_ee.checkpoint.adapter import (
    SETTINGS,
    Adapter,
    check_backbone,
    check_fits,
    check_settings,
    open_adapter,
    say_quantisation,
)
from megatron_ee.checkpoint.atomic import numbered_directories, write_json, writer_lock
from megatron_ee.checkpoint.digest import hash_backbone
from megatron_ee.checkpoint.initialise import initialise_exit
from megatron_ee.checkpoint.loading import load_exits
from megatron_ee.checkpoint.ownership import claim_output
from megatron_ee.checkpoint.packing import packed_slots
from megatron_ee.checkpoint.resume import load_latest, newest_readable
from megatron_ee.checkpoint.saved_model import SavedModel, choose_dtype, open_model, quantise_layers, say_limits
from megatron_ee.checkpoint.store import Checkpoint
from megatron_ee.config.check import check_run
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.load import config_to_dict
from megatron_ee.config.schema import RunConfig
from megatron_ee.data.checks import changed_data, check_data, describe_data
from megatron_ee.data.indexed import Corpus
from megatron_ee.data.loader import MicrobatchStream, PackedBlend, ValidationWindows, open_data
from megatron_ee.errors import ConfigError, Interrupted
from megatron_ee.exits.registry import check_trains, resolve_init
from megatron_ee.exits.stage import Stage, build_stage
from megatron_ee.model.setup import build_setup
from megatron_ee.model.streaming import check_host_memory
from megatron_ee.parallel.adam import adam_class
from megatron_ee.parallel.agreement import each_own
from megatron_ee.parallel.groups import (
    Groups,
    collective_minutes,
    gather_objects,
    joined_processes,
    launched_rank,
    model_groups,
    world_size,
)
from megatron_ee.parallel.layout import Layout
from megatron_ee.parallel.optimizer import ExitOptimizer
from megatron_ee.parallel.watchdog import watch_ranks
from megatron_ee.planning.balance import resolve_layout
from megatron_ee.planning.corpus import little_data
from megatron_ee.planning.parameters import stage_parameters
from megatron_ee.planning.plan import plan_run
from megatron_ee.planning.storage import HOST_OPTIMIZER
from megatron_ee.planning.table import print_plan
from megatron_ee.tuning.finish import finish
from megatron_ee.tuning.fitted import fitted_exits
from megatron_ee.tuning.full_model import FullModel, load_layers
from megatron_ee.tuning.gates import fit_next
from megatron_ee.tuning.interrupt import Interrupt, watch_signals
from megatron_ee.tuning.log import RunLog
from megatron_ee.tuning.schedule import Pipeline
from megatron_ee.tuning.state import RunProgress, check_same_run, load_state
from megatron_ee.tuning.status import reported_status, write_failed
from megatron_ee.tuning.teacher import of_distillation
from megatron_ee.tuning.trainer import MakeValidator, Trainer, ValidationInputs, Validator
from megatron_ee.tuning.wandb_run import check_wandb


def tune(
    config: RunConfig,
    *,
    output: Path,
    resume: bool,
    init_adapter: Path | None,
    make_validator: MakeValidator,
    open_model: Callable[..., SavedModel] = open_model,
    allow_new_data: bool = False,
    around: Callable[[Trainer], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    command: str = "tune",
) -> int:
    """Tune the exits of ``config``. Return exit status 0 when done, or saved after a signal. Every rank calls this.

    ``output`` then holds ``adapter/``, ``adapter-best/``, ``adapter-initial/`` if exits were fitted,
    ``checkpoints/step-N/``, ``log.jsonl``, ``tensorboard/``, ``config.json`` and ``status.json``. ``open_model`` opens
    the model at a path, or the part of it to tune. ``around`` is a context that is open while the trainer runs.
    ``command`` is written into the output's marker.
    ``allow_new_data`` lets ``resume`` continue with changed corpora.

    Raises:
        ConfigError: a setting is impossible for this model, or ``output`` holds another run, a run with other corpora,
            or files that this command did not write.
        CheckpointError: the model, adapter or checkpoint cannot be used.
        DataError: a corpus cannot be used.
    """
    progress, steps, started = RunProgress(), config.tuning.steps, time.monotonic()
    minutes = collective_minutes(config.parallel.timeout_seconds)
    with watch_signals() as interrupt, joined_processes(minutes) as control:
        gather = partial(gather_objects, group=control)
        try:
            inputs = each_own(gather, lambda: _open_inputs(config, init_adapter, open_model, interrupt))
            config = inputs.config
            with (
                model_groups(control, config.parallel.tensor, config.parallel.pipeline, minutes) as groups,
                watch_ranks(
                    groups.rank,
                    groups.world.size(),
                    config.parallel.timeout_seconds,
                    lambda: f"stage {groups.pipeline.rank()}, step {progress.step + 1}",
                    lambda line: write_failed(output, progress, steps),
                ),
                _owned(output, command, resume, groups),
                reported_status(output, config.tuning, progress, interrupt, enabled=groups.is_main),
            ):
                trainer, full, validator = _prepare(
                    config, inputs, groups, output, resume, allow_new_data, progress, make_validator, interrupt
                )
                settings, before = config_to_dict(config), progress.step
                log = RunLog(output, config.logging, progress.step, settings=settings, enabled=groups.is_main)
                with log:
                    with around(trainer):
                        done = trainer.run(log, interrupt)
                    del trainer  # frees its exits, and its layers if they are its own
                    if done:
                        finish(config, full, inputs.gates, inputs.blend, validator, output, log)
                    if progress.step > before:
                        device = platform.device_name()
                        log.session(progress.step, time.monotonic() - started, groups.world.size(), device)
        except Interrupted as error:  # all that is tuned is saved already
            if launched_rank() == 0:
                when = "the work after the last step was done" if progress.step else "the first step"
                print(f"{error}: ended before {when}; continue with --resume", file=sys.stderr, flush=True)
    return 0


@dataclass(frozen=True)
class _Inputs:
    """The inputs of a run, opened and checked. None of them takes much memory yet.

    Attributes:
        config: the configuration, with ``auto`` resolved to a dtype.
        windows: validation windows; None without validation.
        held_out: corpora that ``data.validation`` names.
        gates: layers of the exits that get a gate; ``specs`` are without.
    """

    config: RunConfig
    model: SavedModel
    specs: tuple[ExitSpec, ...]
    layout: Layout
    adapter: Adapter | None
    blend: PackedBlend
    windows: ValidationWindows | None
    held_out: tuple[Corpus, ...]
    gates: frozenset[int]

    @property
    def distils(self) -> bool:
        """Whether all layers run in every step, so that gates are fitted while tuning."""
        return self.config.loss.distillation.kl > 0

    @property
    def gated(self) -> tuple[ExitSpec, ...]:
        """``specs`` with the gates."""
        return tuple(dataclasses.replace(spec, gate=spec.layer in self.gates) for spec in self.specs)


def _open_inputs(
    config: RunConfig, init_adapter: Path | None, open_model: Callable[..., SavedModel], interrupt: Interrupt
) -> _Inputs:
    verify = config.checkpoint.verify
    model = quantise_layers(open_model(config.model.path, verify=verify), config.model.quantise, "model.quantise")
    dtype: Any = choose_dtype(config.model.dtype, model, "model.dtype", tuning=True)
    say_limits(model)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    arch = model.architecture
    wanted = resolve_init(check_run(config, arch, world_size()), arch)
    check_trains(wanted)
    gates = frozenset(spec.layer for spec in wanted if spec.gate)
    specs = tuple(dataclasses.replace(spec, gate=False) for spec in wanted)
    # Refused here if they are not installed on this machine.
    check_wandb(config.logging.wandb)
    adam_class(config.optimizer.implementation, platform.DTYPES[config.model.dtype])
    distillation = config.loss.distillation.kl > 0
    free_running = config.validation.free_running
    layout = resolve_layout(config.parallel, specs, arch, config.data.sequence_length, distillation, free_running)
    if init_adapter is not None:
        described = open_adapter(init_adapter, verify=False)
        check_settings(described, model)
        say_quantisation(described, model, "model.quantise")
        check_fits(described, specs, arch)
    first = launched_rank() == 0
    vocab_size = arch.vocab_size if first else None
    blend, windows = open_data(config.data, vocab_size, config.validation.sequences, interrupt.check)
    held_out = windows.corpora if windows is not None and config.data.validation else ()
    if first:
        passes = blend.passes(config.tuning.steps * config.tuning.global_batch_size)
        notices = little_data(config, arch, specs, blend.trained_tokens, passes)
        for line in [*check_data(blend.corpora, held_out, model.path), *notices]:
            print(line, file=sys.stderr, flush=True)
    # Hashed last: all other checks are faster.
    adapter = open_adapter(init_adapter, verify=verify) if init_adapter is not None else None
    return _Inputs(config, model, specs, layout, adapter, blend, windows, held_out, gates)


def _prepare(
    config: RunConfig,
    inputs: _Inputs,
    groups: Groups,
    output: Path,
    resume: bool,
    allow_new_data: bool,
    progress: RunProgress,
    make_validator: MakeValidator,
    interrupt: Interrupt,
) -> tuple[Trainer, FullModel, Validator | None]:
    """Load the backbone and the exits, and restore the run's state into ``progress``.

    Also returns all layers, which are loaded if tuning keeps them, and what measures the exits on validation data.

    Raises:
        Interrupted: a signal came to one of the ranks; raised on all.
    """
    model, layout = inputs.model, inputs.layout
    specs = inputs.gated if inputs.distils else inputs.specs
    description = _description(config, specs, model)
    interrupt.check_together(groups)  # signals during the import of libraries
    data = groups.together(lambda: describe_data(inputs.blend.corpora, inputs.held_out) if groups.is_main else {})[0]
    description["data"] = data
    leave_out = {"data"} if allow_new_data else set()
    newest = _open_newest(config, output, groups) if resume else None
    _check_resumable(newest, _without(description, leave_out), groups)
    dtype, distillation = platform.DTYPES[config.model.dtype], config.loss.distillation
    setup = build_setup(
        model.architecture,
        dtype,
        groups,
        sequence_parallel=config.parallel.sequence,
        slots=packed_slots(model, config.model.weights),
        residency=config.model.residency,
    )
    kept = _host_optimizer(config, inputs, groups)
    check_host_memory(setup, model.architecture.num_layers, "model.residency", kept)
    stored = model.stored_weights
    digest = groups.together(lambda: hash_backbone(stored, check=interrupt.check) if groups.is_main else "")[0]
    description["backbone_sha256"] = digest
    _check_resumable(newest, _without(description, leave_out), groups)
    if inputs.adapter is not None:
        check_backbone(inputs.adapter, digest, config.model.path)
    _show_plan(config, inputs, groups)
    full = FullModel(setup, model, interrupt, layout)
    validator, adapter = _with_all_layers(config, inputs, full, output, resume, description, make_validator)
    stage = _tuned_stage(config, full, layout, specs)
    groups.together(partial(_load_exits, stage, model, adapter, config.tuning.seed))
    optimizer = ExitOptimizer(stage.exits, setup.config, groups, config.optimizer, config.schedule, config.tuning.steps)
    resumed = resume and _resume(config, output, stage, optimizer, description, leave_out, progress)
    if groups.is_main:
        write_json(output / "config.json", config_to_dict(config))
    trainer = Trainer(
        config=config,
        pipeline=Pipeline(stage, layout, specs, teacher=of_distillation(distillation)),
        optimizer=optimizer,
        stream=_stream(config, inputs.blend, groups, progress),
        output=output,
        description=description,
        validate=None if validator is None else validator.validate,
        fit_gates=partial(fit_next, config, inputs.blend, interrupt) if inputs.gates and inputs.distils else None,
        progress=progress,
        resumed=resumed,
        keep_initial=inputs.adapter is not None or _fits(specs),
    )
    return trainer, full, validator


def _with_all_layers(
    config: RunConfig,
    inputs: _Inputs,
    full: FullModel,
    output: Path,
    resume: bool,
    description: dict[str, Any],
    make_validator: MakeValidator,
) -> tuple[Validator | None, Adapter | None]:
    """What needs all layers before tuning: preparing validation, and the adapter that the exits start from, if any.

    Raises:
        Interrupted: a signal came to one of the ranks; raised on all.
    """
    validator, adapter = None, inputs.adapter
    if inputs.windows is not None:
        validator = make_validator(ValidationInputs(config, description["backbone_sha256"], inputs.windows), full)
    if adapter is None and _fits(inputs.specs):
        adapter = fitted_exits(config, full, inputs.specs, inputs.blend, output, resume, description)
    return validator, adapter


def _fits(specs: Sequence[ExitSpec]) -> bool:
    return any(spec.init == "fit" for spec in specs)


@contextlib.contextmanager
def _owned(output: Path, command: str, resume: bool, groups: Groups) -> Iterator[None]:
    """Hold the output's lock, on the first rank for all. Refuse to overwrite another run."""
    with contextlib.ExitStack() as stack:

        def take() -> None:
            claim_output(output, command)
            stack.enter_context(writer_lock(output))
            if not resume and (numbered_directories(output / "checkpoints") or (output / "adapter").exists()):
                raise ConfigError(
                    f"--output: {output} holds a run already; continue it with --resume, or choose another directory"
                )

        groups.together(lambda: take() if groups.is_main else None)
        yield


def _show_plan(config: RunConfig, inputs: _Inputs, groups: Groups) -> None:
    """Print the plan if there are several processes."""
    if groups.is_main and groups.world.size() > 1:
        arch, size = inputs.model.architecture, groups.world.size()
        print_plan(plan_run(config, inputs.layout, arch, inputs.gated, size, accelerator=platform.has_accelerator()))


def _host_optimizer(config: RunConfig, inputs: _Inputs, groups: Groups) -> int | None:
    """Bytes of this rank's optimizer in host memory; None if it is on the device."""
    if config.optimizer.implementation != "deepspeed_cpu":
        return None
    layout, stage, tensor = inputs.layout.whole, groups.pipeline.rank(), config.parallel.tensor
    _, trained = stage_parameters(layout, stage, inputs.model.architecture, inputs.specs, tensor)
    return trained * HOST_OPTIMIZER // groups.data.size()


def _tuned_stage(config: RunConfig, full: FullModel, layout: Layout, specs: Sequence[ExitSpec]) -> Stage:
    """This rank's stage of tuning: of the layers of ``full`` if all are needed, else of its own ones, loaded here."""
    distillation = config.loss.distillation.kl > 0
    if (distillation or config.validation.free_running) and full.holds(layout):
        return full.with_exits(specs, layout)[0]
    full.free()  # before tuning allocates memory
    stage = build_stage(full.setup, layout, specs, final_exit=distillation)
    load_layers(stage, full.model, full.interrupt)
    return stage


def _load_exits(stage: Stage, model: SavedModel, adapter: Adapter | None, seed: int) -> None:
    """The first values of this stage's exits: those of ``adapter``, if there is one."""
    if adapter is not None:
        load_exits(stage.exits, adapter, model)
    else:
        for exit_ in stage.exits:
            initialise_exit(exit_, model, seed)


def _open_newest(config: RunConfig, output: Path, groups: Groups) -> Checkpoint | None:
    """The checkpoint to continue from, on the first rank; None on the others, or if there is none."""
    found: list[Checkpoint | None] = [None]

    def look() -> None:
        found[0] = newest_readable(output / "checkpoints", verify=config.checkpoint.verify)

    groups.together(lambda: look() if groups.is_main else None)
    return found[0]


def _check_resumable(newest: Checkpoint | None, description: dict[str, Any], groups: Groups) -> None:
    """Refuse a checkpoint whose ``description`` is another run's, before anything is loaded."""
    groups.together(lambda: check_same_run(newest, description) if newest is not None else None)


def _resume(
    config: RunConfig,
    output: Path,
    stage: Stage,
    optimizer: ExitOptimizer,
    description: dict[str, Any],
    leave_out: set[str],
    progress: RunProgress,
) -> bool:
    """Continue from the newest good checkpoint, or start a new run and return False if there is none.

    Args:
        leave_out: parts of ``description`` that may differ from the checkpoint's.
    """
    groups = stage.setup.groups

    def report(line: str) -> None:
        if groups.is_main:
            print(line, file=sys.stderr, flush=True)

    def load(checkpoint: Checkpoint) -> tuple[RunProgress, dict[str, Any], dict[str, str]]:
        made_with = checkpoint.metadata.get("config")
        made_with = made_with if isinstance(made_with, dict) else {}
        changes = changed_data(checkpoint.metadata.get("data"), description["data"])
        return load_state(checkpoint, stage, optimizer, _without(description, leave_out)), made_with, changes

    found = load_latest(
        output / "checkpoints",
        load,
        report,
        rank=groups.rank,
        gather=groups.gather,
        verify=config.checkpoint.verify,
    )
    if found is None:
        report(f"{output}: no checkpoint yet; starting from the beginning")
        return False
    loaded, made_with, new_data = found
    for name, value in loaded:
        setattr(progress, name, value)
    for key, change in new_data.items():
        report(f"{key}: {change}")
        if key.startswith("data.validation"):
            progress.best_loss = progress.best_step = None  # losses on different texts are not comparable
            progress.stale_validations = 0
    changed = [name for name, value in description["config"].items() if made_with.get(name) != value]
    if changed:
        report(f"the configuration changed since the checkpoint was made, in: {', '.join(changed)}")
    report(f"continuing after step {progress.step}")
    return True


def _without(description: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in description.items() if key not in keys}


def _description(config: RunConfig, specs: tuple[ExitSpec, ...], model: SavedModel) -> dict[str, Any]:
    """Identification of a run, without the backbone's hash."""
    return {
        "base_model": str(Path(config.model.path).resolve()),
        SETTINGS: model.settings,
        "dtype": config.model.dtype,
        "quantise": None if config.model.quantise == "none" else config.model.quantise,
        "exits": [dataclasses.asdict(spec) for spec in specs],
        "config": config_to_dict(config),
    }


def _stream(config: RunConfig, blend: PackedBlend, groups: Groups, progress: RunProgress) -> MicrobatchStream:
    return MicrobatchStream(
        blend,
        config.tuning.micro_batch_size,
        config.tuning.global_batch_size,
        groups.data.rank(),
        groups.data.size(),
        progress.consumed,
    )
