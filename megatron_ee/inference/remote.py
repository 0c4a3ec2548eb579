"""Inference over several ranks: JSON messages between ranks, and hidden states between stages.

The scheduler runs on the first stage and sends commands to the others without waiting for them. So it can start the
next token while later stages still compute the KV of the previous one.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Collection
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import Tensor

from megatron_ee import platform
from megatron_ee.inference.heads import HeadOutput
from megatron_ee.inference.passes import Pass
from megatron_ee.inference.replay import ExitReplay
from megatron_ee.inference.requests import FinishReason, Token
from megatron_ee.inference.scheduler import Scheduler
from megatron_ee.inference.sequence import Sequence, SequenceParams
from megatron_ee.inference.stage_runner import StageRunner

T = TypeVar("T")
COMMANDS, HEADERS, OUTPUTS, REPLAYS = 1, 2, 3, 4
"""Message tags. Messages with different tags do not wait for each other."""
IN_FLIGHT = 64
"""Maximum number of unfinished sends."""


class Mail:
    """JSON messages between the ranks of a host group. Sends are asynchronous; buffers are kept until they finish."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._sends: deque[tuple[dist.Work | None, Tensor]] = deque()

    def send(self, target: int, tag: int, content: Any) -> None:
        """Send ``content``, of JSON types, to a rank of the group."""
        payload = json.dumps(content, separators=(",", ":")).encode()
        body = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        for part in (torch.tensor([len(payload)]), body):
            self._sends.append((dist.isend(part, group=self._group, group_dst=target, tag=tag), part))
        while len(self._sends) > IN_FLIGHT:
            self._wait_one()

    def receive(self, source: int, tag: int) -> Any:
        """Wait for the next message with this tag from a rank, and return it."""
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, group=self._group, group_src=source, tag=tag)
        body = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(body, group=self._group, group_src=source, tag=tag)
        return json.loads(body.numpy().tobytes())

    def finish(self) -> None:
        """Wait until all sends have finished."""
        while self._sends:
            self._wait_one()

    def _wait_one(self) -> None:
        work, _ = self._sends.popleft()
        if work is not None:
            work.wait()


def broadcast(content: list[Any] | None, group: dist.ProcessGroup) -> Any:
    """Broadcast the first rank's list ``content`` to all ranks of a host group. An empty list is one broadcast."""
    payload = json.dumps(content, separators=(",", ":")).encode() if content and group.rank() == 0 else b""
    size = torch.tensor([len(payload)])
    dist.broadcast(size, group=group, group_src=0)
    if int(size) == 0:
        return []
    body = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(int(size)).byte()
    dist.broadcast(body, group=group, group_src=0)
    return json.loads(body.numpy().tobytes())


PASS, PARAMS = TypeAdapter(Pass), TypeAdapter(SequenceParams)
HEAD_OUTPUTS, EXIT_REPLAYS = TypeAdapter(list[HeadOutput]), TypeAdapter(list[ExitReplay])


def pack(kind: TypeAdapter[T], content: T) -> Any:
    """Convert ``content`` to JSON types; ``kind.validate_python`` converts it back."""
    return kind.dump_python(content, mode="json")


class RemoteStage:
    """A ``StageWorker`` for a stage in another process. The first stage uses it."""

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
        self._flush()  # the previous stage may block in its next send until this receive is posted

    def run(self, pass_: Pass) -> None:
        """See ``StageWorker``."""
        self._calls.append(["run", pack(PASS, pass_)])
        self._flush()

    def stop(self) -> None:
        """End ``serve_stage`` in the stage's process."""
        self._calls.append(["stop"])
        self._flush()

    def outputs(self) -> list[HeadOutput]:
        """See ``StageWorker``."""
        return HEAD_OUTPUTS.validate_python(self._mail.receive(self._stage, OUTPUTS))

    def heartbeat(self) -> None:
        """See ``StageWorker``. Calls that wait for the next pass, such as ``close``, are sent too."""
        self._flush()

    def replayed(self, seq_id: int) -> list[ExitReplay]:
        """See ``StageWorker``."""
        self._calls.append(["replayed", seq_id])
        self._flush()
        return EXIT_REPLAYS.validate_python(self._mail.receive(self._stage, REPLAYS))

    def _flush(self) -> None:
        self._mail.send(self._stage, COMMANDS, self._calls)
        self._calls = []


