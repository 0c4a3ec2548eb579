"""The engine: requests in, text out, while it runs. Which rows run what is ``core``'s business."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import replace

from megatron_ee.config.exits import ExitSpec
from megatron_ee.data.tokenizer import Tokenizer
from megatron_ee.errors import ConfigError, UserError
from megatron_ee.inference.prompts import check_ids, prompt_ids
from megatron_ee.inference.remote import DriverScheduler
from megatron_ee.inference.requests import Completion, Event, Request, Token
from megatron_ee.inference.scheduler import Scheduler
from megatron_ee.inference.sequence import Sequence, SequenceParams
from megatron_ee.inference.statistics import Totals, row_statistics
from megatron_ee.inference.text import TextStream


class Engine:
    """Continues prompts, many at a time.

    ``submit`` and ``cancel`` may be called between any two ``step`` calls; ``step`` runs some layers for some rows and
    returns what that brought. ``stream`` and ``generate`` call it as needed.

    Attributes:
        max_positions: the model's.
        vocab_size: the model's.
        exits: that may be asked.
        off: layers of the model's other exits, which this engine does without.
    """

    def __init__(
        self,
        scheduler: Scheduler | DriverScheduler,
        exits: Collection[ExitSpec],
        *,
        num_layers: int,
        vocab_size: int,
        max_positions: int,
        tokenizer: Tokenizer | None = None,
        eos: Collection[int] = (),
        off: Collection[int] = (),
    ) -> None:
        """See ``loading.open_engine``. Without ``tokenizer`` prompts must be token ids, and outputs have no text."""
        self._scheduler, self._tokenizer, self._eos = scheduler, tokenizer, frozenset(eos)
        self.exits, self.off, self.num_layers = tuple(exits), tuple(sorted(off)), num_layers
        self.vocab_size, self.max_positions = vocab_size, max_positions
        self._front: dict[int, _Front] = {}
        self._events: deque[Event] = deque()
        self._requests = self._rows = 0
        self._totals, self._seconds = Totals(), 0.0
        self._closed = False

    def submit(self, request: Request) -> int:
        """Put a request in line; the number that its events carry.

        Raises:
            ConfigError: it cannot be answered: an impossible setting, an empty prompt, one that is longer than the
                model's context, or one that no amount of waiting would find memory for. Nothing else is disturbed.
        """
        if self._closed:
            raise ConfigError("the engine is closed")
        prompt, most, limit = self.check(request)
        self._requests += 1
        outputs = [self._output(request, prompt, most, limit, sample) for sample in range(request.samples)]
        for output in outputs:
            text = TextStream(self._tokenizer, prompt, request.stop) if self._tokenizer is not None else None
            self._front[output.number] = _Front(output, text, self._echoed(request, prompt))
        self._scheduler.add(outputs)
        return self._requests

    def check(self, request: Request) -> tuple[tuple[int, ...], int, int]:
        """What a request comes down to, without putting it in line: its prompt's ids, most tokens, most positions.

        Raises:
            ConfigError: as ``submit``.
        """
        request.check([spec.layer for spec in self.exits], self.num_layers, self.off)
        if request.stop and self._tokenizer is None:
            raise ConfigError("stop: there is no tokenizer, and so no text to find it in; give stop_ids")
        prompt = prompt_ids(request, self._tokenizer, self.vocab_size, self.max_positions)
        check_ids("follow", request.follow, self.vocab_size)
        check_ids("stop_ids", request.stop_ids, self.vocab_size)
        most = min(request.max_tokens, len(request.follow) or request.max_tokens)
        limit = min(len(prompt) + most, self.max_positions)
        needed = self._scheduler.budget.needed(limit, limit)
        if needed > self._scheduler.budget.total:
            raise ConfigError(
                f"max_tokens: {limit} positions need {needed / 1e6:,.0f} MB of keys and values, but there are "
                f"{self._scheduler.budget.total / 1e6:,.0f} MB; ask for less, or give the engine more memory"
            )
        return prompt, most, limit

    def cancel(self, request: int) -> None:
        """End a request's outputs; what they have said so far comes as their completions. Unknown ones are ignored."""
        for number, front in list(self._front.items()):
            if front.output.settings.request == request:
                self._scheduler.remove(number)
                front.output.finish = front.output.finish or "cancelled"
                self._events.append(self._end(front))

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do or to be told."""
        return self._scheduler.idle and not self._events

    def step(self) -> list[Event]:
        """Run one chain of layers for the rows whose turn it is; what that brought, often nothing."""
        started = time.perf_counter()
        events, self._events = list(self._events), deque()
        if not self._scheduler.idle:
            for output, tokens in self._scheduler.advance():
                events += self._told(output, tokens)
            self._seconds += time.perf_counter() - started
        return events

    def stream(self, request: int) -> Iterator[Event]:
        """The events of one request as they come; those of others wait for their own ``stream`` or ``step``."""
        open_ = sum(front.output.settings.request == request for front in self._front.values())
        open_ += sum(event.request == request and _last(event) for event in self._events)
        while open_:
            events = self.step()
            # Before anything is told: whoever hears it may well step, or listen to another stream.
            self._events.extendleft(event for event in reversed(events) if event.request != request)
            for event in events:
                if event.request == request:
                    open_ -= _last(event)
                    yield event

    def generate(self, requests: Collection[Request]) -> list[list[Completion]]:
        """Answer all of these; by request and sample.

        Raises:
            UserError: one of them is refused, or fails; then the others are cancelled.
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

    def statistics(self) -> dict[str, object]:
        """Totals over the outputs that have ended."""
        return {**self._totals.to_dict(self._seconds), "set_aside": self._scheduler.set_aside}

    def close(self) -> None:
        """Cancel what is in work; nothing can be submitted afterwards."""
        for front in list(self._front.values()):
            self.cancel(front.output.settings.request)
        self._closed = True

    # -------------------------------------------------------------------------------------------------------- inside

    def _output(self, request: Request, prompt: tuple[int, ...], most: int, limit: int, sample: int) -> Sequence:
        self._rows += 1
        exits = tuple(s.layer for s in self.exits if request.exits is None or s.layer in request.exits)
        sampling = replace(request.sampling, seed=request.sampling.seed + sample)
        eos = frozenset() if request.ignore_eos or request.follow else self._eos
        settings = SequenceParams(
            request=self._requests,
            sample=sample,
            prompt=prompt,
            mode=request.mode,
            policy=request.policy,
            draft=request.draft,
            exits=exits,
            drafting=tuple(k for k in exits if k < self.num_layers and request.draft.exit in (None, k)),
            sampling=sampling,
            max_tokens=most,
            limit=limit,
            ends=eos | frozenset(request.stop_ids),
            eos=eos,
            logprobs=request.logprobs,
            follow=tuple(request.follow),
        )
        return make_sequence(self._scheduler, self._rows, settings)

    def _echoed(self, request: Request, prompt: Collection[int]) -> str:
        """What the output's text begins with."""
        if not request.echo:
            return ""
        if isinstance(request.prompt, str):
            return request.prompt
        return "" if self._tokenizer is None else self._tokenizer.decode(list(prompt))

    def _told(self, output: Sequence, tokens: Collection[Token]) -> list[Event]:
        """The event of an output, of which some tokens were emitted or which failed."""
        front, now = self._front[output.number], time.perf_counter()
        request, sample = output.settings.request, output.settings.sample
        if output.failed is not None:
            del self._front[output.number]
            return [Event(request, sample, error=output.failed)]
        output.first_at, output.last_at = output.first_at or now, now
        text, taken = "", []
        for token in tokens:
            taken.append(token)
            text += front.push(token, is_eos=token.id in output.settings.eos)
            if front.text is not None and front.text.stopped is not None:
                if output.finish is None:
                    self._scheduler.remove(output.number)
                del output.tokens[len(front.pieces) :]  # after every rank has removed the same
                output.finish = "stop"
                break
        if output.finish is None:
            return [Event(request, sample, text, tuple(taken))]
        end = self._end(front)
        return [replace(end, text=text + end.text, tokens=tuple(taken))]

    def _end(self, front: _Front) -> Event:
        """The last event of an output."""
        output, settings = front.output, front.output.settings
        del self._front[output.number]
        rest = front.finish()
        if front.text is not None and front.text.stopped is not None:
            output.finish = "stop"  # completed by what was held back until the end
        self._totals.add([output])
        assert output.finish is not None
        completion = Completion(
            text=front.prefix + "".join(front.pieces),
            tokens=tuple(output.tokens),
            pieces=tuple(front.pieces),
            finish_reason=output.finish,
            statistics={"finish_reason": output.finish, **row_statistics(output)},
        )
        return Event(settings.request, settings.sample, text=rest, completion=completion)


def make_sequence(scheduler: Scheduler | DriverScheduler, number: int, settings: SequenceParams) -> Sequence:
    """An output that has yet to start, to be given to ``core``."""
    drafter = scheduler.drafter if settings.mode == "speculative" else None
    return Sequence(number, settings, drafter, submitted_at=time.perf_counter())


class _Front:
    """The text side of one output.

    Attributes:
        prefix: what its text begins with.
        pieces: the text of each token.
    """

    def __init__(self, output: Sequence, text: TextStream | None, prefix: str) -> None:
        self.output, self.text, self.prefix = output, text, prefix
        self.pieces: list[str] = []

    def push(self, token: Token, *, is_eos: bool) -> str:
        """The text that is certain with one token more; end of text has none."""
        piece = "" if self.text is None or is_eos else self.text.push(token.id)
        self.pieces.append(piece)
        return piece

    def finish(self) -> str:
        """What was held back in case more came."""
        rest = "" if self.text is None else self.text.finish()
        if rest and self.pieces:
            self.pieces[-1] += rest
        return rest


def _last(event: Event) -> bool:
    return event.completion is not None or event.error is not None
