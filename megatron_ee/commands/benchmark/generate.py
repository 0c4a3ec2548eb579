"""``megatron-ee benchmark generate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_ee.commands import DTYPES, at_least
from megatron_ee.commands.benchmark.options import repeats_option, shape_of, show
from megatron_ee.errors import ConfigError

DESCRIPTION = """Decode with the engine: in full mode against transformers' generate and the machine's own bandwidth, in
speculative mode against transformers with the same exits, in threshold mode along full mode's output, with decisions
from a trace against its chains timed alone, and in batches. On a released model with tuned exits, or a random one."""
HELP = "decoding in every mode against transformers, full mode and the machine"
PARTS = ("full", "speculative", "threshold", "overhead", "batch")
SHAPES: dict[str, dict[str, Any]] = {
    "270m": {"hidden": 1024, "layers": 16, "vocab": 32000},
    "1b": {"hidden": 2048, "layers": 20, "vocab": 32000},
}


def add_options(options: argparse.ArgumentParser) -> None:
    """Add what it takes."""
    whole = at_least(1)
    options.add_argument("--parts", choices=PARTS, nargs="+", default=["full"], help="what to measure")
    options.add_argument("--model", type=Path, metavar="DIR", help="Hugging Face directory (default: a random model)")
    options.add_argument("--adapter", type=Path, metavar="DIR", help="its exits (default: untuned ones)")
    options.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help="cut prompts from these files (default: random tokens)"
    )
    options.add_argument("--shape", choices=SHAPES, default="270m", help="of a random model (default: 270m)")
    options.add_argument("--exits", type=whole, default=3, metavar="N", help="untuned exits (default: 3)")
    options.add_argument(
        "--batches", type=whole, nargs="+", default=[1, 8], metavar="N", help="for full (default: 1 8)"
    )
    options.add_argument("--prompts", type=whole, default=4, metavar="N", help="one after another (default: 4)")
    options.add_argument("--prompt-tokens", type=whole, default=64, metavar="N", help="of each prompt (default: 64)")
    options.add_argument("--tokens", type=at_least(2), default=96, metavar="N", help="to emit for each (default: 96)")
    options.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype (default: bfloat16)")
    options.add_argument("--compile", action="store_true", help="compile our layers, as generate --compile does")
    repeats_option(options)


def run(arguments: argparse.Namespace) -> int:
    """Measure; a table or JSON to stdout."""
    from megatron_ee.benchmark.generate import Load, benchmark_generate
    from megatron_ee.benchmark.generate_report import print_generate

    if arguments.adapter is not None and arguments.model is None:
        raise ConfigError("--adapter: belongs to a model; give it with --model")
    for text in arguments.text:
        if not Path(text).is_file():
            raise ConfigError(f"--text: {text}: no such file")
    if arguments.text and arguments.model is None:
        raise ConfigError("--text: a random model has no tokenizer; give a --model")
    if arguments.compile:
        from megatron_ee.inference.compiled import check_compiler

        check_compiler(1)
    result = benchmark_generate(
        arguments.model,
        arguments.adapter,
        shape_of(argparse.Namespace(), SHAPES[arguments.shape]),
        Load(tuple(arguments.text), arguments.prompts, arguments.prompt_tokens, arguments.tokens, arguments.repeats),
        parts=arguments.parts,
        batches=arguments.batches,
        exits=arguments.exits,
        dtype=arguments.dtype,
        compiled=arguments.compile,
    )
    return show(result, print_generate, arguments.json)
