"""The frozen pre-trained model, or the part of one stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron_ee import platform
from megatron_ee.model.attention import make_positions, make_rotary, packed_positions
from megatron_ee.model.layer import DecoderLayer
from megatron_ee.model.linear import RMSNorm
from megatron_ee.model.slots import LayerSlots
from megatron_ee.parallel.core_versions import mark_sharded

if TYPE_CHECKING:
    from megatron_ee.model.attention import Positions
    from megatron_ee.model.setup import ModelSetup

with platform.quiet_imports():
    from megatron.core.tensor_parallel import VocabParallelEmbedding


class VocabHead(nn.Module):
    """The matrix from hidden states to logits, with its rows (the vocabulary) sharded over tensor-parallel ranks.

    It only holds the weight. Losses and decoding compute logits from it in chunks.

    Attributes:
        weight: ``[padded_vocab / tp, hidden]``.
        start: first token id of this rank's rows.
        valid: number of this rank's rows that are real tokens; the others are padding.
        vocabulary: number of real tokens on all ranks.
        soft_cap: ``logit_soft_cap`` of the architecture.
    """

    def __init__(self, setup: ModelSetup) -> None:
        super().__init__()
        rows = setup.padded_vocab // setup.groups.tensor.size()
        self.start = setup.groups.tensor.rank() * rows
        self.vocabulary = setup.architecture.vocab_size
        self.soft_cap = setup.architecture.logit_soft_cap
        self.valid = max(0, min(rows, self.vocabulary - self.start))
        self.weight = nn.Parameter(torch.empty(rows, setup.architecture.hidden_size, dtype=setup.dtype))
        mark_sharded(self.weight, 0)

    def capped(self, logits: Tensor) -> Tensor:
        """Apply the soft cap, if there is one, to products with the weight."""
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


class Backbone(nn.Module):
    """Layers of the model, optionally with the embedding before them and the final exit after them.

    Attributes:
        layers: the decoder layers by number, from 1, as strings.
        slots: memory that the layers share; None if each has its own.
    """

    def __init__(self, setup: ModelSetup, layers: Iterable[int], *, embedding: bool, final_exit: bool) -> None:
        super().__init__()
        arch = setup.architecture
        self.setup = setup
        self.embedding = None
        if embedding:
            self.embedding = VocabParallelEmbedding(
                setup.padded_vocab,
                arch.hidden_size,
                init_method=lambda weight: weight,
                reduce_scatter_embeddings=setup.config.sequence_parallel,
                config=setup.config,
                tp_group=setup.groups.tensor,
            )
        with torch.device("meta") if setup.slots else contextlib.nullcontext():
            self.layers = nn.ModuleDict({str(number): DecoderLayer(setup, number) for number in layers})
        self.slots = LayerSlots(dict(self.numbered_layers()), setup.slots) if setup.slots and self.layers else None
        self.final_norm = RMSNorm(setup, arch.hidden_size) if final_exit else None
        self.head = VocabHead(setup) if final_exit else None
        if final_exit and arch.tied and self.embedding is not None:
            self.head.weight = self.embedding.weight  # type: ignore[union-attr]
        self.requires_grad_(False)
        ropes = (arch.rope,) if arch.local_rope is None else (arch.rope, arch.local_rope)
        self.rotaries = [make_rotary(rope, arch.head_dim, platform.device()) for rope in ropes]
        multiplier = torch.tensor(arch.embedding_multiplier, dtype=setup.dtype, device="cpu")
        self.embedding_multiplier = float(multiplier)

    def positions(self, length: int, key_valid: Tensor | None = None) -> Positions:
        """See ``make_positions``."""
        return make_positions(self.rotaries, self.setup.dtype, length, key_valid)

    def packed_positions(self, positions: Tensor) -> Positions:
        """See ``packed_positions``."""
        return packed_positions(self.rotaries, self.setup.dtype, positions)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids ``[batch, seq]`` -> h_0 ``[seq, batch, hidden]``; ``[seq / tp, ...]`` if sequence-parallel."""
        assert self.embedding is not None, "this stage has no embedding"
        # With sequence parallelism megatron-core expects [batch, seq] and transposes it.
        hidden = self.embedding(tokens if self.setup.config.sequence_parallel else tokens.t())
        return hidden if self.embedding_multiplier == 1 else hidden * self.embedding_multiplier

    def numbered_layers(self) -> Iterable[tuple[int, DecoderLayer]]:
        """The layers of this stage with their numbers, in order."""
        return ((int(name), layer) for name, layer in self.layers.items())  # type: ignore[misc]

    def layers_between(self, first: int, last: int) -> Iterator[tuple[int, DecoderLayer]]:
        """Layers ``first .. last`` with their numbers, in order: a ``traversal.LayerSource``."""
        for number in range(first, last + 1):
            layer: DecoderLayer = self.layers[str(number)]  # type: ignore[assignment]
            if self.slots is None:
                yield number, layer
            else:
                self.slots.hold(number)
                with self.slots.event("layer", number):
                    yield number, layer
