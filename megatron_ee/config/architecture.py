"""The architecture of a model, and the digest of the settings that affect its outputs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ee.errors import shown

MAX_LAYERS = 10_000
"""Limit far above any model, so that a malicious number of layers is refused before it takes memory."""
_OUTSIDE_OUTPUTS = ("family", "max_positions", "tied", "packed_bits")
"""Fields that do not change outputs by themselves: a name, a limit, ``tied``, which the weights show, and a size."""
QUANTISE = "quantise"
"""Key, among recorded settings, of how a plain model's layers were quantised as they were loaded."""


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base, rotated share of a head, and scaling to longer contexts.

    Attributes:
        theta: base of the frequencies.
        kind: ``default``, ``linear``, ``llama3``, ``yarn`` (arXiv 2309.00071) or ``longrope`` (arXiv 2402.13753).
        factor: extension factor of the context.
        low_freq_factor: Llama 3: wavelengths above ``original_positions / low_freq_factor`` are fully scaled.
        high_freq_factor: Llama 3: wavelengths below ``original_positions / high_freq_factor`` are not scaled.
        original_positions: context length before scaling.
        fraction: share of each head's features that are rotated, the first ones.
        magnitude: factor of cosine and sine (YaRN, longrope).
        beta_fast: YaRN: frequencies with more rotations than this within ``original_positions`` are not scaled.
        beta_slow: YaRN: frequencies with fewer rotations are fully scaled.
        truncate: YaRN: round the bounds of the ramp between the two to whole numbers.
        short_factors: longrope: divisors of the frequencies for contexts up to ``original_positions``.
        long_factors: longrope: the same for longer contexts.
        query_scaling: queries are multiplied by ``1 + query_scaling * log(1 + position // original_positions)``, as in
            Llama 4.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192
    fraction: float = 1.0
    magnitude: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    query_scaling: float = 0.0


@dataclass(frozen=True)
class Architecture:
    """Architecture of a decoder-only model.

    Attributes:
        family: ``model_type`` in ``config.json``; each family is a file in ``families/``.
        max_positions: context length, as in vLLM: with linear scaling ``max_position_embeddings`` times the factor,
            with YaRN the original length times the factor.
        windows: per layer, number of positions that attention sees, including its own; None for no limit.
        tied: whether the LM head is the input embedding.
        embedding_multiplier: factor of the embedding, rounded to the model's dtype.
        residual_multiplier: factor of the outputs of attention and MLP before they are added to the residual.
        attention_multiplier: factor of the attention scores; None for ``head_dim ** -0.5``.
        logit_multiplier: factor of the logits.
        norm_placement: ``before`` attention and MLP, ``after`` them, or both (``sandwich``).
        norm_plus_one: norms multiply by 1 + weight.
        activation: activation of the MLP's gate: ``silu`` or ``gelu_tanh``.
        qk_norm: whether queries and keys have norms.
        qk_norm_whole: whether these norms are over the whole projection instead of each head.
        local_rope: rope of the layers with a window; None if it is ``rope``.
        rotated: per layer, whether it has rotary positions; empty if all layers have.
        attention_soft_cap: c in ``c * tanh(score / c)`` of attention scores; None for no soft cap.
        logit_soft_cap: the same for logits, after ``logit_multiplier``.
        weight_format: how the values of quantised weights follow from the stored tensors; empty if none is quantised.
        packed_bits: about how many bits a quantised weight of a layer takes with its scales; 0 if it is not quantised.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope: Rope
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    windows: tuple[int | None, ...]
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    logit_multiplier: float = 1.0
    norm_placement: str = "before"
    norm_plus_one: bool = False
    activation: str = "silu"
    qk_norm_whole: bool = False
    local_rope: Rope | None = None
    rotated: tuple[bool, ...] = ()
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    weight_format: str = ""
    packed_bits: float = 0.0

    @property
    def max_generated_positions(self) -> int:
        """Context length of generation. With longrope, the original length: cached keys cannot be rotated again."""
        return self.rope.original_positions if self.rope.kind == "longrope" else self.max_positions

    @property
    def norms_before(self) -> bool:
        """Whether attention and MLP have a norm before them."""
        return self.norm_placement != "after"

    @property
    def norms_after(self) -> bool:
        """Whether attention and MLP have a norm after them."""
        return self.norm_placement != "before"


def outputs_digest(architecture: Architecture) -> str:
    """SHA-256 (hex) of the settings that affect outputs: rope, epsilon, windows, sizes, biases.

    Equal digests and equal weights give equal outputs. ``family``, ``max_positions``, ``tied``, and fields at their
    default are left out, so a new field with a default does not change the digests of older models. The digest is
    stored in files: do not change its computation.
    """
    text = json.dumps(_settings(architecture), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def output_settings(architecture: Architecture) -> dict[str, Any]:
    """The input of ``outputs_digest``: a flat dict of JSON types, with keys such as ``rope.theta``."""
    found: dict[str, Any] = {}
    for name, setting in json.loads(json.dumps(_settings(architecture))).items():
        nested = isinstance(setting, dict)
        found |= {f"{name}.{part}": each for part, each in setting.items()} if nested else {name: setting}
    return found


def changed_settings(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Describe the differences of two ``output_settings``, as ``norm_eps (1e-05 against 1e-06)``; empty if equal.

    ``recorded`` may come from an untrusted file. ``QUANTISE`` is not compared: exits can be used with other rounding.
    """
    names = sorted((recorded.keys() | current.keys()) - {QUANTISE})
    names = [name for name in names if recorded.get(name) != current.get(name)]
    if "num_layers" in names and "windows" in names:
        names.remove("windows")  # one per layer, so ``num_layers`` already shows the difference
    return ", ".join(f"{name[:40]} ({_setting(recorded, name)} against {_setting(current, name)})" for name in names)


def _setting(settings: Mapping[str, Any], name: str) -> str:
    """The value as text; the field's default if it is left out."""
    ropes = {f"{rope}.{field.name}": field for rope in ("rope", "local_rope") for field in dataclasses.fields(Rope)}
    fields = {field.name: field for field in dataclasses.fields(Architecture)} | ropes
    default = fields[name].default if name in fields else None
    return shown(settings.get(name, None if default is dataclasses.MISSING else default))


def _settings(value: Architecture | Rope) -> dict[str, Any]:
    """The fields that ``outputs_digest`` includes, by name."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        setting = getattr(value, field.name)
        if field.name not in _OUTSIDE_OUTPUTS and setting != field.default:
            found[field.name] = _settings(setting) if isinstance(setting, Rope) else setting
    return found
