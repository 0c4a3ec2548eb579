"""The output of a conversion: files, the boxes of tensors in them, and small files that are written last."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_ee.checkpoint.safetensors_file import write_safetensors
from megatron_ee.checkpoint.tensors import StoredTensor

Watch = Callable[[Iterator[Tensor]], Iterator[Tensor]]
OnBytes = Callable[[memoryview], None]


@dataclass(frozen=True)
class Part:
    """One tensor of an output file: the box of ``shape`` at ``offset`` of ``tensor``.

    Attributes:
        name: name in the file.
        key: global key of the whole tensor.
    """

    name: str
    key: str
    tensor: StoredTensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the box."""
        return math.prod(self.shape) * self.tensor.dtype.itemsize


def whole_part(name: str, tensor: StoredTensor) -> Part:
    """The part that is the whole ``tensor``."""
    return Part(name, name, tensor, (0,) * len(tensor.shape), tensor.shape)


def write_parts(path: Path, parts: Sequence[Part], watch: Watch, on_bytes: OnBytes) -> None:
    """Write a safetensors file, a few MiB at a time.

    Args:
        path: the file.
        parts: its tensors.
        watch: wraps the iterator over each tensor's rows, for progress; it may raise to end the work.
        on_bytes: called with all bytes of the file in order.

    Raises:
        CheckpointError: a file cannot be read or written.
    """
    named = {part.name: part for part in parts}
    shapes = {name: torch.empty(part.shape, dtype=part.tensor.dtype, device="meta") for name, part in named.items()}

    def content(name: str) -> Iterator[Tensor]:
        return watch(named[name].tensor.slabs(named[name].offset, named[name].shape))

    write_safetensors(path, shapes, {"format": "pt"}, on_bytes=on_bytes, content=content)


@dataclass(frozen=True)
class OutputFile:
    """A file of tensors to write.

    Attributes:
        name: its path in the output.
        parts: its tensors.
        write: writes the file, like ``write_parts``. Equal parts always give equal bytes.
    """

    name: str
    parts: tuple[Part, ...]
    write: Callable[[Path, Sequence[Part], Watch, OnBytes], None] = write_parts

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class Written:
    """A file on disk: its size in bytes and the SHA-256 (hex) of each ``manifest.BLOCK`` bytes."""

    size: int
    blocks: list[str]


def nothing_more(directory: Path, written: Mapping[str, Written]) -> dict[str, bytes]:
    """Default of ``OutputDirectory.finish``: no files."""
    return {}


@dataclass(frozen=True)
class OutputDirectory:
    """A directory to write.

    Attributes:
        format: its format in words.
        files: the large files.
        assets: small files by name: a path to copy, or the content.
        finish: returns the files to write last, by name, from the directory and its large files.
    """

    format: str
    files: tuple[OutputFile, ...]
    assets: Mapping[str, Path | bytes] = field(default_factory=dict)
    finish: Callable[[Path, Mapping[str, Written]], dict[str, bytes]] = nothing_more

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(file.nbytes for file in self.files)


def split_parts(parts: Sequence[Part], limit: int) -> Iterator[tuple[Part, ...]]:
    """Yield groups of consecutive parts of at most ``limit`` bytes. A larger part is a group of its own."""
    run: list[Part] = []
    for part in parts:
        if run and sum(each.nbytes for each in run) + part.nbytes > limit:
            yield tuple(run)
            run = []
        run.append(part)
    if run:
        yield tuple(run)
