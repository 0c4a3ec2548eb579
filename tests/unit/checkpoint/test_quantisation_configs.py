"""``quantization_config`` as the tools of each method write it: what is read of it, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_ee.checkpoint.quantised.registry import METHODS, find_quantisation
from megatron_ee.errors import CheckpointError

WEIGHT = (256, 512)  # [out, in]
INT4 = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "group_size": 128,
    "strategy": "group",
    "block_structure": None,
    "dynamic": False,
    "actorder": None,
    "observer": "minmax",
    "observer_kwargs": {},
}
INT8 = INT4 | {"num_bits": 8, "strategy": "channel", "group_size": None}
FP8 = INT8 | {"type": "float"}
NVFP4 = INT4 | {"type": "float", "strategy": "tensor_group", "group_size": 16}
DYNAMIC = INT8 | {"strategy": "token", "dynamic": True, "observer": None}


def scheme(weights: dict[str, Any] | None, **others: Any) -> dict[str, Any]:
    return {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None, **others}


def compressed(stored: str, *groups: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": ["lm_head", "re:.*vision.*"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.12.2",
        **others,
    }


def gptq(**changes: Any) -> dict[str, Any]:
    """As transformers and AutoGPTQ write it."""
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "damp_percent": 0.01,
        "desc_act": False,
        "sym": True,
        "true_sequential": True,
        "modules_in_block_to_quantize": None,
        "exllama_config": {"version": 1},
        **changes,
    }


def awq(**changes: Any) -> dict[str, Any]:
    settings = {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}
    return {"quant_method": "awq", **settings, **changes}


def fp8(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", **changes}


INT4_TENSORS = {"weight_packed", "weight_scale", "weight_zero_point"}
BYTES = {"weight", "weight_scale", "weight_zero_point"}
FLOATS = {"weight", "weight_scale"}
WORDS = {"qweight", "qzeros", "scales"}
READ: dict[str, tuple[dict[str, Any], list[tuple[set[str], tuple[int, ...]]]]] = {
    # the tensors of each format, and the shape of its scales
    "w4a16": (compressed("pack-quantized", scheme(INT4)), [(INT4_TENSORS, (256, 4))]),
    "w4a16, saved without what is null": (
        compressed("pack-quantized", {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 128}}),
        [(INT4_TENSORS, (256, 4))],
    ),
    "w4a16, actorder weight": (
        compressed("pack-quantized", scheme(INT4 | {"actorder": "weight"})),
        [(INT4_TENSORS, (256, 4))],
    ),
    "w4a16, actorder static": (
        compressed("pack-quantized", scheme(INT4 | {"actorder": "static"})),
        [(INT4_TENSORS, (256, 4))],
    ),
    "w4a16, actorder group": (
        compressed("pack-quantized", scheme(INT4 | {"actorder": "group"})),
        [(INT4_TENSORS | {"weight_g_idx"}, (256, 4))],
    ),
    "w8a16": (compressed("pack-quantized", scheme(INT8)), [(INT4_TENSORS, (256, 1))]),
    "w8a8": (compressed("int-quantized", scheme(INT8, input_activations=DYNAMIC)), [(BYTES, (256, 1))]),
    "w4a8": (compressed("int-quantized", scheme(INT4, input_activations=DYNAMIC)), [(BYTES, (256, 4))]),
    "fp8-dynamic": (compressed("float-quantized", scheme(FP8, input_activations=DYNAMIC)), [(FLOATS, (256, 1))]),
    "fp8, naive": (compressed("naive-quantized", scheme(FP8 | {"strategy": "tensor"})), [(FLOATS, ())]),
    "fp8 in blocks": (
        compressed("float-quantized", scheme(FP8 | {"strategy": "block", "block_structure": [128, 128]})),
        [(FLOATS, (2, 4))],
    ),
    "fp8 in blocks, as a text": (
        compressed("float-quantized", scheme(FP8 | {"strategy": "block", "block_structure": "128x128"})),
        [(FLOATS, (2, 4))],
    ),
    "two groups of modules": (
        compressed(
            "mixed-precision",
            scheme(INT4, format="pack-quantized"),
            scheme(FP8, format="float-quantized", targets=["re:.*down_proj$"], input_activations=DYNAMIC),
        ),
        [(INT4_TENSORS, (256, 4)), (FLOATS, (256, 1))],
    ),
    "only the cache": (compressed("dense", kv_cache_scheme=FP8 | {"strategy": "tensor"}), []),
    "only zeros": ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}}, []),
    "gptq": (gptq(), [(WORDS | {"g_idx"}, (4, 256))]),
    "gptq, one group": (gptq(group_size=-1, desc_act=True, sym=False), [(WORDS | {"g_idx"}, (1, 256))]),
    "gptq of GPTQModel": (
        gptq(
            checkpoint_format="gptq_v2",
            format="gptq_v2",
            method="gptq",
            pack_dtype="int32",
            lm_head=True,
            meta={"quantizer": ["gptqmodel:2.1.0"], "static_groups": False},
            dynamic={"-:.*k_proj": {}, "+:.*down_proj": {"bits": 8, "group_size": 32}},
        ),
        [(WORDS | {"g_idx"}, (4, 256)), (WORDS | {"g_idx"}, (16, 256))],
    ),
    "gptq of AutoRound": (
        gptq(autoround_version="0.4.5", iters=200, block_name_to_quantize="model.layers", checkpoint_format=None),
        [(WORDS | {"g_idx"}, (4, 256))],
    ),
    "awq": (awq(), [(WORDS, (4, 256))]),
    "awq of AutoAWQ": (awq(version="GEMM", backend="autoawq", do_fuse=False), [(WORDS, (4, 256))]),
    "awq of GPTQModel": (awq(version=None, format="gemm", checkpoint_format="gemm"), [(WORDS, (4, 256))]),
    "fp8 of Qwen3": (
        fp8(fmt="e4m3", weight_block_size=[128, 128], modules_to_not_convert=["lm_head"]),
        [({"weight", "weight_scale_inv"}, (2, 4)), (FLOATS, (2, 4))],
    ),
    "fp8 of AutoFP8": (
        fp8(activation_scheme="static", ignored_layers=["lm_head"], kv_cache_scheme="static"),
        [({"weight", "weight_scale_inv"}, ()), (FLOATS, ())],
    ),
}
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nvfp4": (compressed("nvfp4-pack-quantized", scheme(NVFP4)), ["'nvfp4-pack-quantized'", "pack-quantized"]),
    "one group of nvfp4": (
        compressed(
            "mixed-precision", scheme(INT4, format="pack-quantized"), scheme(NVFP4, format="nvfp4-pack-quantized")
        ),
        ["group_1", "'nvfp4-pack-quantized'"],
    ),
    "2 of 4": (compressed("marlin-24", scheme(INT4)), ["'marlin-24'"]),
    "not compressed": (compressed("dense", scheme(INT4)), ["format 'dense'"]),
    "rotated": (
        compressed("pack-quantized", scheme(INT4), transform_config={"config_groups": {"u": {}}}),
        ["transform_config"],
    ),
    "3 bits": (compressed("pack-quantized", scheme(INT4 | {"num_bits": 3})), ["num_bits", "3", "4, 8"]),
    "a wrong block": (
        compressed("float-quantized", scheme(FP8 | {"strategy": "block", "block_structure": "128"})),
        ["block_structure", "'128'"],
    ),
    "gptq for marlin": (gptq(is_marlin_format=True), ["checkpoint_format 'marlin'", "gptq_v2"]),
    "gptq, rotated": (gptq(rotation="hadamard"), ["rotation 'hadamard'"]),
    "awq of its authors": (awq(backend="llm-awq"), ["version 'llm-awq'", "gemm"]),
    "awq, gemv": (awq(version="gemv_fast"), ["version 'gemv_fast'", "gemm"]),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, ["'modelopt'", *METHODS]),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, ["'fbgemm_fp8'", *METHODS]),
    "auto-round": ({"quant_method": "auto-round", "bits": 4}, ["'auto-round'", *METHODS]),
    "mxfp4": ({"quant_method": "mxfp4"}, ["'mxfp4'", *METHODS]),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_read(name: str) -> None:
    settings, expected = READ[name]
    found = find_quantisation({"quantization_config": settings}, "config.json")
    assert found is not None
    formats = []
    for each in found.formats:
        parts = each.parts(WEIGHT)
        (scales,) = [part for part in parts.values() if part.allowed != "any"]
        formats.append((set(parts), scales.shape(WEIGHT)))
    assert formats == expected
    wider = any(word in name for word in ("a8", "fp8-dynamic", "two groups", "cache", "fp8 of"))
    assert found.activations == wider


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    settings, words = REFUSED[name]
    with pytest.raises(CheckpointError) as caught:
        find_quantisation({"quantization_config": settings}, "config.json")
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in ["config.json", *words]), text
