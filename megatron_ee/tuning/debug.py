"""``tune --debug``: a small slice of a run on one process, deterministic, with all checks on.

Any configuration works unchanged. It is checked in full, as for the real run, and then reduced: one process in place of
``parallel``, the first few layers of the backbone with their real weights, one exit of each kind (body and head) spread
over these layers, and few steps on short sequences. A ``layer`` exit is copied from the slice's last layer, which the
final exit reads too. The slice has its own hash, so its adapter fits no whole model. Results go to a subdirectory of
the output, which the next debug run replaces.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from megatron_ee.checkpoint.atomic import LOCK_NAME, storage_errors, writer_lock
from megatron_ee.checkpoint.ownership import MARKER, check_output
from megatron_ee.checkpoint.saved_model import SavedModel, open_model
from megatron_ee.config.check import check_run
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import ExitConfig, ParallelConfig, RunConfig, WandbConfig
from megatron_ee.errors import ConfigError
from megatron_ee.exits.registry import check_trains, resolve_init
from megatron_ee.families.weights import expected_tensors
from megatron_ee.parallel.groups import world_size
from megatron_ee.planning.balance import resolve_layout
from megatron_ee.tuning.checks import LOG, checked
from megatron_ee.tuning.run import tune
from megatron_ee.tuning.trainer import MakeValidator
from megatron_ee.tuning.wandb_run import check_wandb

COMMAND, DIRECTORY = "tune --debug", "debug"
"""Subdirectory of the run's output that a debug run writes to."""
LAYERS, STEPS, MICROBATCHES, MICRO_BATCH_SIZE, SEQUENCE_LENGTH, VALIDATION_SEQUENCES, PROMPTS = 4, 3, 2, 2, 128, 2, 2
"""Limits of a slice. It has more layers only if there are more kinds of exits."""


@dataclass(frozen=True)
class Slice:
    """The part of the model and its exits that a debug run keeps.

    Attributes:
        layers: number of backbone layers, from the first.
        exits: each exit that is kept, as configured and as it runs.
        left_out: layers of the exits that are skipped, since an earlier one has the same body and head.
    """

    layers: int
    exits: tuple[tuple[ExitSpec, ExitSpec], ...]
    left_out: tuple[int, ...]


def debug_tune(config: RunConfig, *, output: Path, make_validator: MakeValidator) -> int:
    """Run a small slice of ``config`` with all checks on. Return exit status 0 if all pass.

    ``output`` then holds the files of ``tune`` and ``debug.log``: every parameter, and every module with the shapes and
    dtypes of its first call.

    Raises:
        ConfigError: as in ``tune``, for the unreduced ``config``; or several processes are running.
        UserError: a check failed; one line names the module or parameter.
    """
    if world_size() > 1:
        error = ConfigError(f"--debug: runs on one process, but {world_size()} are running; start it without torchrun")
        error.common = True
        raise error
    model, parallel = open_model(config.model.path), config.parallel
    specs = check_run(config, model.architecture, parallel.tensor * parallel.pipeline)
    resolve_init(specs, model.architecture)
    check_trains(specs)
    distillation = config.loss.distillation.kl > 0
    free_running = config.validation.free_running
    resolve_layout(parallel, specs, model.architecture, config.data.sequence_length, distillation, free_running)
    check_wandb(config.logging.wandb)
    kept = choose_slice(specs, model.architecture.num_layers)
    small = cut_config(config, kept)
    check_output(output, COMMAND)
    check_output(output.parent, "tune")
    _remove_earlier(output)
    _announce(small, kept, model.architecture.num_layers, output)
    passed: list[str] = []
    with deterministic(small.tuning.seed):
        status = tune(
            small,
            output=output,
            resume=False,
            init_adapter=None,
            make_validator=make_validator,
            open_model=lambda path, verify: cut_model(model, kept.layers),
            around=partial(checked, passed=passed.append),
            command=COMMAND,
        )
    for line in passed:  # after what tune does with the tuned exits
        print(line, file=sys.stderr, flush=True)
    return status


