"""What a run does with all layers after its last step: gates, and free-running threshold mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ee.checkpoint.adapter import DESCRIPTION, MAX_DESCRIPTION, describe_exits, open_adapter
from megatron_ee.checkpoint.adapter_writing import save_adapter
from megatron_ee.checkpoint.loading import load_exits
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import RunConfig
from megatron_ee.config.untrusted import read_json
from megatron_ee.data.loader import PackedBlend
from megatron_ee.exits.stage import Stage
from megatron_ee.parallel.agreement import each_own
from megatron_ee.tuning.full_model import FullModel
from megatron_ee.tuning.gates import fit_gates, print_gates, read_gate_tokens
from megatron_ee.tuning.log import RunLog, free_running_steps
from megatron_ee.tuning.schedule import Pipeline
from megatron_ee.tuning.teacher import TopTokens
from megatron_ee.tuning.trainer import BEST, Validator

LAST = "adapter"
"""Directory of the exits after the last step."""


def finish(
    config: RunConfig,
    full: FullModel,
    gates: Collection[int],
    blend: PackedBlend,
    validator: Validator | None,
    output: Path,
    log: RunLog,
) -> None:
    """Do what the run's adapters and log lack yet. Every rank calls this.

    Args:
        config: of the run.
        full: all layers.
        gates: layers of the exits that get a gate.
        blend: the training data.
        validator: None without validation data.
        output: directory of the run.
        log: of the run, open.

    Raises:
        Interrupted: a signal came to one of the ranks; raised on all. Other errors as for ``add_gates``.
    """
    if gates:  # those that were fitted while tuning are there already
        add_gates(config, full, [output / LAST, output / BEST], gates, blend)
    if validator is not None:
        _free_running(full, validator, output, log)


def add_gates(
    config: RunConfig, full: FullModel, adapters: Sequence[Path], layers: Collection[int], blend: PackedBlend
) -> None:
    """Fit the gates of the exits after ``layers`` in each adapter that lacks them, and replace the adapter atomically.

    All layers run once for all adapters. Prints a table of each to stderr. Every rank calls this.

    Args:
        config: of the run.
        full: all layers.
        adapters: directories; those that do not exist are left out.
        layers: of the exits.
        blend: the training data, read from its beginning.

    Raises:
        CheckpointError: an adapter cannot be read or written.
        DataError: all tokens are masked.
        Interrupted: a signal came to one of the ranks; raised on all.
    """
    groups = full.setup.groups
    existing = groups.from_first(lambda: [path for path in adapters if path.exists()])
    opened = each_own(groups.gather, lambda: {path: open_adapter(path, verify=False) for path in existing})
    todo = {path: each for path, each in opened.items() if {s.layer for s in each.exits if s.gate} != set(layers)}
    if not todo:
        return
    tokens = read_gate_tokens(config, blend, full.setup, full.interrupt)
    distinct = {adapter.steps: adapter for adapter in todo.values()}  # exits after the same step are the same
    first = next(iter(todo.values()))
    specs, stages = _gated(first.exits, layers), dict[int, Stage]()
    for steps, adapter in distinct.items():
        stages[steps], layout = full.with_exits(specs)
        groups.together(partial(load_exits, stages[steps].exits, adapter, full.model))
    taught = Pipeline(stages[first.steps], layout, specs, teacher=TopTokens(1))
    sets = [stage.exits for stage in stages.values()]
    found = fit_gates(taught, sets, tokens, config.loss.chunk_tokens, full.interrupt)
    if groups.is_main:
        for steps, qualities in zip(stages, found, strict=True):
            names = [path.name for path, adapter in todo.items() if adapter.steps == steps]
            print_gates(qualities, tokens, "of " + " and ".join(names))
    for path, adapter in todo.items():
        save_adapter(
            path,
            stages[adapter.steps].exits,
            _gated(adapter.exits, layers),
            groups,
            base_model=adapter.base_model,
            backbone_sha256=adapter.backbone_sha256,
            steps=adapter.steps,
            settings=adapter.settings,
            extra=groups.from_first(partial(_further, path)),
        )


def _gated(specs: Sequence[ExitSpec], layers: Collection[int]) -> tuple[ExitSpec, ...]:
    return tuple(dataclasses.replace(spec, gate=spec.layer in layers) for spec in specs)


def _further(path: Path) -> dict[str, Any]:
    """Entries of an adapter's description that not every adapter has, such as its validation loss."""
    content, known = read_json(path / DESCRIPTION, MAX_DESCRIPTION), describe_exits((), "", "", 0, "", {})
    return {key: value for key, value in content.items() if key not in known}


def _free_running(full: FullModel, validator: Validator, output: Path, log: RunLog) -> None:
    """Measure threshold mode with the best exits, or the last ones if no validation loss was finite."""
    groups = full.setup.groups
    if full.setup.residency == "disk":  # with free_running it was measured in the validations
        return
    adapter = each_own(groups.gather, lambda: open_adapter(_best(output), verify=False))
    if groups.together(lambda: groups.is_main and adapter.steps in free_running_steps(output))[0]:
        return
    found = validator.free_running(full, adapter)
    if found is not None:
        log.free_running(adapter.steps, adapter.path.name, found)


def _best(output: Path) -> Path:
    best = output / BEST
    return best if best.exists() else output / LAST