def serve_stage(runner: StageRunner, mail: Mail) -> None:
    """Execute the commands of the first stage until it sends ``stop``."""
    while True:
        for name, *arguments in mail.receive(0, COMMANDS):
            if name == "stop":
                return
            if name == "replayed":
                mail.send(0, REPLAYS, pack(EXIT_REPLAYS, runner.replayed(*arguments)))
                continue
            if name != "run":
                getattr(runner, name)(*arguments)
                continue
            pass_ = PASS.validate_python(arguments[0])
            runner.run(pass_)
            if pass_.has_outputs:
                mail.send(0, OUTPUTS, pack(HEAD_OUTPUTS, runner.outputs()))


class RemoteChannel:
    """A ``StageChannel`` between processes: sends hidden states and draft distributions from each stage to the next."""

    def __init__(self, mail: Mail, group: dist.ProcessGroup, hidden: int, vocab: int, dtype: torch.dtype) -> None:
        """Create the channel of one rank.

        Args:
            mail: for the sizes.
            group: the pipeline's device group.
            hidden: hidden size.
            vocab: vocabulary size.
            dtype: of the hidden states.
        """
        self._mail, self._group = mail, group
        self._hidden, self._vocab, self._dtype = hidden, vocab, dtype
        self._sends: list[tuple[dist.Work | None, Tensor]] = []

    def send(self, parts: Collection[Tensor], drafts: Collection[Collection[Tensor]]) -> None:
        """See ``StageChannel``."""
        for work, _ in self._sends:
            if work is not None:
                work.wait()
        self._sends = []
        target = self._group.rank() + 1
        self._mail.send(target, HEADERS, [[len(part) for part in parts], [len(draft) for draft in drafts]])
        messages = [torch.cat(list(parts))]
        rows = [distribution for draft in drafts for distribution in draft]
        if rows:
            messages.append(torch.stack(rows))
        for message in messages:
            self._sends.append((dist.isend(message, group=self._group, group_dst=target), message))

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
    """The scheduler on the first tensor-parallel rank of the first stage. The other ranks run ``follow_driver``."""

    def __init__(self, scheduler: Scheduler, group: dist.ProcessGroup) -> None:
        """Wrap ``scheduler``; ``group`` is the host group of the stage's tensor-parallel ranks."""
        self._scheduler, self._group = scheduler, group
        self._calls: list[list[Any]] = []
        self.kv_caches = scheduler.kv_caches

    @property
    def idle(self) -> bool:
        """See ``Scheduler``."""
        return self._scheduler.idle

    @property
    def num_preempted(self) -> int:
        """See ``Scheduler``."""
        return self._scheduler.num_preempted

    @property
    def num_running(self) -> int:
        """See ``Scheduler``."""
        return self._scheduler.num_running

    def add(self, seqs: Collection[Sequence]) -> None:
        """See ``Scheduler``."""
        self._calls.append(["add", [[seq.seq_id, pack(PARAMS, seq.params)] for seq in seqs]])
        self._scheduler.add(seqs)

    def finish(self, seq_id: int, reason: FinishReason) -> None:
        """See ``Scheduler``."""
        self._calls.append(["finish", [seq_id, reason]])
        self._scheduler.finish(seq_id, reason)

    def step(self) -> list[tuple[Sequence, list[Token]]]:
        """See ``Scheduler``."""
        calls, self._calls = self._calls, []
        broadcast(calls, self._group)
        return self._scheduler.step()

    def heartbeat(self) -> None:
        """See ``Scheduler``."""
        self._calls.append(["heartbeat", None])
        self._scheduler.heartbeat()
        self.step()

    def stop(self) -> None:
        """End ``follow_driver`` on the other ranks."""
        broadcast([["stop", None]], self._group)


def follow_driver(scheduler: Scheduler, group: dist.ProcessGroup) -> None:
    """Repeat the calls of the first rank's scheduler until it stops; for the first stage's other tensor ranks."""
    while True:
        for name, argument in broadcast(None, group):
            if name == "stop":
                return
            if name == "add":
                scheduler.add([Sequence(seq_id, PARAMS.validate_python(packed)) for seq_id, packed in argument])
            elif name == "heartbeat":
                scheduler.heartbeat()
            else:
                scheduler.finish(*argument)
        scheduler.step()
