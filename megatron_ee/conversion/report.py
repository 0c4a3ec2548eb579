"""Tables of the files that a conversion would read and write."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from megatron_ee.checkpoint.contents import Contents
from megatron_ee.checkpoint.outputs import OutputDirectory, OutputFile
from megatron_ee.checkpoint.tensors import StoredTensor
from megatron_ee.tables import add_columns, make_console, new_table


def print_contents(contents: Contents, output: TextIO | None = None) -> None:
    """Print the input's contents, with sizes."""
    console = make_console(output)
    table = new_table(f"Read: {contents.source} ({contents.format})", console)
    add_columns(table, "what", words=True)
    add_columns(table, "tensors", "MB")
    add_columns(table, "dtype", "details", words=True)
    arch = contents.architecture
    if arch is not None:
        shape = f"{arch.family}, {arch.num_layers} layers of {arch.hidden_size}, vocabulary {arch.vocab_size}"
        table.add_row("backbone", *_sizes(contents.stored_backbone.values()), shape)
    if contents.non_weights:
        table.add_row("non-weights", *_sizes(contents.non_weights.values()), ", ".join(contents.non_weights))
    if contents.vision:
        table.add_row("vision", *_sizes(contents.vision.values()), "not of the text model")
    for spec in contents.exits:
        prefix = f"exits.{spec.layer}."
        own = [tensor for name, tensor in contents.exit_tensors.items() if name.startswith(prefix)]
        table.add_row(f"exit {spec.layer}", *_sizes(own), f"body {spec.body}, head {spec.head}")
    console.print(table)
    if contents.assets:
        console.print(f"Files carried along: {', '.join(contents.assets)}", soft_wrap=True)
    console.print()


def print_plan(plan: OutputDirectory, directory: Path, output: TextIO | None = None) -> None:
    """Print the files that would be written, with sizes."""

    def tensors(file: OutputFile) -> int:
        return len({part.key for part in file.parts})

    console = make_console(output)
    table = new_table(f"Write: {directory} ({plan.format})", console)
    add_columns(table, "file", words=True)
    add_columns(table, "tensors", "MB")
    for file in plan.files:
        table.add_row(file.name, str(tensors(file)), f"{file.nbytes / 1e6:,.1f}")
    table.add_row("all", str(sum(tensors(file) for file in plan.files)), f"{plan.nbytes / 1e6:,.1f}")
    console.print(table)


def _sizes(tensors: Iterable[StoredTensor]) -> tuple[str, str, str]:
    listed = list(tensors)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in listed})
    return str(len(listed)), f"{sum(tensor.nbytes for tensor in listed) / 1e6:,.1f}", ", ".join(dtypes)
