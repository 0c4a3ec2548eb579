"""What an API key may use in a minute.

The grants of the last 60 seconds are kept, so a key never gets more than its limit in *any* 60 seconds. How many tokens
a request will emit is not known when it is admitted. So it first takes the most that it may use, and gives back the
rest at its end (``MinuteWindow.settle``).

The rate limiters on PyPI (``limits``, ``pyrate-limiter``) count what has happened and cannot give back; the first also
keeps one entry per token, and starts a thread.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from megatron_ee.errors import ConfigError, UserError

SECONDS = 60.0


class RateLimited(UserError):
    """A key has used what it may use in a minute.

    Attributes:
        retry_after: whole seconds until the same request would be admitted, if no other came first.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass
class Grant:
    """What one request has taken.

    Attributes:
        time: when, in seconds of the window's clock.
        tokens: how many; 0 once they have left the window.
    """

    time: float
    tokens: int


class MinuteWindow:
    """The grants of one key in the last 60 seconds. For one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._grants: deque[Grant] = deque()
        self._tokens = 0

    def take(self, tokens: int, requests_per_minute: int | None, tokens_per_minute: int | None) -> Grant:
        """Admit one request.

        Args:
            tokens: the most that it may use: its prompt's and those it may emit.
            requests_per_minute: None for any number.
            tokens_per_minute: None for any number.

        Raises:
            ConfigError: the request may use more than a whole minute's tokens.
            RateLimited: not now. Nothing is taken.
        """
        if tokens_per_minute is not None and tokens > tokens_per_minute:
            raise ConfigError(
                f"max_tokens: the request may use {tokens} tokens with its prompt, but its API key has "
                f"{tokens_per_minute} a minute; ask for fewer"
            )
        now = self._clock()
        self._forget(now)
        free_at, used = now, ""
        if requests_per_minute is not None and len(self._grants) >= requests_per_minute:
            free_at = self._grants[len(self._grants) - requests_per_minute].time + SECONDS
            used = f"{requests_per_minute} requests"
        if tokens_per_minute is not None and self._tokens + tokens > tokens_per_minute:
            free_at = max(free_at, self._free_at(self._tokens + tokens - tokens_per_minute))
            used = used or f"{tokens_per_minute} tokens"
        if used:
            wait = max(1, math.ceil(free_at - now))
            raise RateLimited(f"the API key may use {used} a minute; try again in {wait} seconds", wait)
        grant = Grant(now, tokens)
        self._grants.append(grant)
        self._tokens += tokens
        return grant

    def settle(self, grant: Grant, tokens: int) -> None:
        """Give back what a request has not used.

        Args:
            grant: from ``take``.
            tokens: what it has used.
        """
        kept = min(tokens, grant.tokens)
        self._tokens -= grant.tokens - kept
        grant.tokens = kept

    def _forget(self, now: float) -> None:
        while self._grants and self._grants[0].time + SECONDS <= now:
            gone = self._grants.popleft()
            self._tokens -= gone.tokens
            gone.tokens = 0

    def _free_at(self, tokens: int) -> float:
        """When so many of the tokens will have left the window."""
        for grant in self._grants:
            tokens -= grant.tokens
            if tokens <= 0:
                return grant.time + SECONDS
        raise AssertionError("the window holds fewer tokens")
