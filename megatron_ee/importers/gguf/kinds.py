"""The architectures of GGUF files that are read: ``config.json`` from their metadata, and how they store weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

from megatron_ee.config.architecture import MAX_LAYERS
from megatron_ee.errors import shown
from megatron_ee.families.reading import FULL, SLIDING, Config

LLAMA3_POSITIONS, LLAMA3_LOW, LLAMA3_HIGH = 8192, 1.0, 4.0
"""Of the rotary scaling of every Llama 3.x. A file has only the factors that follow from them."""
ROPE_FREQS, ROPE_SHORT, ROPE_LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"


@dataclass(frozen=True)
class Facts:
    """What decides the ``config.json`` of a file.

    Attributes:
        values: metadata of the architecture, by key without its name, such as ``block_count``.
        vectors: values of the tensors with settings of rotary positions, by name.
        tensors: names of all tensors.
    """

    values: Config
    vectors: Mapping[str, list[float]]
    tensors: frozenset[str]

    def layers(self) -> int:
        """The number of layers."""
        return self.values.integer("block_count", most=MAX_LAYERS)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number of the file, in the fewest digits that give the same float32."""
        return float(str(np.float32(self.values.positive(key, default))))

    def same(self, key: str, default: int | None = None) -> int:
        """A whole number, which may be given for every layer, but must then be the same."""
        value = self.values.values.get(key)
        if isinstance(value, list):
            if len(set(map(repr, value))) != 1:
                raise self.values.error(f"{key} differs by layer, which is not supported")
            return Config({key: value[0]}, self.values.where).integer(key)
        return self.values.integer(key, default)

    def head_dim(self) -> int:
        """Features of a head."""
        size = self.values.integer(
            "attention.key_length", self.values.integer("embedding_length") // self.same("attention.head_count") or None
        )
        if self.values.integer("attention.value_length", size) != size:
            raise self.values.error("attention.value_length differs from attention.key_length; not supported")
        return size

    def has(self, part: str) -> bool:
        """Whether the first layer has the tensor ``part``."""
        return f"blk.0.{part}" in self.tensors


@dataclass(frozen=True)
class Kind:
    """An architecture of GGUF files.

    Attributes:
        model_arch: as the package ``gguf`` names it, for its table of tensor names.
        config: the part of ``config.json`` that is its own.
        keys: metadata that only this kind has.
        vectors: tensors with settings of rotary positions that it may have.
        interleaved: rows of queries and keys are stored for rotary positions of neighbouring features.
        offset_norms: norms are stored with 1 added.
    """

    model_arch: gguf.MODEL_ARCH
    config: Callable[[Facts], dict[str, Any]]
    keys: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    interleaved: bool = False
    offset_norms: bool = False


def _llama(facts: Facts) -> dict[str, Any]:
    if facts.values.values.get("attention.sliding_window"):
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "sliding_window": facts.values.integer("attention.sliding_window"),
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": facts.has("attn_q.bias"),
        "mlp_bias": facts.has("ffn_up.bias"),
    }


def _qwen2(facts: Facts) -> dict[str, Any]:
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}


def _qwen3(facts: Facts) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": facts.has("attn_q.bias"),
        "use_sliding_window": False,
    }


def _gemma(facts: Facts, period: int, large: int) -> dict[str, Any]:
    """What Gemma 2 and 3 share.

    Args:
        period: every layer of this number has full attention, unless the file says otherwise.
        large: the number of layers of the 27B model, whose attention scores are scaled by another size than a head's.
    """
    layers, heads = facts.layers(), facts.same("attention.head_count")
    found = facts.values.values.get("attention.sliding_window_pattern", period)
    if isinstance(found, list):
        kinds = [SLIDING if inside else FULL for inside in found]
    else:
        period = facts.values.integer("attention.sliding_window_pattern", period)
        kinds = [SLIDING if (layer + 1) % period else FULL for layer in range(layers)]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": facts.values.integer("embedding_length") // heads
        if layers == large
        else facts.head_dim(),
        "sliding_window": facts.values.integer("attention.sliding_window", 4096),
        "layer_types": kinds,
    }


def _gemma2(facts: Facts) -> dict[str, Any]:
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        **_gemma(facts, 2, 46),
        "attn_logit_softcapping": facts.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": facts.number("final_logit_softcapping", 30.0),
    }


def _gemma3(facts: Facts) -> dict[str, Any]:
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **_gemma(facts, 6, 62),
        "rope_local_base_freq": facts.number("rope.freq_base_swa", 10_000.0),
    }


def _phi3(facts: Facts) -> dict[str, Any]:
    window = facts.values.values.get("attention.sliding_window")
    config: dict[str, Any] = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "attention_bias": False,
        "sliding_window": facts.values.integer("attention.sliding_window") if window else None,
        "partial_rotary_factor": facts.values.integer("rope.dimension_count", facts.head_dim()) / facts.head_dim(),
        "original_max_position_embeddings": facts.values.integer(
            "rope.scaling.original_context_length", facts.values.integer("context_length")
        ),
    }
    if ROPE_SHORT in facts.vectors or ROPE_LONG in facts.vectors:
        if len(facts.vectors) != 2:
            raise facts.values.error(f"has only one of {ROPE_SHORT} and {ROPE_LONG}")
        scaling: dict[str, Any] = {"type": "longrope", "rope_type": "longrope"}
        scaling |= {"short_factor": facts.vectors[ROPE_SHORT], "long_factor": facts.vectors[ROPE_LONG]}
        if "rope.scaling.attn_factor" in facts.values.values:
            scaling["attention_factor"] = facts.number("rope.scaling.attn_factor")
        config["rope_scaling"] = scaling
    return config


