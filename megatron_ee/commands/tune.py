"""``megatron-ee tune``: train exits on a frozen model."""

from __future__ import annotations

import argparse
import contextlib
from functools import partial
from pathlib import Path

from megatron_ee.commands.config_parser import ConfigParser
from megatron_ee.errors import ConfigError

DESCRIPTION = (
    "Train exits on a frozen model. Options override keys of the configuration file: "
    "--tuning.steps 100 --exits.0.layer 4 --data.train '[corpus/wiki]'."
)


def parser() -> argparse.ArgumentParser:
    """The command line; ``overrides`` holds the dotted options."""
    result = ConfigParser("tune", DESCRIPTION)
    result.usage = (
        "%(prog)s --config FILE [--dotted.key VALUE ...] --output DIR "
        "[--resume [--allow-new-data] | --init-adapter DIR | --debug]"
    )
    result.add_argument("--config", type=Path, required=True, metavar="FILE", help="configuration (YAML)")
    result.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory of the run: adapter/, adapter-best/, checkpoints, logs and plots. New or empty, or with "
        "--resume the run's own",
    )
    start = result.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --output")
    result.add_argument(
        "--allow-new-data",
        action="store_true",
        help="with --resume: accept corpora that have changed, and continue at the same position",
    )
    start.add_argument("--init-adapter", type=Path, metavar="DIR", help="start from this adapter's exits")
    start.add_argument(
        "--debug",
        action="store_true",
        help="run a small part of the configuration on one process, in a minute or two: a few deterministic steps on "
        "short sequences, the first layers, one exit of each kind. Checks every module's output, every gradient and "
        "every frozen weight. Writes to DIR/debug/, which the next debug run replaces; debug.log there has the shapes "
        "of all tensors",
    )
    return result


def run(arguments: argparse.Namespace) -> int:
    """Load and check the configuration, then tune."""
    if arguments.allow_new_data and not arguments.resume:
        raise ConfigError("--allow-new-data: needs --resume; add it, or leave this option out")
    from megatron_ee.commands.inputs import check_corpus, check_input
    from megatron_ee.config.check import check_model_path
    from megatron_ee.config.load import load_config

    config = load_config(arguments.config, arguments.overrides)
    check_model_path(config.model.path)
    for key in ("train", "validation"):
        corpora = getattr(config.data, key)
        check_corpus(f"data.{key}", [each if isinstance(each, str) else each.path for each in corpora])
    check_input("--init-adapter", arguments.init_adapter)
    from megatron_ee.evaluation.validation import make_validator, show_history

    if arguments.debug:
        from megatron_ee.tuning.debug import DIRECTORY, debug_tune

        output = arguments.output / DIRECTORY
        return debug_tune(config, output=output, make_validator=partial(make_validator, output))
    from megatron_ee.evaluation.timeline import drawn_step
    from megatron_ee.parallel.groups import launched_rank
    from megatron_ee.tuning.interrupt import watch_signals
    from megatron_ee.tuning.run import tune
    from megatron_ee.tuning.status import is_finished

    plot = arguments.output / "streaming.png"
    with watch_signals():
        status = tune(
            config,
            output=arguments.output,
            resume=arguments.resume,
            allow_new_data=arguments.allow_new_data,
            init_adapter=arguments.init_adapter,
            make_validator=partial(make_validator, arguments.output),
            around=contextlib.nullcontext if config.model.residency == "device" else partial(drawn_step, path=plot),
        )
        if launched_rank() == 0 and is_finished(arguments.output):
            show_history(arguments.output)
    return status
