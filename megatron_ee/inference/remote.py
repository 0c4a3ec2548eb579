"""Stages and schedulers in other processes: what ranks tell each other, as JSON, and hidden states between stages.

The first stage decides. It does not wait for what it tells another, so that it can start the next token while later
stages fill the keys and values of the last.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import Tensor

from megatron_ee import platform
from megatron_ee.inference.heads import HeadOutput
from megatron_ee.inference.passes import Pass
from megatron_ee.inference.requests import FinishReason, Token
from megatron_ee.inference.scheduler import Scheduler
from megatron_ee.inference.sequence import Sequence, SequenceParams
from megatron_ee.inference.stage_runner import StageRunner

COMMANDS, HEADERS, OUTPUTS = 1, 2, 3
"""Tags, so that messages of one kind between two ranks do not wait for those of another."""
IN_FLIGHT = 64


class Mail:
    """Messages between the ranks of a host group.

    Sending returns at once; a message is kept until it has left.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._leaving: deque[tuple[dist.Work | None, Tensor]] = deque()

    def send(self, target: int, tag: int, content: Any) -> None:
        """Send ``content``, which JSON can hold, to a rank of the group."""
        payload = json.dumps(content, separators=(",", ":")).encode()
        body = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        for part in (torch.tensor([len(payload)]), body):
            self._leaving.append((dist.isend(part, group=self._group, group_dst=target, tag=tag), part))
        while len(self._leaving) > IN_FLIGHT:
            self._wait_one()

    def receive(self, source: int, tag: int) -> Any:
        """The next message of this kind from a rank; waits for it."""
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, group=self._group, group_src=source, tag=tag)
        body = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(body, group=self._group, group_src=source, tag=tag)
        return json.loads(body.numpy().tobytes())

    def finish(self) -> None:
        """Wait until everything has left."""
        while self._leaving:
            self._wait_one()

    def _wait_one(self) -> None:
        work, _ = self._leaving.popleft()
        if work is not None:
            work.wait()


def share(content: list[Any] | None, group: dist.ProcessGroup) -> Any:
    """The first rank's list ``content`` on every rank of a host group; an empty one costs a single broadcast."""
    payload = json.dumps(content, separators=(",", ":")).encode() if content and group.rank() == 0 else b""
    size = torch.tensor([len(payload)])
    dist.broadcast(size, group=group, group_src=0)
    if int(size) == 0:
        return []
    body = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(int(size)).byte()
    dist.broadcast(body, group=group, group_src=0)
    return json.loads(body.numpy().tobytes())


_PASS, _OUTPUTS, _PARAMS = TypeAdapter(Pass), TypeAdapter(list[HeadOutput]), TypeAdapter(SequenceParams)


def pack_pass(pass_: Pass) -> Any:
    """For ``unpack_pass``."""
    return _PASS.dump_python(pass_, mode="json")


def unpack_pass(packed: Any) -> Pass:
    """The pass that ``pack_pass`` was given."""
    return _PASS.validate_python(packed)


def pack_outputs(outputs: Iterable[HeadOutput]) -> Any:
    """For ``unpack_outputs``."""
    return _OUTPUTS.dump_python(list(outputs), mode="json")


def unpack_outputs(packed: Any) -> list[HeadOutput]:
    """The outputs that ``pack_outputs`` was given."""
    return _OUTPUTS.validate_python(packed)


def pack_params(params: SequenceParams) -> Any:
    """For ``unpack_params``."""
    return _PARAMS.dump_python(params, mode="json")


def unpack_params(packed: Any) -> SequenceParams:
    """The settings that ``pack_params`` was given."""
    return _PARAMS.validate_python(packed)


class RemoteStage:
    """A stage in another process: a ``StageWorker``. Called by the first stage."""

    def __init__(self, mail: Mail, stage: int) -> None:
        self._mail, self._stage = mail, stage
        self._calls: list[list[Any]] = []

    def open(self, seq_id: int, limit: int) -> None:
        """See ``StageWorker``."""
        self._calls.append(["open", seq_id, limit])

    def close(self, seq_id: int) -> None:
        """See ``StageWorker``."""
        self._calls.append(["close", seq_id])

    def crop(self, seq_id: int, length: int) -> None:
        """See ``StageWorker``."""
        self._calls.append(["crop", seq_id, length])

    def copy(self, source: int, target: int, length: int) -> None:
        """See ``StageWorker``."""
        self._calls.append(["copy", source, target, length])

    def keep(self, seq_id: int, length: int) -> None:
        """See ``StageWorker``."""
        self._calls.append(["keep", seq_id, length])

    def receive(self, seq_ids: Collection[int]) -> None:
        """See ``StageWorker``."""
        self._calls.append(["receive", list(seq_ids)])
        self._flush()  # the stage before may send no more until this has been taken

    def run(self, pass_: Pass) -> None:
        """See ``StageWorker``."""
        self._calls.append(["run", pack_pass(pass_)])
        self._flush()

    def stop(self) -> None:
        """Let the stage's process leave ``serve_stage``."""
        self._calls.append(["stop"])
        self._flush()

    def outputs(self) -> list[HeadOutput]:
        """See ``StageWorker``."""
        return unpack_outputs(self._mail.receive(self._stage, OUTPUTS))

    def _flush(self) -> None:
        self._mail.send(self._stage, COMMANDS, self._calls)
        self._calls = []


