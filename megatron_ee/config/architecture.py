"""The shape of a model, and the digest of the settings that decide what its weights compute."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ee.errors import shown

MAX_LAYERS = 10_000
"""Limit far above any model: a hostile number of layers must not cost memory before it is refused."""
_OUTSIDE_OUTPUTS = ("family", "max_positions", "tied")
"""Fields that alone change no output: the first two only name and limit, and the weights show what is tied."""


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base, how much of a head turns, and how frequencies are scaled to longer contexts.

    Attributes:
        theta: base of the frequencies.
        kind: ``default``, ``linear``, ``llama3``, ``yarn`` (arXiv 2309.00071) or ``longrope`` (arXiv 2402.13753).
        factor: how many times longer the context becomes.
        low_freq_factor: Llama 3: wavelengths above ``original_positions / low_freq_factor`` are scaled fully.
        high_freq_factor: Llama 3: wavelengths below ``original_positions / high_freq_factor`` stay.
        original_positions: context before scaling.
        fraction: of each head's features that turn, the first ones.
        magnitude: factor of cosine and sine (YaRN, longrope).
        beta_fast: YaRN: frequencies with more turns than this within ``original_positions`` stay.
        beta_slow: YaRN: frequencies with fewer turns are scaled fully.
        truncate: YaRN: the bounds of the ramp between the two are whole numbers.
        short_factors: longrope: divisors of the frequencies in contexts up to ``original_positions``.
        long_factors: longrope: the same in longer contexts.
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
    """Shape of a decoder-only model, in the field's names.

    Attributes:
        family: as ``config.json`` names it in ``model_type``; a file of ``families/`` has it.
        max_positions: the context; with linear scaling ``max_position_embeddings`` times the factor, with YaRN the
            original one times the factor, as in vLLM.
        windows: per layer, how many positions attention looks back (its own included); None is unlimited.
        tied: the LM head is the input embedding.
        embedding_multiplier: factor of the embedding, rounded to the model's dtype.
        residual_multiplier: factor of what attention and MLP add to the residual.
        attention_multiplier: factor of the attention scores; None is ``head_dim ** -0.5``.
        logit_multiplier: factor of the logits.
        norm_placement: ``before`` attention and MLP, ``after`` them, or both (``sandwich``).
        norm_plus_one: norms multiply by 1 + weight.
        activation: of the MLP's gate: ``silu`` or ``gelu_tanh``.
        qk_norm: queries and keys are normed.
        qk_norm_whole: over the whole projection, not each head.
        local_rope: of the layers with a window; None where it is ``rope``.
        rotated: per layer, whether it has rotary positions; empty where all have.
        attention_soft_cap: c of ``c * tanh(score / c)``, which attention scores become; None for no such bound.
        logit_soft_cap: the same of the logits, after their factor.
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

    @property
    def max_generated_positions(self) -> int:
        """The context of generation: with longrope the original one, since keys that are kept cannot be turned anew."""
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
    """SHA-256 (hex) of the settings that decide what given weights compute: rope, epsilon, windows, sizes, biases.

    Equal digests and equal weights give equal outputs. ``family``, ``max_positions`` and ``tied`` do not count. A
    field at its default does not count either, so a new field with a default leaves the digests of older models as
    they were. The digest is stored in files: do not change how it is computed.
    """
    text = json.dumps(_settings(architecture), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def output_settings(architecture: Architecture) -> dict[str, Any]:
    """The input of ``outputs_digest``, in types of JSON, with ``rope.theta`` and the like in one flat object."""
    found: dict[str, Any] = {}
    for name, setting in json.loads(json.dumps(_settings(architecture))).items():
        nested = isinstance(setting, dict)
        found |= {f"{name}.{part}": each for part, each in setting.items()} if nested else {name: setting}
    return found


def changed_settings(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """How two ``output_settings`` differ, as ``norm_eps (1e-05 against 1e-06)``; empty where they are equal.

    ``recorded`` may come from a file that is not trusted.
    """
    names = sorted(name for name in recorded.keys() | current.keys() if recorded.get(name) != current.get(name))
    if "num_layers" in names and "windows" in names:
        names.remove("windows")  # one for each layer: their number says enough
    return ", ".join(f"{name[:40]} ({_setting(recorded, name)} against {_setting(current, name)})" for name in names)


def _setting(settings: Mapping[str, Any], name: str) -> str:
    """The value for the user; one that is left out is the field's default."""
    ropes = {f"{rope}.{field.name}": field for rope in ("rope", "local_rope") for field in dataclasses.fields(Rope)}
    fields = {field.name: field for field in dataclasses.fields(Architecture)} | ropes
    default = fields[name].default if name in fields else None
    return shown(settings.get(name, None if default is dataclasses.MISSING else default))


def _settings(value: Architecture | Rope) -> dict[str, Any]:
    """Fields by name that count for ``outputs_digest``."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        setting = getattr(value, field.name)
        if field.name not in _OUTSIDE_OUTPUTS and setting != field.default:
            found[field.name] = _settings(setting) if isinstance(setting, Rope) else setting
    return found
