"""Converts between Megatron's two forms of a model's settings and ours.

Megatron-LM saves its command-line arguments in ``common.pt``. ``legacy_args`` reads them and ``to_args`` creates them.
Megatron-Bridge saves a ``run_config.yaml`` whose ``model`` has the fields of megatron-core's ``TransformerConfig``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_ee.config.architecture import Architecture
from megatron_ee.errors import CheckpointError, shown
from megatron_ee.families.family import LLAMA_LAYER
from megatron_ee.families.registry import FAMILIES
from megatron_ee.importers.megatron.legacy_args import LLAMA3_CONTEXT, LLAMA3_HIGH, LLAMA3_LOW, Args

_ARGUMENTS = {
    "layernorm_epsilon": "norm_epsilon",
    "seq_length": "max_position_embeddings",
    "gated_linear_unit": "swiglu",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "num_moe_experts": "num_experts",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
}
"""Field of ``TransformerConfig`` -> argument of Megatron-LM, if the names differ."""


def bridge_args(content: Any, where: str) -> Args:
    """Convert a ``run_config.yaml`` to Megatron-LM's arguments.

    Args:
        content: content of the file.
        where: name of the file, for messages.

    Raises:
        CheckpointError: it does not describe a supported model.
    """
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise CheckpointError(f"{where}: has no model; give the model's Hugging Face directory with --config DIR")
    inner = model.get("transformer")
    fields = {**model, **inner} if isinstance(inner, dict) else model
    values = {_ARGUMENTS.get(name, name): value for name, value in fields.items()}
    activation = fields.get("activation_func")
    name = activation.get("_target_") if isinstance(activation, dict) else activation
    if not str(name).endswith("silu"):
        values["swiglu"] = False
    if "old_context_len" in fields:  # the first releases' form of Llama 3's scaling
        found = tuple(fields.get(name) for name in ("low_freq_factor", "high_freq_factor", "old_context_len"))
        if found != (LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT):
            raise CheckpointError(f"{where}: rope scaling {shown(found)} is not Llama 3's; give --config DIR")
        values |= {"use_rope_scaling": True, "rope_scaling_factor": fields.get("scale_factor")}
    values["group_query_attention"] = fields.get("num_query_groups") is not None
    values["untie_embeddings_and_output_weights"] = not fields.get("share_embeddings_and_output_weights", True)
    return Args(where, values)


def check_family(arch: Architecture, where: str) -> None:
    """Refuse a family that is not mapped to Megatron's names; arguments and errors as ``check_expressible``."""
    what = None
    if FAMILIES[arch.family].layer is not LLAMA_LAYER:
        what = "tensors of other names"
    elif arch.rope.kind not in ("default", "linear", "llama3"):
        what = f"rope type {arch.rope.kind}"
    for field in dataclasses.fields(arch):
        if field.default is not dataclasses.MISSING and getattr(arch, field.name) != field.default:
            what = field.name
    if what is not None:
        raise CheckpointError(
            f"{where}: {arch.family} models have {what}, which Megatron's checkpoints do not support; convert the "
            "model --to hf or --to parallel"
        )


def check_expressible(arch: Architecture, where: str) -> None:
    """Refuse a model that megatron-core's ``GPTModel`` cannot compute.

    Args:
        arch: of the model.
        where: name of its source, for messages.

    Raises:
        CheckpointError: it is not supported; the message names the setting.
    """
    check_family(arch, where)
    biases = arch.qkv_bias, arch.output_bias, arch.mlp_bias
    if biases not in ((False, False, False), (True, False, False), (True, True, True)):
        have = "attention_bias without mlp_bias" if arch.output_bias else "mlp_bias without attention_bias"
        raise CheckpointError(
            f"{where}: has {have}, which Megatron cannot express: its add_bias_linear is one switch for both; convert "
            "the model --to hf or --to parallel"
        )
    rope = arch.rope
    frequencies = rope.low_freq_factor, rope.high_freq_factor, rope.original_positions
    if rope.kind == "llama3" and frequencies != (LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT):
        raise CheckpointError(
            f"{where}: rope scaling has low_freq_factor {rope.low_freq_factor:g}, high_freq_factor "
            f"{rope.high_freq_factor:g} and original_max_position_embeddings {rope.original_positions}, which Megatron "
            f"cannot express: it has {LLAMA3_LOW:g}, {LLAMA3_HIGH:g} and {LLAMA3_CONTEXT} built in; convert the model "
            "--to hf or --to parallel"
        )


def to_args(arch: Architecture, padded_vocab: int) -> dict[str, Any]:
    """Megatron-LM's arguments for a model, for ``--use-checkpoint-args``.

    They are complete for every model that passes ``check_expressible``.
    """
    windows = sorted({window for window in arch.windows if window is not None})
    args: dict[str, Any] = {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_size,
        "num_attention_heads": arch.num_heads,
        "group_query_attention": arch.num_kv_heads != arch.num_heads,
        "num_query_groups": arch.num_kv_heads,
        "kv_channels": arch.head_dim,
        "vocab_size": arch.vocab_size,
        "padded_vocab_size": padded_vocab,
        "max_position_embeddings": arch.max_positions,
        "seq_length": arch.max_positions,
        "normalization": "RMSNorm",
        "norm_epsilon": arch.norm_eps,
        "apply_layernorm_1p": False,
        "swiglu": True,
        "squared_relu": False,
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": True,
        "rotary_base": int(arch.rope.theta) if arch.rope.theta.is_integer() else arch.rope.theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": arch.rope.factor if arch.rope.kind == "linear" else None,
        "use_rope_scaling": arch.rope.kind == "llama3",
        "rope_scaling_factor": arch.rope.factor if arch.rope.kind == "llama3" else 8.0,
        "add_bias_linear": arch.mlp_bias,
        "add_qkv_bias": arch.qkv_bias,
        "qk_layernorm": arch.qk_norm,
        "untie_embeddings_and_output_weights": not arch.tied,
        "window_size": (windows[0] - 1, 0) if windows else None,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "ckpt_format": "torch_dist",
    }
    if windows and None in arch.windows:
        args["window_attn_skip_freq"] = [int(window is not None) for window in arch.windows]
    return args
