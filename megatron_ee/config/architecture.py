"""What a released model's ``config.json`` says of its shape, by family."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ee.config.untrusted import allowed_root, check_confined, read_json
from megatron_ee.errors import CheckpointError, shown

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

MAX_LAYERS = 10_000
"""Far beyond any model: a hostile number of layers must not cost memory before it is refused."""
MAX_FILE = 16 * 2**20  # bytes; released files have a few KiB
_OUTSIDE_OUTPUTS = ("family", "max_positions", "tied")
"""Fields that alone change no output: the first two only name and limit, and the weights show what is tied."""


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base, and Llama 3's or linear frequency scaling.

    Attributes:
        theta: base of the frequencies.
        kind: ``default``, ``linear`` or ``llama3``.
        factor: how many times longer the context becomes.
        low_freq_factor: Llama 3: wavelengths above ``original_positions / low_freq_factor`` are scaled fully.
        high_freq_factor: Llama 3: wavelengths below ``original_positions / high_freq_factor`` stay.
        original_positions: Llama 3: context before scaling.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True)
class Architecture:
    """Shape of a decoder-only model, in the field's names.

    Attributes:
        family: ``llama``, ``mistral``, ``qwen2`` or ``qwen3``.
        max_positions: the context; with linear scaling ``max_position_embeddings`` times the factor, as in vLLM.
        windows: per layer, how many positions attention looks back (its own included); None is unlimited.
        tied: the LM head is the input embedding.
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


