"""Shapes read from ``config.json``: what transformers writes and assumes, released files, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.config.architecture import Architecture, Rope, changed_settings, output_settings, outputs_digest
from megatron_ee.errors import CheckpointError
from megatron_ee.families.registry import FAMILIES, parse_architecture, read_architecture

LLAMA2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
LLAMA31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN25_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        parse_architecture(config, "here/config.json")
    text = str(caught.value)
    assert text.startswith("here/config.json: ") and "\n" not in text
    return text


def test_released_files() -> None:
    llama2 = parse_architecture(LLAMA2_7B)
    assert llama2 == Architecture(
        family="llama",
        num_layers=32,
        hidden_size=4096,
        ffn_size=11008,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        vocab_size=32000,
        max_positions=4096,
        norm_eps=1e-5,
        rope=Rope(),
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tied=False,
        windows=(None,) * 32,
    )
    llama31 = parse_architecture(LLAMA31_8B)
    assert llama31.rope == Rope(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    assert (llama31.num_kv_heads, llama31.max_positions) == (8, 131072)
    mistral = parse_architecture(MISTRAL_7B)
    assert mistral.family == "mistral" and mistral.windows == (4096,) * 32
    assert parse_architecture({**MISTRAL_7B, "sliding_window": None}).windows == (None,) * 32
    qwen2 = parse_architecture(QWEN25_7B)
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm, qwen2.head_dim) == (True, False, False, 128)
    assert qwen2.windows == (None,) * 28 and qwen2.rope.theta == 1e6
    qwen3 = parse_architecture(QWEN3_06B)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim, qwen3.tied) == (False, True, 128, True)


def test_windows_of_qwen() -> None:
    on = {**QWEN25_7B, "use_sliding_window": True, "sliding_window": 1024, "num_hidden_layers": 30}
    assert parse_architecture(on).windows == (None,) * 28 + (1024,) * 2
    assert parse_architecture({**on, "max_window_layers": 29}).windows == (None,) * 29 + (1024,)
    kinds = ["sliding_attention", "full_attention"] * 15
    assert parse_architecture({**on, "layer_types": kinds}).windows == (1024, None) * 15
    assert parse_architecture({**on, "use_sliding_window": False, "layer_types": None}).windows == (None,) * 30


def test_both_spellings_of_rope() -> None:
    older = {"rope_theta": 5e5, "rope_scaling": LLAMA31_8B["rope_scaling"]}
    newer = {"rope_parameters": {**LLAMA31_8B["rope_scaling"], "rope_theta": 5e5}}  # type: ignore[dict-item]
    assert parse_architecture({**LLAMA2_7B, **older}).rope == parse_architecture({**LLAMA2_7B, **newer}).rope
    plain = [{"rope_theta": 3e4}, {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}}]
    assert [parse_architecture({**LLAMA2_7B, **spelling}).rope for spelling in plain] == [Rope(3e4)] * 2
    linear = {"rope_scaling": {"type": "linear", "factor": 2}}
    assert parse_architecture({**LLAMA2_7B, **linear}).rope == Rope(kind="linear", factor=2.0)


def _thetas(parameters: dict[str, Any]) -> list[float]:
    """Of one rope, or of one for each type of layers."""
    return (
        [parameters["rope_theta"]]
        if "rope_theta" in parameters
        else [each["rope_theta"] for each in parameters.values()]
    )


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_left_out_keys_mean_what_transformers_takes_them_for(name: str, window: bool, tmp_path: Path) -> None:
    import transformers

    config = {
        "architectures": [FAMILIES[name].architecture],
        "hidden_size": 512,
        "intermediate_size": 96,
        "vocab_size": 131,
    }
    config |= {"num_hidden_layers": 30, "num_attention_heads": 32, "use_sliding_window": window}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": name}))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    ours = read_architecture(tmp_path)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 512 // 32)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tied == theirs.tie_word_embeddings
    assert {ours.rope.theta, (ours.local_rope or ours.rope).theta} == set(_thetas(theirs.rope_parameters))
    assert ours.max_positions == theirs.max_position_embeddings
    size = getattr(theirs, "sliding_window", None)
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 30
    assert ours.windows == tuple(size if kind == "sliding_attention" else None for kind in types)


@pytest.mark.parametrize(
    "name, key",
    [
        ("llama", "num_key_value_heads"),
        ("llama", "head_dim"),
        ("mistral", "head_dim"),
        ("mistral", "sliding_window"),
        ("qwen2", "num_key_value_heads"),
        ("qwen3", "num_key_value_heads"),
        ("qwen3", "sliding_window"),
    ],
)
def test_a_null_means_what_transformers_takes_it_for(name: str, key: str, tmp_path: Path) -> None:
    import transformers

    config = {"architectures": [FAMILIES[name].architecture], "model_type": name, "hidden_size": 512}
    config |= {"num_hidden_layers": 30, "num_attention_heads": 16, "vocab_size": 131, "use_sliding_window": True}
    config["intermediate_size"] = 96
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 8, key: None}))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    ours = read_architecture(tmp_path)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", 512 // 16)
    assert (ours.windows[-1] is None) == (getattr(theirs, "sliding_window", None) is None)


def test_the_context_of_linear_scaling_is_the_stretched_one() -> None:
    # vLLM, _get_and_verify_max_len: times the factor, but not for llama3. Vicuna 1.5 16k states 4096 and a factor of 4.
    linear = {"rope_scaling": {"type": "linear", "factor": 4.0}}
    assert parse_architecture({**LLAMA2_7B, **linear}).max_positions == 16384
    assert parse_architecture({**LLAMA2_7B, "rope_parameters": linear["rope_scaling"]}).max_positions == 16384
    assert parse_architecture({**LLAMA2_7B, "rope_scaling": {"type": "linear", "factor": 1.5}}).max_positions == 6144
    assert parse_architecture(LLAMA31_8B).max_positions == 131072


def test_the_context_of_yarn_is_the_stretched_one() -> None:
    """As Qwen's model cards tell users to set it; Qwen3 states more positions than it scales."""
    yarn = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
    assert parse_architecture({**QWEN25_7B, "max_position_embeddings": 32768, **yarn}).max_positions == 131072
    qwen3 = parse_architecture({**QWEN3_06B, **yarn})
    assert qwen3.max_positions == 131072
    assert qwen3.rope == Rope(1e6, "yarn", 4.0, original_positions=32768, magnitude=0.1 * math.log(4.0) + 1.0)
    alone = {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}
    assert parse_architecture({**LLAMA2_7B, **alone}).max_positions == 8192


