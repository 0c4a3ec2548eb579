"""Agreement of an answer with full mode's answer to the same prompt, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile


@dataclass(frozen=True)
class TokenAgreement:
    """Two answers, place by place. Shares are of the places of the longer one.

    Attributes:
        departure: index of the first token that differs, or of the end of the shorter answer; None if they are equal.
        before: share of the tokens before that place; 1 if they are equal.
        equal_tokens: share of the places at which both have the same token. After the first different token the
            answers may say the same at other places, so this can be low for answers that are much alike.
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
    places = max(len(mine), len(full))
    same = [one == other for one, other in zip(mine, full, strict=False)]
    before = sum(takewhile(bool, same))
    return TokenAgreement(None if before == places else before, before / places, sum(same) / places)
