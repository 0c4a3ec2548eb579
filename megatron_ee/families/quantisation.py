"""The size of a quantised model's weights in memory, from ``config.json`` alone, for plans.

Which formats can be read, and their values, is a matter of ``checkpoint.quantised``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

QUANTISED = ("quantization_config", "compression_config")
"""Keys of a quantised model; the second is of the first releases of compressed-tensors."""
SCALE_BITS = 16
"""Of a scale, and of a zero point, which has the scale's dtype."""
LARGEST = 2**20
"""Bound of sizes of groups and blocks, far above any."""
GROUPS = (128, 64, 32)
"""Sizes of groups for rounding to 4 bits. The largest that divides the input features is used."""


def packed_bits(config: Mapping[str, Any]) -> float:
    """Bits of a weight of a layer's matrices, with its share of scales and zero points; 0 if they are not quantised.

    Modules with settings of their own are not told apart. Unknown settings count as 0.
    """
    settings: Mapping[str, Any] = next((config[key] for key in QUANTISED if isinstance(config.get(key), dict)), {})
    groups = settings.get("config_groups")
    method = settings.get("quant_method", "compressed-tensors" if groups else None)
    if method in ("gptq", "awq"):
        bits = _number(settings.get("bits", settings.get("w_bit", 4)))
        group = settings.get("group_size", settings.get("q_group_size", 128))
        return _with_scales(bits, group, zero_points=True)
    if method == "fp8":
        return 8.0
    if method == "compressed-tensors" and isinstance(groups, dict):
        for group in groups.values():
            weights = group.get("weights") if isinstance(group, dict) else None
            if isinstance(weights, dict):
                bits = _number(weights.get("num_bits", 8))
                if bits and (group.get("format") or settings.get("format")) != "pack-quantized":
                    bits = max(bits, 8.0)  # other formats have a byte per element
                symmetric = weights.get("symmetric", True) is True
                return _with_scales(bits, weights.get("group_size"), zero_points=not symmetric)
    return 0.0


def rounded_bits(kind: str, features: int) -> float:
    """The same for a plain model that is rounded to ``int8`` or ``int4`` as it is loaded.

    ``features``: input features of a matrix; matrices with others may have other groups.
    """
    if kind == "int8":
        return 8.0
    return _with_scales(4.0, next((size for size in GROUPS if features % size == 0), GROUPS[-1]), zero_points=False)


def fits_groups(features: int) -> bool:
    """Whether ``int4`` has a size of groups for a matrix with so many input features."""
    return any(features % size == 0 for size in GROUPS)


def _with_scales(bits: float, group: object, *, zero_points: bool) -> float:
    size = _number(group)
    return bits + (SCALE_BITS * (1 + zero_points) / size if size > 0 and bits else 0.0)


def _number(value: object) -> float:
    known = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST
    return float(value) if known else 0.0  # type: ignore[arg-type]
