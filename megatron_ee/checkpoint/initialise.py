"""Initialises new exits, from the model's weights or at random."""

from __future__ import annotations

import hashlib
import math

import torch

from megatron_ee.checkpoint.derived import constant, normal
from megatron_ee.checkpoint.loading import fill, load_frozen_norms
from megatron_ee.checkpoint.saved_model import SavedModel
from megatron_ee.checkpoint.tensors import StoredTensor
from megatron_ee.config.architecture import Architecture
from megatron_ee.exits.exit import Exit
from megatron_ee.exits.tensors import exit_copy_sources, trained_parts
from megatron_ee.model.names import blocks

INIT_STD = 0.02
OUTPUT_PROJECTIONS = ("mlp.down_proj.weight", "self_attn.o_proj.weight")
LOW_RANK_UP = "lm_head.b"


@torch.no_grad()
def initialise_exit(exit_: Exit, model: SavedModel, seed: int) -> None:
    """Initialise a new exit, by copies unless its ``init`` is ``random``. Equal for every tensor-parallel size.

    A ``low_rank`` head starts equal to the backbone's: A is normal(0, 0.02), B is zero (as in LoRA, arXiv 2106.09685).

    Raises:
        CheckpointError: a file cannot be read.
    """
    if exit_.spec.init == "random":
        load_frozen_norms(exit_, model)
    else:
        fill(exit_copy_sources(exit_), model, exit_.setup)
    tensor, drawn = exit_.setup.groups.tensor, dict[str, StoredTensor]()
    for parameter, part in trained_parts(exit_):
        if exit_.spec.init != "random" and part.copied is not None:
            continue
        parameter.zero_()  # rows that pad the vocabulary stay zero
        for block in blocks(parameter, part.saved, exit_.setup.architecture, tensor.rank(), tensor.size()):
            if block.name not in drawn:
                layer, arch = exit_.spec.layer, exit_.setup.architecture
                drawn[block.name] = random_tensor(block.name, block.shape, layer, seed, parameter.dtype, arch)
            drawn[block.name].read(block.tensor, block.offset)


def random_tensor(
    name: str, shape: tuple[int, ...], layer: int, seed: int, dtype: torch.dtype, arch: Architecture
) -> StoredTensor:
    """Initial values of a tensor that is not copied, of the exit after ``layer``.

    The values depend on its adapter name and the seed. Norms multiply by 1. Biases and B of a ``low_rank`` head are 0.
    All others are normal(0, 0.02), and output projections normal(0, 0.02 / sqrt(2 k)), drawn in float32.
    """
    if len(shape) == 1 or name.endswith(LOW_RANK_UP):
        zero = arch.norm_plus_one or name.endswith(("bias", LOW_RANK_UP))
        return constant(0.0 if zero else 1.0, shape, dtype)
    std = INIT_STD / math.sqrt(2 * layer) if name.endswith(OUTPUT_PROJECTIONS) else INIT_STD
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return normal(int.from_bytes(digest[:8], "little", signed=True), std, shape, dtype)
