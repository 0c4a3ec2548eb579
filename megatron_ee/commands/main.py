"""The console script: finds the command, runs it, and turns errors that a user can act on into one line."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence

from megatron_ee import __version__
from megatron_ee.errors import ConfigError, UserError
from megatron_ee.tuning.interrupt import Signalled, raise_signals, watch_signals

# command: (module of this package, description). Modules are imported on demand, so that --help is fast.
COMMANDS = {
    "quickstart": ("quickstart", "run all steps on one model, on a small machine"),
    "prepare-data": ("prepare_data", "tokenize text or chat jsonl into a corpus"),
    "regenerate": ("regenerate", "answer prompts with the model itself, as data to tune on"),
    "convert": ("convert", "convert checkpoints; add, drop or merge exits"),
    "probe": ("probe", "forecast what exits would gain, before tuning"),
    "plan": ("plan", "estimate memory, time and price of a run, and search for a better layout"),
    "tune": ("tune", "train exits on a frozen model"),
    "evaluate": ("evaluate", "measure each exit on a corpus; threshold sweep"),
    "harness": ("harness", "run tasks of lm-evaluation-harness in any mode, or at one exit"),
    "calibrate": ("calibrate", "find exit thresholds with a tested bound on their loss"),
    "drift": ("drift", "test exit logs: is the loss of audited requests still what was certified?"),
    "exits-report": ("exits_report", "read a server's exit logs: layers, exits and latency by task and day"),
    "report": ("report", "make one HTML page of what was gained and risked"),
    "generate": ("generate", "generate text; show the layer that emitted each token"),
    "serve": ("serve", "serve the model to clients of OpenAI's API"),
    "doctor": ("doctor", "check what works on this machine"),
}
SAVING = ("tune",)
"""Commands that save and end with 0 after a signal; the others end by it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv`` (default: the process's arguments) and return its exit status.

    0: success. 2: an invalid command line or configuration, which includes an input that does not exist and an output
        that must not be written to. 1: any other error. 128 + N: signal N. An exception other than ``UserError`` is a
        bug and keeps its traceback.
    """
    command, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    # Before the command imports torch, which takes seconds: a signal in that time must not be lost.
    handlers: contextlib.AbstractContextManager[object] = watch_signals() if command in SAVING else raise_signals()
    with handlers:
        return _main(command, rest)


def _main(command: str, rest: list[str]) -> int:
    """``main`` with the handlers of signals in place."""
    name = f"megatron-ee {command}" if command in COMMANDS else "megatron-ee"
    _replace_what_cannot_be_encoded()
    try:
        status = _run(command, rest)
        sys.stdout.flush()  # a closed pipe is detected here instead of at exit with a traceback
        return status
    except UserError as error:
        if not error.common or os.environ.get("RANK", "0") == "0":
            print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_status
    except Signalled as interrupt:
        print(f"{name}: {interrupt}", file=sys.stderr)
        return 128 + interrupt.number
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes stdout again at exit, so replace it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # a shell's status for a process that SIGPIPE ended


def _run(command: str, rest: list[str]) -> int:
    if command in ("-h", "--help"):
        print(_usage())
        return 0
    if command == "--version":
        print(f"megatron-ee {__version__}")
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"possible: {', '.join(COMMANDS)}"
        raise ConfigError(f"unknown command {command!r}; {hint}" if command else f"no command given; {hint}")
    module = importlib.import_module(f"megatron_ee.commands.{COMMANDS[command][0]}")
    try:
        arguments = module.parser().parse_args(rest)
    except SystemExit as request:  # after --help
        return int(request.code or 0)
    return int(module.run(arguments))


def _replace_what_cannot_be_encoded() -> None:
    """Print replacement characters for text that stdout and stderr cannot encode, in a locale that is not UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def _usage() -> str:
    lines = [f"  {name:<14}{does}" for name, (_, does) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: megatron-ee COMMAND ...\n",
            "Early-exit tuning: attach exits to a released language model, train only the exits, generate faster.",
            "",
            "commands:",
            *lines,
            "",
            "Also: megatron-ee COMMAND --help, megatron-ee --version.",
        ]
    )
