"""Names of weights in Megatron's ``model_optim_rng.pt`` files, of the old language model, megatron-core and EE-LLM.

The tables map them to our parameter names. The families' weight tables map a parameter to released tensors and describe
its tensor-parallel sharding.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Scope = Literal["backbone", "exit", "exit head", "known"]


@dataclass(frozen=True)
class StageParameter:
    """The parameter under a key of one pipeline stage's file.

    Attributes:
        scope: ``known`` for a key that is not a separate weight.
        name: our name of the parameter, relative to its layer if it is in one.
        index: layer in this stage, or number of an exit's head, from 0; None outside of layers.
    """

    scope: Scope
    name: str
    index: int | None = None


OLD_LAYER: dict[str, str] = {
    "input_norm.weight": "attention_norm.weight",
    "self_attention.query_key_value.weight": "attention.qkv.weight",
    "self_attention.query_key_value.bias": "attention.qkv.bias",
    "self_attention.dense.weight": "attention.output.weight",
    "self_attention.dense.bias": "attention.output.bias",
    "self_attention.q_norm.weight": "attention.q_layernorm.weight",
    "self_attention.k_norm.weight": "attention.k_layernorm.weight",
    "post_attention_norm.weight": "mlp_norm.weight",
    "mlp.dense_h_to_4h.weight": "mlp.gate_up.weight",
    "mlp.dense_h_to_4h.bias": "mlp.gate_up.bias",
    "mlp.dense_4h_to_h.weight": "mlp.down.weight",
    "mlp.dense_4h_to_h.bias": "mlp.down.bias",
}
"""``language_model.encoder.layers.N.``. Older files have "layernorm" instead of "norm"; Megatron reads both."""
OLD_MODEL: dict[str, str] = {
    "embedding.word_embeddings.weight": "embedding.weight",
    "encoder.final_norm.weight": "final_norm.weight",
    "output_layer.weight": "head.weight",
}
CORE_LAYER: dict[str, str] = {
    "input_layernorm.weight": "attention_norm.weight",
    "self_attention.linear_qkv.weight": "attention.qkv.weight",
    "self_attention.linear_qkv.bias": "attention.qkv.bias",
    "self_attention.linear_proj.weight": "attention.output.weight",
    "self_attention.linear_proj.bias": "attention.output.bias",
    "self_attention.q_layernorm.weight": "attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight": "attention.k_layernorm.weight",
    "pre_mlp_layernorm.weight": "mlp_norm.weight",
    "mlp.linear_fc1.weight": "mlp.gate_up.weight",
    "mlp.linear_fc1.bias": "mlp.gate_up.bias",
    "mlp.linear_fc2.weight": "mlp.down.weight",
    "mlp.linear_fc2.bias": "mlp.down.bias",
}
CORE_FUSED: dict[str, str] = {
    "self_attention.linear_qkv.layer_norm_weight": "attention_norm.weight",
    "mlp.linear_fc1.layer_norm_weight": "mlp_norm.weight",
}
"""Names of the norms that Transformer Engine's linear layers contain."""
CORE_MODEL: dict[str, str] = {
    "embedding.word_embeddings.weight": "embedding.weight",
    "decoder.final_layernorm.weight": "final_norm.weight",
    "output_layer.weight": "head.weight",
}
OLD = "language_model."
TIED_HEAD = StageParameter("known", "head.weight")
_NO_WEIGHT = ("_extra_state", "rotary_pos_emb.inv_freq")


def find_parameter(key: str, tied: bool) -> StageParameter | None:
    """The parameter under ``key``; None if the key is unknown.

    Args:
        key: as in the file, with the levels of a nested state dict joined by dots.
        tied: whether the LM head is the input embedding; later stages then hold copies of it.
    """
    if key.endswith(_NO_WEIGHT):
        return StageParameter("known", key)
    if key in ("word_embeddings_for_head.weight", "output_layer.weight"):
        return TIED_HEAD if tied else StageParameter("backbone", "head.weight")
    if not key.startswith(OLD):
        return _in_tables(key, r"decoder\.layers\.(\d+)\.(.+)", {**CORE_LAYER, **CORE_FUSED}, CORE_MODEL)
    key = key.removeprefix(OLD).replace("layernorm", "norm").replace(".attention.", ".self_attention.")
    head = re.fullmatch(r"exit_output_layer\.(\d+)\.weight", key)
    if head:
        return StageParameter("exit head", "head.weight", int(head[1]))
    return _in_tables(key, r"(?:encoder|transformer)\.layers\.(\d+)\.(.+)", _OLD_AND_EXITS, OLD_MODEL)


def _in_tables(key: str, layers: str, layer: dict[str, str], model: dict[str, str]) -> StageParameter | None:
    found = re.fullmatch(layers, key)
    if not found:
        key = re.sub(r"^transformer\.", "encoder.", key)
        return StageParameter("backbone", model[key]) if key in model else None
    parameter = layer.get(found[2])
    if parameter is None:
        return None
    if parameter.startswith("exit."):
        return StageParameter("exit", parameter.removeprefix("exit."), int(found[1]))
    return StageParameter("backbone", parameter, int(found[1]))


def _with_exits() -> dict[str, str]:
    """EE-LLM's early-exit layer. Its own MLP is ``mlp.trunk``; the exit's is ``mlp.branch`` or in ``exit_block``."""
    table = {**OLD_LAYER, "exit_norm.weight": "exit.norm.weight"}
    for name, parameter in OLD_LAYER.items():
        table[f"exit_block.{name}"] = f"exit.layer.{parameter}"
        if name.startswith("mlp."):
            table[f"mlp.trunk.{name[4:]}"] = parameter
            table[f"mlp.branch.{name[4:]}"] = f"exit.{parameter}"
    return table


_OLD_AND_EXITS = _with_exits()


def spell(parameter: StageParameter, old: bool) -> str:
    """The key of ``parameter`` for messages, in the old language model's form if ``old``, else megatron-core's."""
    if parameter.scope == "exit head":
        return f"{OLD}exit_output_layer.{parameter.index}.weight"
    wanted = f"exit.{parameter.name}" if parameter.scope == "exit" else parameter.name
    layer, model = (_OLD_AND_EXITS, OLD_MODEL) if old else (CORE_LAYER, CORE_MODEL)
    start = OLD if old else ""
    if parameter.index is None:
        return start + next(key for key, name in model.items() if name == wanted)
    inner = next(key for key, name in layer.items() if name == wanted)
    return f"{start}{'encoder' if old else 'decoder'}.layers.{parameter.index}.{inner}"
