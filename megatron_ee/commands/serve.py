"""``megatron-ee serve``: an HTTP server for clients of OpenAI's API."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_ee.commands import Parser, add_files, at_least
from megatron_ee.commands.drift import ALARM_LEVEL
from megatron_ee.commands.engine_options import add_engine, add_model, engine_options, errors_of_options
from megatron_ee.errors import ConfigError

MOST_SECONDS = 1e7
MOST_TEMPERATURE = 2.0
DESCRIPTION = """Serve a model to clients of OpenAI's API. Under torchrun the model is split over --tensor x --pipeline
processes. SIGTERM ends the server when the running requests have ended; SIGHUP reads keys and rules again."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser("serve", DESCRIPTION)
    add_model(result, adapter="exits to use (default: those in the model's directory)")
    _add_address(result.add_argument_group("address and clients"))
    _add_exits(result.add_argument_group("exits"))
    _add_limits(result.add_argument_group("limits and defaults"))
    _add_log(result.add_argument_group("exit log"))
    engine = result.add_argument_group("engine")
    add_engine(engine)
    engine.add_argument(
        "--prefix-cache",
        type=at_least(0),
        default=0,
        metavar="N",
        help="keep the KV of N finished answers, for requests that begin with the same tokens; times then tell clients "
        "whether others sent the same text (default: 0)",
    )
    engine.add_argument("--compile", action="store_true", help="compile the layers first, which can take minutes")
    return result


def _add_address(group: Any) -> None:
    add = group.add_argument
    add("--host", default="127.0.0.1", metavar="H", help="address; others than loopback need keys (default: 127.0.0.1)")
    add("--port", type=_port, default=8000, metavar="P", help="port; 0: one that is free (default: 8000)")
    add("--api-key-file", type=Path, metavar="FILE", help="keys of the clients, with mode 0600 (docs/serving.md)")
    add("--model-name", metavar="NAME", help="the model's name for clients (default: that of its directory)")


def _add_exits(group: Any) -> None:
    add = group.add_argument
    add_files(
        group, "--calibration", "certificates of calibrate, one per task: requests of the task use its thresholds"
    )
    add("--rules", type=Path, metavar="FILE", help="YAML: which keys and tasks may leave early, and how")
    add(
        "--audit",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="also run this share of the requests under certificates in full mode, and test the loss (default: 0)",
    )
    add(
        "--alarm-level",
        type=float,
        default=ALARM_LEVEL,
        metavar="A",
        help=f"probability of a false alarm (default: {ALARM_LEVEL})",
    )
    add("--reset-audits", action="store_true", help="begin the tests again, and end what earlier alarms changed")


def _add_limits(group: Any) -> None:
    add = group.add_argument
    add(
        "--max-connections",
        type=at_least(1),
        default=512,
        metavar="N",
        help="open requests; further ones get status 503. Twice as many connections may be open (default: 512)",
    )
    add(
        "--max-queue",
        type=at_least(1),
        default=256,
        metavar="N",
        help="answers that may wait before further requests get status 429 (default: 256)",
    )
    add("--max-tokens", type=at_least(1), default=4096, metavar="N", help="tokens of an answer (default: 4096)")
    add(
        "--max-prompt-tokens", type=at_least(1), metavar="N", help="tokens of a prompt (default: the model's positions)"
    )
    add("--max-body", type=at_least(1), default=8, metavar="MIB", help="size of a request's body (default: 8)")
    add("--max-samples", type=at_least(1), default=128, metavar="N", help="answers of a request (default: 128)")
    add(
        "--default-temperature",
        type=_temperature,
        default=1.0,
        metavar="T",
        help="of requests that give none, and whose task has no certificate (default: 1, as OpenAI's)",
    )
    add("--deadline", type=_seconds, metavar="S", help="end an answer after S seconds (default: no limit)")
    add(
        "--drain-seconds",
        type=_seconds,
        default=20.0,
        metavar="S",
        help="after a signal to stop, cancel what still runs after S seconds (default: 20; torchrun kills after 30)",
    )


def _add_log(group: Any) -> None:
    add = group.add_argument
    add("--exit-log", type=Path, metavar="FILE", help="write a JSON line per request, for exits-report and drift")
    add("--log-text", action="store_true", help="with prompts and answers")
    add("--log-size", type=at_least(1), default=128, metavar="MB", help="rotate it at this size (default: 128)")
    add("--log-period", choices=("hour", "day"), default="day", help="rotate it at the end of each (default: day)")
    add("--log-backups", type=at_least(0), default=90, metavar="N", help="logs to keep; 0: all (default: 90)")


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal."""
    from megatron_ee.commands.inputs import check_input
    from megatron_ee.inference.certificate import open_calibration
    from megatron_ee.inference.released import open_released

    try:
        from megatron_ee.commands.serving_parts import ServingParts
        from megatron_ee.serving.engine_loop import LoopLimits
        from megatron_ee.serving.launch import serve_model
        from megatron_ee.serving.server import ServerOptions, check_address
    except ModuleNotFoundError as error:
        raise ConfigError(f"serve: needs {error.name}; pip install 'megatron-ee[serve]'") from None

    with errors_of_options():
        keys = arguments.api_key_file is not None
        check_address(arguments.host, keys=keys)
        for name in ("model", "adapter", "api_key_file", "rules"):
            check_input(name, getattr(arguments, name))
        check_input("calibration", *arguments.calibration)
        if arguments.log_text and arguments.exit_log is None:
            raise ConfigError("log_text: has an effect with --exit-log only")
        if arguments.audit and not (arguments.calibration and arguments.exit_log):
            raise ConfigError("audit: needs --calibration, whose requests are audited, and --exit-log")
        released = open_released(
            arguments.model, arguments.adapter, verify=not arguments.no_verify, quantise=arguments.quantise
        )
        options = engine_options(
            arguments, released, compile=arguments.compile, prefix_cache_seqs=arguments.prefix_cache
        )
        calibrations = [
            open_calibration(path, released, options, quantise=arguments.quantise) for path in arguments.calibration
        ]
    # The first rank answers. The others may be on machines that have no keys and rules.
    serve_model(
        released,
        options,
        arguments.host,
        arguments.port,
        lambda: ServingParts.open(arguments, released, calibrations).serve,
        limits=LoopLimits(max_queue=arguments.max_queue),
        # A refusal takes a connection, too. Beyond these, connections are closed without an answer.
        server=ServerOptions(2 * arguments.max_connections, arguments.drain_seconds, any_host=keys),
    )
    return 0


def _port(text: str) -> int:
    if text.isdecimal() and int(text) < 2**16:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a port from 0 to 65535, not {text!r}")


def _temperature(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= MOST_TEMPERATURE:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to {MOST_TEMPERATURE:g}, not {text!r}")
    return value


def _seconds(text: str) -> float:
    value = _number(text)
    if not 0 < value <= MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not {text!r}")
    return value


def _number(text: str) -> float:
    """A number from its text; -1 if it is none."""
    try:
        return float(text)
    except ValueError:
        return -1.0
