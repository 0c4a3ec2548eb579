"""``megatron-ee generate``: text from a prompt, showing the layer that emitted each token."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_ee.commands import DTYPES, MODEL, Parser, at_least
from megatron_ee.errors import ConfigError

DEFAULT_THRESHOLD = 0.9


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser("generate", "Continue a prompt greedily; each token is coloured by the layer that emitted it.")
    result.add_argument("--model", type=Path, required=True, metavar="DIR", help=MODEL)
    result.add_argument("--adapter", type=Path, metavar="DIR", help="exits from tune (default: those with the model)")
    result.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    result.add_argument(
        "--mode",
        choices=("full", "threshold", "speculative"),
        help="full: every token runs all layers; threshold: a token leaves at the first exit that is confident enough "
        "(default where there are exits); speculative: not yet available",
    )
    result.add_argument(
        "--threshold", type=_threshold, metavar="X", help=f"confidence to leave at (default: {DEFAULT_THRESHOLD})"
    )
    result.add_argument("--max-tokens", type=at_least(1), default=64, metavar="N", help="at most so many (default: 64)")
    result.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the model (default: bfloat16)")
    result.add_argument("--no-verify", action="store_true", help="do not check what is read against its checksums")
    result.add_argument("--json", action="store_true", help="print one JSON object instead of coloured text")
    return result


def run(arguments: argparse.Namespace) -> int:
    """Generate; text with its legend, or JSON, to stdout."""
    mode = arguments.mode
    if mode == "speculative":
        raise ConfigError("--mode: speculative is not yet available; choose full or threshold")
    if mode == "full" and arguments.threshold is not None:
        print("megatron-ee generate: --threshold has no effect in mode full", file=sys.stderr)
    from megatron_ee.inference.generate import generate

    result = generate(
        model=arguments.model,
        adapter=arguments.adapter,
        prompt=arguments.prompt,
        mode=mode,
        threshold=DEFAULT_THRESHOLD if arguments.threshold is None else arguments.threshold,
        max_tokens=arguments.max_tokens,
        dtype=arguments.dtype,
        verify=not arguments.no_verify,
    )
    if result.statistics["finish_reason"] == "context":
        print("megatron-ee generate: stopped at the end of the model's context", file=sys.stderr)
    if arguments.json:
        names = ("text", "token_ids", "layers", "statistics")
        print(json.dumps({name: getattr(result, name) for name in names}))
        return 0
    from rich.console import Console

    from megatron_ee.commands.show import print_layers

    print_layers(Console(highlight=False), arguments.prompt, result.pieces, result.layers)
    return 0


def _threshold(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}; above 1 no token leaves early")
    return value
