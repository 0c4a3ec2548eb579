"""Generated tokens as text, while they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ee.data.tokenizer import Detokenizer, Tokenizer
from megatron_ee.errors import ConfigError, shown


class TextStream:
    """The text of one output, given out as soon as it is certain.

    What ``push`` and ``finish`` return, joined, is ``decode(prompt + tokens)`` behind ``decode(prompt)``, up to the
    stop string that is complete first; of several complete at the same character, the longest. That depends on the
    text alone, not on how tokens cut it. Stop strings are looked for in the output only.

    Attributes:
        stopped: the stop string that was found, or None. Nothing comes out from then on.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        """Begin behind ``prompt_ids``.

        Raises:
            ConfigError: ``stop`` is no list of texts, or one of them is empty.
        """
        if isinstance(stop, str) or not all(isinstance(each, str) for each in stop):
            raise ConfigError(f"stop: must be a list of texts, not {shown(stop)}")
        if not all(stop):
            raise ConfigError("stop: holds an empty text, which would end every output at once; leave it out")
        self.stopped: str | None = None
        self._tokens = Detokenizer(tokenizer, prompt_ids)
        self._stop = sorted(set(stop), key=len, reverse=True)
        self._held = ""  # the beginning of what may become a stop string

    def push(self, token_id: int) -> str:
        """Add a token; the text that is certain now, which may be none, or belong to tokens before it as well."""
        if self.stopped is not None:
            return ""
        return self._take(self._tokens.push(token_id))

    def finish(self) -> str:
        """What was held back, once no token follows. A stop string may be found here, too."""
        if self.stopped is not None:
            return ""
        certain = self._take(self._tokens.flush())
        rest, self._held = self._held, ""
        return certain + rest

    def _take(self, new: str) -> str:
        """The part of ``new`` and what was held back that may go out."""
        if not self._stop or not new:
            return new
        text = self._held + new
        # The least end, then the longest: ``min`` keeps the first of equals, and long ones come first.
        found = [(start + len(stop), stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            end, self.stopped = min(found, key=lambda pair: pair[0])
            self._held = ""
            return text[: end - len(self.stopped)]
        length = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - length :]
        return text[: len(text) - length]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
