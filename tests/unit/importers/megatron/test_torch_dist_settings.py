"""What Megatron's checkpoints say of their model: taken from them where it is all, never guessed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch_dist_helpers import Exported, Model, assert_equal

from megatron_ee.config.architecture import Architecture
from megatron_ee.conversion.formats import open_contents
from megatron_ee.errors import CheckpointError
from megatron_ee.families.registry import parse_architecture, read_architecture
from megatron_ee.importers.megatron.export import to_torch_dist
from megatron_ee.importers.megatron.legacy_args import Args, derive_config, differing_settings
from megatron_ee.importers.megatron.settings import check_expressible, to_args
from megatron_ee.importers.megatron.torch_dist import open_torch_dist
from megatron_ee.testing.models import FAMILIES as TINY
from megatron_ee.testing.models import LLAMA3_ROPE, SHAPE

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


def changed(family: str, **changes: Any) -> Architecture:
    """Architecture of a tiny model's configuration, changed."""
    prefix, differences = TINY[family]
    config = {**SHAPE, **differences, **changes, "architectures": [f"{prefix}ForCausalLM"]}
    if "rope_parameters" not in changes:
        config.pop("rope_parameters", None)
    return parse_architecture(config)


LLAMA3 = {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}
NOT_WRITTEN = {
    "gemma2": "logit_soft_cap",
    "gemma3": "local_rope",
    "granite": "logit_multiplier",
    "ministral3": "rope type yarn",
    "olmo2": "qk_norm_whole",
    "olmo3": "qk_norm_whole",
    "phi3": "tensors of other names",
    "phi4-mini": "tensors of other names",
    "smollm3": "rotated",
}
"""Families that are refused, and what the error says that they have."""
EXPRESSED: list[tuple[str, dict[str, Any]]] = [
    *(
        (family, {"tie_word_embeddings": tied})
        for family in sorted(set(TINY) - set(NOT_WRITTEN))
        for tied in (False, True)
    ),
    ("llama3.1", {"rope_scaling": LLAMA3}),
    ("llama2", {"rope_scaling": {"type": "linear", "factor": 3.3}, "max_position_embeddings": 10}),
    ("mistral", {"rope_scaling": {"type": "linear", "factor": 1.5}, "max_position_embeddings": 67}),
    ("qwen2", {"rope_theta": 10_000.5, "head_dim": 20}),
    *((family, {"head_dim": 40}) for family in ("llama2", "mistral", "qwen3")),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    *(
        (family, {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2})
        for family in ("qwen2", "qwen3")
    ),
]


@pytest.mark.parametrize(("family", "changes"), EXPRESSED, ids=str)
def test_megatrons_arguments_say_all_of_a_model(family: str, changes: dict[str, Any]) -> None:
    arch = changed(family, **changes)
    check_expressible(arch, "model")
    assert differing_settings(Args("args", to_args(arch, 256)), arch, "config.json") == ()
    read = parse_architecture(derive_config(Args("args", to_args(arch, 256)), torch.float32))
    # Without a window Mistral is Llama under another name.
    assert dataclasses.replace(read, family=arch.family) == arch


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama2", {"attention_bias": True}, "attention_bias"),
        ("llama2", {"mlp_bias": True}, "mlp_bias"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("llama3.1", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}}, "original_max_position"),
        ("llama3.1", {"rope_scaling": {**LLAMA3, "high_freq_factor": 8.0}}, "high_freq_factor 8"),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "models have rope type yarn, which Megatron"),
        *((family, {}, f"models have {what}, which Megatron's") for family, what in NOT_WRITTEN.items()),
    ],
)
def test_what_megatron_cannot_express_is_not_written(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        check_expressible(changed(family, **changes), "model")
    assert str(caught.value).startswith("model: ")


def test_an_export_is_checked_before_anything_is_written(saved_model: Callable[..., Model]) -> None:
    path, _ = saved_model("llama2", attention_bias=True)
    with pytest.raises(CheckpointError, match="attention_bias without mlp_bias, which Megatron cannot express"):
        to_torch_dist(open_contents(path))


def test_windows_of_some_layers_without_norms_or_biases_are_of_no_family() -> None:
    args = to_args(changed("mistral"), 256) | {"window_attn_skip_freq": [1, 0, 1, 0]}
    with pytest.raises(CheckpointError, match="no supported family has this combination of add_bias_linear"):
        derive_config(Args("args", args), torch.float32)


def test_settings_that_a_given_configuration_has_otherwise_are_told(
    saved_model: Callable[..., Model], copied: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(saved_model("llama2", num_key_value_heads=2)[0], tmp_path / "config"))
    assert open_torch_dist(copied, trust=True, config=path).notes == ()
    config = json.loads((path / "config.json").read_text())
    config |= {"rms_norm_eps": 1e-3, "rope_parameters": {**LLAMA3, "rope_theta": 70.0}}
    (path / "config.json").write_text(json.dumps(config))
    found = open_torch_dist(copied, trust=True, config=path)
    assert found.architecture == read_architecture(path)
    assert [note.removeprefix(f"{copied / 'common.pt'}: ").split(" ")[0] for note in found.notes] == [
        "norm_epsilon",
        "rotary_base",
        "use_rope_scaling",
    ]
    assert f"is 1e-05, but 0.001 by {path / 'config.json'}, which is used" in found.notes[0]
    windows = changed("mistral")
    args = to_args(windows, 256) | {"window_size": [7, 0], "rotary_seq_len_interpolation_factor": 2.0}
    args["layernorm_epsilon"] = 1e-3  # what older releases call it
    lines = differing_settings(Args("args", args), windows, "config.json")
    names = ["layernorm_epsilon", "rotary_seq_len_interpolation_factor", "window_size"]
    assert [line.split(" ")[1] for line in lines] == names


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), float("inf")])
def test_factors_that_stretch_nothing(factor: float) -> None:
    args = to_args(changed("llama2"), 256) | {"rotary_seq_len_interpolation_factor": factor}
    with pytest.raises(CheckpointError, match="rotary_seq_len_interpolation_factor"):
        derive_config(Args("args", args), torch.float32)