def choose_slice(specs: Sequence[ExitSpec], num_layers: int) -> Slice:
    """The first exit of each kind, in order, spread over as few layers as possible.

    Args:
        specs: the configured exits, by layer.
        num_layers: depth of the model.
    """
    kinds: dict[tuple[str, str], ExitSpec] = {}
    for spec in specs:
        kinds.setdefault((spec.body, spec.head), spec)
    kept = list(kinds.values())
    layers = min(num_layers, max(LAYERS, len(kept)))
    # The last exit reads the last layer, so that all layers run.
    places = [layers * (index + 1) // len(kept) for index in range(len(kept))]
    exits = [(spec, dataclasses.replace(spec, layer=place)) for spec, place in zip(kept, places, strict=True)]
    return Slice(layers, tuple(exits), tuple(spec.layer for spec in specs if spec not in kept))


def cut_config(config: RunConfig, kept: Slice) -> RunConfig:
    """The configuration of a debug run of ``config``."""
    micro, acceptance = min(config.tuning.micro_batch_size, MICRO_BATCH_SIZE), config.validation.acceptance
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, residency="device"),
        # A slice has too little data to fit exits on.
        exits=[
            ExitConfig(**{**dataclasses.asdict(spec), "init": "random" if spec.init == "random" else "copy"})
            for _, spec in kept.exits
        ],
        data=dataclasses.replace(config.data, sequence_length=min(config.data.sequence_length, SEQUENCE_LENGTH)),
        parallel=ParallelConfig(),
        tuning=dataclasses.replace(
            config.tuning,
            steps=min(config.tuning.steps, STEPS),
            global_batch_size=MICROBATCHES * micro,
            micro_batch_size=micro,
            patience=0,
        ),
        validation=dataclasses.replace(
            config.validation,
            interval=0,
            sequences=min(config.validation.sequences or VALIDATION_SEQUENCES, VALIDATION_SEQUENCES),
            acceptance=dataclasses.replace(acceptance, prompts=min(acceptance.prompts, PROMPTS)),
        ),
        checkpoint=dataclasses.replace(config.checkpoint, interval=0),
        logging=dataclasses.replace(config.logging, interval=1, wandb=WandbConfig()),
    )


def cut_model(model: SavedModel, layers: int) -> SavedModel:
    """A model of the first ``layers`` layers of a model. The whole model's files were already checked."""
    whole = model.architecture
    architecture = dataclasses.replace(whole, num_layers=layers, windows=whole.windows[:layers])
    weights = {name: model.weights[name] for name in expected_tensors(architecture)}
    quantised = {name: weight for name, weight in model.quantised.items() if name in weights}
    return SavedModel(model.path, architecture, weights, quantised=quantised)


@contextlib.contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Deterministic algorithms, seeds, and autograd's anomaly detection, until the context closes.

    Meanwhile torch fills uninitialised memory with NaN, which reveals a weight that was never loaded.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # cuBLAS reads this variable at its first use, and is deterministic only with it.
    workspace = {"CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8")}
    with (
        mock.patch.dict(os.environ, workspace),
        torch.random.fork_rng(devices=[]),
        torch.autograd.set_detect_anomaly(True),
    ):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _remove_earlier(output: Path) -> None:
    """Delete an earlier debug run, but for its marker, which identifies the directory even after an incomplete
    removal."""
    if not output.exists():
        return
    with writer_lock(output), storage_errors(output, "delete"):
        for path in output.iterdir():
            if path.name in (MARKER, LOCK_NAME):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _announce(config: RunConfig, kept: Slice, num_layers: int, output: Path) -> None:
    """Print to stderr which part of the configuration is run, and where results go."""
    tuning = config.tuning
    exits = "; ".join(
        f"{spec.body} with {spec.head} head, configured after layer {spec.layer}, runs after layer {small.layer}"
        for spec, small in kept.exits
    )
    same = (
        f"; left out, since another exit is of the same kind: {', '.join(map(str, kept.left_out))}"
        if kept.left_out
        else ""
    )
    for line in (
        f"one process, layers 1 to {kept.layers} of {num_layers}, {tuning.steps} steps of {tuning.global_batch_size} "
        f"sequences of {config.data.sequence_length} tokens; results go to {output}",
        f"exits: {exits}{same}",
        f"shapes of all tensors: {output / LOG}",
    ):
        print(f"debug: {line}", file=sys.stderr, flush=True)
