"""Acceptance of each exit's drafts, from the full model's continuations.

In greedy speculative decoding a proposal is accepted if it is the next token of the full model's own continuation. So
the top-1 tokens of an exit along these continuations give the rounds exactly, and layers after the exit need not run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, replace

import numpy as np
import torch

from megatron_ee.data.loader import Sample, Windows
from megatron_ee.evaluation.continuations import Continuation
from megatron_ee.evaluation.quality import scored_batches, sum_over_ranks
from megatron_ee.model.quality import DraftAcceptance, Quality
from megatron_ee.tuning.schedule import Pipeline


def count_rounds(matches: Sequence[bool], draft_length: int, room: int) -> DraftAcceptance:
    """Rounds of greedy speculative decoding along one continuation.

    A round proposes up to ``draft_length`` tokens. It emits those before the first wrong one, and one token of the full
    model. The first token of a continuation comes from the prompt's pass, before the first round.

    Args:
        matches: of each token of the continuation but the first, whether the exit predicts it from those before it.
        draft_length: proposals per round.
        room: largest number of tokens after the first. It is ``len(matches)`` unless an end of text came before.
    """
    rounds = proposed = accepted = done = 0
    while done < len(matches):
        proposals = min(draft_length, room - done - 1)  # the last token needs no proposal
        drafted = list(matches[done : done + proposals])
        right = drafted.index(False) if False in drafted else len(drafted)
        rounds, accepted, proposed = rounds + 1, accepted + right, proposed + len(drafted)
        done += right + 1
    return DraftAcceptance(draft_length, rounds, len(matches), proposed, accepted)


class ContinuationWindows(Windows):
    """Prompts with their continuations as windows of one length. The labels that count are the continuation's tokens
    after the first."""

    def __init__(self, continuations: Sequence[Continuation], multiple: int = 1) -> None:
        """``multiple``: of which the length of the windows has to be one."""
        self._continuations = continuations
        longest = max(len(each.prompt) + len(each.tokens) - 1 for each in continuations)
        self.sequence_length = -(-longest // multiple) * multiple

    def __len__(self) -> int:
        """Number of windows."""
        return len(self._continuations)

    def __getitem__(self, index: int) -> Sample:
        """Tokens, labels and mask of one window, each ``[sequence_length]``; padded with token 0."""
        prompt, tokens = self._continuations[index].prompt, self._continuations[index].tokens
        whole = np.zeros(self.sequence_length + 1, dtype=np.int64)
        whole[: len(prompt) + len(tokens)] = prompt + tokens
        mask = np.zeros(self.sequence_length, dtype=bool)
        mask[len(prompt) : len(prompt) + len(tokens) - 1] = True
        return whole[:-1], whole[1:], mask


def measure_acceptance(
    pipeline: Pipeline,
    continuations: Sequence[Continuation],
    draft_length: int,
    *,
    batch_tokens: int,
    chunk_tokens: int = 512,
    check: Callable[[], None] = lambda: None,
) -> dict[int, DraftAcceptance]:
    """Acceptance of the drafts of all exits before the last layer, by layer; equal on every rank.

    Args:
        pipeline: the stages, with the exits.
        continuations: at least one; each data-parallel rank takes its share.
        draft_length: proposals per round.
        batch_tokens: largest number of tokens per pass, but at least one window.
        chunk_tokens: tokens whose logits exist at a time.
        check: called by every rank between groups of microbatches; it may raise, on all ranks.
    """
    setup = pipeline.stage.setup
    drafting = [spec.layer for spec in pipeline.specs if spec.layer < setup.architecture.num_layers]
    sums = torch.zeros(len(drafting), 4, dtype=torch.float64)
    windows = ContinuationWindows(continuations, setup.groups.tensor.size() if setup.config.sequence_parallel else 1)
    batch_size = max(1, batch_tokens // windows.sequence_length)
    scored = scored_batches(pipeline, windows, batch_size=batch_size, chunk_tokens=chunk_tokens, check=check)
    for batch, exits in scored:
        for place, layer in enumerate(drafting if exits else ()):
            top1 = exits[layer].top1.view(-1, len(batch.sequences)).t().cpu()
            for row, number in enumerate(batch.sequences):
                right = (top1[row] == batch.labels[row])[batch.mask[row]].tolist()
                rounds = count_rounds(right, draft_length, continuations[number].limit - 1)
                sums[place] += torch.tensor(astuple(rounds)[1:])
    sum_over_ranks(sums, setup.groups)
    counts = (map(int, row) for row in sums.tolist())
    return {layer: DraftAcceptance(draft_length, *row) for layer, row in zip(drafting, counts, strict=True)}


def with_acceptance(quality: Quality, acceptance: dict[int, DraftAcceptance]) -> Quality:
    """``quality`` with the acceptance of each exit, by layer."""
    exits = (replace(exit_, acceptance=acceptance.get(exit_.layer)) for exit_ in quality.exits)
    return replace(quality, exits=tuple(exits))
