"""Exports an exit as a plain model: the layers below the exit, and the exit's MLP or layer, norm and head."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ee.checkpoint.contents import Contents
from megatron_ee.checkpoint.derived import low_rank_sum
from megatron_ee.checkpoint.safetensors_file import DTYPE_NAMES, PIECE
from megatron_ee.checkpoint.tensors import StoredTensor
from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.untrusted import parse_json, read_json
from megatron_ee.errors import CheckpointError
from megatron_ee.exits.registry import BODIES, body_of
from megatron_ee.exits.tensors import exit_parts
from megatron_ee.families.multimodal import VISION_FILES, plain_config
from megatron_ee.families.registry import FAMILIES, parse_architecture
from megatron_ee.families.weights import LM_HEAD, expected_tensors, head_name

CONFIG = "config.json"


def shallow_model(contents: Contents, layer: int) -> Contents:
    """Convert the exit after ``layer`` to a plain model of its family with the same logits.

    An exit after layer k becomes a model of k layers and the layers of its body. A ``low_rank`` head becomes one
    matrix, computed in float32. Every tensor has the dtype of the backbone tensor that it replaces, with a line in
    ``notes`` if the exit's own is wider. Only ``config.json`` is read.

    Args:
        contents: a backbone with its exits.
        layer: of the exit.

    Returns:
        The model, without exits and vision: its weights, an adapted ``config.json``, and the other files unchanged.
        ``base_model`` is still the original model.

    Raises:
        CheckpointError: the exit or the backbone does not exist, a tensor is missing or has another shape, or no plain
            model of the family is equivalent to the exit's body.
    """
    spec = _expressible_exit(contents, layer)
    arch = contents.architecture
    if arch is None:
        raise CheckpointError(f"{contents.source}: holds only exits; a plain model needs their backbone as well")
    where = f"{contents.source}: {CONFIG}"
    contents = text_only(contents)
    config = shallow_config(_read_config(contents), arch, spec)
    shallow = parse_architecture(config, where)
    parts = _exit_parts(contents, arch, spec)
    tensors = {**contents.backbone, **parts}
    backbone = {}
    for name, shape in expected_tensors(shallow).items():
        if name not in tensors:
            raise CheckpointError(f"{contents.source}: tensor {name!r} is missing")
        _check_shape(contents, name, tensors[name], shape)
        backbone[name] = tensors[name]
    text = json.dumps(config, indent=2) + "\n"
    notes = list(contents.notes)
    if spec.gate:
        notes.append(f"{contents.source}: the gate of the exit after layer {layer} is left out: a plain model has none")
    notes += _rounding_notes(contents, arch, spec, parts)
    return replace(
        contents,
        notes=tuple(notes),
        format=f"{spec.body} exit after layer {layer} as a model of {shallow.num_layers} layers",
        architecture=shallow,
        backbone=backbone,
        non_weights={},
        exits=(),
        exit_tensors={},
        assets={**contents.assets, CONFIG: text.encode("utf-8")},
        backbone_sha256=None,
        settings=None,
    )


def text_only(contents: Contents) -> Contents:
    """Extract the text model of a multimodal release, with a line in ``notes``. Other contents are not changed."""
    if contents.spelling is None:
        return contents
    config = plain_config(_read_config(contents), f"{contents.source}: {CONFIG}")
    text = json.dumps(config, indent=2) + "\n"
    assets = {name: source for name, source in contents.assets.items() if name not in VISION_FILES}
    line = f"{contents.source}: only its text model is written, not its {len(contents.vision)} vision tensors"
    return replace(
        contents,
        vision={},
        spelling=None,
        assets={**assets, CONFIG: text.encode("utf-8")},
        notes=(*contents.notes, line),
    )


def _expressible_exit(contents: Contents, layer: int) -> ExitSpec:
    if not contents.exits:
        raise CheckpointError(f"{contents.source}: has no exits, so there is none to write as a model")
    found = {spec.layer: spec for spec in contents.exits}
    if layer not in found:
        raise CheckpointError(
            f"{contents.source}: no exit after layer {layer}; it has them after {', '.join(map(str, found))}"
        )
    if reason := body_of(found[layer]).not_plain:
        *others, last = (name for name, body in BODIES.items() if not body.not_plain)
        raise CheckpointError(
            f"{contents.source}: the exit after layer {layer} has body {found[layer].body}, which no plain model can "
            f"express: {reason}; export an exit with body {', '.join(others)} or {last}"
        )
    return found[layer]


def _read_config(contents: Contents) -> dict[str, Any]:
    source = contents.assets.get(CONFIG)
    if source is None:
        raise CheckpointError(f"{contents.source}: {CONFIG} is missing")
    where = f"{contents.source}: {CONFIG}"
    config = read_json(source) if isinstance(source, Path) else parse_json(source, where)
    if not isinstance(config, dict):
        raise CheckpointError(f"{where}: expected a JSON object")
    return config


def shallow_config(config: dict[str, Any], arch: Architecture, spec: ExitSpec) -> dict[str, Any]:
    """``config.json`` of an exit as a plain model. Only values that depend on the number of layers change.

    Args:
        config: of the whole model.
        arch: of the whole model.
        spec: the exit. If it has its own layer, this is of the same kind as the model's last layer.
    """
    layers = [*range(spec.layer), *[arch.num_layers - 1] * body_of(spec).extra_layers]
    result = FAMILIES[arch.family].pick(config, arch, layers)
    result["tie_word_embeddings"] = arch.tied and spec.head == "shared"
    result.pop("auto_map", None)  # names code files, which are not copied
    return result


def _exit_parts(contents: Contents, arch: Architecture, spec: ExitSpec) -> dict[str, StoredTensor]:
    """The exit's tensors by their names in the shallow model."""
    parts: dict[str, StoredTensor] = {}
    factors: dict[str, StoredTensor] = {}
    for part in exit_parts(spec, arch):
        for number, (name, shape) in enumerate(zip(part.saved.names, part.shapes, strict=True)):
            tensor = contents.exit_tensors.get(name)
            if tensor is None and part.optional:
                continue  # the backbone's own, which is there under the same name
            if tensor is None:
                raise CheckpointError(f"{contents.source}: tensor {name!r} is missing")
            _check_shape(contents, name, tensor, shape)
            tensor = replace(tensor, made=" of ".join(filter(None, (name, tensor.made))))
            if part.copied is None:  # of a low_rank head
                factors[name.rpartition(".")[2]] = tensor
            else:
                dtype = _backbone_tensor(contents, part.copied.names[number]).dtype
                parts[part.plain[number]] = _in_dtype(tensor, dtype)
    if factors:
        head = _backbone_tensor(contents, head_name(arch))
        parts[LM_HEAD] = low_rank_sum((head_name(arch), head), ("b", factors["b"]), ("a", factors["a"]), head.dtype)
    return parts


