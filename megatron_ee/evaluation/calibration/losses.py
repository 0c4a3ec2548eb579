"""The loss of an answer against full mode's, in [0, 1]. It is 0 wherever both are the same."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ee.evaluation.tasks.answers import TaskAnswer
from megatron_ee.evaluation.tasks.metrics import METRICS, rouge_l
from megatron_ee.inference.certificate import Loss


def loss_of(loss: Loss, metric: str, early: TaskAnswer, full: TaskAnswer, references: Sequence[str]) -> float:
    """The loss of one answer, see ``Certificate``.

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
