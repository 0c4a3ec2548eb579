"""Options that several kinds of measurement have, and what they describe."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_ee.commands import DTYPES, at_least

if TYPE_CHECKING:
    from megatron_ee.benchmark.ranks import ParallelStep
    from megatron_ee.benchmark.shape import Shape

SMALL = {
    "hidden": 512,
    "layers": 16,
    "vocab": 8000,
    "sequence_length": 512,
    "exits": 4,
    "mlp_exits": 4,
    "head": "own",
    "dtype": "float32",
    "microbatches": 8,
}
SHAPES: dict[str, dict[str, Any]] = {
    "small": {**SMALL, "hidden": 1024, "vocab": 16000, "sequence_length": 256, "microbatches": 2},
    "7b": {
        "hidden": 4096,
        "layers": 32,
        "ffn": 11008,
        "heads": 32,
        "vocab": 32000,
        "sequence_length": 128,
        "exits": 8,
        "mlp_exits": 1,
        "head": "shared",
        "dtype": "bfloat16",
        "microbatches": 2,
    },
}
SHAPES["13b"] = {**SHAPES["7b"], "hidden": 5120, "layers": 40, "ffn": 13824, "heads": 40}


def repeats_option(options: argparse.ArgumentParser) -> None:
    """How often, and ``json_option``."""
    options.add_argument(
        "--repeats",
        type=at_least(1),
        default=5,
        metavar="N",
        help="measurements of each, the median counts (default: 5)",
    )
    json_option(options)


def json_option(options: argparse.ArgumentParser) -> None:
    """In which form ``show`` prints."""
    options.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def adder(options: argparse.ArgumentParser, defaults: dict[str, Any] | None) -> Callable[..., None]:
    """Adds an option by its key in ``defaults``; None: they come from ``--shape``."""

    def add(name: str, what: str, kind: Any = None, **settings: Any) -> None:
        default = None if defaults is None else defaults.get(name)
        shown = f"{what} (default: {'as --shape' if defaults is None else default})" if "(" not in what else what
        options.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=shown, **settings)

    return add


def shape_options(add: Callable[..., None]) -> None:
    """A random model; ``add`` from ``adder``."""
    add("hidden", "hidden size", at_least(1), metavar="N")
    add("layers", "layers", at_least(1), metavar="N")
    add("ffn", "MLP size (default: 8/3 of the hidden size)", at_least(1), metavar="N")
    add("heads", "attention heads (default: one per 64 of hidden)", at_least(1), metavar="N")
    add("vocab", "vocabulary", at_least(2), metavar="N")


def step_options(options: argparse.ArgumentParser, defaults: dict[str, Any] | None) -> None:
    """A random model and its exits; ``defaults`` None: they come from ``--shape``."""
    add, number = adder(options, defaults), at_least(1)
    shape_options(add)
    add("sequence_length", "tokens per microbatch", at_least(2), metavar="N")
    add("microbatches", "microbatches per step", number, metavar="N")
    add("exits", "exits, spread over 3/4 of the depth", number, metavar="N")
    add("mlp_exits", "how many of the deepest have an MLP, the others a norm alone", at_least(0), metavar="N")
    add("head", "head of the exits", choices=("own", "shared"))
    add("dtype", "dtype of the weights", choices=DTYPES)
    options.add_argument("--distillation", action="store_true", help="let the exits learn from the final exit too")
    options.add_argument("--steps", type=number, default=3, metavar="N", help="measured steps (default: 3)")
    json_option(options)


def step_of(arguments: argparse.Namespace, defaults: dict[str, Any], **spread: Any) -> ParallelStep:
    """What ``step_options`` and the options of how it is spread describe."""
    from megatron_ee.benchmark.ranks import exit_specs, parallel_step

    chosen = {**defaults, **_given(arguments)}
    shape = shape_of(arguments, defaults)
    return parallel_step(
        shape,
        exit_specs(chosen["exits"], shape.layers, mlp=chosen["mlp_exits"], head=chosen["head"]),
        distillation=chosen["distillation"],
        dtype=chosen["dtype"],
        tokens=chosen["sequence_length"],
        microbatches=chosen["microbatches"],
        **spread,
    )


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(arguments).items() if value is not None}


def shape_of(arguments: argparse.Namespace, defaults: dict[str, Any]) -> Shape:
    """What ``shape_options`` describe."""
    from megatron_ee.benchmark.shape import Shape, default_ffn

    given = _given(arguments)
    chosen = {"ffn": default_ffn(given.get("hidden", defaults["hidden"])), **defaults, **given}
    hidden = chosen["hidden"]
    heads = chosen.get("heads", max(1, hidden // 64))
    return Shape(hidden, chosen["layers"], chosen["ffn"], heads, chosen["vocab"])


def show(result: Any, print_tables: Any, as_json: bool) -> int:
    """Print a result as JSON, or with ``print_tables``; the exit status."""
    if as_json:
        print(json.dumps(dataclasses.asdict(result)))
        return 0
    from megatron_ee.tables import make_console

    print_tables(result, make_console())
    return 0
