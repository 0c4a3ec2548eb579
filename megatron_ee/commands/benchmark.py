"""``megatron-ee benchmark``: tuning step and loading against what one would otherwise run."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_ee.commands import DTYPES, Parser, at_least

TUNE = """Time the tuning step against plain PyTorch doing the same work (the transformers model frozen, the same exits
as ordinary modules), and the exit loss alone against torch's own, interleaved, on a random model made for this."""
LOAD = """Time loading a released model against reading the same bytes, and the hashing that comes on top."""


class _Nested(Parser):
    """The parser of ``tune`` or ``load``, as argparse makes it."""

    def __init__(self, *, prog: str, description: str) -> None:
        super().__init__(prog.removeprefix("megatron-ee "), description)


def parser() -> argparse.ArgumentParser:
    """The command line; ``what`` is ``tune`` or ``load``."""
    result = Parser("benchmark", "Compare with what one would otherwise run, on this machine; prints ratios.")
    kinds = result.add_subparsers(dest="what", required=True, metavar="{tune,load}", parser_class=_Nested)
    _tune_options(kinds.add_parser("tune", help="the tuning step and its loss", description=TUNE))
    _load_options(kinds.add_parser("load", help="loading a released model", description=LOAD))
    return result


def run(arguments: argparse.Namespace) -> int:
    """Measure; a table or JSON to stdout."""
    return _run_tune(arguments) if arguments.what == "tune" else _run_load(arguments)


def _tune_options(options: argparse.ArgumentParser) -> None:
    whole = at_least(1)
    options.add_argument("--hidden", type=whole, default=768, metavar="N", help="hidden size (default: 768)")
    options.add_argument("--layers", type=whole, default=12, metavar="N", help="layers (default: 12)")
    options.add_argument("--ffn", type=whole, metavar="N", help="MLP size (default: 8/3 of the hidden size)")
    options.add_argument("--heads", type=whole, metavar="N", help="attention heads (default: one per 64 of hidden)")
    options.add_argument("--vocab", type=at_least(2), default=32000, metavar="N", help="vocabulary (default: 32000)")
    options.add_argument(
        "--sequence-length", type=at_least(2), default=2048, metavar="N", help="tokens per step (default: 2048)"
    )
    options.add_argument(
        "--exits",
        type=whole,
        nargs="+",
        default=[4, 8],
        metavar="N",
        help="numbers of exits, spread over 3/4 of the depth (default: 4 8)",
    )
    options.add_argument(
        "--dtype", choices=DTYPES, nargs="+", default=["bfloat16", "float32"], help="dtypes (default: both)"
    )
    options.add_argument(
        "--chunk-tokens", type=whole, default=512, metavar="N", help="tokens whose logits exist at once (default: 512)"
    )
    _common_options(options)


def _load_options(options: argparse.ArgumentParser) -> None:
    source = options.add_mutually_exclusive_group()
    source.add_argument("--model", type=Path, metavar="DIR", help="Hugging Face directory")
    source.add_argument(
        "--size-mb", type=at_least(1), default=1000, metavar="N", help="or a random one of this size (default: 1000)"
    )
    options.add_argument("--dtype", choices=DTYPES, help="dtype to load in (default: as it is stored)")
    _common_options(options)


def _common_options(options: argparse.ArgumentParser) -> None:
    options.add_argument(
        "--repeats",
        type=at_least(1),
        default=5,
        metavar="N",
        help="measurements of each, the median counts (default: 5)",
    )
    options.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def _run_tune(arguments: argparse.Namespace) -> int:
    from megatron_ee.benchmark.report import print_tune
    from megatron_ee.benchmark.shape import Shape, default_ffn
    from megatron_ee.benchmark.tune import benchmark_tune

    shape = Shape(
        hidden=arguments.hidden,
        layers=arguments.layers,
        ffn=arguments.ffn or default_ffn(arguments.hidden),
        heads=arguments.heads or max(1, arguments.hidden // 64),
        vocab=arguments.vocab,
    )
    result = benchmark_tune(
        shape,
        tokens=arguments.sequence_length,
        exits=arguments.exits,
        dtypes=arguments.dtype,
        repeats=arguments.repeats,
        chunk_tokens=arguments.chunk_tokens,
    )
    return _show(result, print_tune, arguments.json)


def _run_load(arguments: argparse.Namespace) -> int:
    from megatron_ee.benchmark.load import benchmark_load
    from megatron_ee.benchmark.report import print_load

    result = benchmark_load(
        arguments.model, megabytes=arguments.size_mb, dtype=arguments.dtype, repeats=arguments.repeats
    )
    return _show(result, print_load, arguments.json)


def _show(result: Any, print_tables: Any, as_json: bool) -> int:
    if as_json:
        print(json.dumps(dataclasses.asdict(result)))
        return 0
    from megatron_ee.evaluation.report import make_console

    print_tables(result, make_console())
    return 0
