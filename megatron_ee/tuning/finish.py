"""What a run does with all layers after its last step: gates, and free-running threshold mode."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from megatron_ee.checkpoint.adapter import open_adapter
from megatron_ee.config.schema import RunConfig
from megatron_ee.data.loader import PackedBlend
from megatron_ee.parallel.agreement import each_own
from megatron_ee.tuning.full_model import FullModel
from megatron_ee.tuning.gates import add_gates
from megatron_ee.tuning.log import RunLog, free_running_steps
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
    if gates:
        add_gates(config, full, [output / LAST, output / BEST], gates, blend)
    if validator is not None:
        _free_running(full, validator, output, log)


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
