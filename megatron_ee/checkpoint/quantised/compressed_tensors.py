"""compressed-tensors, the format of LLM Compressor and vLLM: integers of 4 or 8 bits, packed into words or not; FP8.

Scales are one per weight, per output ("channel"), per group of input features, or per block. Those of integers may be
negative (AutoRound writes such ones). Settings of activations and of the KV cache are not applied: only weights are
quantised here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

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
from megatron_ee.config.validation import Strict, validated
from megatron_ee.errors import CheckpointError, shown
from megatron_ee.model.packed import PackedMatrix

PACKED, PLAIN = "pack-quantized", ("int-quantized", "naive-quantized", "float-quantized")
STRATEGIES = ("tensor", "channel", "group", "block")
BITS = {"int": (4, 8), "float": (8,)}


class _Weights(Strict, extra="ignore"):
    """``weights`` of a group of modules."""

    num_bits: int = 8
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: str | None = None
    group_size: int | None = None
    block_structure: list[int] | str | None = None
    actorder: bool | str | None = None


class _Group(Strict, extra="ignore"):
    """One of ``config_groups``."""

    weights: _Weights | None = None
    input_activations: dict[str, Any] | None = None
    output_activations: dict[str, Any] | None = None
    format: str | None = None


class _Settings(Strict, extra="ignore"):
    """``quantization_config``. Without ``config_groups`` it describes sparsity, or the KV cache, of plain weights."""

    config_groups: dict[str, _Group] = {}
    format: str = "dense"
    kv_cache_scheme: dict[str, Any] | None = None


@dataclass(frozen=True)
class Scales:
    """The blocks of a weight that share a scale.

    Attributes:
        strategy: one of ``STRATEGIES``.
        rows: rows of a block, with strategy ``block``.
        columns: columns of a block or group.
    """

    strategy: str
    rows: int = 1
    columns: int = 0

    def size(self, weight: Shape) -> tuple[int, int]:
        """Rows and columns of a block."""
        if self.strategy == "tensor":
            return weight[ROWS], weight[COLUMNS]
        return self.rows, self.columns or weight[COLUMNS]

    def axes(self, weight: Shape, *, row_unit: int = 1, whole: bool = False) -> tuple[Axis, ...]:
        """Axes of the tensor of scales, or of zero points of which ``row_unit`` are in a word."""
        if self.strategy == "tensor":
            return ()
        rows, columns = self.size(weight)
        return Axis(ROWS, rows * row_unit), Axis(COLUMNS, columns, whole)

    def __str__(self) -> str:
        return f"{self.strategy} {self.rows} x {self.columns or 'all'}"


def integer_format(
    bits: int, scales: Scales, *, in_words: bool, symmetric: bool, act_order: bool, zeros_in_words: bool = False
) -> Format:
    """Integers, as ``weight`` int8 ``[out, in]``, or as ``weight_packed`` int32 ``[out, in * bits / 32]``.

    Args:
        bits: of a code, 4 or 8.
        scales: their blocks.
        in_words: codes are packed into words, from the lowest bits on, after adding 2^(bits - 1).
        symmetric: ``weight_zero_point`` may be missing, which stands for zeros.
        act_order: ``weight_g_idx`` gives the group of each input feature.
        zeros_in_words: zero points of consecutive outputs are packed like codes.
    """
    unit, middle = 32 // bits, 2 ** (bits - 1) if in_words else 0
    codes_name = "weight_packed" if in_words else "weight"

    def parts(weight: Shape) -> dict[str, PartSpec]:
        kind = torch.int32 if in_words else torch.int8
        found = {
            codes_name: PartSpec((kind,), (Axis(ROWS), Axis(COLUMNS, unit if in_words else 1))),
            "weight_scale": PartSpec(FLOATING, scales.axes(weight, whole=act_order), allowed="nonzero"),
            "weight_zero_point": PartSpec(
                (torch.int32 if zeros_in_words else torch.int8,),
                scales.axes(weight, row_unit=unit if zeros_in_words else 1, whole=act_order),
                optional=symmetric,
            ),
        }
        if act_order:
            found["weight_g_idx"] = PartSpec((torch.int32, torch.int64), (Axis(COLUMNS),))
        return found

    def zero_points(reader: Reader) -> Tensor | float:
        """As they are subtracted from codes that are stored from 0 on."""
        if "weight_zero_point" not in reader:
            return float(middle)
        zero = reader["weight_zero_point"]
        if not zeros_in_words:
            return _matrix(zero).to(torch.int16) + middle
        first = reader.offset[ROWS] % unit
        return unpack_words(zero.t(), bits).t()[first : first + reader.rows]

    def pack(reader: Reader) -> PackedMatrix:
        codes = reader[codes_name]
        if in_words:
            codes = reader.within(unpack_words(codes, bits), column_unit=unit)
        scale, zero, order = _matrix(reader["weight_scale"]), zero_points(reader), None
        size = scales.size(reader.weight)
        grid = reader.grid(*size)
        if act_order:
            scale, zero, grid, order = ordered(reader, "weight_g_idx", size[1], scale, zero)
        return packed(codes, bits if in_words else 8, scale, zero, grid, order)

    zero = "symmetric" if symmetric else "asymmetric"
    spread = ", a byte per zero point" if in_words and not (symmetric or zeros_in_words) else ""
    return Format(f"compressed-tensors int{bits}, {scales}, {zero}{spread}", parts, pack)


def float_format(scales: Scales) -> Format:
    """FP8: ``weight`` float8 ``[out, in]``."""

    def parts(weight: Shape) -> dict[str, PartSpec]:
        return {
            "weight": PartSpec((torch.float8_e4m3fn,), (Axis(ROWS), Axis(COLUMNS))),
            "weight_scale": PartSpec(FLOATING, scales.axes(weight), allowed="positive"),
        }

    def pack(reader: Reader) -> PackedMatrix:
        grid = reader.grid(*scales.size(reader.weight))
        return packed(reader["weight"], 8, _matrix(reader["weight_scale"]), 0.0, grid)

    return Format(f"compressed-tensors fp8, {scales}", parts, pack)


def _matrix(values: Tensor) -> Tensor:
    """One value as a matrix of one element."""
    return values.view(1, 1) if values.ndim < 2 else values


def read_formats(config: Mapping[str, Any], where: str) -> tuple[Format, ...]:
    """See ``Method``. Which group a weight belongs to is seen from its tensors, not from ``targets`` and ``ignore``."""
    where = f"{where}: quantization_config"
    sparsity = config.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise CheckpointError(f"{where}: sparsity_config {shown(sparsity)} is not supported; use a dense release")
    if config.get("transform_config"):
        raise CheckpointError(f"{where}: transform_config is not supported; use a release without rotations")
    settings = validated(_Settings, dict(config), where=where, error=CheckpointError)
    found: dict[str, Format] = {}
    for name, group in settings.config_groups.items():
        if group.weights is not None:
            for each in _formats(group.weights, group.format or settings.format, f"{where}: config_groups.{name}"):
                found[each.text] = each
    return tuple(found.values())


def _formats(weights: _Weights, stored: str, where: str) -> Iterator[Format]:
    """The formats that weights of a group may have."""
    check_one_of(stored, "format", (PACKED, *PLAIN), where)
    where = f"{where}.weights"
    check_one_of(weights.num_bits, f"num_bits of type {weights.type}", BITS[weights.type], where)
    scales = _scales(weights, where)
    act_order = weights.actorder is True or weights.actorder in ("group", "dynamic")
    if weights.type == "float":
        check_one_of(stored, "format of type float", PLAIN, where)
        check_one_of(weights.symmetric, "symmetric of type float", (True,), where)
        yield float_format(scales)
        return
    if not weights.symmetric:
        check_one_of(scales.strategy, "asymmetric strategy", ("tensor", "channel", "group"), where)
    in_words = stored == PACKED
    read = partial(integer_format, weights.num_bits, scales, in_words=in_words, act_order=act_order)
    if in_words and not weights.symmetric and scales.strategy != "tensor":
        yield read(symmetric=False, zeros_in_words=True)  # as the library stores them since April 2025
    yield read(symmetric=weights.symmetric)


def _scales(weights: _Weights, where: str) -> Scales:
    strategy = weights.strategy
    if strategy is None:
        strategy = "tensor" if weights.group_size is None else "channel" if weights.group_size == -1 else "group"
    check_one_of(strategy, "strategy", STRATEGIES, where)
    if strategy == "group":
        return Scales(strategy, 1, read_size(weights.group_size, "group_size", where))
    if strategy == "block":
        block = weights.block_structure or []
        if isinstance(block, str):  # as some releases spell it: 128x128
            found = re.fullmatch("([0-9]{1,7})x([0-9]{1,7})", block)
            block = [int(size) for size in found.groups()] if found else []
        if len(block) != 2:
            given = shown(weights.block_structure)
            raise CheckpointError(f"{where}: block_structure must be rows and columns, not {given}")
        return Scales(strategy, *(read_size(size, "block_structure", where) for size in block))
    return Scales(strategy)


def quantises_activations(config: Mapping[str, Any]) -> bool:
    """See ``Method``. ``read_formats`` has checked the settings."""
    groups = config.get("config_groups", {}).values()
    kinds = ("input_activations", "output_activations")
    return bool(config.get("kv_cache_scheme")) or any(group.get(kind) for group in groups for kind in kinds)


COMPRESSED_TENSORS = Method(
    "compressed-tensors",
    read_formats,
    marks=("weight_packed", "weight_scale"),
    activations=quantises_activations,
    carried=("weight_shape", "input_scale", "input_zero_point", "input_global_scale", "output_scale"),
    extra=("k_scale", "v_scale", "q_scale", "output_scale", "k_zero_point", "v_zero_point"),
)
