"""The engine accepts requests and returns text as it is generated. The ``Scheduler`` decides which sequences run."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import replace

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.data.tokenizer import Tokenizer
from megatron_ee.errors import ConfigError, UserError
from megatron_ee.inference.output_processor import OutputState, TextStream, Totals
from megatron_ee.inference.remote import DriverScheduler
from megatron_ee.inference.requests import Completion, Event, Request, Token, check_ids, prompt_ids
from megatron_ee.inference.scheduler import Scheduler
from megatron_ee.inference.sequence import Sequence, SequenceParams, Status


class Engine:
    """Generates continuations of many prompts concurrently (continuous batching).

    ``submit`` and ``cancel`` may be called between any two ``step`` calls. ``step`` runs some layers for some sequences
    and returns the resulting events. ``stream`` and ``generate`` call ``step`` as needed.

    Attributes:
        exits: the exits that requests may use.
        off: layers of the model's exits that are switched off in this engine.
        num_layers: number of backbone layers.
        vocab_size: size of the vocabulary.
        max_positions: maximum number of positions of a sequence.
    """

    def __init__(
        self,
        scheduler: Scheduler | DriverScheduler,
        architecture: Architecture,
        exits: Collection[ExitSpec],
        *,
        tokenizer: Tokenizer | None = None,
        eos: Collection[int] = (),
        off: Collection[int] = (),
    ) -> None:
        """Create an idle engine; ``loading`` builds one for a model.

        Args:
            scheduler: runs the sequences.
            architecture: of the model.
            exits: the exits that requests may use.
            tokenizer: None if prompts are token ids only; outputs then have no text.
            eos: end-of-text tokens.
            off: layers of the model's exits that are not loaded, for the messages about them.
        """
        self._scheduler, self._tokenizer, self._eos = scheduler, tokenizer, frozenset(eos)
        self.exits, self.off, self.num_layers = tuple(exits), tuple(sorted(off)), architecture.num_layers
        self.vocab_size, self.max_positions = architecture.vocab_size, architecture.max_generated_positions
        self._outputs: dict[int, OutputState] = {}
        self._events: deque[Event] = deque()
        self._num_requests = self._num_seqs = 0
        self._totals, self._seconds = Totals(), 0.0
        self._closed = self._failed = False

    def submit(self, request: Request) -> int:
        """Queue a request.

        Returns:
            The request's number, which its events carry.

        Raises:
            ConfigError: a setting is invalid, the prompt is empty or longer than the model's context, or the request
                needs more KV memory than the engine has. Other requests are not affected.
        """
        if self._closed:
            raise ConfigError("the engine is closed")
        prompt, max_tokens, max_length = self.check(request)
        self._num_requests += 1
        seqs = [self._sequence(request, prompt, max_tokens, max_length, sample) for sample in range(request.samples)]
        for seq in seqs:
            text = TextStream(self._tokenizer, prompt, request.stop) if self._tokenizer is not None else None
            self._outputs[seq.seq_id] = OutputState(seq, text, self._prefix(request), request.coverage)
        self._scheduler.add(seqs)
        return self._num_requests

    def check(self, request: Request) -> tuple[tuple[int, ...], int, int]:
        """Check a request without queueing it.

        Returns:
            The token ids of the prompt (with the text to replay, but for its last token), the maximum number of emitted
            tokens, and the maximum number of positions.

        Raises:
            ConfigError: as ``submit``.
        """
        gates = [spec.layer for spec in self.exits if spec.gate]
        request.check([spec.layer for spec in self.exits], self.num_layers, self.off, gates)
        if request.stop and self._tokenizer is None:
            raise ConfigError("stop: needs a tokenizer, and there is none; give stop_ids")
        prompt = prompt_ids(request, self._tokenizer, self.vocab_size, self.max_positions)
        check_ids("forced_ids", request.forced_ids, self.vocab_size)
        check_ids("stop_ids", request.stop_ids, self.vocab_size)
        check_ids("replay_ids", request.replay_ids, self.vocab_size)
        most = min(request.max_tokens, len(request.forced_ids) or request.max_tokens)
        if request.replay_ids:
            prompt, most = (*prompt, *request.replay_ids[:-1]), 1
            if len(prompt) > self.max_positions:
                held = f"there may be {self.max_positions + 1}"
                raise ConfigError(f"replay_ids: the prompt has {len(prompt) + 1} tokens with them; {held}")
        limit = min(len(prompt) + most, self.max_positions + request.scores_text)
        budget = self._scheduler.kv_caches.budget
        needed = budget.needed(limit, limit)
        if needed > budget.total:
            raise ConfigError(
                f"max_tokens: {limit} positions need {needed / 1e6:,.3f} MB of KV cache, but it may have "
                f"{budget.total / 1e6:,.3f} MB; ask for fewer tokens, or give it more memory"
            )
        return prompt, most, limit

    def cancel(self, request: int) -> None:
        """End a request. The completions of its outputs hold the tokens so far. An unknown number is ignored."""
        for seq_id, output in list(self._outputs.items()):
            if output.seq.params.request == request:
                self._scheduler.finish(seq_id, "cancelled")
                self._events.append(self._finish(output))

    @property
    def idle(self) -> bool:
        """Whether there is no work left and no event left to return."""
        return self._scheduler.idle and not self._events

    def step(self) -> list[Event]:
        """Run one scheduler step and return its events, which may be none."""
        started = time.perf_counter()
        events, self._events = list(self._events), deque()
        if not self._scheduler.idle:
            try:
                for seq, tokens in self._scheduler.step():
                    events.append(self._process(seq, tokens))
            except BaseException:
                self._failed = True
                raise
            self._seconds += time.perf_counter() - started
        return events

    def stream(self, request: int) -> Iterator[Event]:
        """Yield the events of one request. Events of other requests are kept for their ``stream`` or for ``step``."""
        open_ = sum(output.seq.params.request == request for output in self._outputs.values())
        open_ += sum(event.request == request and event.last for event in self._events)
        while open_:
            events = self.step()
            # Kept before the first yield, because the caller may call ``step`` or read another stream in between.
            self._events.extendleft(event for event in reversed(events) if event.request != request)
            for event in events:
                if event.request == request:
                    open_ -= event.last
                    yield event

    def generate(self, requests: Collection[Request]) -> list[list[Completion]]:
        """Generate the completions of all requests, indexed by request and sample.

        Raises:
            UserError: a request is invalid or fails; the others are then cancelled.
        """
        numbers: list[int] = []
        found: dict[tuple[int, int], Completion] = {}
        try:
            for request in requests:
                numbers.append(self.submit(request))
            for number in numbers:
                for event in self.stream(number):
                    if event.error is not None:
                        raise UserError(event.error)
                    if event.completion is not None:
                        found[number, event.sample] = event.completion
        except BaseException:
            for number in numbers:
                self.cancel(number)
            self._events = deque(event for event in self._events if event.request not in numbers)
            raise
        return [[found[n, i] for i in range(r.samples)] for n, r in zip(numbers, requests, strict=True)]

    def heartbeat(self) -> None:
        """Keep the other ranks from timing out. To be called now and then while the engine is idle.

        The ranks also notice a lost one without it, see ``parallel.watchdog``.
        """
        if self._scheduler.idle:
            self._scheduler.heartbeat()

    @property
    def num_running(self) -> int:
        """Number of running sequences. Others may wait."""
        return self._scheduler.num_running

    @property
    def kv_cache_usage(self) -> float:
        """Claimed share of the KV memory, 0 to 1. Finished sequences that are kept as prefixes count."""
        budget = self._scheduler.kv_caches.budget
        return budget.used / budget.total

    @property
    def num_preempted(self) -> int:
        """Number of preemptions so far."""
        return self._scheduler.num_preempted

    def statistics(self) -> dict[str, object]:
        """Totals over the finished outputs."""
        return {**self._totals.to_dict(self._seconds), "num_preempted": self.num_preempted}

    def close(self) -> None:
        """Cancel all unfinished requests. Nothing can be submitted afterwards."""
        self._closed = True
        for output in list(self._outputs.values()):
            self.cancel(output.seq.params.request)
        # Another stage's last send does not end before its head outputs are read. After a failure none may come.
        while not self._failed and not self._scheduler.idle:
            self._scheduler.step()

    def _sequence(
        self, request: Request, prompt: tuple[int, ...], max_tokens: int, max_length: int, sample: int
    ) -> Sequence:
        self._num_seqs += 1
        exits = tuple(s.layer for s in self.exits if request.exits is None or s.layer in request.exits)
        eos = frozenset() if request.ignore_eos or request.forced_ids else self._eos
        params = SequenceParams(
            request=self._num_requests,
            sample=sample,
            prompt_token_ids=prompt,
            mode=request.mode,
            policy=request.policy,
            draft=request.draft,
            exits=exits,
            draft_exits=tuple(k for k in exits if k < self.num_layers and request.draft.exit in (None, k)),
            sampling=request.sampling.model_copy(update={"seed": request.sampling.seed + sample}),
            max_tokens=max_tokens,
            max_length=max_length,
            stop_token_ids=eos | frozenset(request.stop_ids),
            eos_token_ids=eos,
            logprobs=request.logprobs,
            forced_token_ids=request.forced_ids,
            replayed_token_ids=request.replay_ids,
        )
        return Sequence(self._num_seqs, params)

    def _prefix(self, request: Request) -> str:
        """The start of the output's text: the prompt with ``echo``, else empty."""
        if not request.echo:
            return ""
        if isinstance(request.prompt, str):
            return request.prompt
        return "" if self._tokenizer is None else self._tokenizer.decode(list(request.prompt))

    def _process(self, seq: Sequence, tokens: list[Token]) -> Event:
        """The event of a sequence that emitted tokens or failed."""
        output, params = self._outputs[seq.seq_id], seq.params
        if seq.status is Status.FAILED:
            del self._outputs[seq.seq_id]
            return Event(params.request, params.sample, error=seq.error)
        text, taken = output.push(tokens)
        if output.stopped:
            self._scheduler.finish(seq.seq_id, "stop")
        first = len(output.pieces) - len(taken)
        if seq.status is not Status.FINISHED:
            return Event(params.request, params.sample, text, taken, tuple(output.pieces[first:]))
        end = self._finish(output)
        # The last piece has taken up the text that was held back until the end.
        return replace(end, text=text + end.text, tokens=taken, pieces=tuple(output.pieces[first:]))

    def _finish(self, output: OutputState) -> Event:
        """End an output and return its last event."""
        del self._outputs[output.seq.seq_id]
        event = output.finish()
        self._totals.add(output)
        return event
