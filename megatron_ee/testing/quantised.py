"""Tiny quantised models, written as the tools for each method write them, with the values they stand for.

GPTQ and AWQ follow the loops of AutoGPTQ's and AutoAWQ's ``pack``, FP8 DeepSeek-V3's; compressed-tensors uses its own
library.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_ee.testing.models import tiny_model

Quantised = tuple[dict[str, Tensor], Tensor]
"""The tensors of a weight, by the end of their names, and the values that they stand for."""


@dataclass(frozen=True)
class Recipe:
    """A way to quantise a model.

    Attributes:
        config: ``quantization_config``.
        quantise: quantises a weight ``[out, in]``.
    """

    config: dict[str, Any]
    quantise: Callable[[Tensor], Quantised]


def save_quantised_model(family: str, directory: Path, recipe: Recipe, *, head: bool = False, **changes: Any) -> Any:
    """Save a ``tiny_model`` with quantised linears, and return the model with the values that they stand for.

    Args:
        family: as for ``tiny_model``.
        directory: to write.
        recipe: how to quantise.
        head: also quantise the LM head.
        changes: as for ``tiny_model``.
    """
    model = tiny_model(family, **changes)
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if not name.endswith("_proj.weight") and not (head and name == "lm_head.weight"):
            tensors[name] = value.clone()
            continue
        parts, values = recipe.quantise(value)
        tensors |= {name.removesuffix("weight") + end: part.clone().contiguous() for end, part in parts.items()}
        value.copy_(values)
    model.config.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": [type(model).__name__], "quantization_config": recipe.config, "dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return model


def round_to_codes(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric round-to-nearest: int32 codes ``[out, in]``, fp16 scales and int32 zero points ``[out, groups]``."""
    parts = weight.unflatten(1, (-1, group)).float()
    low, high = parts.amin(-1), parts.amax(-1)
    scale = ((high - low) / (2**bits - 1)).half()
    zero = (-low / scale.float()).round().clamp(0, 2**bits - 1).int()
    codes = (parts / scale.float()[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
    return codes.flatten(1).int(), scale, zero


def gptq(bits: int = 4, group: int = 16, *, act_order: bool = False, version: int = 1) -> Recipe:
    """GPTQ: ``act_order`` draws groups of scattered input features."""

    def quantise(weight: Tensor) -> Quantised:
        out_features, in_features = weight.shape
        g_idx = torch.arange(in_features, dtype=torch.int32) // group
        if act_order:
            g_idx = g_idx[torch.randperm(in_features, generator=torch.Generator().manual_seed(in_features))]
        place = torch.argsort(g_idx, stable=True)
        sorted_codes, scale, zero = round_to_codes(weight[:, place], bits, group)
        codes = torch.empty_like(sorted_codes)
        codes[:, place] = sorted_codes
        wide = g_idx.long()
        values = ((codes - zero[:, wide]).half() * scale[:, wide]).float()
        in_word, stored_zero = 32 // bits, zero.t()
        qweight = torch.zeros(in_features // in_word, out_features, dtype=torch.int64)
        for row in range(len(qweight)):
            for place_in_word in range(in_word):
                qweight[row] |= codes[:, row * in_word + place_in_word].long() << (bits * place_in_word)
        qzeros = torch.zeros(len(stored_zero), -(-out_features // in_word), dtype=torch.int64)
        for column in range(out_features):
            qzeros[:, column // in_word] |= stored_zero[:, column].long() << (bits * (column % in_word))
        if version == 1:
            qzeros = (qzeros - sum(1 << (bits * place) for place in range(in_word))) % 2**32
        parts = {"qweight": _as_words(qweight), "qzeros": _as_words(qzeros), "scales": scale.t(), "g_idx": g_idx}
        return parts, values

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": False}
    return Recipe({**config, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}, quantise)


def awq(group: int = 16) -> Recipe:
    """AWQ in version ``gemm``."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def pack(values: Tensor) -> Tensor:
        words = torch.zeros(len(values), values.shape[1] // 8, dtype=torch.int64)
        for column in range(words.shape[1]):
            for place in range(8):
                words[:, column] |= values[:, column * 8 + order[place]].long() << (4 * place)
        return _as_words(words)

    def quantise(weight: Tensor) -> Quantised:
        codes, scale, zero = round_to_codes(weight, 4, group)
        values = (codes - zero.repeat_interleave(group, 1)).half() * scale.repeat_interleave(group, 1)
        parts = {"qweight": pack(codes.t()), "qzeros": pack(zero.t()), "scales": scale.t()}
        return parts, values.float()

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Recipe(config, quantise)


def fp8(block: tuple[int, int] | None = (32, 32)) -> Recipe:
    """FP8 in blocks, or with one scale."""

    def quantise(weight: Tensor) -> Quantised:
        rows, columns = block or weight.shape
        scale = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
        codes, values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(weight.shape)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                scale[i, j] = weight[part].abs().max() / 448
                codes[part] = (weight[part] / scale[i, j]).to(torch.float8_e4m3fn)
                values[part] = codes[part].float() * scale[i, j]
        return {"weight": codes, "weight_scale_inv": scale if block else scale.view(())}, values

    size = list(block) if block else None
    return Recipe({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": size}, quantise)


def compressed_tensors(
    stored: str, dtype: torch.dtype = torch.float32, *, act_order: bool = False, **weights: Any
) -> Recipe:
    """compressed-tensors, through its library.

    Args:
        stored: the format, such as ``pack-quantized``.
        dtype: of the scales.
        act_order: groups of scattered input features, which releases had until the library's version 0.19.
        weights: arguments of ``QuantizationArgs``.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=stored)
    compressor = BaseCompressor.get_value_from_registry(stored)

    def quantise(weight: Tensor) -> Quantised:
        given: dict[str, Tensor] = {"weight": weight.to(dtype)}
        low, high = _extremes(given["weight"], args)
        given["weight_scale"], given["weight_zero_point"] = calculate_qparams(low, high, args)
        parts = compressor.compress(given, scheme)
        values: Tensor = compressor.decompress(dict(parts), scheme)["weight"]
        return {name: part for name, part in parts.items() if part is not None}, values.float()

    def quantise_scattered(weight: Tensor) -> Quantised:
        features = weight.shape[1]
        place = torch.randperm(features, generator=torch.Generator().manual_seed(features))
        parts, values = quantise(weight[:, place])
        back = torch.argsort(place)
        codes = unpack_from_int32(parts["weight_packed"], args.num_bits, weight.shape)[:, back]
        parts["weight_packed"] = pack_to_int32(codes.contiguous(), args.num_bits)
        parts["weight_g_idx"] = (back // args.group_size).int()
        return parts, values[:, back]

    group = json.loads(scheme.model_dump_json())
    group["weights"]["actorder"] = "group" if act_order else None
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": stored,
        "quantization_status": "compressed",
    }
    config |= {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    return Recipe(config, quantise_scattered if act_order else quantise)


def _extremes(weight: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each block of a weight that shares a scale."""
    if args.strategy == "tensor":
        return weight.amin().view(1), weight.amax().view(1)
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if args.strategy == "block":
        rows, columns = args.block_structure
        parts = weight.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
        return parts.amin((1, 3)), parts.amax((1, 3))
    parts = weight.unflatten(1, (-1, args.group_size))
    return parts.amin(-1), parts.amax(-1)


def _as_words(words: Tensor) -> Tensor:
    """Unsigned 32-bit words in int64 as int32."""
    return torch.where(words >= 2**31, words - 2**32, words).int()
