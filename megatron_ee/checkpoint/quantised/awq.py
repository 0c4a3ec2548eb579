"""AWQ (arXiv 2306.00978) as AutoAWQ stores it, in version ``gemm``.

``qweight`` int32 ``[in, out / 8]`` has the codes of eight consecutive outputs in a word, in the order ``ORDER`` from
the lowest bits on. ``qzeros`` int32 ``[groups, out / 8]`` has the zero points in the same way. ``scales`` ``[groups,
out]`` may be negative (AutoRound writes such ones).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    packed,
    read_size,
    unpack_words,
)
from megatron_ee.model.packed import PackedMatrix

BITS, IN_WORD = 4, 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Outputs in a word, from the lowest bits on."""
_PLACES = [ORDER.index(output) for output in range(IN_WORD)]


def awq_format(group: int | None) -> Format:
    """The format of a weight; ``group``: input features per scale, None for all."""

    def parts(weight: Shape) -> dict[str, PartSpec]:
        groups, outputs = Axis(COLUMNS, group or weight[COLUMNS]), Axis(ROWS, IN_WORD)
        return {
            "qweight": PartSpec((torch.int32,), (Axis(COLUMNS), outputs)),
            "qzeros": PartSpec((torch.int32,), (groups, outputs)),
            "scales": PartSpec(FLOATING, (groups, Axis(ROWS)), allowed="nonzero"),
        }

    def pack(reader: Reader) -> PackedMatrix:
        first = reader.offset[ROWS] % IN_WORD
        codes, zeros = (unpack_outputs(reader[name]).t()[first : first + reader.rows] for name in ("qweight", "qzeros"))
        return packed(codes, BITS, reader["scales"].t(), zeros, reader.grid(1, group or reader.weight[COLUMNS]))

    return Format(f"awq {BITS} bits, groups of {group or 'all'}", parts, pack)


def unpack_outputs(words: Tensor) -> Tensor:
    """int32 ``[rows, words]`` -> codes, uint8 ``[rows, 8 words]``, in the order of the outputs."""
    return unpack_words(words, BITS).unflatten(-1, (-1, IN_WORD))[..., _PLACES].flatten(-2)


def read_formats(config: Mapping[str, Any], where: str) -> tuple[Format, ...]:
    """See ``Method``."""
    version = config.get("version") or config.get("format") or "gemm"
    if config.get("backend") == "llm-awq":  # of its authors, whose layout is another one
        version = "llm-awq"
    version = version.lower() if isinstance(version, str) else version
    check_one_of(version, "quantization_config.version", ("gemm",), where)
    bits = config.get("bits", config.get("w_bit", BITS))
    check_one_of(bits, "quantization_config.bits", (BITS,), where)
    group = config.get("group_size", config.get("q_group_size", 128))
    return (awq_format(read_size(group, "quantization_config.group_size", where, none=0) or None),)


AWQ = Method("awq", read_formats, marks=("qweight",), zero_bias=True)
