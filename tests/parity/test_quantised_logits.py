"""Logits of quantised releases equal those of the reference libraries' dequantised models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ee.exits.stage import Stage
from megatron_ee.testing import quantised as recipes
from megatron_ee.testing.quantised import Recipe, save_quantised_model

TOLERANCE = 1e-4
TOKENS = torch.randint(0, 131, (2, 48), generator=torch.Generator().manual_seed(7))
LIBRARY: dict[str, Callable[[], Recipe]] = {
    "ct-int4": lambda: recipes.compressed_tensors(
        "pack-quantized", num_bits=4, strategy="group", group_size=16, symmetric=False
    ),
    "ct-int8": lambda: recipes.compressed_tensors("int-quantized", num_bits=8, strategy="channel"),
    "ct-fp8": lambda: recipes.compressed_tensors("float-quantized", num_bits=8, type="float", strategy="channel"),
    "fp8-blocks": lambda: recipes.fp8((16, 16)),
}
"""Which transformers itself dequantises on a CPU."""
LoadStage = Callable[..., Stage]


@torch.no_grad()
def our_logits(stage: Stage) -> Tensor:
    h, _ = stage.run_layers(stage.backbone.embed(TOKENS), stage.backbone.positions(TOKENS.shape[1]), to_end=True)
    return stage.final_logits(stage.final_features(h)).transpose(0, 1)


@torch.no_grad()
def assert_equal_logits(stage: Stage, reference: Any) -> None:
    theirs = reference(TOKENS, use_cache=False).logits.float()
    assert float(theirs.abs().max()) > 0.5, "the reference says nothing"
    assert float((our_logits(stage) - theirs).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("name", LIBRARY)
def test_models_that_transformers_dequantises(name: str, tmp_path: Path, load_stage: LoadStage) -> None:
    import transformers
    from transformers.utils.quantization_config import CompressedTensorsConfig, FineGrainedFP8Config

    save_quantised_model("llama3.1", tmp_path, LIBRARY[name]())
    kind = FineGrainedFP8Config if name.startswith("fp8") else CompressedTensorsConfig
    reference = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=kind(dequantize=True), attn_implementation="eager"
    )
    assert_equal_logits(load_stage(tmp_path), reference.eval())


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gemma3", "llama3.2-tied"])
@pytest.mark.parametrize("recipe", [lambda: recipes.gptq(act_order=True), lambda: recipes.awq()], ids=["gptq", "awq"])
def test_published_layouts_in_several_families(
    recipe: Callable[[], Recipe], family: str, tmp_path: Path, load_stage: LoadStage
) -> None:
    reference = save_quantised_model(family, tmp_path, recipe())
    assert_equal_logits(load_stage(tmp_path), reference)
