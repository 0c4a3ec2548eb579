"""``megatron-ee convert``: any checkpoint format into any other."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ee.commands import Parser, at_least
from megatron_ee.errors import ConfigError

if TYPE_CHECKING:
    from megatron_ee.config.schema import ExitConfig

DESCRIPTION = """Convert between Hugging Face directories, parallel checkpoints, adapters and Megatron checkpoints, and
from GGUF files. Weights are streamed. To continue an interrupted conversion, run the same command again."""
TARGETS = ("hf", "parallel", "adapter", "megatron")
HEADS = ("own", "shared", "low_rank")
DTYPES = ("bfloat16", "float32")
ALL = 0  # in place of a layer


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser("convert", DESCRIPTION)
    result.add_argument(
        "--input",
        type=Path,
        required=True,
        metavar="PATH",
        help="checkpoint to read: directory, or GGUF file (any of its parts)",
    )
    result.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to write; must not exist")
    result.add_argument("--to", choices=TARGETS, required=True, help="format to write")
    result.add_argument("--dry-run", action="store_true", help="print what would be read and written, then stop")
    result.add_argument(
        "--model", type=Path, metavar="DIR", help="the adapter's model (default: the path that it records)"
    )
    layout = result.add_argument_group(
        "parallel checkpoints", "how the weights are split into files; any number of ranks can load them"
    )
    layout.add_argument("--tensor", type=at_least(1), default=1, metavar="N", help="tensor-parallel size (default: 1)")
    layout.add_argument("--pipeline", type=at_least(1), default=1, metavar="N", help="pipeline stages (default: 1)")
    layout.add_argument(
        "--stages", type=at_least(1), nargs="+", default=[], metavar="N", help="layers of each stage (default: even)"
    )
    exits = result.add_argument_group("exits", "applied in this order")
    exits.add_argument(
        "--drop-exits", type=at_least(1), nargs="+", default=[], metavar="LAYER", help="remove these exits"
    )
    exits.add_argument(
        "--adapter", type=Path, action="append", default=[], metavar="DIR", help="merge its exits; repeatable"
    )
    exits.add_argument(
        "--exits", metavar="YAML", help="add exits, as in a configuration: '[{layer: 8, body: mlp, init: copy}]'"
    )
    exits.add_argument("--seed", type=at_least(0), default=1, metavar="N", help="seed of random weights (default: 1)")
    exits.add_argument(
        "--heads", nargs="+", default=[], metavar="LAYER=HEAD", help="change heads: 8=shared, or all=shared"
    )
    exits.add_argument(
        "--exit", type=at_least(1), metavar="K", help="write the exit after layer K as a plain model (--to hf)"
    )
    trust = result.add_argument_group("reading")
    trust.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="read Megatron's formats, which contain pickles: only from people whom you trust to run code here",
    )
    trust.add_argument(
        "--config", type=Path, metavar="DIR", help="Hugging Face directory of a Megatron checkpoint's model"
    )
    trust.add_argument("--no-verify", action="store_true", help="do not check checksums")
    trust.add_argument("--dtype", choices=DTYPES, help="dtype for a GGUF file's weights (default: bfloat16)")
    result.add_argument(
        "--expand", action="store_true", help="write the values of quantised weights instead of their stored tensors"
    )
    result.add_argument(
        "--max-shard-size", type=at_least(1), default=5000, metavar="MB", help="file size for --to hf (default: 5000)"
    )
    return result


def run(arguments: argparse.Namespace) -> int:
    """Convert, or print the plan."""
    added = _exits(arguments.exits)
    heads = _heads(arguments.heads)
    all_heads = heads.pop(ALL, None)
    from megatron_ee.checkpoint.ownership import check_new
    from megatron_ee.commands.inputs import check_input
    from megatron_ee.conversion.convert import Conversion, plan_output, prepare, write
    from megatron_ee.conversion.report import print_contents, print_plan
    from megatron_ee.conversion.usage import usage

    request = Conversion(
        input=arguments.input,
        to=arguments.to,
        model=arguments.model,
        config=arguments.config,
        trust=arguments.trust_checkpoint,
        verify=not arguments.no_verify,
        dtype=arguments.dtype,
        tensor=arguments.tensor,
        pipeline=arguments.pipeline,
        stages=arguments.stages,
        exit=arguments.exit,
        drop=arguments.drop_exits,
        adapters=arguments.adapter,
        add=added,
        heads=heads,
        all_heads=all_heads,
        seed=arguments.seed,
        shard=arguments.max_shard_size * 10**6,
        expand=arguments.expand,
    )
    check_new(arguments.output)
    for option in ("input", "model", "config"):
        check_input(f"--{option}", getattr(arguments, option))
    check_input("--adapter", *arguments.adapter)
    found, contents = prepare(request)
    for note in contents.notes:
        print(note, file=sys.stderr)
    if arguments.dry_run:
        plan = plan_output(contents, request)
        print_contents(found)
        print_plan(plan, arguments.output)
        return 0
    write(contents, request, arguments.output)
    if arguments.exit is not None:
        print(usage(arguments.output, contents.base_model, contents, arguments.config))
    return 0


def _exits(text: str | None) -> list[ExitConfig]:
    if text is None:
        return []
    from megatron_ee.config.load import parse_exits

    return parse_exits(text, "--exits")


def _heads(pairs: list[str]) -> dict[int, Any]:
    """``LAYER=HEAD`` pairs."""
    found: dict[int, Any] = {}
    for pair in pairs:
        layer, _, head = pair.partition("=")
        if head not in HEADS or not (layer == "all" or (layer.isascii() and layer.isdigit() and int(layer) > 0)):
            raise ConfigError(f"--heads: {pair!r} is not LAYER=HEAD; heads are {', '.join(HEADS)}")
        found[ALL if layer == "all" else int(layer)] = head
    return found
