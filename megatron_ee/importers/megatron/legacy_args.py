"""Derives ``config.json`` and the exits from a Megatron run's arguments, which its checkpoints hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import Body, Head
from megatron_ee.errors import CheckpointError, shown

LLAMA3_CONTEXT = 8192  # positions before Llama 3's scaling; this and the two factors below are constants in Megatron
LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0
STRETCHED = "rotary_seq_len_interpolation_factor"  # linear scaling
_MUST_BE: dict[str, Any] = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
}
_MUST_NOT_BE = (
    *("rotary_interleaved", "apply_layernorm_1p", "apply_residual_connection_post_layernorm", "squared_relu"),
    *("multi_latent_attention", "num_experts", "mtp_num_layers", "no_rope_freq", "qk_l2_norm"),
)


@dataclass(frozen=True)
class Args:
    """The arguments of a run.

    Attributes:
        where: source of the arguments, for messages.
        values: arguments by name, as in the checkpoint.
    """

    where: str
    values: Mapping[str, Any]

    def need(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """The value of ``name``, which must have the type ``kind`` (a bool is not a number).

        Raises:
            CheckpointError: it is missing or has another type.
        """
        if self.values.get(name) is None:
            raise CheckpointError(f"{self.where}: {name} is missing, which config.json needs; give --config DIR")
        return self.get(name, None, kind)

    def get(self, name: str, default: Any, kind: type | tuple[type, ...]) -> Any:
        """As ``need``, but returns ``default`` if the value is missing or None."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"{self.where}: {name} is {shown(value)}, which cannot be used; give --config DIR")
        return value


def check_supported(args: Args) -> None:
    """Refuse options that our decoder layer does not support. Many of them do not affect the shapes of weights.

    Raises:
        CheckpointError: an option is not supported; the message names the argument.
    """
    values = dict(args.values)
    if values.get("use_rotary_position_embeddings"):  # Megatron's older form of this option
        values["position_embedding_type"] = "rope"
    for name, wanted in _MUST_BE.items():
        if values.get(name) not in (None, wanted):
            raise CheckpointError(f"{args.where}: {name} is {shown(values[name])}; only {wanted!r} is supported")
    for name in _MUST_NOT_BE:
        if values.get(name):
            raise CheckpointError(f"{args.where}: {name} is {shown(values[name])}; such models are not supported")


