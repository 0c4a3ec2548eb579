"""``megatron-ee plan``: what a run will take, before hardware is booked."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ee.commands import at_least
from megatron_ee.commands.config_parser import ConfigParser
from megatron_ee.errors import ConfigError
from megatron_ee.planning.devices import DEVICES, GB

if TYPE_CHECKING:
    from megatron_ee.config.architecture import Architecture
    from megatron_ee.config.schema import RunConfig
    from megatron_ee.planning.machine import Machine

DESCRIPTION = """Estimate memory, work, traffic, time, energy, price and disk of a run of `tune`, and search for the
best way to run it on a number of GPUs. Reads no weights and no data: a model's config.json is enough, at `model.path`
or beside the configuration file. Options override keys of that file, as in `tune`."""


def parser() -> argparse.ArgumentParser:
    """The command line; ``overrides`` holds the dotted options."""
    result = ConfigParser("plan", DESCRIPTION)
    result.usage = (
        "%(prog)s --config FILE [--dotted.key VALUE ...] [--gpus N] [--gpu-memory GB] [--gpu NAME | --measured] "
        "[--host-memory GB] [--price PER_HOUR] [--json]"
    )
    result.add_argument("--config", type=Path, required=True, metavar="FILE", help="configuration of the run (YAML)")
    result.add_argument(
        "--gpus",
        type=at_least(1),
        metavar="N",
        help="number of GPUs (default: the processes that were started, or as many as hold one model)",
    )
    result.add_argument(
        "--gpu-memory", type=_positive, metavar="GB", help="memory of a GPU, in 10^9 bytes (default: that of --gpu)"
    )
    result.add_argument(
        "--host-memory",
        type=_positive,
        metavar="GB",
        help="memory of the host of one machine, in 10^9 bytes (default: what is free with --measured, else unknown)",
    )
    device = result.add_mutually_exclusive_group()
    device.add_argument("--gpu", metavar="NAME", help=f"the GPU: {', '.join(DEVICES)}")
    device.add_argument(
        "--measured",
        action="store_true",
        help="measure this machine for about a minute instead; under torchrun also the link between the processes",
    )
    result.add_argument("--price", type=_positive, metavar="PER_HOUR", help="price of one GPU for an hour")
    result.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return result


def run(arguments: argparse.Namespace) -> int:
    """Plan, and print tables or JSON to stdout. Only the first rank prints."""
    from megatron_ee.config.load import load_config
    from megatron_ee.planning.devices import find_device

    device = None if arguments.gpu is None else find_device(arguments.gpu)
    loaded = load_config(arguments.config, arguments.overrides)
    from megatron_ee.checkpoint.quantised.registry import find_quantisation
    from megatron_ee.parallel.groups import launched_rank, world_size
    from megatron_ee.planning.machine import assumed_machine
    from megatron_ee.planning.read_model import read_model

    beside = _model_beside(arguments.config, arguments.overrides)
    config, architecture, notices = read_model(loaded, beside, find_quantisation)
    first = launched_rank() == 0
    for line in notices if first else ():
        print(line, file=sys.stderr, flush=True)
    whole = config.parallel.tensor * config.parallel.pipeline
    gpus = arguments.gpus or (world_size() if world_size() > 1 else whole)
    machine = None if device is None else assumed_machine(device, config.model.dtype)
    if arguments.measured:
        machine = _measured(config, architecture, gpus)
    if first:
        _report(arguments, config, architecture, gpus, machine)
    return 0


def _model_beside(config: Path, overrides: Sequence[str]) -> Path | None:
    """The model's ``config.json`` beside a run's configuration, as in ``examples/``; None if a path is given."""
    beside = config.with_name("config.json")
    named = any(word.partition("=")[0] == "--model.path" for word in overrides)
    return None if named or beside == config else beside


def _measured(config: RunConfig, architecture: Architecture, gpus: int) -> Machine:
    from megatron_ee.config.check import check_run
    from megatron_ee.exits.registry import resolve_init
    from megatron_ee.parallel.groups import world_size
    from megatron_ee.tuning.rates import measure_machine

    if gpus > 1 and world_size() == 1:
        raise ConfigError(
            f"--measured: one process measures no link, but {gpus} are planned for; start it with torchrun "
            "--nproc-per-node 2 or more, or name a device with --gpu"
        )
    whole = config.parallel.tensor * config.parallel.pipeline
    return measure_machine(config, architecture, resolve_init(check_run(config, architecture, whole), architecture))


def _report(
    arguments: argparse.Namespace,
    config: RunConfig,
    architecture: Architecture,
    gpus: int,
    machine: Machine | None,
) -> None:
    """Estimate, search and print."""
    from megatron_ee.planning.estimate import estimate_run
    from megatron_ee.planning.report import print_estimate, print_search, report_dict
    from megatron_ee.planning.search import Limits, search
    from megatron_ee.tables import make_console

    console, tensor, pipeline = make_console(), config.parallel.tensor, config.parallel.pipeline
    memory, host = (None, None) if machine is None else (machine.memory, machine.host_memory)
    memory = memory if arguments.gpu_memory is None else GB * arguments.gpu_memory
    host = host if arguments.host_memory is None else GB * arguments.host_memory
    if memory is None and host is not None:
        raise ConfigError("--host-memory: has no effect without the memory of a GPU; add --gpu or --gpu-memory")
    if machine is None and arguments.price is not None:
        raise ConfigError("--price: has no effect without the time of a run; add --gpu or --measured")
    limits = None if memory is None else Limits(memory, host)
    found = None if limits is None else search(config, architecture, gpus, limits, machine)
    estimate, refused = None, ""
    if gpus % (tensor * pipeline):
        refused = f"--gpus: {gpus} is not a multiple of parallel.tensor {tensor} x parallel.pipeline {pipeline}"
        if found is None:
            raise ConfigError(f"{refused}; change these, or name a GPU to search for sizes that fit")
    else:
        try:
            estimate = estimate_run(config, architecture, gpus, machine)
        except ConfigError as error:
            if found is None or not found.best:
                raise
            refused = str(error)
    if refused:
        print(f"{refused}: only other sizes are planned", file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps(report_dict(estimate, found, limits, arguments.price)))
        return
    if estimate is not None:
        print_estimate(estimate, limits, arguments.price, console)
    if found is not None and limits is not None:
        print_search(found, gpus, limits, arguments.price, console)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text}")
    return value
