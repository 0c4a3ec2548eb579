"""Stages in other processes: told what to run, they send hidden states on among themselves and answers back.

The first stage decides. What it tells another is not waited for, so that it can start the next token while later
stages fill the keys and values of the last.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ee import platform
from megatron_ee.inference.heads import HeadOutput
from megatron_ee.inference.messages import (
    COMMANDS,
    HEADERS,
    OUTPUTS,
    Mail,
    pack_outputs,
    pack_params,
    pack_pass,
    share,
    unpack_outputs,
    unpack_params,
    unpack_pass,
)
from megatron_ee.inference.passes import Pass
from megatron_ee.inference.requests import Token
from megatron_ee.inference.scheduler import Scheduler
from megatron_ee.inference.sequence import Sequence, SequenceParams
from megatron_ee.inference.stage_runner import StageRunner

MakeSequence = Callable[[int, SequenceParams], Sequence]


class RemoteStage:
    """A stage in another process: a ``StageWorker``. Called by the first stage."""

    def __init__(self, mail: Mail, stage: int) -> None:
        self._mail, self._stage = mail, stage
        self._calls: list[list[Any]] = []

    def open(self, row: int, limit: int) -> None:
        """See ``StageWorker``."""
        self._calls.append(["open", row, limit])

    def close(self, row: int) -> None:
        """See ``StageWorker``."""
        self._calls.append(["close", row])

    def crop(self, row: int, length: int) -> None:
        """See ``StageWorker``."""
        self._calls.append(["crop", row, length])

    def copy(self, row: int, other: int, length: int) -> None:
        """See ``StageWorker``."""
        self._calls.append(["copy", row, other, length])

    def keep(self, row: int, length: int) -> None:
        """See ``StageWorker``."""
        self._calls.append(["keep", row, length])

    def receive(self, rows: Collection[int]) -> None:
        """See ``StageWorker``."""
        self._calls.append(["receive", list(rows)])
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
    """Do what the first stage says, until it says ``stop``."""
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
    """Hidden states, and distributions that proposals were drawn from, to the next stage: a ``StageChannel``."""

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

    def receive(self, rows: int) -> list[tuple[Tensor, list[Tensor]]]:
        """See ``StageChannel``."""
        source = self._group.rank() - 1
        counts, drafts = self._mail.receive(source, HEADERS)
        assert len(counts) == rows, "the stages disagree about the rows of a chain"
        device = platform.device()
        h = torch.empty((sum(counts), 1, self._hidden), dtype=self._dtype, device=device)
        dist.recv(h, group=self._group, group_src=source)
        distributions = torch.empty((sum(drafts), self._vocab), device=device)
        if len(distributions):
            dist.recv(distributions, group=self._group, group_src=source)
        return [(part, list(own)) for part, own in zip(h.split(counts), distributions.split(drafts), strict=True)]


class DriverScheduler:
    """The first stage's core on its first tensor-parallel rank: the other ranks do as it does, see ``follow``."""

    def __init__(self, scheduler: Scheduler, group: dist.ProcessGroup) -> None:
        """``group``: the stage's ranks, on the host."""
        self._scheduler, self._group = scheduler, group
        self._calls: list[list[Any]] = []
        self.budget, self.drafter = scheduler.budget, scheduler.drafter

    @property
    def idle(self) -> bool:
        """See ``Core``."""
        return self._scheduler.idle

    @property
    def set_aside(self) -> int:
        """See ``Core``."""
        return self._scheduler.set_aside

    def add(self, outputs: Collection[Sequence]) -> None:
        """See ``Core``."""
        self._calls.append(["add", [[output.number, pack_params(output.settings)] for output in outputs]])
        self._scheduler.add(outputs)

    def remove(self, number: int) -> None:
        """See ``Core``."""
        self._calls.append(["remove", number])
        self._scheduler.remove(number)

    def advance(self) -> list[tuple[Sequence, list[Token]]]:
        """See ``Core``."""
        calls, self._calls = self._calls, []
        share(calls, self._group)
        return self._scheduler.advance()

    def stop(self) -> None:
        """Let the others leave ``follow``."""
        share([["stop", None]], self._group)


def follow(scheduler: Scheduler, make_sequence: MakeSequence, group: dist.ProcessGroup) -> None:
    """On the first stage's other tensor-parallel ranks: do what the first rank's core does, until it stops."""
    while True:
        for name, argument in share(None, group):
            if name == "stop":
                return
            if name == "add":
                scheduler.add([make_sequence(number, unpack_params(packed)) for number, packed in argument])
            else:
                scheduler.remove(argument)
        scheduler.advance()
