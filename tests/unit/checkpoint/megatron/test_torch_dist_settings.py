"""What Megatron's checkpoints say of their model: taken from them where it is all, never guessed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch_dist_helpers import FAMILIES, Exported, Model, assert_equal

from megatron_ee.checkpoint.megatron.legacy_args import Args, derive_config
from megatron_ee.checkpoint.megatron.settings import to_args
from megatron_ee.checkpoint.megatron.torch_dist import open_torch_dist
from megatron_ee.config.architecture import parse_architecture, read_architecture
from megatron_ee.errors import CheckpointError
from megatron_ee.testing.models import LLAMA3_ROPE

BRIDGE = {
    "_target_": "megatron.bridge.models.llama.llama_provider.Llama31ModelProvider",
    "activation_func": {"_call_": False, "_target_": "torch.nn.functional.silu"},
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "gated_linear_unit": True,
    "layernorm_zero_centered_gamma": False,
    "multi_latent_attention": False,
    "mtp_num_layers": None,
    "normalization": "RMSNorm",
    "num_moe_experts": None,
    "position_embedding_type": "rope",
    "qk_layernorm": False,
    "rope_scaling": False,
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "seq_len_interpolation_factor": None,
    "window_size": None,
}


def bridge_config(path: Path) -> dict[str, Any]:
    arch = read_architecture(path)
    return {
        "model": {
            **BRIDGE,
            "num_layers": arch.num_layers,
            "hidden_size": arch.hidden_size,
            "ffn_hidden_size": arch.ffn_size,
            "num_attention_heads": arch.num_heads,
            "num_query_groups": arch.num_kv_heads,
            "kv_channels": arch.head_dim,
            "layernorm_epsilon": arch.norm_eps,
            "rotary_base": arch.rope.theta,
            "seq_length": arch.max_positions,
            "share_embeddings_and_output_weights": arch.tied,
            "vocab_size": arch.vocab_size,
        }
    }


def test_bridge_says_what_its_model_is(copied: Path, exported: Exported) -> None:
    path, _, _ = exported("llama2")
    (copied / "huggingface").rename(copied / "elsewhere")
    (copied / "common.pt").unlink()
    (copied / "tokenizer").mkdir()
    (copied / "tokenizer" / "tokenizer.json").write_text("{}")
    (copied / "run_config.yaml").write_text(yaml.safe_dump(bridge_config(path)))
    found = open_torch_dist(copied, trust=True, config=None)
    assert_equal(found, path)
    assert found.assets["tokenizer.json"] == copied / "tokenizer" / "tokenizer.json"
    text = found.assets["config.json"]
    assert isinstance(text, bytes) and json.loads(text)["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"normalization": "LayerNorm"}, "normalization"),
        ({"activation_func": {"_target_": "torch.nn.functional.gelu"}}, "swiglu"),
        ({"num_moe_experts": 8}, "num_experts"),
        ({"old_context_len": 32, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, "rope scaling"),
    ],
)
def test_what_is_not_said_or_not_supported_is_not_guessed(
    change: dict[str, Any], message: str, copied: Path, exported: Exported
) -> None:
    (copied / "huggingface").rename(copied / "elsewhere")
    config = bridge_config(exported("llama2")[0])
    config["model"] |= change
    (copied / "run_config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_torch_dist(copied, trust=True, config=None)
    assert "\n" not in str(caught.value)


def test_llama3_scaling_is_read_in_both_spellings(copied: Path, exported: Exported) -> None:
    (copied / "huggingface").rename(copied / "elsewhere")
    frequencies = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192, "scale_factor": 32.0}
    for change in ({"rope_scaling": True, "rope_scaling_factor": 32.0}, frequencies):
        config = bridge_config(exported("llama2")[0])
        config["model"] |= change
        (copied / "run_config.yaml").write_text(yaml.safe_dump(config))
        found = open_torch_dist(copied, trust=True, config=None).architecture
        assert found is not None
        rope = found.rope
        assert (rope.kind, rope.factor, rope.low_freq_factor, rope.high_freq_factor) == ("llama3", 32.0, 1.0, 4.0)
        assert rope.original_positions == 8192


def test_without_any_description_a_configuration_is_asked_for(copied: Path) -> None:
    (copied / "huggingface").rename(copied / "elsewhere")
    (copied / "common.pt").unlink()
    with pytest.raises(CheckpointError, match="--config DIR"):
        open_torch_dist(copied, trust=True, config=None)


def test_a_configuration_of_another_model_is_refused(copied: Path, saved_model: Callable[..., Model]) -> None:
    other, _ = saved_model("llama2", num_attention_heads=8, head_dim=8, num_key_value_heads=4)
    # Heads of half the size, and twice as many, make every tensor as large as before.
    with pytest.raises(CheckpointError, match="num_attention_heads is 4"):
        open_torch_dist(copied, trust=True, config=other)
    (copied / "common.pt").unlink()
    wider, _ = saved_model("llama2", intermediate_size=96, num_key_value_heads=2)
    with pytest.raises(CheckpointError, match=r"linear_fc1.weight' has shape \[4, 224, 64\].*\[4, 192, 64\]"):
        open_torch_dist(copied, trust=True, config=wider)


@pytest.mark.parametrize("family", sorted(FAMILIES | {"mistral": {}, "qwen2-window": {}, "llama3.1": {}}))
def test_megatrons_arguments_say_all_of_a_model(family: str, saved_model: Callable[..., Model]) -> None:
    llama3 = {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}
    changes = {"rope_parameters": llama3} if family == "llama3.1" else FAMILIES.get(family, {})
    arch = read_architecture(saved_model(family, **changes)[0])
    config = derive_config(Args("args", to_args(arch, 256)), torch.float32)
    assert parse_architecture(config) == arch