def outputs_digest(architecture: Architecture) -> str:
    """SHA-256 (hex) of the settings that decide what given weights compute: rope, epsilon, windows, sizes, biases.

    Equal digests and equal weights give equal outputs. ``family``, ``max_positions`` and ``tied`` do not count. A
    field at its default does not count either, so a new field with a default leaves the digests of older models as
    they were. The digest is stored in files: do not change how it is computed.
    """
    text = json.dumps(_settings(architecture), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def output_settings(architecture: Architecture) -> dict[str, Any]:
    """What ``outputs_digest`` is made of, as JSON holds it, with ``rope.theta`` and the like in one flat object."""
    found: dict[str, Any] = {}
    for name, setting in json.loads(json.dumps(_settings(architecture))).items():
        found |= {f"{name}.{part}": each for part, each in setting.items()} if name == "rope" else {name: setting}
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
    defaults = {f"rope.{field.name}": field.default for field in dataclasses.fields(Rope)}
    return shown(settings[name] if name in settings else defaults.get(name))


def _settings(value: Architecture | Rope) -> dict[str, Any]:
    """Fields by name that count for ``outputs_digest``."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        setting = getattr(value, field.name)
        if field.name not in _OUTSIDE_OUTPUTS and setting != field.default:
            found[field.name] = _settings(setting) if isinstance(setting, Rope) else setting
    return found


def read_architecture(directory: str | Path) -> Architecture:
    """Read ``directory/config.json``.

    Raises:
        CheckpointError: no such file, not JSON, a family or setting that is not supported, or a bad value.
    """
    path = Path(directory) / "config.json"
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: not found; give a Hugging Face model directory with a config.json")
    check_confined(path, allowed_root(path.parent))
    config = read_json(path, MAX_FILE)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return parse_architecture(config, str(path))


def parse_architecture(config: dict[str, Any], where: str = "config.json") -> Architecture:
    """Architecture from the parsed ``config.json``; ``where`` names it in errors.

    Raises:
        CheckpointError: as ``read_architecture``.
    """
    family = _family(config, where)
    if config.get("auto_map"):
        raise CheckpointError(f"{where}: auto_map asks for code from the checkpoint; that is never run")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        raise CheckpointError(f"{where}: hidden_act {shown(config['hidden_act'])} is not supported, only 'silu'")
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            raise CheckpointError(f"{where}: {key} is set; quantised checkpoints are not supported")

    num_layers = _integer(config, "num_hidden_layers", where, most=MAX_LAYERS)
    hidden_size = _integer(config, "hidden_size", where)
    num_heads = _integer(config, "num_attention_heads", where)
    # What transformers assumes where a released file leaves the key out. A null means the same for every family.
    kv_default = {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(family, num_heads)
    kv_default = num_heads if "num_key_value_heads" in config else kv_default
    head_default = 128 if family == "qwen3" and "head_dim" not in config else hidden_size // num_heads
    positions_default = {"mistral": 131_072, "qwen2": 32_768, "qwen3": 32_768}.get(family, 2048)
    num_kv_heads = _integer(config, "num_key_value_heads", where, kv_default)
    head_dim = _integer(config, "head_dim", where, head_default)
    positions = _integer(config, "max_position_embeddings", where, positions_default)
    rope = _rope(config, positions, where)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"{where}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )
    if head_dim % 2:
        raise CheckpointError(f"{where}: head_dim {head_dim} is odd; rotary embeddings need an even one")
    bias = _flag(config, "attention_bias", where)
    return Architecture(
        family=family,
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_size=_integer(config, "intermediate_size", where),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=_integer(config, "vocab_size", where),
        max_positions=_context(positions, rope, where),
        norm_eps=_positive(config.get("rms_norm_eps", 1e-6), "rms_norm_eps", where),
        rope=rope,
        qkv_bias=family == "qwen2" or (family in ("llama", "qwen3") and bias),
        output_bias=family in ("llama", "qwen3") and bias,
        mlp_bias=family == "llama" and _flag(config, "mlp_bias", where),
        qk_norm=family == "qwen3",
        tied=_flag(config, "tie_word_embeddings", where),
        windows=_windows(config, family, num_layers, where),
    )


def _family(config: dict[str, Any], where: str) -> str:
    names, model_type = config.get("architectures") or [], config.get("model_type")
    known = ", ".join(sorted(FAMILIES))
    if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str):
        family = FAMILIES.get(names[0])
        if family is None:
            raise CheckpointError(f"{where}: architecture {shown(names[0])} is not supported; supported: {known}")
        if model_type not in (None, family):
            raise CheckpointError(
                f"{where}: model_type {shown(model_type)} contradicts architecture {shown(names[0])}; correct one"
            )
        return family
    if not names and isinstance(model_type, str) and model_type in FAMILIES.values():
        return model_type
    raise CheckpointError(
        f"{where}: architectures {shown(names)} (model_type {shown(model_type)}) not supported; supported: {known}"
    )


def _integer(config: dict[str, Any], key: str, where: str, default: int | None = None, most: int = 2**31 - 1) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"{where}: {key} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{where}: {key} must be a positive whole number, not {shown(value)}")
    if value > most:
        raise CheckpointError(f"{where}: {key} {shown(value)} is beyond any model; at most {most}")
    return value


def _positive(value: Any, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise CheckpointError(f"{where}: {key} must be a positive number, not {shown(value)}")
    return float(value)


def _flag(config: dict[str, Any], key: str, where: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{where}: {key} must be true or false, not {shown(value)}")
    return bool(value)


def _rope(config: dict[str, Any], positions: int, where: str) -> Rope:
    """Rotary settings, read from where transformers takes them.

    Released files have ``rope_theta`` and ``rope_scaling``, recent transformers writes ``rope_parameters``. Of two
    objects, ``rope_scaling`` counts. A ``rope_theta`` within the object comes before one beside it, but
    ``original_max_position_embeddings`` beside the object comes before one within; ``positions`` is its default.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    settings = config.get(key) or {}
    if not isinstance(settings, dict) or any(isinstance(value, dict) for value in settings.values()):
        raise CheckpointError(f"{where}: {key} must be one object of plain settings for all layers")
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise CheckpointError(f"{where}: rope type {shown(kind)} is not supported; supported: default, linear, llama3")
    if (config.get("partial_rotary_factor") or settings.get("partial_rotary_factor") or 1.0) != 1.0:
        raise CheckpointError(f"{where}: partial_rotary_factor is not supported")
    theta = settings.get("rope_theta", config.get("rope_theta", 10_000.0))
    scaled: dict[str, float] = {}
    if kind != "default":
        scaled["factor"] = _positive(settings.get("factor"), "rope factor", where)
    if kind == "llama3":
        for key in ("low_freq_factor", "high_freq_factor"):
            scaled[key] = _positive(settings.get(key), f"rope {key}", where)
        if scaled["low_freq_factor"] >= scaled["high_freq_factor"]:
            raise CheckpointError(f"{where}: rope low_freq_factor must be less than high_freq_factor")
        key = "original_max_position_embeddings"
        place = config if config.get(key) is not None else settings
        scaled["original_positions"] = _integer(place, key, where, positions)
    return Rope(theta=_positive(theta, "rope_theta", where), kind=kind, **scaled)  # type: ignore[arg-type]


def _context(positions: int, rope: Rope, where: str) -> int:
    """Positions that can be used. Files with linear scaling state those before it; all other files, those after."""
    scaled = positions * rope.factor if rope.kind == "linear" else positions
    if not 1 <= scaled < 2**31:
        raise CheckpointError(f"{where}: rope factor {rope.factor:g} of {positions} positions gives no usable context")
    return int(scaled)


def _windows(config: dict[str, Any], family: str, num_layers: int, where: str) -> tuple[int | None, ...]:
    window, kinds = config.get("sliding_window", 4096), config.get("layer_types")
    if family == "llama":
        return (None,) * num_layers
    if family.startswith("qwen") and not _flag(config, "use_sliding_window", where):
        window = None
    if window is not None:
        window = _integer({"sliding_window": window}, "sliding_window", where)
    if kinds is not None:
        return _listed_windows(kinds, window, family, num_layers, where)
    if window is None:
        return (None,) * num_layers
    first = config.get("max_window_layers", 28) if family.startswith("qwen") else 0
    if type(first) is not int:
        raise CheckpointError(f"{where}: max_window_layers must be a whole number, not {shown(first)}")
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _listed_windows(kinds: Any, window: int | None, family: str, num_layers: int, where: str) -> tuple[int | None, ...]:
    """Windows by ``layer_types``. Where it contradicts the window, readers disagree: transformers' Qwen fails, its
    Mistral ignores ``layer_types``, and vLLM goes by them.
    """
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
        raise CheckpointError(
            f"{where}: layer_types must list full_attention or sliding_attention for each of {num_layers} layers"
        )
    if window is None and "sliding_attention" in kinds:
        switch = "use_sliding_window or sliding_window" if family.startswith("qwen") else "sliding_window"
        raise CheckpointError(f"{where}: layer_types has sliding_attention, but {switch} says that there is none")
    if window is not None and "full_attention" in kinds and family == "mistral":
        raise CheckpointError(
            f"{where}: layer_types has full_attention, which transformers ignores in a Mistral model with a "
            "sliding_window; remove one of the two"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
