"""``benchmark generate`` as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_ee.benchmark.generate import GenerateBenchmark
from megatron_ee.benchmark.report import machine_line, make_table

if TYPE_CHECKING:
    from rich.console import Console


def print_generate(result: GenerateBenchmark, console: Console) -> None:
    """A table for each part."""
    model = result.model
    exits = ", ".join(map(str, model["exits"])) or "none"
    console.print(
        f"{machine_line(result.machine)}; {model['parameters'] / 1e6:,.0f}M parameters, {model['layers']} layers of "
        f"{model['hidden']}, vocabulary {model['vocab']}, exits after {exits}{', compiled' * model['compiled']}",
        soft_wrap=True,
    )
    if result.full:
        table = make_table(
            "Full mode against transformers' generate",
            ("batch", "speed", "tokens/s", "", "bandwidth", "", "its products", "same"),
            ("", "/ theirs", "ours", "theirs", "/ torch.mv", "/ fastest", "/ decoding", "output"),
        )
        for full in result.full:
            measured = (full.bandwidth_share, full.fastest_share, full.products_share)
            shares = ("-" if share is None else f"{share:.2f}" for share in measured)
            speeds = (f"{full.ratio:.2f}x", f"{full.ours:,.1f}", f"{full.transformers:,.1f}")
            table.add_row(str(full.batch), *speeds, *shares, "yes" if full.same else "no")
        console.print(table)
    if result.speculative:
        table = make_table(
            "The full model's output, one prompt at a time",
            ("", "speed", "decoding", "tokens/s", "proposals", "layers", "same"),
            ("", "/ full", "/ full", "", "that stood", "per token", "output"),
        )
        for way in result.speculative:
            table.add_row(
                way.name,
                f"{way.speedup:.2f}x",
                "-" if way.decoding is None else f"{way.decoding:.2f}x",
                f"{way.tokens_per_second:,.1f}",
                "-" if way.acceptance is None else f"{way.acceptance:.0%}",
                "-" if way.layers_per_token is None else f"{way.layers_per_token:.1f}",
                f"{way.same:.0%}",
            )
        console.print(table)
    if result.threshold:
        table = make_table(
            "Threshold mode along full mode's output",
            ("threshold", "speed", "agreement", "layers", "first departs"),
            ("", "/ full", "", "per token", "at token"),
        )
        for point in result.threshold:
            table.add_row(
                f"{point.threshold:g}",
                f"{point.speedup:.2f}x",
                f"{point.agreement:.1%}",
                f"{point.layers_per_token:.2f}",
                f"{point.departure:.0f}",
            )
        console.print(table)
    if result.overhead is not None:
        over = result.overhead
        console.print(
            f"Decisions from a trace: {over.seconds:.2f} s, {over.ratio:.3f}x the {over.chains:.2f} s that its "
            f"{over.count} chains of layers take alone, heads included.",
            soft_wrap=True,
        )
    if result.batch:
        table = make_table(
            "Rows that leave at mixed exits", ("rows", "speed", "tokens/s", ""), ("", "/ full", "mixed", "full")
        )
        for batch in result.batch:
            table.add_row(str(batch.rows), f"{batch.ratio:.2f}x", f"{batch.mixed:,.1f}", f"{batch.full:,.1f}")
        console.print(table)
