"""GPTQ (arXiv 2210.17323) as AutoGPTQ and GPTQModel store it, with and without act-order.

``qweight`` int32 ``[in * bits / 32, out]`` has the codes of consecutive input features in a word, from the lowest bits
on. ``qzeros`` int32 ``[groups, out * bits / 32]`` has the zero points in the same way, of consecutive outputs. Format
``gptq_v2`` stores them as they are. Format ``gptq`` subtracts from each word the one whose zero points are all 1.
``scales`` ``[groups, out]`` may be negative (AutoRound writes such ones). ``g_idx`` int32 ``[in]`` is the group of each
input feature.
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
    check_one_of,
    ordered,
    packed,
    read_size,
    unpack_words,
)
from megatron_ee.errors import CheckpointError, shown
from megatron_ee.model.packed import PackedMatrix

ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""``checkpoint_format`` -> what was subtracted from the zero points."""
ONES = {4: 0x11111111, 8: 0x01010101}
"""By bits: the word whose zero points are all 1."""


def gptq_format(bits: int, group: int | None, offset: int, act_order: bool) -> Format:
    """The format of a weight.

    Args:
        bits: 4 or 8.
        group: input features per scale; None for all.
        offset: what was subtracted from the zero points.
        act_order: whether groups may be any sets of input features, so that ``g_idx`` is needed.
    """

    def parts(weight: Shape) -> dict[str, PartSpec]:
        size, codes = group or weight[COLUMNS], 32 // bits
        groups = Axis(COLUMNS, size, whole=True)
        return {
            "qweight": PartSpec((torch.int32,), (Axis(COLUMNS, codes), Axis(ROWS))),
            "qzeros": PartSpec((torch.int32,), (groups, Axis(ROWS, codes))),
            "scales": PartSpec(FLOATING, (groups, Axis(ROWS)), allowed="nonzero"),
            "g_idx": PartSpec((torch.int32,), (Axis(COLUMNS),), optional=not act_order),
        }

    def pack(reader: Reader) -> PackedMatrix:
        size, unit = group or reader.weight[COLUMNS], 32 // bits
        codes = reader.within(unpack_words(reader["qweight"].t(), bits), column_unit=unit)
        # Words are subtracted and added with carries, as in GPTQModel: a zero point of 0 borrows from the next one.
        zeros = unpack_words(reader["qzeros"] + offset * ONES[bits], bits).t()
        first = reader.offset[ROWS] % unit
        zeros = zeros[first : first + reader.rows]
        scale, zero, grid, order = ordered(reader, "g_idx", size, reader["scales"].t(), zeros)
        return packed(codes, bits, scale, zero, grid, order)

    return Format(f"gptq {bits} bits, groups of {group or 'all'}, zero points less {offset}", parts, pack)


def read_formats(config: Mapping[str, Any], where: str) -> tuple[Format, ...]:
    """See ``Method``. ``dynamic`` of GPTQModel gives some modules other settings."""
    named = config.get("checkpoint_format") or config.get("format") or "gptq"
    if config.get("is_marlin_format"):  # of AutoGPTQ, before it had checkpoint_format
        named = "marlin"
    named = named.lower() if isinstance(named, str) else named
    check_one_of(named, "quantization_config.checkpoint_format", tuple(ZERO_OFFSETS), where)
    if config.get("rotation"):
        raise CheckpointError(
            f"{where}: quantization_config.rotation {shown(config['rotation'])} is not supported; "
            "use a release without rotations"
        )
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(isinstance(each, dict) for each in dynamic.values()):
        raise CheckpointError(
            f"{where}: quantization_config.dynamic must be an object of objects, not {shown(dynamic)}"
        )
    found = {}
    for settings in ({}, *dynamic.values()):
        merged = {**config, **settings}
        check_one_of(merged.get("bits"), "quantization_config.bits", (4, 8), where)
        group = read_size(merged.get("group_size", -1), "quantization_config.group_size", where, none=0) or None
        act_order = merged.get("desc_act", False)
        check_one_of(act_order, "quantization_config.desc_act", (True, False), where)
        found[(merged["bits"], group, act_order)] = gptq_format(merged["bits"], group, ZERO_OFFSETS[named], act_order)
    return tuple(found.values())


GPTQ = Method("gptq", read_formats, marks=("qweight",), zero_bias=True)
