"""Logs a run to Weights & Biases (extra ``wandb``), by default offline under ``OUTPUT/wandb``.

Figures, the configuration and wandb's own system metrics are recorded; no code and no terminal output.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_ee.config.schema import WandbConfig
from megatron_ee.errors import ConfigError, UserError, first_line, storage_errors
from megatron_ee.parallel.groups import launched_rank

DIRECTORY, RUN_ID = "wandb", "run_id"
"""wandb's directory under the run's output, and the file there with the id that a resumed run reuses."""


def check_wandb(config: WandbConfig) -> None:
    """Check, before anything is loaded, that ``start_run`` can work.

    Raises:
        ConfigError: wandb is not installed, or ``online`` without an API key.
    """
    if not config.project:
        return
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "logging.wandb.project: needs wandb, which is not installed; pip install 'megatron-ee[wandb]', or leave it "
            "empty"
        )
    if config.mode == "online" and launched_rank() == 0:
        wandb = _import()
        try:
            wandb.login()
        except wandb.Error as error:
            raise ConfigError(f"logging.wandb.mode: online: {first_line(error)}") from None


class WandbRun:
    """A wandb run. If it fails, a line says so and tuning continues without it."""

    def __init__(self, run: Any) -> None:
        self._run: Any = run

    def log(self, points: Mapping[str, float], step: int) -> None:
        """Record values by name after ``step`` steps."""
        self._try(lambda: self._run.log({**points, "step": step}))

    def finish(self, *, failed: bool) -> None:
        """Write the remaining data. ``failed``: the tuning run ended with an error."""
        self._try(lambda: self._run.finish(exit_code=int(failed)))

    def _try(self, action: Callable[[], object]) -> None:
        if self._run is None:
            return
        try:
            action()
        except Exception as error:  # its service is a separate process, which a signal to the job may have ended
            self._run = None
            print(f"wandb: recording has stopped: {first_line(error)}", file=sys.stderr, flush=True)


def start_run(output: Path, config: WandbConfig, step: int, settings: Mapping[str, Any]) -> WandbRun:
    """Start logging to wandb; if ``step`` is above 0, to the earlier wandb run.

    Args:
        output: the tuning run's directory.
        config: the wandb block, with a project.
        step: steps done.
        settings: the run's configuration, recorded with it.

    Raises:
        UserError: wandb could not start it.
        CheckpointError: ``output`` cannot be written.
    """
    wandb = _import()
    try:
        run = wandb.init(
            project=config.project,
            name=config.name or output.resolve().name,
            mode=config.mode,
            id=_run_id(output / DIRECTORY, step),
            # wandb warns about this offline, where each part is a separate run directory with the same id.
            resume="allow" if config.mode == "online" else None,
            dir=str(output),
            config=dict(settings),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
        )
    except (wandb.Error, OSError) as error:
        raise UserError(f"logging.wandb: the run cannot be started: {first_line(error)}") from None
    # Not wandb's own step, which must not decrease: a save in the background is reported some steps later.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    where = run.url if config.mode == "online" else f"{run.settings.sync_dir} (wandb sync uploads it)"
    print(f"wandb: {where}", file=sys.stderr, flush=True)
    return WandbRun(run)


def _import() -> Any:
    # By default wandb reports its errors to its developers, even in offline mode.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb


def _run_id(directory: Path, step: int) -> str:
    """The id of the earlier run; a new id if the run starts from step 0."""
    path = directory / RUN_ID
    with storage_errors(path, "write"):
        if step > 0 and path.is_file() and (known := path.read_text(encoding="utf-8").strip()):
            return known
        directory.mkdir(parents=True, exist_ok=True)
        new = os.urandom(4).hex()
        path.write_text(new + "\n", encoding="utf-8")
    return new
