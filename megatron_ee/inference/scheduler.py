"""The engine's inside: which rows run which layers next, and what becomes of the answers. Tokens only, no text.

It is deterministic but for measured times, so that tensor-parallel ranks can each run it on the same requests and
agree; ``times`` lets them share those.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from megatron_ee import platform
from megatron_ee.inference.heads import HeadInput
from megatron_ee.inference.memory import Budget
from megatron_ee.inference.passes import Pass, ScheduledSequence, StageMap, StageWorker
from megatron_ee.inference.prefixes import Prefix, Prefixes
from megatron_ee.inference.requests import Token
from megatron_ee.inference.scheduling import choose_place, next_stop
from megatron_ee.inference.sequence import Sequence
from megatron_ee.inference.speculation import Drafter

PASS_TOKENS = 512
"""Tokens of a prompt that run at a time: as many as products need to be fast, few enough that others wait little."""


class Timer(Protocol):
    """Measures device work, as ``platform.DeviceTimer`` does."""

    def stop(self) -> None:
        """All that is measured has been started."""

    def seconds(self) -> float:
        """How long it took; waits until it is done."""


@dataclass
class _PendingPass:
    """A chain whose answers are to come; ``timer``: of its device work, None where no drafts are planned by it."""

    stage: int
    pass_: Pass
    outputs: list[Sequence]
    inputs: list[HeadInput | None]
    timer: Timer | None


@dataclass
class Scheduler:
    """Rows in work and in line.

    Attributes:
        links: the stages.
        places: where rows stop.
        budget: memory of keys and values.
        max_rows: rows in work at a time.
        drafter: what speculative rows go by.
        prefixes: what ended rows leave to others.
        times: gives every rank the first one's seconds; None where there is one rank.
        start_timer: starts to measure the device work of a chain.
    """

    links: list[StageWorker]
    places: StageMap
    budget: Budget
    max_rows: int
    drafter: Drafter
    prefixes: Prefixes = field(default_factory=Prefixes)
    times: Callable[[float], float] | None = None
    start_timer: Callable[[], Timer] = platform.DeviceTimer
    running: dict[int, Sequence] = field(default_factory=dict)
    queue: deque[Sequence] = field(default_factory=deque)
    set_aside: int = 0
    _pending: deque[_PendingPass] = field(default_factory=deque)
    _prefilled: bool = False

    def add(self, outputs: Iterable[Sequence]) -> None:
        """Put the outputs of one request in line; the first one's prompt serves all."""
        leader, *others = outputs
        for other in others:
            other.waits_for = leader.number
        self.queue += [leader, *others]

    def remove(self, number: int) -> None:
        """Forget an output, in work or in line."""
        self._no_longer_leads(number)
        output = self.running.pop(number, None)
        if output is None:
            self.queue = deque(each for each in self.queue if each.number != number)
            return
        gone = [number]
        if not output.in_flight and output.failed is None:
            prefix = _prefix(output)
            gone = self.prefixes.keep(prefix)
            if number not in gone:
                for link in self.links:
                    link.keep(number, len(prefix.ids))
        for row in gone:
            self._close(row)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self.running and not self.queue

    def advance(self) -> list[tuple[Sequence, list[Token]]]:
        """Admit rows, run a chain on each stage that has work, and give what was emitted; ended rows are closed."""
        self._admit()
        for stage in range(len(self.links)):
            self._run_stage(stage)
        return self._land() if self._pending else []

    # ------------------------------------------------------------------------------------------------------ admission

    def _admit(self) -> None:
        while self.queue and len(self.running) < self.max_rows:
            output = self.queue[0]
            leader = None if output.waits_for is None else self.running[output.waits_for]
            if leader is not None and leader.run >= len(output.settings.prompt) - 1:
                output.waits_for = None  # it is past where others may join
            fits = self.budget.claim(output.number, output.settings.limit, output.known)
            if not fits and not self.prefixes.rows:  # as in every turn while it waits
                return
            source = None
            if output.waits_for is None:  # known before others go for its sake: it is then the last of them
                others = (_prefix(each) for each in self.running.values() if not each.in_flight)
                source = self.prefixes.longest(output.ids, others)
            if not fits and not self._claim(output, output.known):
                return
            self.queue.popleft()
            for link in self.links:
                link.open(output.number, output.settings.limit)
            if source is not None and (source.row in self.running or source.row in self.prefixes.rows):
                output.run = output.reused = len(source.ids)
                for link in self.links:
                    link.copy(source.row, output.number, output.run)
            self.running[output.number] = output

    def _claim(self, output: Sequence, length: int) -> bool:
        """Claim room for a row, at the expense of those that are kept for others."""
        while not self.budget.claim(output.number, output.settings.limit, length):
            if not self.prefixes.rows:
                return False
            self._close(self.prefixes.evict())
        return True

    def _close(self, number: int) -> None:
        for link in self.links:
            link.close(number)
        self.budget.release(number)

    def _make_room(self, output: Sequence, length: int) -> bool:
        """Room for a row to have ``length`` positions, at the expense of younger ones; False where it has to wait."""
        if output.number not in self.running:  # set aside for one before it
            return False
        while not self._claim(output, length):
            youngest = next((each for each in reversed(self.running.values()) if not each.in_flight), None)
            if youngest is None:
                return False
            del self.running[youngest.number]
            self._close(youngest.number)
            self._no_longer_leads(youngest.number)
            youngest.set_aside()
            self.queue.appendleft(youngest)
            self.set_aside += 1
            if youngest is output:
                return False
        return True

    def _no_longer_leads(self, number: int) -> None:
        for each in (*self.running.values(), *self.queue):
            if each.waits_for == number:
                each.waits_for = None

    # --------------------------------------------------------------------------------------------------------- chains

    def _run_stage(self, stage: int) -> None:
        """Run the chain of a stage that advances most rows, or prompts, in turns."""
        if any(pending.stage == stage for pending in self._pending):
            return
        ready = [o for o in self.running.values() if o.stage == stage and not o.in_flight and o.waits_for is None]
        prompts = [output for output in ready if output.place == 0 and output.prefilling]
        waiting: dict[int, list[Sequence]] = {}
        for output in ready:
            if output.place > 0 or not output.prefilling:
                waiting.setdefault(output.place, []).append(output)
        if prompts and (not waiting or not self._prefilled):
            self._prefilled = True
            self._run_prompts(prompts)
            return
        self._prefilled = False
        if not waiting:
            return
        place = choose_place({place: [output.age for output in there] for place, there in waiting.items()})
        for other, there in waiting.items():
            for output in there:
                output.age = 0 if other == place else output.age + 1
        chosen = waiting[place]
        if place == 0:
            for output in chosen:
                output.begin_round(len(chosen), time.perf_counter())
            chosen = [output for output in chosen if self._make_room(output, output.run + 1)]
            chosen = [output for output in chosen if output.number in self.running]
        if chosen:
            self._start(stage, place, chosen, [output.ids_from(output.run) if place == 0 else [] for output in chosen])

    def _run_prompts(self, prompts: Collection[Sequence]) -> None:
        """Run the next tokens of prompts, oldest first, up to ``PASS_TOKENS`` in all."""
        chosen, tokens, left = [], [], PASS_TOKENS
        for output in prompts:
            behind = output.ids_from(output.run)
            # Others copy the prompt but for its last token; one that goes on decides on the newest as usual.
            forks = any(each.waits_for == output.number for each in self.running.values())
            if len(behind) > 1 and (output.tokens or forks):
                behind = behind[:-1]
            behind = behind[:left]
            if not behind or not self._make_room(output, output.run + len(behind)):
                break
            chosen.append(output)
            tokens.append(behind)
            left -= len(behind)
        pairs = [(o, t) for o, t in zip(chosen, tokens, strict=True) if o.number in self.running]
        if pairs:
            self._start(0, 0, [output for output, _ in pairs], [tokens for _, tokens in pairs])

    def _start(self, stage: int, place: int, outputs: list[Sequence], tokens: Collection[Collection[int]]) -> None:
        """Run rows from a place to the first where one of them stops."""
        end, final = self.places.ends[stage], self.places.final
        stop = min(next_stop(place, output.asked(), end) for output in outputs)
        scheduled, inputs = [], []
        for output, new in zip(outputs, tokens, strict=True):
            output.run += len(new)
            asked = stop == final or (stop in output.asked() and place != stop)
            head_input = output.head_input(stop, final) if asked and output.run == output.known else None
            scheduled.append(ScheduledSequence(output.number, output.run, tuple(new), head_input))
            inputs.append(head_input)
            self._count(output, place, stop, len(new), asked=head_input is not None)
        pass_ = Pass(place, stop, tuple(scheduled), sends=stop == end != final and not any(inputs))
        timer = self._run(stage, pass_, outputs)
        if any(inputs):
            for output in outputs:
                output.in_flight = True
            self._pending.append(_PendingPass(stage, pass_, outputs, inputs, timer))
        else:
            self._passed(stage, pass_, outputs)

    def _run(self, stage: int, pass_: Pass, outputs: Collection[Sequence]) -> Timer | None:
        """Run a chain, with a timer where drafts are planned by how long it takes.

        The timer is read with the answers. Waiting for it here could be a deadlock: a chain that sends is done only
        after the next stage receives, and the command to receive follows this call.
        """
        wanted = len(self.links) == 1 or _decodes_to_heads(pass_)
        if stage > 0 or not wanted or not any(output.plans_by_time for output in outputs):
            self.links[stage].run(pass_)
            return None
        timer = self.start_timer()
        self.links[stage].run(pass_)
        timer.stop()
        return timer

    def _learn_time(self, pending: _PendingPass) -> None:
        """Observe how long a chain took. Its answers have arrived, so reading the timer does not wait."""
        if pending.timer is None:
            return
        pass_, seconds = pending.pass_, pending.timer.seconds()
        seconds = seconds if self.times is None else self.times(seconds)
        if len(self.links) == 1:
            for output in pending.outputs:
                output.spent += seconds / len(pending.outputs)
        if _decodes_to_heads(pass_):
            self.drafter.costs.observe(pass_.stop, len(pass_.sequences), seconds)

    def _count(self, output: Sequence, place: int, stop: int, new: int, *, asked: bool) -> None:
        """Count the layers that a row's tokens run, and let the deferred ones that it meets go on."""
        tokens = new if place == 0 else output.carried + output.deferred.pop(place, 0)
        at, products = place, 0
        for layer in sorted(layer for layer in output.deferred if place < layer < stop):
            products += tokens * self.places.layers(at, layer)
            tokens, at = tokens + output.deferred.pop(layer), layer
        output.carried = tokens
        if output.run > len(output.settings.prompt):
            products += tokens * self.places.layers(at, stop)
            # Other tokens only leave keys and values in the exit's layer.
            output.products += products + int(asked and stop in self.places.layer_exits)

    def _passed(self, stage: int, pass_: Pass, outputs: Collection[Sequence]) -> None:
        """Rows have got to the end of a chain without being asked anything."""
        if pass_.sends:
            self.links[stage + 1].receive([output.number for output in outputs])
        for output in outputs:
            output.place = pass_.stop
            if pass_.sends:
                output.stage = stage + 1
            elif pass_.stop == self.places.final:
                output.place = output.stage = 0
                self._fork(output)

    def _fork(self, leader: Sequence) -> None:
        """Give those that wait for a prompt its keys and values, once all but its last token has run."""
        waiting = [each for each in self.running.values() if each.waits_for == leader.number]
        if not waiting or leader.run < len(leader.settings.prompt) - 1:
            return
        for each in waiting:
            for link in self.links:
                link.copy(leader.number, each.number, leader.run)
            each.run, each.waits_for = leader.run, None
        self._no_longer_leads(leader.number)  # those still in line run it themselves

    # -------------------------------------------------------------------------------------------------------- answers

    def _land(self) -> list[tuple[Sequence, list[Token]]]:
        """Take the oldest answers."""
        pending = self._pending.popleft()
        outputs = iter(self.links[pending.stage].outputs())
        self._learn_time(pending)
        emitted = []
        for output, head_input in zip(pending.outputs, pending.inputs, strict=True):
            output.in_flight = False
            output.place = pending.pass_.stop
            if head_input is None:
                if output.number in self.running:
                    self._passed(pending.stage, pending.pass_, [output])
                continue
            head_output = next(outputs)
            if output.number not in self.running:
                continue
            if len(self.links) > 1 and head_input.kind in ("emit", "verify") and output.plans_by_time:
                # Stages work at the same time: what a round takes is known from its begin and end alone.
                seconds = time.perf_counter() - output.began
                output.spent = (seconds if self.times is None else self.times(seconds)) / output.rows
            tokens = output.take(head_output, head_input, pending.pass_.stop, self.places.final - 1)
            if head_input.kind == "verify" and output.run >= output.known:
                output.run = output.known - 1
                for link in self.links:
                    link.crop(output.number, output.run)
            if output.finish is not None or output.failed is not None:
                self.remove(output.number)
            if tokens or output.failed is not None:
                emitted.append((output, tokens))
            if output.place == 0 and pending.stage > 0 and head_input.kind == "leave" and output.number in self.running:
                self._fill(pending.stage, pending.pass_.stop, output)
        return emitted

    def _fill(self, stage: int, place: int, output: Sequence) -> None:
        """Let the token that has just left go on through the stages behind, while its successor starts."""
        for index in range(stage, len(self.links)):
            start, end = (place if index == stage else self.places.ends[index - 1]), self.places.ends[index]
            output.products += sum(output.deferred.values()) * self.places.layers(start, end)
            sends = end != self.places.final
            self.links[index].run(Pass(start, end, (ScheduledSequence(output.number, output.run),), sends))
            if sends:
                self.links[index + 1].receive([output.number])
        output.deferred.clear()


def _decodes_to_heads(pass_: Pass) -> bool:
    """Whether each row of a chain starts from tokens and asks: the costs of such chains are learnt."""
    return pass_.start == 0 and all(work.head_input is not None for work in pass_.sequences)


def _prefix(output: Sequence) -> Prefix:
    """What a row that is not in flight could leave to others."""
    return Prefix(output.number, tuple(output.ids[: output.complete]))
