"""Limits of a key: never more than its limit in any 60 seconds, and the time to wait is right."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ee.errors import ConfigError
from megatron_ee.serving.limits import Grant, MinuteWindow, RateLimited


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_requests_are_limited_in_any_minute() -> None:
    clock = Clock()
    window = MinuteWindow(clock)
    for clock.now in (1000.0, 1030.0, 1059.0):
        window.take(1, 3, None)
    clock.now = 1059.5
    with pytest.raises(RateLimited, match="3 requests a minute") as refused:
        window.take(1, 3, None)
    assert refused.value.retry_after == 1  # of the first request's minute half a second is left
    clock.now = 1060.0
    window.take(1, 3, None)
    with pytest.raises(RateLimited) as refused:
        window.take(1, 3, None)
    assert refused.value.retry_after == 30


def test_tokens_are_limited_and_given_back() -> None:
    clock = Clock()
    window = MinuteWindow(clock)
    first = window.take(60, None, 100)
    clock.now += 10
    second = window.take(40, None, 100)
    with pytest.raises(RateLimited, match="100 tokens a minute") as refused:
        window.take(70, None, 100)
    assert refused.value.retry_after == 60  # both must have left
    with pytest.raises(RateLimited) as refused:
        window.take(60, None, 100)
    assert refused.value.retry_after == 50
    window.settle(first, 15)
    window.take(45, None, 100)
    window.settle(second, 1000)  # it used more than it said: what it has taken stays
    with pytest.raises(RateLimited):
        window.take(1, None, 100)


def test_giving_back_after_the_minute_changes_nothing() -> None:
    clock = Clock()
    window = MinuteWindow(clock)
    old = window.take(100, None, 100)
    clock.now += 60
    window.take(100, None, 100)
    window.settle(old, 0)
    with pytest.raises(RateLimited):
        window.take(1, None, 100)


def test_a_request_larger_than_a_minute_is_an_error_of_the_request() -> None:
    with pytest.raises(ConfigError, match="max_tokens: the request may use 101 tokens.*100 a minute"):
        MinuteWindow().take(101, None, 100)


def test_a_refused_request_takes_nothing() -> None:
    window = MinuteWindow(Clock())
    window.take(50, 2, 100)
    for _ in range(5):
        with pytest.raises(RateLimited):
            window.take(60, 2, 100)
    window.take(50, 2, 100)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 50), st.integers(0, 50)), max_size=40),
    st.integers(1, 5),
    st.integers(50, 120),
)
def test_no_minute_holds_more_than_the_limits(steps: list[tuple[int, int, int]], requests: int, tokens: int) -> None:
    clock, taken = Clock(), []
    window = MinuteWindow(clock)
    for wait, size, used in steps:
        clock.now += wait
        before = sum(grant.time > clock.now - 60 for grant, _ in taken)
        spent = sum(kept for grant, kept in taken if grant.time > clock.now - 60)
        try:
            grant = window.take(size, requests, tokens)
        except RateLimited as refused:
            assert before >= requests or spent + size > tokens
            clock.now += refused.retry_after
            grant = window.take(size, requests, tokens)
        else:
            assert before < requests and spent + size <= tokens
        window.settle(grant, used)
        taken.append((grant, min(size, used)))
    assert all(isinstance(grant, Grant) for grant, _ in taken)
