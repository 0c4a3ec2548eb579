"""One exit: an optional body, a norm and a head on a tap of the frozen backbone (design: exits).

======== ===================== =============================
body     features z            tap
======== ===================== =============================
embedding ``h_k``              h_k, after layer k
norm     ``N(h_k)``            h_k
mlp      ``N(r_k + MLP(n(r_k)))`` r_k, layer k's residual after attention
layer    ``N(Layer(h_k))``     h_k
======== ===================== =============================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ee.config.exits import ExitSpec
from megatron_ee.model.backbone import VocabHead
from megatron_ee.model.distillation import Distillation
from megatron_ee.model.exit_loss import LowRank, exit_loss, exit_statistics
from megatron_ee.model.layer import MLP, DecoderLayer
from megatron_ee.model.linear import product
from megatron_ee.model.metrics import TokenStats
from megatron_ee.parallel.core_versions import mark_sharded

if TYPE_CHECKING:
    from megatron_ee.model.attention import LayerCache, Positions
    from megatron_ee.model.setup import ModelSetup


@dataclass(frozen=True)
class Candidates:
    """The part of an exit's vocabulary that drafts are chosen from.

    Attributes:
        local: ``[n]`` int64, rows of this rank's head.
        rows: ``[n, hidden]``, these rows, the trained part of a ``low_rank`` head added.
        left_out: ``[vocab]`` bool, the tokens that are not among any rank's.
    """

    local: Tensor
    rows: Tensor
    left_out: Tensor


class Exit(nn.Module):
    """What is attached after layer ``spec.layer``. Its trained parameters are those that require a gradient.

    Attributes:
        candidates: see ``restrict``; None for none.
        input_norm: layer k's own pre-MLP norm, frozen: the one an ``mlp`` exit reads its tap through.
        head: ``own``: trained; otherwise the backbone's frozen head, one object for all exits of a stage.
    """

    candidates: Candidates | None = None

    def __init__(self, setup: ModelSetup, spec: ExitSpec, shared_head: VocabHead | None) -> None:
        super().__init__()
        arch = setup.architecture
        self.spec, self.setup = spec, setup
        self.input_norm = self.mlp = self.layer = self.norm = self.down = self.up = None
        if spec.body == "mlp":
            self.input_norm = setup.spec.norm(setup, arch.hidden_size).requires_grad_(False)
            self.mlp = MLP(setup)
        if spec.body == "layer":
            self.layer = DecoderLayer(setup, arch.num_layers)
        if spec.body != "embedding":
            self.norm = setup.spec.norm(setup, arch.hidden_size)
        if spec.head == "own":
            self.head = VocabHead(setup)
        else:
            assert shared_head is not None, "this stage holds no shared head"
            self.head = shared_head
        if spec.head == "low_rank":
            self.down = nn.Parameter(torch.empty(spec.rank, arch.hidden_size, dtype=setup.dtype))
            self.up = nn.Parameter(torch.empty(len(self.head.weight), spec.rank, dtype=setup.dtype))
            mark_sharded(self.up, 0)

    def attention_half(self, tap: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """What the attention of a ``layer`` body makes of a tap ``[seq, batch, hidden]``; other bodies have none."""
        return tap if self.layer is None else self.layer.attention_half(tap, positions, cache)

    def rest(self, x: Tensor) -> Tensor:
        """What ``attention_half`` gave -> z ``[seq, batch, hidden]``, token by token."""
        if self.mlp is not None and self.input_norm is not None:
            x = x + self.mlp(self.input_norm(x))
        elif self.layer is not None:
            x = self.layer.mlp_half(x)
        if self.norm is not None:
            x = self.norm(x)
        return self.setup.gather_sequence(x)

    def pieces(self, tap: Tensor, tokens: int) -> Sequence[Tensor]:
        """A microbatch's tap, cut into ``[tokens, 1, hidden]`` where ``forward`` may take some tokens after others.

        Attention needs them all, and ranks that share a sequence would gather tokens that do not follow each other.
        """
        if self.layer is not None or self.setup.config.sequence_parallel:
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
            coefficient: ``[seq * batch]`` float32.
            dynamic: dynamic token weights.
            distillation: from the final exit.
            chunk_tokens: tokens whose logits exist at one time.
        """
        z = self.features(tap, positions).flatten(0, 1)
        return exit_loss(
            z,
            self.head,
            labels,
            coefficient,
            self.setup.groups.tensor,
            low_rank=self._low_rank(z),
            dynamic=dynamic,
            distillation=distillation,
            chunk_tokens=chunk_tokens,
            tiles=self.setup.tiles,
        )

    @torch.no_grad()
    def statistics(self, tap: Tensor, positions: Positions, labels: Tensor, *, chunk_tokens: int = 512) -> TokenStats:
        """Loss, confidence and top-1 token of each token; arguments as for ``forward``."""
        z = self.features(tap, positions).flatten(0, 1)
        return exit_statistics(
            z,
            self.head,
            labels,
            self.setup.groups.tensor,
            low_rank=self._low_rank(z),
            chunk_tokens=chunk_tokens,
            tiles=self.setup.tiles,
        )

    def logits(self, z: Tensor) -> Tensor:
        """``[..., hidden]`` -> float32 logits ``[..., vocab]``, the whole vocabulary on every rank."""
        logits = product(z, self.head.weight)
        low_rank = self._low_rank(z)
        if low_rank is not None:
            logits = logits + F.linear(low_rank.hidden, low_rank.up)
        return self.setup.gather_vocabulary(logits).float()

    @torch.no_grad()
    def restrict(self, ids: Tensor) -> None:
        """Choose the tokens of ``candidate_logits``: distinct ``ids`` ``[n]`` int64; their rows are copied."""
        start = self.head.start
        local = ids[(ids >= start) & (ids < start + self.head.valid)] - start
        rows = self.head.weight[local]
        if self.down is not None and self.up is not None:
            rows = torch.addmm(rows.float(), self.up[local].float(), self.down.float()).to(rows.dtype)
        left_out = torch.ones(self.setup.architecture.vocab_size, dtype=torch.bool, device=ids.device)
        self.candidates = Candidates(local, rows, left_out)
        left_out[ids] = False

    def candidate_logits(self, z: Tensor) -> Tensor:
        """As ``logits``, but of the tokens that ``restrict`` chose alone; the others' are -inf and cost nothing."""
        assert self.candidates is not None, "no candidates were chosen"
        found = product(z, self.candidates.rows)
        logits = found.new_full((*z.shape[:-1], len(self.head.weight)), -torch.inf)
        return self.setup.gather_vocabulary(logits.index_copy_(-1, self.candidates.local, found)).float()

    def _low_rank(self, z: Tensor) -> LowRank | None:
        if self.down is None or self.up is None:
            return None
        return LowRank(F.linear(z, self.down), self.up)
