"""The head of an exit: its own matrix, the backbone's frozen head, or this head with a low-rank correction.

=========== ================= ==========================================
head        logits            trained
=========== ================= ==========================================
own         W z               W, at first a copy of the LM head
shared      W0 z              nothing; W0 is the LM head
low_rank    W0 z + B (A z)    A, at first normal(0, 0.02), and B, zero
=========== ================= ==========================================
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.body import ExitPart
from megatron_ee.families.family import Source
from megatron_ee.families.weights import LM_HEAD, head_name
from megatron_ee.model.backbone import VocabHead
from megatron_ee.model.exit_loss import LowRank
from megatron_ee.model.linear import product
from megatron_ee.parallel.core_versions import mark_sharded

if TYPE_CHECKING:
    from megatron_ee.model.setup import ModelSetup


@dataclass(frozen=True)
class Candidates:
    """The tokens that an exit's drafts are limited to.

    Attributes:
        local: ``[n]`` int64, rows of this rank's head.
        rows: ``[n, hidden]``, these rows, including the correction of a ``low_rank`` head.
        left_out: ``[vocab]`` bool, the tokens that no rank has.
    """

    local: Tensor
    rows: Tensor
    left_out: Tensor


class ExitHead(nn.Module):
    """Maps the body's output to logits.

    Attributes:
        matrix: the trained matrix of an ``own`` head, else the backbone's frozen head, one object for all exits of a
            stage.
        down: A of a ``low_rank`` head, ``[rank, hidden]``; else None.
        up: B of a ``low_rank`` head, ``[padded_vocab / tp, rank]``; else None.
        candidates: see ``restrict``; None for none.
    """

    candidates: Candidates | None = None

    def __init__(self, setup: ModelSetup, spec: ExitSpec, shared: VocabHead | None) -> None:
        super().__init__()
        self.setup = setup
        self.down = self.up = None
        if spec.head == "own":
            self.matrix = VocabHead(setup)
        else:
            assert shared is not None, "this stage holds no shared head"
            self.matrix = shared
        if spec.head == "low_rank":
            self.down = nn.Parameter(torch.empty(spec.rank, setup.architecture.hidden_size, dtype=setup.dtype))
            self.up = nn.Parameter(torch.empty(len(self.matrix.weight), spec.rank, dtype=setup.dtype))
            mark_sharded(self.up, 0)

    def low_rank(self, z: Tensor) -> LowRank | None:
        """The correction of a ``low_rank`` head at z ``[..., hidden]``, as factors; None for other heads."""
        if self.down is None or self.up is None:
            return None
        return LowRank(F.linear(z, self.down), self.up)

    def logits(self, z: Tensor) -> Tensor:
        """``[..., hidden]`` -> float32 logits ``[..., vocab]``, the whole vocabulary on every rank."""
        logits = product(z, self.matrix.weight)
        low_rank = self.low_rank(z)
        if low_rank is not None:
            logits = logits + F.linear(low_rank.hidden, low_rank.up)
        return self.matrix.capped(self.setup.gather_vocabulary(logits).float())

    @torch.no_grad()
    def restrict(self, ids: Tensor) -> None:
        """Set the tokens of ``candidate_logits``: distinct ``ids`` ``[n]`` int64. Their rows are copied."""
        start = self.matrix.start
        local = ids[(ids >= start) & (ids < start + self.matrix.valid)] - start
        rows = self.matrix.weight[local]
        if self.down is not None and self.up is not None:
            rows = torch.addmm(rows.float(), self.up[local].float(), self.down.float()).to(rows.dtype)
        left_out = torch.ones(self.setup.architecture.vocab_size, dtype=torch.bool, device=ids.device)
        self.candidates = Candidates(local, rows, left_out)
        left_out[ids] = False

    def candidate_logits(self, z: Tensor) -> Tensor:
        """As ``logits``, but only for the tokens of ``restrict``. The logits of others are -inf and are not
        computed."""
        assert self.candidates is not None, "no candidates were chosen"
        found = self.matrix.capped(product(z, self.candidates.rows).float())
        logits = found.new_full((*z.shape[:-1], len(self.matrix.weight)), -torch.inf)
        return self.setup.gather_vocabulary(logits.index_copy_(-1, self.candidates.local, found))


def head_parts(spec: ExitSpec, architecture: Architecture) -> Iterator[ExitPart]:
    """The trained parameters of an exit's head."""
    hidden, vocab, prefix = architecture.hidden_size, architecture.vocab_size, f"exits.{spec.layer}.lm_head"
    if spec.head == "own":
        saved, copied = Source((f"{prefix}.weight",), "vocabulary"), Source((head_name(architecture),), "vocabulary")
        yield ExitPart("head.matrix.weight", saved, ((vocab, hidden),), copied, (LM_HEAD,))
    if spec.head == "low_rank":
        yield ExitPart("head.down", Source((f"{prefix}.a",), "whole"), ((spec.rank, hidden),), None)
        yield ExitPart("head.up", Source((f"{prefix}.b",), "vocabulary"), ((vocab, spec.rank),), None)
