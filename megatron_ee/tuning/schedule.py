"""The schedule of a step over the stages: forward only. Each stage trains its exits when their taps have arrived.

There is no backward pipeline, so no stage waits for an exit: h and taps are sent before the exits' work starts. What
exits learn from the stage of the last layer comes back in a teacher message (``tuning.teacher``). A stage with n
stages after it then runs its exits n microbatches late, when the first teacher message has arrived.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.config.exits import ExitSpec
from megatron_ee.data.loader import Batch
from megatron_ee.exits.stage import Stage
from megatron_ee.parallel.layout import Layout, StageLayout
from megatron_ee.parallel.transfer import Inbox, Outbox, connect
from megatron_ee.tuning.teacher import TeacherMessage

if TYPE_CHECKING:
    from megatron_ee.model.attention import Positions

RUN = 8
"""Batches per stage in one run through several stages, where any number is possible: enough to keep the stages busy,
few enough to fit in memory and to stop soon after a signal."""


@dataclass(frozen=True)
class Microbatch:
    """A microbatch on one stage, after the stage's layers have run.

    Attributes:
        number: its number in the step, from 0.
        batch: the sequences, on the host.
        positions: for ``layer`` exits.
        labels: ``[seq * batch]`` int64, sequence-major as hidden states are.
        mask: ``[seq * batch]`` float32.
        taps: inputs of the exits on this stage, by layer, ``[seq, batch, hidden]`` (with sequence parallelism, this
            rank's share of seq).
    """

    number: int
    batch: Batch
    positions: Positions
    labels: Tensor
    mask: Tensor
    taps: dict[int, Tensor]


@dataclass(frozen=True)
class Span:
    """A timed action of a stage.

    Attributes:
        kind: for a microbatch ``receive``, ``forward``, ``send``, ``exits``, ``teach`` (work after the last layer) or
            ``teacher`` (waiting for the teacher message). For a layer ``exits``, or one of ``model.slots``.
        number: of the microbatch, or of the layer where all microbatches pass a layer before the next one.
        start: in seconds.
        end: in seconds.
    """

    kind: str
    number: int
    start: float
    end: float


class Pipeline:
    """This rank's stage and its links to the others.

    Attributes:
        stage: layers and exits held here.
        layout: of all stages.
        specs: the exits of all stages.
        teacher: the kind of teacher messages, which come back from the stage of the last layer; None if there are none.
        events: a list to which events are added; None to record none.
    """

    def __init__(
        self, stage: Stage, layout: Layout, specs: Sequence[ExitSpec], *, teacher: TeacherMessage | None = None
    ) -> None:
        self.stage, self.layout, self.specs, self.teacher = stage, layout, tuple(specs), teacher
        self.events: list[Span] | None = None
        self._marks: deque[tuple[str, int, Any, Any]] = deque()  # of the slots; another thread appends too
        self._clock: platform.Clock | None = None
        groups, dtype = stage.setup.groups, stage.setup.dtype
        self.index, last = groups.pipeline.rank(), layout.last_layered
        hosts = [index for index, place in enumerate(layout.stages) if place.exits and index != last]
        taught = teacher is not None
        self.lag = layout.depth(last) - layout.depth(self.index) if taught and self.index in hosts else 0
        # Warm-up is needed for messages in both directions. Messages that only go forward cannot deadlock.
        self._needs_warm_up = bool(taught and hosts) and platform.loads_kernels_lazily()
        self._inboxes, self._outboxes = [], []
        for message in layout.messages:
            connect(groups.pipeline, message.source, message.target)
            # A tap from an early stage arrives long before a tap of the same microbatch from a later stage.
            ahead = max(1, layout.depth(message.target) - layout.depth(message.source) + 1)
            if message.target == self.index:
                box = Inbox(groups.pipeline, message.source, dtype, ahead=ahead, held=self.lag)
                self._inboxes.append((message, box, ahead))
            if message.source == self.index:
                self._outboxes.append((message, Outbox(groups.pipeline, message.target, dtype, ahead=ahead)))
        self._teacher_outboxes: list[Outbox] = []
        self._teacher_inbox: Inbox | None = None
        if teacher is not None:
            for host in hosts:
                connect(groups.teacher, last, host)
            if self.index == last:
                self._teacher_outboxes = [Outbox(groups.teacher, host, teacher.dtype) for host in hosts]
            if self.index in hosts:
                self._teacher_inbox = Inbox(groups.teacher, last, teacher.dtype)

    @property
    def _by_layer(self) -> bool:
        """Whether all microbatches of a run pass a layer before the next one, since the layers share memory."""
        return self.stage.backbone.slots is not None and len(self.layout.stages) == 1

    def batches_per_run(self, batch_size: int, sequence_length: int) -> int:
        """Number of batches that ``run`` should get at a time where any number is possible, as in validation.

        Several stages need enough to be busy. Where layers share memory, each run fills every slot again, so there are
        as many as have hidden states of the size of one slot.
        """
        if len(self.layout.stages) > 1:
            return RUN * len(self.layout.stages)
        slots, setup = self.stage.backbone.slots, self.stage.setup
        if slots is None:
            return 1
        hidden = setup.hidden_shape(batch_size, sequence_length).numel() * setup.dtype.itemsize
        return max(1, slots.slots[0].memory.nbytes // hidden)

    @platform.tuning_attention()
    def run(
        self,
        batches: Sequence[Batch],
        exits_work: Callable[[Microbatch, Any], None],
        at_end: Callable[[Microbatch, Tensor], Any] | None = None,
        *,
        taught: bool = False,
    ) -> None:
        """Run every microbatch through this stage's layers, and then through its exits.

        Args:
            batches: this data-parallel rank's microbatches, the same on all stages.
            exits_work: called once for each microbatch, in order, with the teacher of the microbatch or None.
            at_end: called with h after the last layer, on the stage that runs this layer. The teacher that it returns,
                of the kind that ``teacher`` packs, is sent to all stages that host exits.
            taught: whether ``at_end`` returns a teacher, for which the exits then wait. Equal on all stages; False in
                validation.
        """
        if self._by_layer:
            self._run_by_layer(batches, exits_work, at_end, taught)
            return
        ends = at_end is not None and self.index == self.layout.last_layered
        needs_h = ends or any(message.hidden for message, _ in self._outboxes)
        waiting: deque[tuple[Microbatch, Any]] = deque()
        if taught and self._needs_warm_up:
            self._needs_warm_up = False
            self._warm_up(batches[0], exits_work, at_end)
        data = on_device(batches)
        of_length = self._positions(batches)
        self._expect(batches, taught)
        lag = self.lag if taught else 0
        for turn in range(len(batches) + lag):
            if turn < len(batches):  # fill and steady state: one more microbatch through the layers
                positions = of_length[batches[turn].tokens.shape[1]]
                h, taps = self._receive(turn, batches[turn], data[turn])
                with self._event("forward", turn):
                    h, own = self.stage.run_layers(h, positions, to_end=needs_h)
                self._send(turn, h, own)
                micro = Microbatch(
                    turn, batches[turn], positions, data[turn].labels, data[turn].mask, self._hosted(own | taps)
                )
                del own, taps  # frees all taps but this stage's own before the next microbatch
                teacher = None
                if ends and at_end is not None:
                    with self._event("teach", turn):
                        teacher = at_end(micro, h)
                    if taught:
                        self._send_teacher(turn, teacher)
                del h  # taps are all that the exits' work needs
                waiting.append((micro, teacher))
            if taught and self._teacher_inbox is not None:
                # The teacher message that is needed now and the next one, if this stage has sent what they depend on.
                self._teacher_inbox.post(min(turn, turn - lag + 1) + 1)
            if turn >= lag:  # steady state and drain: the exits' work on a microbatch whose teacher message has arrived
                micro, teacher = waiting.popleft()
                if taught and self._teacher_inbox is not None:
                    teacher = self._receive_teacher(micro)
                with self._event("exits", micro.number):
                    exits_work(micro, teacher)
        for outbox in (*(box for _, box in self._outboxes), *self._teacher_outboxes):
            outbox.finish()

    def _run_by_layer(
        self,
        batches: Sequence[Batch],
        exits_work: Callable[[Microbatch, Any], None],
        at_end: Callable[[Microbatch, Tensor], Any] | None,
        taught: bool,
    ) -> None:
        """As ``run``, but all microbatches pass a layer, and then the exit after it, before the next layer.

        So the weights of a layer are needed once. If the exits wait for a teacher, their taps are kept until the end.
        """
        stage, data = self.stage, on_device(batches)
        slots = stage.backbone.slots
        assert slots is not None, "layers with memory of their own need no such order"
        marks = self._marks  # not self, which refers to the slots
        slots.record = None if self.events is None else lambda *event: marks.append(event)
        if self.events is not None and self._clock is None:
            self._clock = platform.Clock()
        with torch.no_grad():
            hidden = [stage.backbone.embed(each.tokens) for each in data]
        of_length = self._positions(batches)
        micros = [
            Microbatch(number, batch, of_length[batch.tokens.shape[1]], each.labels, each.mask, {})
            for number, (batch, each) in enumerate(zip(batches, data, strict=True))
        ]

        def at_tap(layer: int, taps: Sequence[Tensor]) -> None:
            if taught:
                for micro, tap in zip(micros, taps, strict=True):
                    micro.taps[layer] = tap
                return
            with slots.event("exits", layer):
                for micro, tap in zip(micros, taps, strict=True):
                    exits_work(replace(micro, taps={layer: tap}), None)

        positions = [micro.positions for micro in micros]
        hidden = stage.run_by_layer(hidden, positions, at_tap, to_end=at_end is not None)
        hidden.reverse()
        for micro in micros:
            h = hidden.pop()
            teacher = None if at_end is None else at_end(micro, h)
            del h
            if taught or not stage.exits:
                exits_work(micro, teacher)
        if self.events is not None:
            self.events += self._timed()

    def _warm_up(
        self,
        batch: Batch,
        exits_work: Callable[[Microbatch, Any], None],
        at_end: Callable[[Microbatch, Tensor], Any] | None,
    ) -> None:
        """Compute one microbatch without messages, with all tokens masked, before any receive is posted.

        CUDA loads a kernel at its first use, and may then wait for the device. If the device is waiting for a message
        that depends on a send of this rank, this would deadlock. After the warm-up all kernels are loaded and memory is
        allocated. Gradients and sums are unchanged.
        """
        (data,), shape = on_device([batch]), self._shape(batch)
        positions = self.stage.backbone.positions(batch.tokens.shape[1])
        zeros = torch.zeros(shape, dtype=self.stage.setup.dtype, device=platform.device())
        h = zeros
        if self.stage.backbone.embedding is not None:
            with torch.no_grad():
                h = self.stage.backbone.embed(data.tokens)
        ends = at_end is not None and self.index == self.layout.last_layered
        h, own = self.stage.run_layers(h, positions, to_end=True)
        taps = {exit_.spec.layer: own.get(exit_.spec.layer, zeros) for exit_ in self.stage.exits}
        micro = Microbatch(-1, batch, positions, data.labels, torch.zeros_like(data.mask), taps)
        teacher = at_end(micro, h) if ends and at_end is not None else None
        if self._teacher_inbox is not None and self.teacher is not None:
            teacher = self.teacher.stand_in(batch)
        exits_work(micro, teacher)

    def _expect(self, batches: Sequence[Batch], taught: bool) -> None:
        """Post the first receives of h and taps."""
        for message, inbox, ahead in self._inboxes:
            tensors = message.hidden + len(message.taps)
            inbox.begin([tensors * self._shape(batch).numel() for batch in batches])
            inbox.post(ahead)
        if taught and self._teacher_inbox is not None and self.teacher is not None:
            self._teacher_inbox.begin([self.teacher.size(batch) for batch in batches])

    def _positions(self, batches: Sequence[Batch]) -> dict[int, Positions]:
        """Positions by the length of sequences. Microbatches of one length share them, and their masks."""
        lengths = {batch.tokens.shape[1] for batch in batches}
        return {length: self.stage.backbone.positions(length) for length in lengths}

    def _timed(self) -> list[Span]:
        """The events of the slots that were recorded since the last call."""
        assert self._clock is not None
        events = [self._marks.popleft() for _ in range(len(self._marks))]
        return [
            Span(kind, number, self._clock.time(start), self._clock.time(end)) for kind, number, start, end in events
        ]

    def _receive(self, number: int, batch: Batch, data: DeviceBatch) -> tuple[Tensor, dict[int, Tensor]]:
        """h and taps from other stages, or the embedded tokens."""
        if self.stage.backbone.embedding is not None:
            with torch.no_grad(), self._event("forward", number):
                return self.stage.backbone.embed(data.tokens), {}
        h, taps = torch.empty(0), dict[int, Tensor]()
        for message, inbox, ahead in self._inboxes:
            with self._event("receive", number):
                parts = iter(inbox.take().view(-1, *self._shape(batch)).unbind())
                inbox.post(number + 1 + ahead)
            if message.hidden:
                h = next(parts)
            taps |= dict(zip(message.taps, parts, strict=True))
        return h, taps

    def _send(self, number: int, h: Tensor, taps: dict[int, Tensor]) -> None:
        for message, outbox in self._outboxes:
            with self._event("send", number):
                outbox.send(([h] if message.hidden else []) + [taps[layer] for layer in message.taps])

    def _send_teacher(self, number: int, teacher: Any) -> None:
        for outbox in self._teacher_outboxes:
            assert teacher is not None and self.teacher is not None, "other stages wait for it"
            with self._event("send", number):
                outbox.send(self.teacher.pack(teacher))

    def _receive_teacher(self, micro: Microbatch) -> Any:
        assert self._teacher_inbox is not None and self.teacher is not None
        with self._event("teacher", micro.number):
            message = self._teacher_inbox.take()
        return self.teacher.unpack(message, micro.batch)

    def _hosted(self, taps: dict[int, Tensor]) -> dict[int, Tensor]:
        return {exit_.spec.layer: taps[exit_.spec.layer] for exit_ in self.stage.exits}

    def _shape(self, batch: Batch) -> torch.Size:
        """Shape of a microbatch's hidden states on this rank."""
        return self.stage.setup.hidden_shape(*batch.tokens.shape)

    @contextlib.contextmanager
    def _event(self, kind: str, number: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.events is not None:
            self.events.append(Span(kind, number, start, time.perf_counter()))


def one_stage(stage: Stage) -> Pipeline:
    """A whole model on one rank."""
    layers = [number for number, _ in stage.backbone.numbered_layers()]
    specs = [exit_.spec for exit_ in stage.exits]
    place = StageLayout(range(layers[0], layers[-1] + 1), tuple(spec.layer for spec in specs))
    return Pipeline(stage, Layout((place,)), specs)


@dataclass(frozen=True)
class DeviceBatch:
    """A microbatch's data on the device.

    Attributes:
        tokens: ``[batch, seq]`` int64.
        labels: ``[seq * batch]`` int64, sequence-major as hidden states are.
        mask: ``[seq * batch]`` float32.
    """

    tokens: Tensor
    labels: Tensor
    mask: Tensor


def on_device(batches: Sequence[Batch]) -> list[DeviceBatch]:
    """The data of all microbatches on the device, with three host-to-device copies in total."""
    sizes = [batch.labels.numel() for batch in batches]
    tokens = platform.to_device(torch.cat([batch.tokens.reshape(-1) for batch in batches])).split(sizes)
    labels = platform.to_device(torch.cat([batch.labels.t().reshape(-1) for batch in batches])).split(sizes)
    mask = platform.to_device(torch.cat([batch.mask.t().reshape(-1) for batch in batches])).float().split(sizes)
    return [
        DeviceBatch(its_tokens.view(batch.tokens.shape), *rest)
        for batch, its_tokens, *rest in zip(batches, tokens, labels, mask, strict=True)
    ]
