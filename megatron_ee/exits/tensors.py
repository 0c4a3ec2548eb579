"""The tensors of exits: the names and shapes that they are saved with, and what they are copied from at first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.exit import Exit
from megatron_ee.exits.stage import Stage
from megatron_ee.families.family import Source
from megatron_ee.families.registry import FAMILIES
from megatron_ee.families.weights import FINAL_NORM, head_name, layer_source, layer_tensors


@dataclass(frozen=True)
class ExitPart:
    """A trained parameter of an exit, and the tensors of its own that it is made of in an adapter.

    Attributes:
        parameter: its name in ``Exit``.
        saved: its tensors' names in an adapter, ``exits.<layer>...``.
        shapes: of these tensors.
        copied: what each is copied from; None for a ``low_rank`` head's A and B, which start out otherwise.
    """

    parameter: str
    saved: Source
    shapes: tuple[tuple[int, ...], ...]
    copied: Source | None


def exit_parts(spec: ExitSpec, arch: Architecture) -> Iterator[ExitPart]:
    """Every trained parameter of an exit (design: exits, the table)."""
    hidden, vocab, prefix = arch.hidden_size, arch.vocab_size, f"exits.{spec.layer}"
    origin = f"model.layers.{(arch.num_layers if spec.body == 'layer' else spec.layer) - 1}"
    shapes = layer_tensors(arch)
    for name, source in FAMILIES[arch.family].layer.items():
        in_body = spec.body == "layer" or (spec.body == "mlp" and name.startswith("mlp."))
        if in_body and source.names[0] in shapes:
            yield ExitPart(
                f"layer.{name}" if spec.body == "layer" else name,
                layer_source(arch, name, prefix),
                tuple(shapes[each] for each in source.names),
                layer_source(arch, name, origin),
            )
    if spec.body != "embedding":
        saved = Source((f"{prefix}.norm.weight",), "whole")
        yield ExitPart("norm.weight", saved, ((hidden,),), Source((FINAL_NORM,), "whole"))
    if spec.head == "own":
        saved = Source((f"{prefix}.lm_head.weight",), "vocabulary")
        yield ExitPart("head.weight", saved, ((vocab, hidden),), Source((head_name(arch),), "vocabulary"))
    if spec.head == "low_rank":
        yield ExitPart("down", Source((f"{prefix}.lm_head.a",), "whole"), ((spec.rank, hidden),), None)
        yield ExitPart("up", Source((f"{prefix}.lm_head.b",), "vocabulary"), ((vocab, spec.rank),), None)


def exit_tensors(spec: ExitSpec, arch: Architecture) -> dict[str, tuple[tuple[int, ...], str | None]]:
    """What an exit holds of its own: name in an adapter -> shape, and the released tensor it is copied from.

    The source is None for a ``low_rank`` head's A and B, which start out otherwise (design: exits).
    """
    found: dict[str, tuple[tuple[int, ...], str | None]] = {}
    for part in exit_parts(spec, arch):
        origins = part.copied.names if part.copied else (None,) * len(part.saved.names)
        found |= {
            name: (shape, origin) for name, shape, origin in zip(part.saved.names, part.shapes, origins, strict=True)
        }
    return found


def _trained(exit_: Exit) -> Iterator[tuple[Tensor, ExitPart]]:
    """Every trained parameter of an exit, in the module's order."""
    parts = {part.parameter: part for part in exit_parts(exit_.spec, exit_.setup.architecture)}
    for name, parameter in exit_.named_parameters():
        if parameter.requires_grad:
            yield parameter, parts[name]


def exit_copy_sources(exit_: Exit) -> Iterator[tuple[Tensor, Source]]:
    """Where each parameter of an exit, the frozen input norm included, is copied from (design: exits, the table).

    A ``low_rank`` head's A and B have no source, and a shared head is loaded once with its stage.
    """
    if exit_.input_norm is not None:
        yield (
            exit_.input_norm.weight,
            layer_source(exit_.setup.architecture, "mlp_norm.weight", f"model.layers.{exit_.spec.layer - 1}"),
        )
    for parameter, part in _trained(exit_):
        if part.copied is not None:
            yield parameter, part.copied


def exit_saved_sources(exit_: Exit) -> Iterator[tuple[Tensor, Source]]:
    """Every trained parameter of an exit under its name in an adapter, ``exits.<layer>...``."""
    for parameter, part in _trained(exit_):
        yield parameter, part.saved


def shared_head_sources(stage: Stage) -> Iterator[tuple[Tensor, Source]]:
    """The frozen head of a stage that holds one of its own: neither the final exit's nor a tied embedding."""
    head, backbone = stage.shared_head, stage.backbone
    if head is None or any(head.weight is parameter for parameter in backbone.parameters()):
        return
    yield head.weight, Source((head_name(stage.setup.architecture),), "vocabulary")
