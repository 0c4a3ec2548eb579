"""megatron-core's own ``GPTModel`` on the CPU, to exchange checkpoints with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_ee import platform
from megatron_ee.config.architecture import Architecture
from megatron_ee.parallel.groups import Groups


@contextmanager
def _on_cpu() -> Iterator[None]:
    with platform.quiet_imports(), platform.stand_in(), platform.translated(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Stages that share a tied embedding move it to CUDA to all-reduce it.
        with mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor):
            yield


def gpt_model(arch: Architecture, groups: Groups, vocabulary: int) -> Any:
    """This rank's part of a float32 model with random weights, with Megatron's local layers (no Transformer Engine).

    Args:
        arch: of the model.
        groups: process groups.
        vocabulary: rows of the embedding, including padding.
    """
    with _on_cpu():
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer import TransformerConfig

        config = TransformerConfig(
            num_layers=arch.num_layers,
            hidden_size=arch.hidden_size,
            ffn_hidden_size=arch.ffn_size,
            num_attention_heads=arch.num_heads,
            num_query_groups=arch.num_kv_heads,
            kv_channels=arch.head_dim,
            layernorm_epsilon=arch.norm_eps,
            normalization="RMSNorm",
            activation_func=torch.nn.functional.silu,
            gated_linear_unit=True,
            add_bias_linear=arch.mlp_bias,
            add_qkv_bias=arch.qkv_bias,
            qk_layernorm=arch.qk_norm,
            tensor_model_parallel_size=groups.tensor.size(),
            pipeline_model_parallel_size=groups.pipeline.size(),
            pipeline_dtype=torch.float32,
            use_cpu_initialization=True,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            masked_softmax_fusion=False,
            bias_dropout_fusion=False,
            apply_rope_fusion=False,
        )
        first, last = groups.pipeline.rank() == 0, groups.pipeline.rank() == groups.pipeline.size() - 1
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(qk_layernorm=arch.qk_norm, normalization="RMSNorm"),
            vocabulary,
            arch.max_positions,
            pre_process=first,
            post_process=last,
            parallel_output=False,
            share_embeddings_and_output_weights=arch.tied,
            position_embedding_type="rope",
            rotary_base=int(arch.rope.theta),
            rope_scaling=arch.rope.kind == "llama3",
            rope_scaling_factor=arch.rope.factor,
        )
        return model.eval()


def load_gpt(model: Any, directory: Path, metadata: dict[str, Any] | None = None) -> None:
    """Load ``model`` with megatron-core's ``dist_checkpointing.load``. Every key must exist.

    Args:
        model: to load.
        directory: of the iteration.
        metadata: argument of ``sharded_state_dict``.
    """
    with _on_cpu():
        from megatron.core import dist_checkpointing  # noqa: TID251  on what the test wrote

        state = {"model": model.sharded_state_dict(metadata=metadata)}
        loaded = dist_checkpointing.load(state, str(directory))
        model.load_state_dict(loaded["model"])


def save_gpt(model: Any, directory: Path, metadata: dict[str, Any] | None = None, **common: Any) -> None:
    """Save ``model`` with megatron-core's ``dist_checkpointing.save``; ``common`` goes to ``common.pt``."""
    with _on_cpu():
        from megatron.core import dist_checkpointing  # noqa: TID251  on what the test wrote

        directory.mkdir(parents=True, exist_ok=True)
        state = {"model": model.sharded_state_dict(metadata=metadata), **common}
        dist_checkpointing.save(state, str(directory), content_metadata=metadata)


@torch.no_grad()
def gpt_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits ``[batch, sequence, vocabulary]`` of ``tokens``, of a model on one stage."""
    with _on_cpu():
        count = tokens.shape[1]
        positions = torch.arange(count).expand_as(tokens)
        mask = torch.ones(count, count, dtype=torch.bool).triu(1)[None, None]
        logits: torch.Tensor = model(tokens, positions, mask)
        return logits