KINDS: dict[str, Kind] = {
    "llama": Kind(
        gguf.MODEL_ARCH.LLAMA,
        _llama,
        ("attention.sliding_window", "tensor_data_layout"),
        (ROPE_FREQS,),
        interleaved=True,
    ),
    "qwen2": Kind(gguf.MODEL_ARCH.QWEN2, _qwen2),
    "qwen3": Kind(gguf.MODEL_ARCH.QWEN3, _qwen3),
    "gemma2": Kind(
        gguf.MODEL_ARCH.GEMMA2,
        _gemma2,
        (
            "attention.sliding_window",
            "attention.sliding_window_pattern",
            "attn_logit_softcapping",
            "final_logit_softcapping",
        ),
        offset_norms=True,
    ),
    "gemma3": Kind(
        gguf.MODEL_ARCH.GEMMA3,
        _gemma3,
        ("attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"),
        offset_norms=True,
    ),
    "phi3": Kind(gguf.MODEL_ARCH.PHI3, _phi3, ("attention.sliding_window",), (ROPE_SHORT, ROPE_LONG)),
}
"""By ``general.architecture``. Mistral's models are stored as ``llama``."""

_COMMON_KEYS = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor"),
    *("rope.scaling.finetuned", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "rope.scale_linear"),
)
_WITHOUT_EFFECT = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True}


def derive_config(kind: Kind, facts: Facts, vocabulary: int) -> dict[str, Any]:
    """The ``config.json`` of the model, without special tokens and dtype.

    Args:
        vocabulary: rows of the embedding.

    Raises:
        CheckpointError: a key is missing, of a wrong type, or not known to leave the computation as it is.
    """
    for key, value in facts.values.values.items():
        if key not in (*_COMMON_KEYS, *kind.keys) and (key, value) not in _WITHOUT_EFFECT.items():
            raise facts.values.error(f"{key} {shown(value)} is not supported")
    heads = facts.same("attention.head_count")
    own = kind.config(facts)
    rotated = facts.values.integer("rope.dimension_count", facts.head_dim())
    if rotated != facts.head_dim() and "partial_rotary_factor" not in own:
        raise facts.values.error(f"rope.dimension_count {rotated} is not the size of a head, {facts.head_dim()}")
    return {
        "hidden_size": facts.values.integer("embedding_length"),
        "intermediate_size": facts.same("feed_forward_length"),
        "num_hidden_layers": facts.layers(),
        "num_attention_heads": heads,
        "num_key_value_heads": facts.same("attention.head_count_kv", heads),
        "head_dim": facts.head_dim(),
        "hidden_act": "silu",
        "max_position_embeddings": facts.values.integer("context_length"),
        "rms_norm_eps": facts.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": vocabulary,
        "tie_word_embeddings": "output.weight" not in facts.tensors,
        "rope_theta": facts.number("rope.freq_base", 10_000.0),
        "rope_scaling": _scaling(facts),
        **own,
    }


def _scaling(facts: Facts) -> dict[str, Any] | None:
    values = facts.values.values
    kind = values.get("rope.scaling.type", "linear" if "rope.scale_linear" in values else "none")
    if ROPE_FREQS in facts.vectors:
        if kind != "none":
            raise facts.values.error(f"has both {ROPE_FREQS} and rope.scaling.type {shown(kind)}; not supported")
        return _llama3(facts, facts.vectors[ROPE_FREQS])
    if kind == "none" or (kind == "longrope" and ROPE_LONG in facts.vectors):  # the latter is in Phi-3's own part
        return None
    if kind not in ("linear", "yarn"):
        raise facts.values.error(f"rope.scaling.type {shown(kind)} is not supported")
    if values.get("rope.scaling.attn_factor", 1.0) != 1.0:
        raise facts.values.error(f"rope.scaling.attn_factor with {kind} is not supported")
    factor = facts.number("rope.scaling.factor" if "rope.scaling.factor" in values else "rope.scale_linear")
    scaling: dict[str, Any] = {"type": kind, "rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = facts.values.integer("rope.scaling.original_context_length")
        for key in ("beta_fast", "beta_slow"):
            if f"rope.scaling.yarn_{key}" in values:
                scaling[key] = facts.number(f"rope.scaling.yarn_{key}")
    return scaling if factor != 1.0 else None


def _llama3(facts: Facts, factors: list[float]) -> dict[str, Any] | None:
    """Llama 3's rotary scaling, of which the file has what it divides each frequency by."""
    factor, size = max(factors), facts.head_dim()
    if not np.isfinite(factors).all() or min(factors) < 1.0:
        raise facts.values.error(f"{ROPE_FREQS} must have factors from 1, not {shown(factors)}")
    if factor == 1.0:
        return None
    turns = [
        LLAMA3_POSITIONS * facts.number("rope.freq_base", 10_000.0) ** (-2 * index / size) / (2 * math.pi)
        for index in range(size // 2)
    ]
    kept = [min(1.0, max(0.0, (turn - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW))) for turn in turns]
    expected = [1 / ((1 - share) / factor + share) for share in kept]
    if len(factors) != len(expected) or not np.allclose(factors, expected, rtol=1e-4):
        raise facts.values.error(f"{ROPE_FREQS} has other factors than Llama 3's rotary scaling; not supported")
    return {
        "rope_type": "llama3",
        "factor": float(str(np.float32(factor))),
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_POSITIONS,
    }