def serve_stage(runner: StageRunner, mail: Mail) -> None:
    """Carry out what the first stage sends, until it sends ``stop``."""
    while True:
        for name, *arguments in mail.receive(0, COMMANDS):
            if name == "stop":
                return
            if name != "run":
                getattr(runner, name)(*arguments)
                continue
            pass_ = unpack_pass(arguments[0])
            runner.run(pass_)
            if any(work.head_input is not None for work in pass_.sequences):
                mail.send(0, OUTPUTS, pack_outputs(runner.outputs()))


class RemoteChannel:
    """Hidden states from each stage to the next, and distributions of drafts: a ``StageChannel``."""

    def __init__(self, mail: Mail, group: dist.ProcessGroup, hidden: int, vocab: int, dtype: torch.dtype) -> None:
        """``group``: the pipeline's ranks, on the device."""
        self._mail, self._group = mail, group
        self._hidden, self._vocab, self._dtype = hidden, vocab, dtype
        self._leaving: list[tuple[dist.Work | None, Tensor]] = []

    def send(self, parts: Collection[Tensor], drafts: Collection[Collection[Tensor]]) -> None:
        """See ``StageChannel``."""
        for work, _ in self._leaving:
            if work is not None:
                work.wait()
        self._leaving = []
        target = self._group.rank() + 1
        self._mail.send(target, HEADERS, [[len(part) for part in parts], [len(draft) for draft in drafts]])
        messages = [torch.cat(list(parts))]
        rows = [distribution for draft in drafts for distribution in draft]
        if rows:
            messages.append(torch.stack(rows))
        for message in messages:
            self._leaving.append((dist.isend(message, group=self._group, group_dst=target), message))

    def receive(self, num_sequences: int) -> list[tuple[Tensor, list[Tensor]]]:
        """See ``StageChannel``."""
        source = self._group.rank() - 1
        counts, drafts = self._mail.receive(source, HEADERS)
        assert len(counts) == num_sequences, "the stages disagree about the sequences of a pass"
        device = platform.device()
        h = torch.empty((sum(counts), 1, self._hidden), dtype=self._dtype, device=device)
        dist.recv(h, group=self._group, group_src=source)
        distributions = torch.empty((sum(drafts), self._vocab), device=device)
        if len(distributions):
            dist.recv(distributions, group=self._group, group_src=source)
        return [(part, list(own)) for part, own in zip(h.split(counts), distributions.split(drafts), strict=True)]


class DriverScheduler:
    """The first stage's scheduler on its first tensor-parallel rank; the others repeat it in ``follow_driver``."""

    def __init__(self, scheduler: Scheduler, group: dist.ProcessGroup) -> None:
        """``group``: the stage's ranks, on the host."""
        self._scheduler, self._group = scheduler, group
        self._calls: list[list[Any]] = []
        self.budget = scheduler.budget

    @property
    def idle(self) -> bool:
        """See ``Scheduler``."""
        return self._scheduler.idle

    @property
    def num_preempted(self) -> int:
        """See ``Scheduler``."""
        return self._scheduler.num_preempted

    def add(self, seqs: Collection[Sequence]) -> None:
        """See ``Scheduler``."""
        self._calls.append(["add", [[seq.seq_id, pack_params(seq.params)] for seq in seqs]])
        self._scheduler.add(seqs)

    def finish(self, seq_id: int, reason: FinishReason) -> None:
        """See ``Scheduler``."""
        self._calls.append(["finish", [seq_id, reason]])
        self._scheduler.finish(seq_id, reason)

    def step(self) -> list[tuple[Sequence, list[Token]]]:
        """See ``Scheduler``."""
        calls, self._calls = self._calls, []
        share(calls, self._group)
        return self._scheduler.step()

    def stop(self) -> None:
        """Let the others leave ``follow_driver``."""
        share([["stop", None]], self._group)


def follow_driver(scheduler: Scheduler, group: dist.ProcessGroup) -> None:
    """On the first stage's other tensor-parallel ranks: do what the first rank's scheduler does, until it stops."""
    while True:
        for name, argument in share(None, group):
            if name == "stop":
                return
            if name == "add":
                scheduler.add([Sequence(seq_id, unpack_params(packed)) for seq_id, packed in argument])
            else:
                scheduler.finish(*argument)
        scheduler.step()
