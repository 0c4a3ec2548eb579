"""The tensors of exits: the names and shapes that they are saved with, and what they are copied from at first."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.body import ExitPart
from megatron_ee.exits.exit import Exit
from megatron_ee.exits.gate import gate_parts
from megatron_ee.exits.head import head_parts
from megatron_ee.exits.registry import body_of
from megatron_ee.exits.stage import Stage
from megatron_ee.families.family import Source
from megatron_ee.families.weights import head_name
from megatron_ee.parallel.costs import padded_vocab


def exit_parts(spec: ExitSpec, arch: Architecture) -> Iterator[ExitPart]:
    """Every trained parameter of an exit: the body's, then the head's."""
    yield from body_of(spec).parts(arch, spec.layer)
    yield from head_parts(spec, arch)


def saved_parts(spec: ExitSpec, arch: Architecture) -> Iterator[ExitPart]:
    """Every parameter of an exit that an adapter holds: the trained ones, and those of its gate."""
    yield from exit_parts(spec, arch)
    yield from gate_parts(spec, arch)


def parameter_sizes(spec: ExitSpec, arch: Architecture, tensor: int, *, matrices: bool = False) -> list[int]:
    """Numbers of elements of an exit's trained parameters on one of ``tensor`` tensor-parallel ranks.

    Args:
        matrices: only of those with two dimensions, which weight decay applies to.
    """
    sizes = []
    for part in exit_parts(spec, arch):
        if matrices and len(part.shapes[0]) == 1:
            continue
        whole = part.elements
        if part.saved.kind == "vocabulary":
            whole = whole // arch.vocab_size * padded_vocab(arch.vocab_size, tensor)
        sizes.append(whole if part.saved.kind == "whole" else whole // tensor)
    return sizes


def body_weights(spec: ExitSpec, arch: Architecture) -> int:
    """Number of weights in the matrices of an exit's body: what a token costs there."""
    shapes = [shape for part in body_of(spec).parts(arch, spec.layer) for shape in part.shapes]
    return sum(math.prod(shape) for shape in shapes if len(shape) > 1)


def exit_tensors(spec: ExitSpec, arch: Architecture) -> dict[str, tuple[tuple[int, ...], str | None]]:
    """What an exit holds of its own: name in an adapter -> shape, and the released tensor it is copied from.

    The source is None for a ``low_rank`` head's A and B, which start out otherwise, and for a gate, which is fitted.
    """
    found: dict[str, tuple[tuple[int, ...], str | None]] = {}
    for part in saved_parts(spec, arch):
        origins = part.copied.names if part.copied else (None,) * len(part.saved.names)
        found |= {
            name: (shape, origin) for name, shape, origin in zip(part.saved.names, part.shapes, origins, strict=True)
        }
    return found


def trained_parts(exit_: Exit) -> Iterator[tuple[Tensor, ExitPart]]:
    """Every trained parameter of an exit with its part, in the module's order."""
    parts = {part.parameter: part for part in exit_parts(exit_.spec, exit_.setup.architecture)}
    for name, parameter in exit_.named_parameters():
        if parameter.requires_grad:
            yield parameter, parts[name.removeprefix("body.")]


def exit_copy_sources(exit_: Exit) -> Iterator[tuple[Tensor, Source]]:
    """Where each parameter of an exit, the frozen norms that it reads through included, is copied from.

    A ``low_rank`` head's A and B have no source, and a shared head is loaded once with its stage.
    """
    for name, source in exit_.body.frozen(exit_.setup.architecture, exit_.spec.layer).items():
        yield exit_.body.get_parameter(name), source
    for parameter, part in trained_parts(exit_):
        if part.copied is not None:
            yield parameter, part.copied


def exit_saved_sources(exit_: Exit) -> Iterator[tuple[Tensor, Source]]:
    """Every parameter of an exit that an adapter holds, under its name there, ``exits.<layer>...``."""
    for parameter, part in trained_parts(exit_):
        yield parameter, part.saved
    yield from gate_sources(exit_)


def gate_sources(exit_: Exit) -> Iterator[tuple[Tensor, Source]]:
    """The parameters of an exit's gate, if it has one, under their names in an adapter."""
    for part in gate_parts(exit_.spec, exit_.setup.architecture):
        yield exit_.get_parameter(part.parameter), part.saved


def shared_head_sources(stage: Stage) -> Iterator[tuple[Tensor, Source]]:
    """The frozen head of a stage that holds one of its own: neither the final exit's nor a tied embedding."""
    head, backbone = stage.shared_head, stage.backbone
    if head is None or any(head.weight is parameter for parameter in backbone.parameters()):
        return
    yield head.weight, Source((head_name(stage.setup.architecture),), "vocabulary")
