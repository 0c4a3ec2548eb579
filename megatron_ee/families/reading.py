"""What families share in reading a ``config.json``: checked values, the common sizes, rotary settings, windows."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ee.config.architecture import MAX_LAYERS, Architecture, Rope
from megatron_ee.errors import CheckpointError, shown

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Config:
    """A parsed ``config.json`` whose values are checked as they are read; every method raises CheckpointError.

    Attributes:
        values: by key.
        where: names the file in errors.
    """

    values: Mapping[str, Any]
    where: str

    def error(self, message: str) -> CheckpointError:
        """An error that names the file."""
        return CheckpointError(f"{self.where}: {message}")

    def integer(self, key: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        """A positive whole number. ``default`` stands for a key that is missing or null; None makes it required."""
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(f"{key} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(f"{key} must be a positive whole number, not {shown(value)}")
        if value > most:
            raise self.error(f"{key} {shown(value)} is beyond any model; at most {most}")
        return value

    def positive(self, key: str, default: float | None = None, name: str = "") -> float:
        """A positive number; ``name`` is what errors call it, by default its key."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
            raise self.error(f"{name or key} must be a positive number, not {shown(value)}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false; null is false."""
        value = self.values.get(key, default)
        if value is not None and not isinstance(value, bool):
            raise self.error(f"{key} must be true or false, not {shown(value)}")
        return bool(value)


def plain_architecture(
    config: Config, family: str, *, positions: int, kv_heads: int | None = None, head_dim: int | None = None
) -> Architecture:
    """The architecture of a pre-norm model with RMSNorm, rotary positions and a gated MLP, without biases or windows.

    Families replace what differs in theirs. The defaults are transformers' own, for keys that a file leaves out.

    Args:
        config: of the model.
        family: its name.
        positions: default of ``max_position_embeddings``.
        kv_heads: default of ``num_key_value_heads``; None, or a null in the file, is ``num_attention_heads``.
        head_dim: default of ``head_dim``; None, or a null in the file, is ``hidden_size / num_attention_heads``.
    """
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    if "num_key_value_heads" in config.values or kv_heads is None:
        kv_heads = num_heads
    if "head_dim" in config.values or head_dim is None:
        head_dim = hidden_size // num_heads
    num_kv_heads = config.integer("num_key_value_heads", kv_heads)
    head_dim = config.integer("head_dim", head_dim)
    if num_heads % num_kv_heads:
        raise config.error(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
    if head_dim % 2:
        raise config.error(f"head_dim {head_dim} is odd; rotary embeddings need an even one")
    if config.values.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        raise config.error(f"hidden_act {shown(config.values['hidden_act'])} is not supported, only 'silu'")
    num_layers = config.integer("num_hidden_layers", most=MAX_LAYERS)
    context = config.integer("max_position_embeddings", positions)
    rope = read_rope(config, context)
    return Architecture(
        family=family,
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_size=config.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=config.integer("vocab_size"),
        max_positions=_scaled_context(config, context, rope),
        norm_eps=config.positive("rms_norm_eps", 1e-6),
        rope=rope,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tied=config.flag("tie_word_embeddings"),
        windows=(None,) * num_layers,
    )


def read_rope(config: Config, positions: int) -> Rope:
    """Rotary settings, read from where transformers takes them.

    Released files have ``rope_theta`` and ``rope_scaling``, recent transformers writes ``rope_parameters``. Of two
    objects, ``rope_scaling`` counts. A ``rope_theta`` within the object comes before one beside it, but
    ``original_max_position_embeddings`` beside the object comes before one within; ``positions`` is its default.
    """
    key = "rope_scaling" if config.values.get("rope_scaling") else "rope_parameters"
    found = config.values.get(key) or {}
    if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
        raise config.error(f"{key} must be one object of plain settings for all layers")
    settings = Config(found, config.where)
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise config.error(f"rope type {shown(kind)} is not supported; supported: default, linear, llama3")
    if (config.values.get("partial_rotary_factor") or found.get("partial_rotary_factor") or 1.0) != 1.0:
        raise config.error("partial_rotary_factor is not supported")
    theta = (settings if "rope_theta" in found else config).positive("rope_theta", 10_000.0)
    factor = 1.0 if kind == "default" else settings.positive("factor", name="rope factor")
    if kind != "llama3":
        return Rope(theta=theta, kind=kind, factor=factor)
    low, high = (settings.positive(key, name=f"rope {key}") for key in ("low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise config.error("rope low_freq_factor must be less than high_freq_factor")
    original = "original_max_position_embeddings"
    place = config if config.values.get(original) is not None else settings
    return Rope(theta, kind, factor, low, high, place.integer(original, positions))


def _scaled_context(config: Config, positions: int, rope: Rope) -> int:
    """Positions that can be used. Files with linear scaling state those before it; all other files, those after."""
    scaled = positions * rope.factor if rope.kind == "linear" else positions
    if not 1 <= scaled < 2**31:
        raise config.error(f"rope factor {rope.factor:g} of {positions} positions gives no usable context")
    return int(scaled)


def read_window(config: Config, default: int | None) -> int | None:
    """``sliding_window``: how many positions attention looks back; null, or a ``default`` of None, is no limit."""
    if config.values.get("sliding_window", default) is None:
        return None
    return config.integer("sliding_window", default)


def read_layer_types(config: Config, num_layers: int) -> list[str] | None:
    """``layer_types``: ``full_attention`` or ``sliding_attention`` for each layer; None where the file has none."""
    kinds = config.values.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise config.error(f"layer_types must list {FULL} or {SLIDING} for each of {num_layers} layers")
    return kinds


def windows_by_type(config: Config, kinds: Sequence[str], window: int | None, keys: str) -> tuple[int | None, ...]:
    """``window`` at layers with sliding attention; ``keys`` are those that can turn it off, for the error."""
    if window is None and SLIDING in kinds:
        raise config.error(f"layer_types has {SLIDING}, but {keys} says that there is none")
    return tuple(window if kind == SLIDING else None for kind in kinds)


def switched_windows(config: Config, num_layers: int) -> tuple[int | None, ...]:
    """Qwen's windows: off unless ``use_sliding_window``, and then from layer ``max_window_layers`` on."""
    window = read_window(config, 4096) if config.flag("use_sliding_window") else None
    kinds = read_layer_types(config, num_layers)
    if kinds is not None:
        return windows_by_type(config, kinds, window, "use_sliding_window or sliding_window")
    first = config.values.get("max_window_layers", 28)
    if window is not None and type(first) is not int:
        raise config.error(f"max_window_layers must be a whole number, not {shown(first)}")
    return tuple(window if window is not None and layer >= first else None for layer in range(num_layers))
