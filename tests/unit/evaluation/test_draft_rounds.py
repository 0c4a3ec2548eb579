"""Acceptance of drafts, counted along a continuation."""

from __future__ import annotations

import pytest

from megatron_ee.evaluation.acceptance import ContinuationWindows, count_rounds
from megatron_ee.evaluation.continuations import Continuation


@pytest.mark.parametrize(
    "matches, draft_length, room, expected",
    [
        ("", 4, 0, (0, 0, 0, 0)),
        ("0", 4, 1, (1, 1, 0, 0)),  # the last token needs no proposal
        ("1", 4, 1, (1, 1, 0, 0)),
        ("11111", 4, 5, (1, 5, 4, 4)),
        ("11110", 4, 5, (1, 5, 4, 4)),  # the fifth is the full model's own
        ("0000", 2, 4, (4, 4, 5, 0)),
        ("110110", 2, 6, (2, 6, 4, 4)),  # each wrong one is the full model's own, and not proposed
        ("1011", 2, 4, (2, 4, 3, 2)),
        ("111111", 1, 6, (3, 6, 3, 3)),
        ("1111", 8, 4, (1, 4, 3, 3)),  # the draft is shortened at the end
        ("1111", 8, 9, (1, 4, 4, 4)),  # before an end of text it is not, which may be a proposal
        ("1110", 8, 9, (1, 4, 4, 3)),
        ("0", 3, 9, (1, 1, 1, 0)),  # proposals after the end of the text do not count
    ],
)
def test_rounds(matches: str, draft_length: int, room: int, expected: tuple[int, ...]) -> None:
    found = count_rounds([match == "1" for match in matches], draft_length, room)
    assert found.draft_length == draft_length
    assert (found.rounds, found.tokens, found.proposed, found.accepted) == expected


def test_windows_score_the_tokens_after_the_first() -> None:
    windows = ContinuationWindows([Continuation((5, 6, 7), (1, 2, 3), 3), Continuation((8,), (4,), 3)], multiple=4)
    assert len(windows) == 2 and windows.sequence_length == 8
    tokens, labels, mask = windows[0]
    assert tokens.tolist() == [5, 6, 7, 1, 2, 3, 0, 0] and labels.tolist() == [6, 7, 1, 2, 3, 0, 0, 0]
    assert labels[mask].tolist() == [2, 3]
    assert not windows[1][2].any()
    assert ContinuationWindows([Continuation((5, 6, 7), (1, 2, 3), 3)]).sequence_length == 5