def _rounding_notes(
    contents: Contents, arch: Architecture, spec: ExitSpec, parts: Mapping[str, StoredTensor]
) -> list[str]:
    """A line if the exit's tensors are saved in a wider dtype than they are written in."""
    names = [name for part in exit_parts(spec, arch) for name in part.saved.names if name in contents.exit_tensors]
    saved = {contents.exit_tensors[name].dtype for name in names}
    written = {tensor.dtype for tensor in parts.values()}
    if not any(torch.promote_types(one, other) != other for one in saved for other in written):
        return []
    before, after = (_listed(dtypes) for dtypes in (saved, written))
    return [
        f"{contents.source}: the exit after layer {spec.layer} is rounded from {before} to {after}, the dtype of the "
        "model that it becomes part of"
    ]


def _listed(dtypes: Collection[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _backbone_tensor(contents: Contents, name: str) -> StoredTensor:
    if name not in contents.backbone:
        raise CheckpointError(f"{contents.source}: tensor {name!r} is missing")
    return contents.backbone[name]


def _check_shape(contents: Contents, name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{contents.source}: tensor {name!r} has shape {list(tensor.shape)}, but this model makes it {list(shape)}"
        )


def _in_dtype(tensor: StoredTensor, dtype: torch.dtype) -> StoredTensor:
    """``tensor`` rounded to ``dtype``, even if it is read into a wider dtype."""
    if tensor.dtype == dtype:
        return tensor

    def read(out: Tensor, offset: Sequence[int]) -> None:
        if out.dtype == dtype:
            tensor.read(out, offset)
            return
        rows = max(1, PIECE * len(out) // max(1, out.numel() * dtype.itemsize))
        for first in range(0, len(out), rows):
            part = out[first : first + rows]
            rounded = torch.empty(part.shape, dtype=dtype)
            tensor.read(rounded, (offset[0] + first, *offset[1:]))
            part.copy_(rounded)

    return replace(tensor, dtype=dtype, read=read, made=f"{tensor.made} as {DTYPE_NAMES[dtype]}")