def test_dynamic_scaling_does_not_begin_within_the_context() -> None:
    dynamic = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    assert parse_architecture({**LLAMA2_7B, **dynamic}) == parse_architecture(LLAMA2_7B)


def test_the_family_by_model_type_where_architectures_are_left_out() -> None:
    assert parse_architecture({k: v for k, v in MISTRAL_7B.items() if k != "architectures"}).family == "mistral"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["'GPT2LMHeadModel'", "LlamaForCausalLM", "Qwen3ForCausalLM"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
        ({"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]}, ["not supported"]),
        ({"architectures": None, "model_type": "gpt2"}, ["'gpt2'"]),
        ({"architectures": "LlamaForCausalLM"}, ["architectures"]),
        ({"architectures": [None]}, ["architectures"]),
        ({"architectures": None, "model_type": ["llama"]}, ["not supported"]),
        ({"model_type": "mistral"}, ["model_type 'mistral'", "LlamaForCausalLM"]),
        ({"model_type": ["llama"]}, ["model_type"]),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Llama"}}, ["auto_map", "LlamaForCausalLM"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config"]),
        ({"compression_config": {"format": "x"}}, ["compression_config"]),
        ({"num_key_value_heads": 5}, ["32", "num_key_value_heads 5"]),
        ({"head_dim": 7}, ["head_dim 7", "even"]),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, ["'longrope'", "llama3"]),
        ({"rope_scaling": {"rope_type": "dynamic"}}, ["rope factor"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0}}, ["rope factor", "0"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_theta": 1}, ["rope_theta", "1"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": "fast"}}, ["rope beta_fast", "'fast'"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1e-307}}, ["rope beta_fast 1e-307"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_slow": 1e308}}, ["rope beta_slow 1e+308"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 1e300}}, ["rope factor 1e+300"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["rope factor"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, ["rope factor", "-1"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e30}}, ["rope factor 1e+30", "4096"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e300}}, ["rope factor 1e+300", "float32"]),
        ({"rope_theta": 5e-324}, ["rope_theta 5e-324", "float32"]),
        ({"rms_norm_eps": 1e308}, ["rms_norm_eps 1e+308", "float32"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e-5}}, ["rope factor 1e-05", "4096"]),
        ({"rope_scaling": {"rope_type": "su"}}, ["'su'"]),
        (
            {"rope_scaling": {"rope_type": "su"}, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            ["'su'"],
        ),
        ({"rope_scaling": "linear"}, ["rope_scaling"]),
        ({"rope_scaling": [1, 2]}, ["rope_scaling"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["rope_parameters"]),
        ({"rope_theta": 10**400}, ["rope_theta"]),
        ({"rope_parameters": {"rope_type": ["default"]}}, ["rope type"]),
        ({"rope_theta": 0}, ["rope_theta"]),
        ({"rope_theta": "10000"}, ["rope_theta", "'10000'"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"partial_rotary_factor": "half"}, ["partial_rotary_factor"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps"]),
        ({"rms_norm_eps": True}, ["rms_norm_eps"]),
        ({"num_hidden_layers": None}, ["num_hidden_layers", "missing"]),
        ({"vocab_size": None}, ["vocab_size", "missing"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"num_hidden_layers": 2.5}, ["num_hidden_layers", "2.5"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers"]),
        ({"hidden_size": "4096"}, ["hidden_size", "'4096'"]),
        ({"hidden_size": True}, ["hidden_size"]),
        ({"hidden_size": 10**30}, ["hidden_size"]),
        ({"num_attention_heads": 8192, "num_key_value_heads": 8192}, ["head_dim"]),
    ],
)
def test_refusals(changes: dict[str, Any], words: list[str]) -> None:
    text = refusal({**LLAMA2_7B, **changes})
    assert all(word in text for word in words), text


PHI_TINY: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 131,
}
PHI_AUTO_MAP = {
    "AutoConfig": "configuration_phi3.Phi3Config",
    "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
}


@pytest.mark.parametrize("more", [{}, {"AutoTokenizer": "Xenova/gpt-4o"}])
def test_auto_map_of_the_same_model_is_ignored(more: dict[str, str]) -> None:
    auto_map = {**PHI_AUTO_MAP, **more}
    assert parse_architecture({**PHI_TINY, "auto_map": auto_map}) == parse_architecture(PHI_TINY)
    assert "auto_map" in refusal({**LLAMA2_7B, "auto_map": auto_map})


def test_auto_map_of_a_fine_tune_names_its_base_too() -> None:
    auto_map = {key: f"microsoft/Phi-3-mini-4k-instruct--{name}" for key, name in PHI_AUTO_MAP.items()}
    assert parse_architecture({**PHI_TINY, "auto_map": auto_map}) == parse_architecture(PHI_TINY)


@pytest.mark.parametrize(
    "auto_map",
    [
        {**PHI_AUTO_MAP, "AutoModelForCausalLM": "modeling_phi3_small.Phi3SmallForCausalLM"},
        {**PHI_AUTO_MAP, "AutoModelForCausalLM": ["modeling_phi3.Phi3ForCausalLM"]},
        {**PHI_AUTO_MAP, "AutoModelForCausalLM": "evil/evil--evil.Phi3ForCausalLM"},
        {**PHI_AUTO_MAP, "AutoModelForCausalLM": "microsoft/Phi-3--evil--modeling_phi3"},
        {**PHI_AUTO_MAP, "AutoModel": None},
        {**PHI_AUTO_MAP, "AutoTokenizer": "evil.Tokenizer"},
        "modeling_phi3.Phi3ForCausalLM",
        5,
    ],
)
def test_any_other_auto_map_is_refused(auto_map: Any) -> None:
    text = refusal({**PHI_TINY, "auto_map": auto_map})
    assert "auto_map asks for code" in text and "Phi3ForCausalLM" in text


@pytest.mark.parametrize("value", [1e308, 1e-300, 10**400])
def test_factors_that_float32_does_not_hold_are_refused(value: float) -> None:
    config = {"model_type": "granite", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 32}
    config |= {"num_attention_heads": 4, "vocab_size": 131}
    parse_architecture(config)
    for key in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"):
        assert f"{key} " in refusal({**config, key: value})


@pytest.mark.parametrize("key, value", [("partial_rotary_factor", 1e308), ("original_max_position_embeddings", 1)])
def test_extremes_of_longrope_are_refused(key: str, value: float) -> None:
    config = {"model_type": "phi3", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 32}
    config |= {"num_attention_heads": 4, "vocab_size": 131, "max_position_embeddings": 128}
    scaling = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    assert key in refusal({**config, "rope_scaling": scaling, key: value})


@pytest.mark.parametrize("name", ["gemma3_text", "olmo3"])
def test_scaling_of_ropes_by_type_is_what_transformers_takes_it_for(name: str) -> None:
    import transformers

    config = {"num_hidden_layers": 6, "hidden_size": 512, "intermediate_size": 96, "num_attention_heads": 8}
    config |= {"vocab_size": 131, "max_position_embeddings": 128, "original_max_position_embeddings": 32}
    yarn = {"factor": 4.0, "attention_factor": 1.2}
    given = {**config, "rope_scaling": {**yarn, "rope_type": "yarn"}}
    theirs = transformers.AutoConfig.for_model(name, **copy.deepcopy(given)).rope_parameters["full_attention"]
    rope = parse_architecture({"model_type": name, **given}).rope
    assert rope.original_positions == theirs["original_max_position_embeddings"] == 128
    for scaling in ({**yarn, "type": "yarn"}, "yarn", ["yarn"]):
        assert "rope_scaling" in refusal({"model_type": name, **config, "rope_scaling": scaling})


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sliding_window": 0}, ["sliding_window"]),
        ({"sliding_window": "4096"}, ["sliding_window"]),
        ({"layer_types": ["full_attention"]}, ["layer_types", "28"]),
        ({"layer_types": ["chunked_attention"] * 28}, ["layer_types"]),
        ({"layer_types": 28}, ["layer_types"]),
        (
            {"layer_types": ["sliding_attention"] * 28, "use_sliding_window": False},
            ["layer_types", "use_sliding_window"],
        ),
        ({"layer_types": ["sliding_attention"] * 28, "sliding_window": None}, ["layer_types", "sliding_window"]),
        ({"layer_types": [["full_attention"]] * 28}, ["layer_types"]),
        ({"max_window_layers": "all"}, ["max_window_layers"]),
    ],
)
def test_bad_windows(changes: dict[str, Any], words: list[str]) -> None:
    text = refusal({**QWEN25_7B, "use_sliding_window": True, **changes})
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rope_parameters": {"rope_type": "default"}}, ["rope type 'default'", "yarn"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ["rope llama_4_scaling_beta", "None"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "llama_4_scaling_beta": 0}}, ["llama_4_scaling_beta", "0"]),
    ],
)
def test_ropes_that_no_ministral_3_has(changes: dict[str, Any], words: list[str]) -> None:
    text = refusal({**MISTRAL_7B, "architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3", **changes})
    assert all(word in text for word in words), text


