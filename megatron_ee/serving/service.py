"""What the routes use."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_ee.data.tokenizer import Tokenizer
from megatron_ee.errors import ConfigError
from megatron_ee.serving.api.logprobs import TokenTexts
from megatron_ee.serving.api.prompts import ModelFacts
from megatron_ee.serving.api.translate import RequestLimits

if TYPE_CHECKING:
    from megatron_ee.serving.access import Access
    from megatron_ee.serving.audits.auditor import Auditor
    from megatron_ee.serving.engine_loop import EngineLoop
    from megatron_ee.serving.exit_log import ExitLog
    from megatron_ee.serving.metrics import Metrics
    from megatron_ee.serving.rules.rules import Rules


@dataclass
class Service:
    """One model behind the API.

    Attributes:
        engine_loop: runs the requests.
        tokenizer: of the model.
        model_name: as clients name the model.
        created: when the server started, in Unix seconds.
        access: API keys and their limits.
        rules: which requests may leave early.
        auditor: audits a share of the requests; None for none.
        exit_log: one line per request; None for none.
        metrics: for Prometheus.
        limits: on each request.
        max_requests: that may be open at once.
        facts: of the model, for translation.
        texts: of single tokens.
        numbers: of the requests in the order of admission.
        background_tasks: what goes on after its HTTP request has ended; the set keeps the tasks alive.
    """

    engine_loop: EngineLoop
    tokenizer: Tokenizer
    model_name: str
    created: int
    access: Access
    rules: Rules
    auditor: Auditor | None
    exit_log: ExitLog | None
    metrics: Metrics
    limits: RequestLimits = RequestLimits()
    max_requests: int = 512
    facts: ModelFacts = field(init=False)
    texts: TokenTexts = field(init=False)
    numbers: Iterator[int] = field(init=False)
    background_tasks: set[asyncio.Task[None]] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.facts = ModelFacts(self.tokenizer, self.engine_loop.vocab_size, self.engine_loop.max_positions)
        self.texts = TokenTexts(self.tokenizer)
        self.numbers = itertools.count(0 if self.exit_log is None else self.exit_log.next_number)

    def reload(self) -> None:
        """Read keys and rules again, for the requests that come.

        Raises:
            ConfigError: a file is wrong. What it says is then not in force. If it is the rules, keys are revoked and
                replaced nevertheless, but none has a new name: the rules in force say nothing of it.
        """
        keys = self.access.read()
        try:
            plans = self.rules.read(keys.names if self.access.required else None)
        except ConfigError:
            self.access.use(keys, new_names=False)
            raise
        self.access.use(keys)
        self.rules.use(plans)
        self.metrics.configure(self.rules.tasks)

    async def close(self) -> None:
        """Write the records of the last requests. Audits that have not ended are left out."""
        if self.auditor is not None:
            await self.auditor.close()
        if self.background_tasks:
            await asyncio.wait(self.background_tasks)
        if self.exit_log is not None:
            self.exit_log.close()
