"""What the commands that run a model have in common: options of the model, of sampling and of the engine."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ee.commands import MODEL_DTYPES, QUANTISE, RESIDENCIES, WEIGHTS, at_least
from megatron_ee.errors import ConfigError, UserError

if TYPE_CHECKING:
    from megatron_ee.inference.options import EngineOptions
    from megatron_ee.inference.released import Released

MOST_GIGABYTES = 1e9  # bytes fit an int64


def add_model(group: Any, *, adapter: str | None = None) -> None:
    """The model. ``adapter`` is the description of ``--adapter``; None for a command that uses no exits."""
    add = group.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="Hugging Face directory or parallel checkpoint")
    if adapter is not None:
        add("--adapter", type=Path, metavar="DIR", help=adapter)
    add(
        "--dtype",
        choices=MODEL_DTYPES,
        default="auto",
        help="dtype of the model (default: auto, the checkpoint's own; bfloat16 for float16)",
    )
    add(
        "--weights",
        choices=WEIGHTS,
        default="packed",
        help="how a quantised model's weights are held in memory (default: packed; expanded is faster, and larger)",
    )
    add(
        "--quantise",
        choices=QUANTISE,
        default="none",
        help="quantise the layers of a plain model as they are loaded (extra: quantised)",
    )
    add("--no-verify", action="store_true", help="do not check checksums")


def add_residency(group: Any) -> None:
    """Where the layers' weights are."""
    group.add_argument(
        "--residency",
        choices=RESIDENCIES,
        default="device",
        help="where the layers' weights are: all on the device (default), or streamed from host memory or the files",
    )


def add_parallel(group: Any) -> None:
    """Over how many processes the model runs, where the others hold copies of it."""
    add = group.add_argument
    add("--tensor", type=at_least(1), default=1, metavar="N", help="tensor-parallel size (default: 1)")
    add(
        "--pipeline",
        type=at_least(1),
        default=1,
        metavar="N",
        help="pipeline stages (default: 1); data parallelism takes the processes that are left",
    )


def add_sampling(group: Any) -> None:
    """How tokens are chosen, and how many outputs a prompt gets."""
    add = group.add_argument
    add("--temperature", type=float, default=0.0, metavar="T", help="sampling temperature; 0: greedy (default)")
    add(
        "--top-k",
        type=at_least(0),
        default=0,
        metavar="N",
        help="sample from the N most probable tokens; 0: all (default)",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the most probable tokens with total probability P (default: 1)",
    )
    add("--min-p", type=float, default=0.0, metavar="P", help="exclude tokens below P times the largest probability")
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: penalise repeated tokens (default: 1)",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of sampling (default: 0)")
    add("--samples", type=at_least(1), default=1, metavar="N", help="outputs per prompt (default: 1)")


def add_engine(group: Any) -> None:
    """Over how many processes the model runs, and how many sequences at a time."""
    add = group.add_argument
    add("--tensor", type=at_least(1), default=1, metavar="N", help="tensor-parallel size (default: 1)")
    add("--pipeline", type=at_least(1), default=1, metavar="N", help="pipeline stages (default: 1)")
    add_residency(group)
    add_serving(group, "--batch-size")


def add_serving(group: Any, *names: str) -> None:
    """The engine's memory, and how many sequences run at a time; ``names`` are further names of the latter."""
    add = group.add_argument
    add(
        "--kv-memory",
        type=_gigabytes,
        metavar="GB",
        help="memory for the KV cache, per process (default: half of the free memory)",
    )
    add(
        "--max-num-seqs",
        *names,
        type=at_least(1),
        default=16,
        metavar="N",
        help="largest number of sequences that run together (default: 16)",
    )


def engine_options(arguments: argparse.Namespace, released: Released, **others: Any) -> EngineOptions:
    """The options of ``add_model`` and ``add_engine``, checked against the opened model.

    Args:
        arguments: the command line.
        released: the model.
        others: further fields of ``EngineOptions``.

    Raises:
        ConfigError: an option does not fit the model or the number of processes.
    """
    from megatron_ee.inference.options import EngineOptions

    options = EngineOptions(
        dtype=arguments.dtype,
        weights=arguments.weights,
        tensor=arguments.tensor,
        pipeline=arguments.pipeline,
        residency=arguments.residency,
        kv_memory=arguments.kv_memory,
        max_num_seqs=arguments.max_num_seqs,
        **others,
    )
    options.check(released)
    return options


def rounding_settings(arguments: argparse.Namespace, released: Released) -> dict[str, str]:
    """The options of ``add_model`` that change outputs, for what says how a file was made."""
    rounding = {} if arguments.quantise == "none" else {"quantise": arguments.quantise}
    return {**rounding, "dtype": released.model.dtype if arguments.dtype == "auto" else arguments.dtype}


@contextlib.contextmanager
def errors_of_options() -> Iterator[None]:
    """Errors of requests and options in the body name the option in place of the request's field.

    Every rank reads the same command line and files, so only the first one prints the error. An error that is already
    marked so, because it names a file and line, stays as it is.
    """
    try:
        yield
    except UserError as error:
        named = _as_option(error) if isinstance(error, ConfigError) and not error.common else error
        named.common = True
        raise named from None


def _as_option(error: ConfigError) -> ConfigError:
    field, colon, rest = str(error).partition(":")
    if not (colon and re.fullmatch(r"[a-z_.]+(\[\d+\])?", field)):
        return error
    return ConfigError(f"--{setting_name(field).replace('_', '-')}:{rest}")


def setting_name(field: str) -> str:
    """The flat name of a request's field, in options and files of prompts.

    ``policy.threshold`` is the setting ``threshold``, and ``draft.exit`` is ``draft_exit``.
    """
    return field.removeprefix("policy.").removeprefix("sampling.").replace("draft.", "draft_")


def _gigabytes(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= MOST_GIGABYTES:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and at most 1e9, not {text!r}")
    return int(value * 1e9)
