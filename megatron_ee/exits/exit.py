"""One exit: a body on a tap of the frozen backbone, and a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.gate import Gate
from megatron_ee.exits.head import ExitHead
from megatron_ee.exits.registry import body_of, trains
from megatron_ee.model.backbone import VocabHead
from megatron_ee.model.distillation import Distillation
from megatron_ee.model.exit_loss import exit_loss, exit_statistics
from megatron_ee.model.metrics import TokenStats

if TYPE_CHECKING:
    from megatron_ee.model.attention import LayerCache, Positions
    from megatron_ee.model.setup import ModelSetup


class Exit(nn.Module):
    """The exit after layer ``spec.layer``. Its trained parameters are those that require a gradient.

    Attributes:
        gate: predicts the agreement with the final exit; None without one. It is fitted, not trained.
        windows: attention windows of its own layers with a KV cache; see ``Body.windows``.
    """

    def __init__(self, setup: ModelSetup, spec: ExitSpec, shared_head: VocabHead | None) -> None:
        """Allocate the exit. ``shared_head``: the backbone's frozen head, for a head that is not the exit's own."""
        super().__init__()
        self.spec, self.setup = spec, setup
        self.body = body_of(spec)(setup, spec.layer)
        self.head = ExitHead(setup, spec, shared_head)
        self.gate = Gate(setup.architecture.hidden_size) if spec.gate else None
        self.windows = self.body.windows(setup.architecture)
        assert len(self.windows) <= 1, "a body is given one cache"

    @property
    def trains(self) -> bool:
        """Whether it has a parameter to train."""
        return trains(self.spec)

    def attention_half(self, tap: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """The part of the body that needs all tokens, or a cache; ``[seq, batch, hidden]`` -> the same."""
        return self.body.attention_half(tap, positions, cache)

    def rest(self, x: Tensor) -> Tensor:
        """Result of ``attention_half`` -> z ``[seq, batch, hidden]``, token by token."""
        return self.setup.head_input(self.body.rest(x))

    def pieces(self, tap: Tensor, tokens: int) -> Sequence[Tensor]:
        """A microbatch's tap, split into ``[tokens, 1, hidden]`` if ``forward`` can process the tokens in pieces.

        It cannot if the body has attention, which needs all tokens. With sequence parallelism the ranks would gather
        tokens that are not adjacent.
        """
        if self.windows or self.setup.config.sequence_parallel:
            return (tap,)
        return tap.flatten(0, 1)[:, None].split(tokens)

    def features(self, tap: Tensor, positions: Positions) -> Tensor:
        """Tap ``[seq, batch, hidden]``, a share of seq with sequence parallelism -> z ``[seq, batch, hidden]``."""
        return self.rest(self.attention_half(tap, positions))

    def forward(
        self,
        tap: Tensor,
        positions: Positions,
        labels: Tensor,
        coefficient: Tensor,
        *,
        dynamic: bool = False,
        distillation: Distillation | None = None,
        chunk_tokens: int = 512,
    ) -> tuple[Tensor, TokenStats]:
        """Loss of a microbatch, or of a piece of it, and the statistics of its tokens, as ``exit_loss`` gives them.

        Args:
            tap: ``[seq, batch, hidden]``, or one of ``pieces``.
            positions: of the microbatch.
            labels: ``[seq * batch]``, sequence-major as the hidden states.
            coefficient: ``[seq * batch]`` float32, as in ``exit_loss``.
            dynamic: dynamic token weights.
            distillation: from the final exit.
            chunk_tokens: tokens whose logits exist at a time.
        """
        z = self.features(tap, positions).flatten(0, 1)
        return exit_loss(
            z,
            self.head.matrix,
            labels,
            coefficient,
            self.setup.groups.tensor,
            low_rank=self.head.low_rank(z),
            dynamic=dynamic,
            distillation=distillation,
            chunk_tokens=chunk_tokens,
            tiles=self.setup.tiles,
        )

    @torch.no_grad()
    def statistics(self, tap: Tensor, positions: Positions, labels: Tensor, *, chunk_tokens: int = 512) -> TokenStats:
        """Loss, confidence and top-1 token of each token; arguments as in ``forward``."""
        return self.head_statistics(self.features(tap, positions).flatten(0, 1), labels, chunk_tokens=chunk_tokens)

    @torch.no_grad()
    def head_statistics(self, z: Tensor, labels: Tensor, *, chunk_tokens: int = 512) -> TokenStats:
        """As ``statistics``, from ``features`` ``[tokens, hidden]``."""
        return exit_statistics(
            z,
            self.head.matrix,
            labels,
            self.setup.groups.tensor,
            low_rank=self.head.low_rank(z),
            chunk_tokens=chunk_tokens,
            tiles=self.setup.tiles,
        )
