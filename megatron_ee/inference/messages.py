"""What ranks tell each other besides hidden states: JSON over the host's network, no pickles."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ee.inference.heads import HeadInput, HeadOutput, LogProbs
from megatron_ee.inference.passes import Pass, ScheduledSequence
from megatron_ee.inference.policy import ExitPolicy
from megatron_ee.inference.requests import Draft
from megatron_ee.inference.sampling import Sampling
from megatron_ee.inference.sequence import SequenceParams

COMMANDS, HEADERS, OUTPUTS = 1, 2, 3
"""Tags, so that messages of one kind between two ranks do not wait for those of another."""
IN_FLIGHT = 64


class Mail:
    """Messages between the ranks of a host group.

    Sending returns at once; what is sent is kept until it has left.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._leaving: deque[tuple[dist.Work | None, Tensor]] = deque()

    def send(self, target: int, tag: int, content: Any) -> None:
        """``content``, of what JSON knows, to a rank of the group."""
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


def share(content: Sequence[Any] | None, group: dist.ProcessGroup) -> Any:
    """The first rank's list ``content`` on every rank of a host group; an empty one costs a single broadcast."""
    payload = json.dumps(content, separators=(",", ":")).encode() if content and group.rank() == 0 else b""
    size = torch.tensor([len(payload)])
    dist.broadcast(size, group=group, group_src=0)
    if int(size) == 0:
        return []
    body = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(int(size)).byte()
    dist.broadcast(body, group=group, group_src=0)
    return json.loads(body.numpy().tobytes())


def pack_pass(pass_: Pass) -> dict[str, Any]:
    """For ``unpack_pass``."""
    return asdict(pass_)


def unpack_pass(packed: dict[str, Any]) -> Pass:
    """What ``pack_pass`` was given."""
    sequences = tuple(
        ScheduledSequence(w["row"], w["stop"], tuple(w["tokens"]), _head_input(w["head_input"]))
        for w in packed["sequences"]
    )
    return Pass(packed["start"], packed["stop"], sequences, packed["sends"])


def _head_input(packed: dict[str, Any] | None) -> HeadInput | None:
    if packed is None:
        return None
    lists = {name: tuple(packed[name]) for name in ("proposals", "seen")}
    return HeadInput(**{**packed, **lists, "sampling": Sampling(**packed["sampling"])})


def pack_outputs(outputs: Sequence[HeadOutput]) -> list[dict[str, Any]]:
    """For ``unpack_outputs``."""
    return [asdict(output) for output in outputs]


def unpack_outputs(packed: Sequence[dict[str, Any]]) -> list[HeadOutput]:
    """What ``pack_outputs`` was given."""
    found = []
    for each in packed:
        logprobs = tuple(
            LogProbs(one["emitted"], {int(token): value for token, value in one["top"].items()})
            for one in each["logprobs"]
        )
        found.append(HeadOutput(tuple(each["tokens"]), tuple(each["confidences"]), logprobs, each["finite"]))
    return found


def pack_params(settings: SequenceParams) -> dict[str, Any]:
    """For ``unpack_params``."""
    return {**asdict(settings), "ends": sorted(settings.ends), "eos": sorted(settings.eos)}


def unpack_params(packed: dict[str, Any]) -> SequenceParams:
    """What ``pack_params`` was given."""
    policy = dict(packed["policy"])
    policy["thresholds"] = {int(layer): value for layer, value in policy["thresholds"].items()}
    return SequenceParams(
        **{
            **packed,
            "prompt": tuple(packed["prompt"]),
            "exits": tuple(packed["exits"]),
            "drafting": tuple(packed["drafting"]),
            "follow": tuple(packed["follow"]),
            "policy": ExitPolicy(**policy),
            "draft": Draft(**packed["draft"]),
            "sampling": Sampling(**packed["sampling"]),
            "ends": frozenset(packed["ends"]),
            "eos": frozenset(packed["eos"]),
        }
    )
