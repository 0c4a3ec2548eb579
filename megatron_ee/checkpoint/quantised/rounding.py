"""Quantises the weights of a plain release while they are loaded, through the package ``compressed-tensors``.

Weights are rounded to the nearest code, symmetrically: ``int8`` with one scale per output, ``int4`` with one per group
of 128 input features, else of 64 or 32. Scales have the dtype of the release.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_ee.checkpoint.quantised.formats import COLUMNS, FLOATING, ROWS, Axis, Format, PartSpec, Reader, Shape
from megatron_ee.checkpoint.quantised.formats import packed as packed_matrix
from megatron_ee.checkpoint.quantised.weights import QuantisedWeight
from megatron_ee.checkpoint.tensors import StoredTensor
from megatron_ee.errors import ConfigError
from megatron_ee.families.quantisation import GROUPS
from megatron_ee.model.packed import PackedMatrix

BITS = {"int8": 8, "int4": 4}
ROUNDED = 2**22
"""Elements that are rounded at a time, in float32."""


def rounded_weights(weights: Mapping[str, StoredTensor], kind: str, key: str) -> dict[str, QuantisedWeight]:
    """The matrices of layers among ``weights``, to be rounded as they are read.

    Args:
        weights: of a model, by released name.
        kind: ``int8`` or ``int4``.
        key: of the setting, for messages.

    Raises:
        ConfigError: the package is not installed, or no size of groups divides the input features of a matrix.
    """
    if importlib.util.find_spec("compressed_tensors") is None:
        raise ConfigError(f"{key}: needs the package compressed-tensors; pip install 'megatron-ee[quantised]'")
    found = {}
    for name, tensor in weights.items():
        if name.startswith("model.layers.") and len(tensor.shape) == 2:
            group = None if kind == "int8" else _group(name, tensor.shape, key)
            found[name] = QuantisedWeight(name, tensor.shape, _format(BITS[kind], group), {"weight": tensor})
    return found


def _group(name: str, shape: Shape, key: str) -> int:
    group = next((size for size in GROUPS if shape[COLUMNS] % size == 0), None)
    if group is None:
        raise ConfigError(
            f"{key}: int4 needs groups of {', '.join(map(str, GROUPS))} input features, but none divides the "
            f"{shape[COLUMNS]} of {name}; use int8"
        )
    return group


def _format(bits: int, group: int | None) -> Format:
    def parts(weight: Shape) -> dict[str, PartSpec]:
        return {"weight": PartSpec((*FLOATING, torch.float64), (Axis(ROWS), Axis(COLUMNS)))}

    text = f"rounded to int{bits}, " + ("one scale per output" if group is None else f"groups of {group}")
    return Format(text, parts, partial(_pack, bits, group))


def _pack(bits: int, group: int | None, reader: Reader) -> PackedMatrix:
    """Round a box. The groups that it cuts are read as a whole, since all of a group decides its scale."""
    size = group or reader.weight[COLUMNS]
    start, stop = reader.offset[COLUMNS], reader.offset[COLUMNS] + reader.columns
    first, end = start // size * size, min(-(-stop // size) * size, reader.weight[COLUMNS])
    step = max(1, ROUNDED // (end - first))
    codes, scales = [], []
    for row in range(reader.offset[ROWS], reader.offset[ROWS] + reader.rows, step):
        count = min(step, reader.offset[ROWS] + reader.rows - row)
        part, scale = _round(reader.read("weight", ((row, first), (count, end - first))), bits, group)
        codes.append(part[:, start - first : stop - first])
        scales.append(scale)
    # Codes of 4 bits are stored from 0 on.
    joined, middle = torch.cat(codes), 8
    if bits == 4:
        return packed_matrix(
            (joined + middle).to(torch.uint8), 4, torch.cat(scales), float(middle), reader.grid(1, size)
        )
    return packed_matrix(joined, 8, torch.cat(scales), 0.0, reader.grid(1, size))


def _round(weight: Tensor, bits: int, group: int | None) -> tuple[Tensor, Tensor]:
    """Codes int8 ``[rows, columns]`` and scales ``[rows, groups]`` of whole groups."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    blocks = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    arguments: dict[str, Any] = {"num_bits": bits, "symmetric": True, **blocks}
    args = QuantizationArgs(**arguments)
    wide = weight.float()
    parts = wide.unflatten(1, (-1, group or weight.shape[1]))
    scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
    kept = scale.to(weight.dtype if weight.dtype != torch.float64 else torch.float32)
    return quantize(wide, kept.float(), zero, args, dtype=torch.int8), kept
