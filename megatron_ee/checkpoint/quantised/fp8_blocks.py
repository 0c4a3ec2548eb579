"""FP8 as DeepSeek-V3, Qwen3 and Ministral 3 are released: one scale per block of a weight, or one for all of it.

``weight`` float8 ``[out, in]``, and ``weight_scale_inv`` (its factor, in spite of the name), of one element or
``[ceil(out / rows), ceil(in / columns)]``. Products are computed in float32, as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_ee.checkpoint.quantised.formats import (
    COLUMNS,
    FLOATING,
    ROWS,
    Axis,
    Format,
    Method,
    PartSpec,
    Reader,
    Shape,
    packed,
    read_size,
)
from megatron_ee.errors import CheckpointError, shown
from megatron_ee.model.packed import PackedMatrix

SCALES = ("weight_scale_inv", "weight_scale")


def fp8_format(scale: str, block: tuple[int, int] | None) -> Format:
    """The format of a weight.

    Args:
        scale: end of the name of its scales.
        block: rows and columns per scale; None for one scale.
    """

    def parts(weight: Shape) -> dict[str, PartSpec]:
        axes = () if block is None else (Axis(ROWS, block[0]), Axis(COLUMNS, block[1]))
        return {
            "weight": PartSpec((torch.float8_e4m3fn,), (Axis(ROWS), Axis(COLUMNS))),
            scale: PartSpec(FLOATING, axes, allowed="positive"),
        }

    def pack(reader: Reader) -> PackedMatrix:
        found = reader[scale].float()
        grid = reader.grid(*(block or reader.weight))
        return packed(reader["weight"], 8, found.view(1, 1) if block is None else found, 0.0, grid)

    return Format(
        "fp8" + (" with one scale" if block is None else f" in blocks of {block[0]} x {block[1]}"), parts, pack
    )


def read_formats(config: Mapping[str, Any], where: str) -> tuple[Format, ...]:
    """See ``Method``."""
    block, key = config.get("weight_block_size"), "quantization_config.weight_block_size"
    if block is None:
        return tuple(fp8_format(scale, None) for scale in SCALES)
    if not isinstance(block, list) or len(block) != 2:
        raise CheckpointError(
            f"{where}: {key} must be null or rows and columns, such as [128, 128], not {shown(block)}"
        )
    rows, columns = (read_size(size, key, where) for size in block)
    return tuple(fp8_format(scale, (rows, columns)) for scale in SCALES)


FP8 = Method(
    "fp8",
    read_formats,
    marks=SCALES,
    carried=("activation_scale", "input_scale"),
    extra=("k_scale", "v_scale", "kv_scale", "q_scale"),
    activations=lambda config: True,
)
