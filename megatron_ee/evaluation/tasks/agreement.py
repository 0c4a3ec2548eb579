"""An answer beside full mode's answer to the same prompt: where they agree, and what the difference costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from megatron_ee.evaluation.tasks.answers import TaskAnswer
from megatron_ee.evaluation.tasks.metrics import METRICS, rouge_l
from megatron_ee.inference.certificate import Loss


@dataclass(frozen=True)
class TokenAgreement:
    """Two answers, position by position. Shares are of the positions of the longer one.

    Attributes:
        departure: index of the first token that differs, or of the end of the shorter answer; None if they are equal.
        before: share of the tokens before that position; 1 if they are equal.
        equal_tokens: share of the positions at which both have the same token. After the first different token the
            answers may say the same at other positions, so this can be low for answers that are much alike.
    """

    departure: int | None
    before: float
    equal_tokens: float

    @property
    def equal(self) -> bool:
        """Whether the answers are equal."""
        return self.departure is None


def compare_tokens(mine: Sequence[int], full: Sequence[int]) -> TokenAgreement:
    """Compare the tokens of an answer with those of full mode's. At least one of them has tokens."""
    positions = max(len(mine), len(full))
    same = [one == other for one, other in zip(mine, full, strict=False)]
    before = sum(takewhile(bool, same))
    return TokenAgreement(None if before == positions else before, before / positions, sum(same) / positions)


def loss_of(loss: Loss, metric: str, early: TaskAnswer, full: TaskAnswer, references: Sequence[str]) -> float:
    """The loss of an answer against full mode's, in [0, 1]; 0 where both are the same. See ``Certificate``.

    Args:
        loss: its kind.
        metric: of ``quality``, a key of ``METRICS``.
        early: the answer with early exit.
        full: the answer of full mode.
        references: right answers, for ``quality``.
    """
    if early.token_ids == full.token_ids:
        return 0.0
    if loss == "disagreement":
        return 1.0
    if loss == "rouge":  # two texts without words have no ROUGE
        return 0.0 if early.text == full.text else 1.0 - rouge_l(early.text, [full.text])
    return max(0.0, METRICS[metric](full.text, references) - METRICS[metric](early.text, references))