def test_the_digest_of_outputs_changes_with_what_changes_outputs_only() -> None:
    arch, llama2 = parse_architecture(LLAMA31_8B), parse_architecture(LLAMA2_7B)
    # Stored in adapters and caches: these values must never change.
    assert outputs_digest(arch) == "ff4c9a716e1b1cd29fee756d6fd36b04f95ad72504f3ac67a14f1d44cf43f723"
    assert outputs_digest(llama2) == "0f18be6d4aa4dd049acb5e602a159f5e5cd5876c70dbee3705094b9aedbd6201"
    same = {"family": "mistral", "max_positions": 7, "tied": True, "packed_bits": 4.0}
    assert outputs_digest(dataclasses.replace(arch, **same)) == outputs_digest(arch)
    rope = [
        {field.name: "x" if field.name == "kind" else (2.0,) if "factors" in field.name else value + 1}
        for field in dataclasses.fields(Rope)
        for value in [getattr(arch.rope, field.name)]
    ]
    changed = [{"rope": dataclasses.replace(arch.rope, **change)} for change in rope]
    for field in dataclasses.fields(Architecture):
        value = getattr(arch, field.name)
        if field.name not in same and isinstance(value, (bool, int, float)):
            changed.append({field.name: not value if isinstance(value, bool) else value * 2 + 1})
    others = {
        "windows": (4096, *arch.windows[1:]),
        "attention_multiplier": 0.5,
        "norm_placement": "after",
        "activation": "gelu_tanh",
        "local_rope": Rope(),
        "rotated": (False,) * 32,
        "attention_soft_cap": 50.0,
        "logit_soft_cap": 30.0,
        "weight_format": "gptq",
    }
    changed += [{name: value} for name, value in others.items()]
    assert len(changed) == len(dataclasses.fields(Rope)) + len(dataclasses.fields(Architecture)) - len(same) - 1
    digests = {outputs_digest(dataclasses.replace(arch, **change)) for change in changed}
    assert len(digests | {outputs_digest(arch)}) == len(changed) + 1


def test_another_depth_is_shown_by_the_number_of_layers_alone() -> None:
    deep = output_settings(parse_architecture(LLAMA2_7B))
    shallow = output_settings(parse_architecture({**LLAMA2_7B, "num_hidden_layers": 16}))
    assert changed_settings(deep, shallow) == "num_layers (32 against 16)"


def test_windows_of_mistral_are_those_of_all_layers() -> None:
    kinds = ["sliding_attention"] * 31 + ["full_attention"]
    assert "layer_types" in refusal({**MISTRAL_7B, "layer_types": kinds})
    assert parse_architecture({**MISTRAL_7B, "layer_types": kinds[:1] * 32}).windows == (4096,) * 32
    unlimited = {**MISTRAL_7B, "sliding_window": None, "layer_types": kinds[-1:] * 32}
    assert parse_architecture(unlimited).windows == (None,) * 32


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_files_that_are_no_configuration(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_architecture(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json: not found"):
        read_architecture(tmp_path)
