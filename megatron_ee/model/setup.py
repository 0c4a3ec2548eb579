"""The common argument of all module constructors: architecture, megatron-core's configuration, process groups."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.config.architecture import Architecture
from megatron_ee.config.schema import Residency
from megatron_ee.parallel.core_versions import without_cuda_graphs
from megatron_ee.parallel.costs import padded_vocab
from megatron_ee.parallel.groups import Groups
from megatron_ee.parallel.tiles import STREAMED_SLOTS, Tiles, accelerator_tiles

with platform.quiet_imports():
    from megatron.core.tensor_parallel import (
        gather_from_sequence_parallel_region,
        gather_from_tensor_model_parallel_region,
    )
    from megatron.core.transformer import TransformerConfig


@dataclass(frozen=True)
class ModelSetup:
    """Passed to the constructor of every module.

    Attributes:
        architecture: the model's shape.
        config: the corresponding megatron-core configuration.
        groups: process groups.
        tiles: tile sizes of an exit's work on this device.
        repeats_keys: whether attention over whole rows repeats keys and values for each query head, because no fused
            kernel supports grouped queries.
        slots: number of backbone layers whose weights are in the device's memory at a time, see ``model.slots``; 0 for
            all.
        residency: where the layers' weights come from, if not all are in the device's memory.
    """

    architecture: Architecture
    config: TransformerConfig
    groups: Groups
    tiles: Tiles = field(default_factory=Tiles)
    repeats_keys: bool = False
    slots: int = 0
    residency: Residency = "device"

    @property
    def dtype(self) -> torch.dtype:
        """dtype of weights and hidden states."""
        return self.config.params_dtype

    @property
    def padded_vocab(self) -> int:
        """Vocabulary size, rounded up so that every tensor-parallel rank holds the same number of rows."""
        return padded_vocab(self.architecture.vocab_size, self.groups.tensor.size())

    def hidden_shape(self, sequences: int, tokens: int) -> torch.Size:
        """Shape of this rank's hidden states of a microbatch: ``[seq, batch, hidden]``, or a share of seq."""
        share = self.groups.tensor.size() if self.config.sequence_parallel else 1
        return torch.Size((tokens // share, sequences, self.architecture.hidden_size))

    def gather_sequence(self, x: Tensor) -> Tensor:
        """Gather ``[seq / tp, batch, hidden]`` to ``[seq, batch, hidden]``. Without sequence parallelism returns ``x``.

        The loss returns the whole gradient on every rank, so backward takes each rank's share without a reduction.
        """
        if not self.config.sequence_parallel:
            return x
        return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=self.groups.tensor)

    def head_input(self, x: Tensor) -> Tensor:
        """Input of a head, from the last norm's output: gathered, and multiplied by the family's logit multiplier."""
        x = self.gather_sequence(x)
        multiplier = self.architecture.logit_multiplier
        return x if multiplier == 1 else x * multiplier

    def gather_vocabulary(self, logits: Tensor) -> Tensor:
        """Gather logits ``[..., padded_vocab / tp]`` of all ranks to ``[..., vocab]``, without padding."""
        if self.groups.tensor.size() > 1:
            logits = gather_from_tensor_model_parallel_region(logits, group=self.groups.tensor)
        return logits[..., : self.architecture.vocab_size]


def build_setup(
    architecture: Architecture,
    dtype: torch.dtype,
    groups: Groups,
    *,
    sequence_parallel: bool = False,
    slots: int = 0,
    residency: Residency = "device",
) -> ModelSetup:
    """Setup for building modules of ``architecture`` in ``dtype`` on this rank."""
    config = TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        # Norms over whole projections are sharded, so their gradients must not be summed over ranks.
        qk_layernorm=architecture.qk_norm and not architecture.qk_norm_whole,
        layernorm_epsilon=architecture.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        add_bias_linear=False,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=groups.tensor.size(),
        pipeline_model_parallel_size=groups.pipeline.size(),
        pipeline_dtype=dtype,
        sequence_parallel=sequence_parallel,
        # Weights are allocated under `with torch.device(...)` and filled from a checkpoint.
        use_cpu_initialization=True,
        perform_initialization=False,
        # The loss is divided by the global batch's token count, so gradients are summed over data-parallel ranks.
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        **without_cuda_graphs(),
    )
    tensor = groups.tensor.size()
    rows = padded_vocab(architecture.vocab_size, tensor) // tensor
    tiles = accelerator_tiles(rows) if platform.has_accelerator() else Tiles(cached_bytes=platform.cached_bytes())
    repeats_keys = not platform.groups_heads(dtype)
    slots = slots if residency == "device" else STREAMED_SLOTS
    return ModelSetup(architecture, config, groups, tiles, repeats_keys, slots, residency)
