"""Shared code for reading a ``config.json``: checked values, common sizes, rotary settings, windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_ee.config.architecture import MAX_LAYERS, Architecture, Rope
from megatron_ee.errors import CheckpointError, shown

FULL, SLIDING = "full_attention", "sliding_attention"
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
FLOAT32 = (2.0**-126, 2.0**127)
"""Range of a model's settings: smaller and larger ones are lost, or fail, where tensors are computed with them."""
_ORIGINAL_POSITIONS = "original_max_position_embeddings"


@dataclass(frozen=True)
class Config:
    """A parsed ``config.json`` with checked access. Methods raise ``CheckpointError`` for invalid values.

    Attributes:
        values: values by key.
        where: name of the file, for messages.
    """

    values: Mapping[str, Any]
    where: str

    def error(self, message: str) -> CheckpointError:
        """An error that names the file."""
        return CheckpointError(f"{self.where}: {message}")

    def integer(self, key: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        """A positive whole number. ``default`` replaces a missing key or null; with None the key is required."""
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
        """A positive number within float32's range. ``name`` replaces the key in messages."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise self.error(f"{name or key} must be a positive number, not {shown(value)}")
        if not FLOAT32[0] <= value <= FLOAT32[1]:
            raise self.error(f"{name or key} {shown(value)} is beyond any model; float32 does not hold it")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false; null is false."""
        value = self.values.get(key, default)
        if value is not None and not isinstance(value, bool):
            raise self.error(f"{key} must be true or false, not {shown(value)}")
        return bool(value)


def plain_architecture(
    config: Config,
    family: str,
    *,
    positions: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    eps: float = 1e-6,
    tied: bool = False,
    theta: float = 10_000.0,
    rope: Rope | None = None,
    activation: str | None = None,
) -> Architecture:
    """The architecture of a pre-norm model with RMSNorm, rotary positions and a gated MLP, without biases or windows.

    Families replace the fields that differ. Defaults for missing keys are those of transformers.

    Args:
        config: of the model.
        family: its name.
        positions: default of ``max_position_embeddings``.
        kv_heads: default of ``num_key_value_heads``; None, or a null in the file, is ``num_attention_heads``.
        head_dim: default of ``head_dim``; None, or a null in the file, is ``hidden_size / num_attention_heads``.
        eps: default of ``rms_norm_eps``.
        tied: default of ``tie_word_embeddings``.
        theta: default of ``rope_theta``.
        rope: rotary settings; None to read them, and the scaled context length, in the form of most families.
        activation: activation of the MLP; None requires silu in the file.
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
    if activation is None and config.values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise config.error(f"hidden_act {shown(config.values['hidden_act'])} is not supported, only 'silu'")
    num_layers = config.integer("num_hidden_layers", most=MAX_LAYERS)
    context = config.integer("max_position_embeddings", positions)
    if rope is None:
        rope = read_rope(config, context, theta=theta)
        context = _scaled_context(config, context, rope)
    return Architecture(
        family=family,
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_size=config.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=config.integer("vocab_size"),
        max_positions=context,
        norm_eps=config.positive("rms_norm_eps", eps),
        rope=rope,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tied=config.flag("tie_word_embeddings", tied),
        windows=(None,) * num_layers,
        activation=activation or "silu",
    )


def read_rope(config: Config, positions: int, *, theta: float = 10_000.0, kinds: Sequence[str] = ROPE_KINDS) -> Rope:
    """Read rotary settings, with the same precedence as transformers.

    Released files have ``rope_theta`` and ``rope_scaling``; recent transformers writes ``rope_parameters``. If both
    objects exist, ``rope_scaling`` is used. ``rope_theta`` in the object takes precedence over one beside it, but
    ``original_max_position_embeddings`` beside the object takes precedence over one in it.

    Args:
        config: of the model.
        positions: default of ``original_max_position_embeddings``.
        theta: default of ``rope_theta``.
        kinds: supported kinds.
    """
    key = "rope_scaling" if config.values.get("rope_scaling") else "rope_parameters"
    found = config.values.get(key) or {}
    if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
        raise config.error(f"{key} must be one object of plain settings for all layers")
    return make_rope(config, found, positions, theta, kinds)


def read_ropes_by_type(
    config: Config, positions: int, theta: float, local_theta: float, local_key: str = ""
) -> tuple[Rope, Rope]:
    """Read the rotary settings of layers with full and with sliding attention.

    Recent files have ``rope_parameters`` with one object per type. In older files, ``rope_theta`` and ``rope_scaling``
    apply to full attention.

    Args:
        config: of the model.
        positions: default of ``original_max_position_embeddings``.
        theta: default base with full attention.
        local_theta: the same with sliding attention.
        local_key: key of the base with sliding attention in older files, if they state it.
    """
    nested = config.values.get("rope_parameters") or {}
    if not isinstance(nested, dict):
        raise config.error(f"rope_parameters must have an object each for {FULL} and {SLIDING}")
    found = {kind: nested.get(kind) or {} for kind in (FULL, SLIDING)}
    if any(not isinstance(each, dict) for each in found.values()) or (nested and not set(nested) <= set(found)):
        raise config.error(f"rope_parameters must have an object each for {FULL} and {SLIDING}")
    scaling = config.values.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise config.error(f"rope_scaling must be an object, not {shown(scaling)}")
    if "type" in scaling and "rope_type" not in scaling:
        raise config.error("rope_scaling has type, which transformers ignores in this family; call it rope_type")
    beside = {key: value for key, value in config.values.items() if key != _ORIGINAL_POSITIONS}  # counts within only
    within, kinds = {**found[FULL], **scaling}, ("default", "linear", "llama3", "yarn")
    full = make_rope(Config(beside, config.where), within, positions, theta, kinds)
    local = config.positive(local_key, local_theta) if local_key else local_theta
    alone = Config({}, config.where)  # ``rope_theta`` beside the object is that of full attention
    return full, make_rope(alone, found[SLIDING], positions, local, ("default",))


def make_rope(config: Config, found: Mapping[str, Any], positions: int, theta: float, kinds: Sequence[str]) -> Rope:
    """Build a ``Rope`` from one object of settings; arguments as for ``read_rope``."""
    settings = Config(found, config.where)
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in kinds:
        raise config.error(f"rope type {shown(kind)} is not supported; supported: {', '.join(kinds)}")
    fraction = found.get("partial_rotary_factor") or config.values.get("partial_rotary_factor") or 1.0
    if fraction != 1.0 and "longrope" not in kinds:
        raise config.error("partial_rotary_factor is not supported")
    rope = Rope(
        theta=(settings if "rope_theta" in found else config).positive("rope_theta", theta),
        kind=kind,
        fraction=Config({"partial_rotary_factor": fraction}, config.where).positive("partial_rotary_factor"),
    )
    if rope.fraction > 1:
        raise config.error(f"partial_rotary_factor must be at most 1, not {rope.fraction:g}")
    if kind == "default":
        return rope
    place = config if config.values.get(_ORIGINAL_POSITIONS) is not None else settings
    if kind == "longrope":
        return _longrope(
            settings, replace(rope, original_positions=place.integer(_ORIGINAL_POSITIONS, positions)), positions
        )
    factor = settings.positive("factor", name="rope factor")
    if kind == "dynamic":
        # Dynamic scaling starts beyond ``max_position_embeddings``, which is the limit here. Beyond it, transformers
        # selects frequencies by the longest row so far, without rotating cached keys again.
        return replace(rope, kind="default")
    rope = replace(rope, factor=factor)
    if kind == "linear":
        return rope
    rope = replace(rope, original_positions=place.integer(_ORIGINAL_POSITIONS, positions))
    if kind == "yarn":
        return _yarn(settings, rope)
    low, high = (settings.positive(key, name=f"rope {key}") for key in ("low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise config.error("rope low_freq_factor must be less than high_freq_factor")
    return replace(rope, low_freq_factor=low, high_freq_factor=high)


def _yarn(settings: Config, rope: Rope) -> Rope:
    if rope.theta <= 1:
        raise settings.error(f"rope_theta must be more than 1 with yarn, not {rope.theta:g}")

    def magnitude(scale: float = 1.0) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * scale * math.log(rope.factor) + 1.0

    def turns(key: str, default: float) -> float:
        count = settings.positive(key, name=f"rope {key}") if found.get(key) else default
        if not 0 < rope.original_positions / (count * 2 * math.pi) < math.inf:  # the model takes its logarithm
            raise settings.error(f"rope {key} {count:g} is out of range")
        return count

    found, default = settings.values, magnitude()
    if found.get("mscale") and found.get("mscale_all_dim"):
        scales = (settings.positive(key, name=f"rope {key}") for key in ("mscale", "mscale_all_dim"))
        default = magnitude(next(scales)) / magnitude(next(scales))
    given = found.get("attention_factor")
    return replace(
        rope,
        magnitude=default if given is None else settings.positive("attention_factor", name="rope attention_factor"),
        beta_fast=turns("beta_fast", 32.0),
        beta_slow=turns("beta_slow", 1.0),
        truncate=settings.flag("truncate", True),
    )


def _longrope(settings: Config, rope: Rope, positions: int) -> Rope:
    if rope.original_positions < 2:
        raise settings.error(f"{_ORIGINAL_POSITIONS} must be at least 2, not {rope.original_positions}")
    factor = positions / rope.original_positions
    if settings.values.get("factor") is not None:
        factor = settings.positive("factor", name="rope factor")
    magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(rope.original_positions))
    if settings.values.get("attention_factor") is not None:
        magnitude = settings.positive("attention_factor", name="rope attention_factor")
    lists = []
    for key in ("short_factor", "long_factor"):
        values = settings.values.get(key)
        if not isinstance(values, list) or not values:
            raise settings.error(f"rope {key} must be a list of positive numbers")
        lists.append(tuple(Config({key: value}, settings.where).positive(key, name=f"rope {key}") for value in values))
    return replace(rope, magnitude=magnitude, short_factors=lists[0], long_factors=lists[1])


def _scaled_context(config: Config, positions: int, rope: Rope) -> int:
    """The usable context length, as in vLLM.

    Files with linear scaling state the length before scaling. Files with YaRN state the length before scaling in the
    rope's object, and either length beside it. All other files state the length after scaling.
    """
    before = {"linear": positions, "yarn": rope.original_positions}
    scaled = before[rope.kind] * rope.factor if rope.kind in before else positions
    if not 1 <= scaled < 2**31:
        raise config.error(f"rope factor {rope.factor:g} of {positions} positions gives no usable context")
    return int(scaled)


def read_window(config: Config, default: int | None) -> int | None:
    """``sliding_window``: number of positions that attention sees; None for no limit (null in the file)."""
    if config.values.get("sliding_window", default) is None:
        return None
    return config.integer("sliding_window", default)


def read_layer_types(config: Config, num_layers: int) -> list[str] | None:
    """``layer_types``: ``full_attention`` or ``sliding_attention`` per layer; None if the file has no such key."""
    kinds = config.values.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise config.error(f"layer_types must list {FULL} or {SLIDING} for each of {num_layers} layers")
    return kinds


def windows_by_type(config: Config, kinds: Sequence[str], window: int | None, keys: str) -> tuple[int | None, ...]:
    """The window of each layer: ``window`` with sliding attention, else None.

    ``keys`` names the keys that can turn windows off, for messages.
    """
    if window is None and SLIDING in kinds:
        raise config.error(f"layer_types has {SLIDING}, but {keys} says that there is none")
    return tuple(window if kind == SLIDING else None for kind in kinds)
