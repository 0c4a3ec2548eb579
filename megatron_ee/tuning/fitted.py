"""The exits that a run fits before tuning: kept in its output, so that a resumed run in any layout starts from them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ee.checkpoint.adapter import DATA, DESCRIPTION, MAX_DESCRIPTION, SETTINGS, Adapter, open_adapter
from megatron_ee.checkpoint.adapter_writing import save_adapter
from megatron_ee.checkpoint.atomic import numbered_directories
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import RunConfig
from megatron_ee.config.untrusted import read_json
from megatron_ee.data.loader import PackedBlend
from megatron_ee.errors import CheckpointError
from megatron_ee.parallel.agreement import each_own
from megatron_ee.tuning.fit import fit_exits
from megatron_ee.tuning.full_model import FullModel

INITIAL = "adapter-initial"
"""Directory of the fitted exits in a run's output."""
MADE_FROM = "fitted_from"
"""Entry of the description of fitted exits: the settings and data that decided their values."""


def fitted_exits(
    config: RunConfig,
    full: FullModel,
    specs: Sequence[ExitSpec],
    blend: PackedBlend,
    output: Path,
    resume: bool,
    description: dict[str, Any],
) -> Adapter | None:
    """Fit exits before tuning and save them in ``OUTPUT/adapter-initial``.

    A resumed run without a checkpoint takes those that it fitted before. Every rank calls this.

    Args:
        config: of the run.
        full: all layers.
        specs: the exits of all stages, ``init`` resolved.
        blend: the training data.
        output: directory of the run.
        resume: whether the run is resumed.
        description: identification of the run, with ``data`` and ``backbone_sha256``.

    Returns:
        The adapter; None if the run continues from a checkpoint.

    Raises:
        Interrupted: a signal came to one of the ranks; raised on all. Other errors as for ``fit_exits``.
    """
    groups, path = full.setup.groups, output / INITIAL
    made_from = {
        "fit": dataclasses.asdict(config.fit),
        "dtype": config.model.dtype,
        **({} if config.model.quantise == "none" else {"quantise": config.model.quantise}),
        "data": {**dataclasses.asdict(config.data), "corpora": description["data"]},
        "global_batch_size": config.tuning.global_batch_size,
        "seed": config.tuning.seed,
    }

    def state() -> str:
        if resume and numbered_directories(output / "checkpoints"):
            return "checkpoint"
        kept = resume and _is_fitted(path, made_from, specs, description, config.checkpoint.verify)
        return "fitted" if kept else "to fit"

    found = groups.together(lambda: state() if groups.is_main else "")[0]
    if found == "checkpoint":
        return None
    if found == "to fit":
        save_adapter(
            path,
            fit_exits(config, full, specs, blend),
            specs,
            groups,
            base_model=description["base_model"],
            backbone_sha256=description["backbone_sha256"],
            steps=0,
            settings=description[SETTINGS],
            extra={MADE_FROM: made_from, DATA: {"train": description["data"]["train"]}},
        )
    elif groups.is_main:
        print(f"{path}: exits are fitted already; starting from them", file=sys.stderr, flush=True)
    return each_own(groups.gather, lambda: open_adapter(path, verify=False))


def _is_fitted(
    path: Path, made_from: dict[str, Any], specs: Sequence[ExitSpec], description: dict[str, Any], verify: bool
) -> bool:
    """Whether there are undamaged exits that were fitted with the same settings, data and backbone."""
    try:
        adapter = open_adapter(path, verify=verify)
        content = read_json(path / DESCRIPTION, MAX_DESCRIPTION)
    except CheckpointError:
        return False
    return (
        isinstance(content, dict)
        and content.get(MADE_FROM) == made_from
        and content.get("exits") == [dataclasses.asdict(spec) for spec in specs]
        and adapter.backbone_sha256 == description["backbone_sha256"]
    )
