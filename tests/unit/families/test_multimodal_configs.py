"""``config.json`` and tensor names of multimodal releases."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from megatron_ee.errors import CheckpointError
from megatron_ee.families.multimodal import SPELLINGS, find_spelling, plain_config
from megatron_ee.families.registry import parse_architecture

GEMMA3_4B: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
"""As released, but for keys that matter to nothing here."""
MINISTRAL3: dict[str, Any] = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "text_config": {"model_type": "ministral3", "num_hidden_layers": 26, "tie_word_embeddings": True},
    "vision_config": {"model_type": "pixtral"},
}


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        parse_architecture(config, "here/config.json")
    return str(caught.value)


def test_missing_keys_are_the_defaults_of_transformers() -> None:
    for text in (GEMMA3_4B["text_config"], {"num_hidden_layers": 7}, {}, None):
        config = {**GEMMA3_4B, "text_config": text}
        theirs = transformers.Gemma3TextConfig(**(text or {})).to_dict()
        assert parse_architecture(config) == parse_architecture({**theirs, "architectures": ["Gemma3ForCausalLM"]})
    theirs = transformers.Ministral3Config(**MINISTRAL3["text_config"]).to_dict()
    assert parse_architecture(MINISTRAL3) == parse_architecture(theirs)


def test_the_text_model_has_a_configuration_of_its_own() -> None:
    plain = plain_config(GEMMA3_4B, "config.json")
    assert plain["architectures"] == ["Gemma3ForCausalLM"] and plain["model_type"] == "gemma3_text"
    assert (plain["vocab_size"], plain["num_attention_heads"], plain["hidden_size"]) == (262_208, 8, 2560)
    assert plain["eos_token_id"] == [1, 106] and plain["torch_dtype"] == "bfloat16"
    assert not {"vision_config", "text_config", "image_token_index"} & plain.keys()
    assert plain_config(plain, "config.json") == plain


def test_the_outer_key_ties_the_head() -> None:
    """As in transformers, whose default is to tie."""
    text = {"model_type": "ministral3"}
    for outer, inner, tied in ((True, False, True), (False, True, False), (None, False, False), (None, None, True)):
        config = {**MINISTRAL3, "text_config": text if inner is None else {**text, "tie_word_embeddings": inner}}
        if outer is not None:
            config["tie_word_embeddings"] = outer
        assert parse_architecture(config).tied == tied


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_config": []}, "text_config must be an object, not []"),
        ({"text_config": {"model_type": "gemma2"}}, "text_config of model_type 'gemma2' is not supported in a gemma3"),
        ({"model_type": "gemma3_text"}, "model_type 'gemma3_text' contradicts architecture"),
        ({"auto_map": {"AutoModel": "x.y"}}, "auto_map asks for code"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not supported here"),
        ({"text_config": {"quantization_config": {"bits": 4}}}, "quantised weights are not supported here"),
        ({"text_config": {"hidden_size": "x"}}, "hidden_size must be a positive whole number"),
    ],
)
def test_refused(change: dict[str, Any], words: str) -> None:
    text = refusal({**GEMMA3_4B, **change})
    assert text.startswith("here/config.json: ") and words in text


def test_a_text_model_of_another_family_is_refused() -> None:
    """transformers takes a ``text_config`` without a type for Mistral's."""
    assert "model_type 'mistral' is not supported in a mistral3 model" in refusal({**MINISTRAL3, "text_config": {}})


def test_names() -> None:
    hub, classes = SPELLINGS
    assert hub.plain("language_model.model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert classes.plain("model.language_model.norm.weight") == "model.norm.weight"
    assert hub.plain("language_model.lm_head.weight") == classes.plain("lm_head.weight") == "lm_head.weight"
    assert hub.plain("model.norm.weight") is None and classes.plain("model.norm.weight") is None
    for spelling in SPELLINGS:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert spelling.plain(spelling.released(name)) == name
        assert find_spelling([spelling.released("model.norm.weight")], "here") == spelling
    with pytest.raises(CheckpointError, match="but none does"):
        find_spelling(["model.norm.weight"], "here")
    with pytest.raises(CheckpointError, match="not both"):
        find_spelling([spelling.released("model.norm.weight") for spelling in SPELLINGS], "here")
