"""Frozen and trained parameters of one rank of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.registry import body_of
from megatron_ee.exits.tensors import parameter_sizes
from megatron_ee.parallel.costs import padded_vocab
from megatron_ee.parallel.layout import Layout, StageLayout


def stage_parameters(
    layout: Layout,
    index: int,
    architecture: Architecture,
    specs: Sequence[ExitSpec],
    tensor: int = 1,
    distillation: bool = False,
) -> tuple[int, int]:
    """Frozen and trained parameters of each rank of stage ``index``. A tensor that two modules share counts once.

    The first stage has the embedding. With ``distillation`` the last stage with layers has the final norm and the LM
    head. A stage that hosts a ``shared`` or ``low_rank`` head has a copy of the LM head, unless it already holds it for
    the final exit or as a tied embedding.
    """
    stage, hidden = layout.stages[index], architecture.hidden_size
    vocabulary = padded_vocab(architecture.vocab_size, tensor) // tensor * hidden
    hosted = hosted_by(stage, specs)
    first, last = 1 in stage.layers, distillation and index == layout.last_layered
    frozen = len(stage.layers) * layer_parameters(architecture, tensor)
    frozen += first * vocabulary + last * hidden
    if (last or any(spec.head != "own" for spec in hosted)) and not (first and architecture.tied):
        frozen += vocabulary
    frozen += hidden * sum(len(body_of(spec).frozen(architecture, spec.layer)) for spec in hosted)  # norms
    return frozen, sum(trained_parameters(architecture, spec, tensor) for spec in hosted)


def layer_parameters(architecture: Architecture, tensor: int = 1) -> int:
    """Parameters of one decoder layer on one tensor-parallel rank."""
    arch, hidden = architecture, architecture.hidden_size
    query, key = head_rows(arch, tensor)
    attention = (query + 2 * key) * (hidden + arch.qkv_bias) + hidden * (query + arch.output_bias)
    qk_norms = query + key if arch.qk_norm_whole else 2 * arch.head_dim * arch.qk_norm
    norms = 2 * hidden * (arch.norms_before + arch.norms_after)
    return attention + qk_norms + norms + mlp_parameters(arch, tensor)


def layer_matrices(architecture: Architecture, tensor: int = 1) -> int:
    """Elements of the matrices of one decoder layer on one tensor-parallel rank."""
    query, key = head_rows(architecture, tensor)
    return architecture.hidden_size * (2 * query + 2 * key + 3 * architecture.ffn_size // tensor)


def input_features(architecture: Architecture) -> tuple[int, int, int]:
    """Input features of the matrices of a decoder layer: of most, of attention's output, and of the MLP's."""
    return architecture.hidden_size, architecture.num_heads * architecture.head_dim, architecture.ffn_size


def layer_bytes(architecture: Architecture, itemsize: int, bits: float, tensor: int = 1) -> int:
    """Bytes of one decoder layer on one tensor-parallel rank.

    Args:
        architecture: of the model.
        itemsize: bytes of a weight that is not quantised.
        bits: of a weight of the matrices; 0 if they are not quantised.
        tensor: tensor-parallel size.
    """
    matrices, whole = layer_matrices(architecture, tensor), layer_parameters(architecture, tensor)
    return (whole - matrices) * itemsize + round(matrices * (bits or 8 * itemsize) / 8)


def mlp_parameters(architecture: Architecture, tensor: int = 1) -> int:
    """Parameters of one gated MLP on one tensor-parallel rank."""
    arch, hidden, ffn = architecture, architecture.hidden_size, architecture.ffn_size // tensor
    return 2 * ffn * (hidden + arch.mlp_bias) + hidden * (ffn + arch.mlp_bias)


@lru_cache(maxsize=1024)
def trained_parameters(architecture: Architecture, spec: ExitSpec, tensor: int = 1) -> int:
    """Trained parameters of one exit on one tensor-parallel rank."""
    return sum(parameter_sizes(spec, architecture, tensor))


def hosted_by(stage: StageLayout, specs: Sequence[ExitSpec]) -> list[ExitSpec]:
    return [spec for spec in specs if spec.layer in stage.exits]


def head_rows(architecture: Architecture, tensor: int) -> tuple[int, int]:
    """Total size of the query heads and of the key heads of one tensor-parallel rank."""
    arch = architecture
    return arch.num_heads * arch.head_dim // tensor, arch.num_kv_heads * arch.head_dim // tensor