def derive_config(args: Args, dtype: torch.dtype) -> dict[str, Any]:
    """Derive ``config.json``.

    The family is Qwen3 with q/k norms, Qwen2 with biases of q, k and v only, Mistral with a window, else Llama.

    Args:
        args: of the run.
        dtype: of the weights.

    Raises:
        CheckpointError: an argument is missing (the message names it), or no supported family matches.
    """
    check_supported(args)
    args.need("swiglu", bool)
    args.need("normalization", str)
    if not args.values.get("use_rotary_position_embeddings"):
        args.need("position_embedding_type", str)
    heads, hidden = args.need("num_attention_heads", int), args.need("hidden_size", int)
    grouped = args.get("group_query_attention", False, bool)
    eps = args.get("norm_epsilon", None, float)
    return {
        **_family(args),
        "hidden_size": hidden,
        "intermediate_size": args.need("ffn_hidden_size", int),
        "num_hidden_layers": args.need("num_layers", int),
        "num_attention_heads": heads,
        "num_key_value_heads": args.need("num_query_groups", int) if grouped else heads,
        "head_dim": args.get("kv_channels", hidden // max(1, heads), int),
        "hidden_act": "silu",
        "max_position_embeddings": _positions(args),
        "rms_norm_eps": args.need("layernorm_epsilon", float) if eps is None else eps,
        "tie_word_embeddings": not args.get("untie_embeddings_and_output_weights", False, bool),
        # Not the padded size, because the amount of padding is not recorded there.
        "vocab_size": args.need("vocab_size", int),
        "torch_dtype": str(dtype).removeprefix("torch."),
        # Megatron records no special tokens, and transformers would use Llama's by default.
        "bos_token_id": None,
        "eos_token_id": None,
        **_rope(args),
    }


def _family(args: Args) -> dict[str, Any]:
    biases = args.need("add_bias_linear", bool)
    qkv_biases, norms = (biases or args.get("add_qkv_bias", False, bool)), args.get("qk_layernorm", False, bool)
    windows = _windows(args)
    if norms and not qkv_biases:
        name, more = "Qwen3", {"attention_bias": False}
    elif qkv_biases and not biases and not norms:
        name, more = "Qwen2", {}
    elif windows and not qkv_biases and "full_attention" not in windows.get("layer_types", ()):
        name, more = "Mistral", {}
    elif not windows and not norms:
        name, more = "Llama", {"attention_bias": biases, "mlp_bias": biases}
    else:
        raise CheckpointError(
            f"{args.where}: no supported family has this combination of add_bias_linear, add_qkv_bias, qk_layernorm "
            "and window_size"
        )
    if name.startswith("Qwen"):
        windows = {**windows, "use_sliding_window": bool(windows), "max_window_layers": 0}
    return {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower(), **more, **windows}


def _windows(args: Args) -> dict[str, Any]:
    """Attention windows. Megatron counts the positions before a token's own, and those after it (0)."""
    window, skip = args.get("window_size", None, (list, tuple)), args.values.get("window_attn_skip_freq")
    if window is None or tuple(window) == (-1, 0):
        return {}
    if len(window) != 2 or type(window[0]) is not int or window[0] < 0 or window[1] != 0:
        raise CheckpointError(f"{args.where}: window_size is {shown(window)}, which is not supported")
    found: dict[str, Any] = {"sliding_window": window[0] + 1}
    if skip is not None:
        layers = args.need("num_layers", int)
        every = [number % skip != 0 for number in range(1, layers + 1)] if type(skip) is int and skip > 0 else skip
        if not isinstance(every, (list, tuple)) or len(every) != layers:
            raise CheckpointError(f"{args.where}: window_attn_skip_freq is {shown(skip)}, which is not supported")
        found["layer_types"] = ["sliding_attention" if inside else "full_attention" for inside in every]
    return found


def _positions(args: Args) -> int:
    """Context length. Megatron records it after linear scaling, ``config.json`` before."""
    used = int(args.need("max_position_embeddings", int))
    factor = args.get(STRETCHED, 1.0, (int, float))
    if not 0 < factor < float("inf"):
        raise CheckpointError(f"{args.where}: {STRETCHED} is {shown(factor)}, which cannot be used; give --config DIR")
    before = int(used / factor)
    return before if int(before * factor) >= used else before + 1


def _rope(args: Args) -> dict[str, Any]:
    stretched = args.get(STRETCHED, None, (int, float))
    scaling: dict[str, Any] | None = None
    if args.get("use_rope_scaling", False, bool):
        if stretched is not None:
            raise CheckpointError(f"{args.where}: use_rope_scaling with {STRETCHED} is not supported")
        scaling = {
            "rope_type": "llama3",
            "factor": float(args.get("rope_scaling_factor", 8.0, (int, float))),
            "low_freq_factor": LLAMA3_LOW,
            "high_freq_factor": LLAMA3_HIGH,
            "original_max_position_embeddings": LLAMA3_CONTEXT,
        }
    elif stretched is not None:
        scaling = {"rope_type": "linear", "factor": float(stretched)}
    # The default is the constant from before it was an argument.
    return {"rope_theta": float(args.get("rotary_base", 10_000, (int, float))), "rope_scaling": scaling}


def check_agreement(args: Args, arch: Architecture, config: str) -> None:
    """Refuse a configuration that contradicts the arguments about the model or the layout of its weights.

    Args:
        args: of the run.
        arch: architecture of the configuration.
        config: name of the configuration, for messages.

    Raises:
        CheckpointError: they differ (the message names the argument and both values), or as ``check_supported``.
    """
    check_supported(args)
    ours: dict[str, Any] = {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_size,
        "num_attention_heads": arch.num_heads,
        "kv_channels": arch.head_dim,
        "untie_embeddings_and_output_weights": not arch.tied,
    }
    if args.values.get("group_query_attention"):
        ours["num_query_groups"] = arch.num_kv_heads
    for name, value in ours.items():
        found = args.values.get(name)
        if found is not None and found != value:
            raise CheckpointError(
                f"{args.where}: {name} is {shown(found)}, but {value} by {config}; give the configuration that belongs "
                "to these weights"
            )


def differing_settings(args: Args, arch: Architecture, config: str) -> tuple[str, ...]:
    """Notices about settings that differ between the arguments and the configuration.

    They cover only settings that do not affect a tensor's shape. The configuration is used, because the arguments may
    be a converter's defaults.

    Args:
        args: of the checkpoint.
        arch: architecture of the configuration.
        config: name of the configuration, for the notices.
    """
    rope = arch.rope
    windows = [window for window in arch.windows if window is not None]
    ours: dict[str, Any] = {
        "norm_epsilon": arch.norm_eps,
        "layernorm_epsilon": arch.norm_eps,  # the argument's name in older releases
        "rotary_base": rope.theta,
        STRETCHED: rope.factor if rope.kind == "linear" else None,
        "use_rope_scaling": rope.kind == "llama3",
        "window_size": (windows[0] - 1, 0) if windows else None,
    }
    if rope.kind == "llama3" and args.values.get("use_rope_scaling"):
        ours["rope_scaling_factor"] = rope.factor
    lines = []
    for name, value in ours.items():
        found = args.values.get(name, value)
        found = tuple(found) if isinstance(found, list) else found
        if found != value and (name, found, value) != ("window_size", (-1, 0), None):
            lines.append(f"{args.where}: {name} is {shown(found)}, but {shown(value)} by {config}, which is used")
    return tuple(lines)


@dataclass(frozen=True)
class EarlyExit:
    """An exit of EE-LLM.

    Attributes:
        spec: the equivalent exit.
        layer: number, from 1, of EE-LLM's layer that holds its weights.
    """

    spec: ExitSpec
    layer: int


def early_exits(args: Args, arch: Architecture) -> tuple[EarlyExit, ...]:
    """EE-LLM's exits, in the order in which each pipeline stage numbers their heads.

    With ``pre_exit`` an exit reads its layer's input, so it is an exit after the previous layer.

    Args:
        args: of the run.
        arch: of the backbone.

    Raises:
        CheckpointError: an exit has no equivalent in this package.
    """
    layers = args.get("exit_layer_nums", [], (list, tuple))
    if not layers:
        return ()
    if any(type(layer) is not int or not 1 <= layer <= arch.num_layers for layer in layers):
        raise CheckpointError(
            f"{args.where}: exit_layer_nums {shown(layers)} are not layers from 1 to {arch.num_layers}"
        )
    if len(set(layers)) < len(layers):
        raise CheckpointError(f"{args.where}: exit_layer_nums {shown(layers)} name a layer twice")
    before, own = args.get("pre_exit", False, bool), args.get("untie_exit_output_weights", False, bool)
    if before and 1 in layers:
        raise CheckpointError(
            f"{args.where}: pre_exit at layer 1 reads the embedding; exits here read a layer's output"
        )
    if not own and not arch.tied:
        raise CheckpointError(
            f"{args.where}: untie_exit_output_weights is off, so exits share the input embedding, which is not "
            "this model's LM head; such heads are not supported"
        )
    body, head = _body(args, before), "own" if own else "shared"
    weights = args.get("exit_layer_weight", [], (list, tuple))
    weights = weights if len(weights) == len(layers) else [1.0] * len(layers)
    return tuple(
        EarlyExit(_spec(layer - before, body, head, weight), layer)
        for layer, weight in zip(layers, weights, strict=True)
    )


def _spec(layer: int, body: Body, head: str, weight: Any) -> ExitSpec:
    """The spec of an exit. The loss weight is 1 if the given weight is 0 or not a number."""
    usable = isinstance(weight, (int, float)) and 0 < weight < float("inf")
    named: Head = "own" if head == "own" else "shared"
    return ExitSpec(layer, body, named, float(weight) if usable else 1.0)


def _body(args: Args, before: bool) -> Body:
    mlp, block, norm = (args.get(f"use_exit_{part}", False, bool) for part in ("mlp", "block", "norm"))
    if mlp and (block or before):
        other = "use_exit_block" if block else "pre_exit"
        raise CheckpointError(f"{args.where}: exits with both use_exit_mlp and {other} are not supported")
    if (mlp or block) and not norm:
        kind = "use_exit_mlp" if mlp else "use_exit_block"
        raise CheckpointError(f"{args.where}: {kind} without use_exit_norm is not supported: our heads read a norm")
    return "mlp" if mlp else "layer" if block else "norm" if norm else "embedding"
