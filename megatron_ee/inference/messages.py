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

from megatron_ee.inference.heads import Answer, Ask, LogProbs
from megatron_ee.inference.outputs import Settings
from megatron_ee.inference.passes import Chain, Work
from megatron_ee.inference.policy import ExitPolicy
from megatron_ee.inference.requests import Draft
from megatron_ee.inference.sampling import Sampling

COMMANDS, HEADERS, ANSWERS = 1, 2, 3
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


def pack_chain(chain: Chain) -> dict[str, Any]:
    """For ``unpack_chain``."""
    return asdict(chain)


def unpack_chain(packed: dict[str, Any]) -> Chain:
    """What ``pack_chain`` was given."""
    works = tuple(Work(w["row"], w["stop"], tuple(w["tokens"]), _ask(w["ask"])) for w in packed["works"])
    return Chain(packed["start"], packed["stop"], works, packed["sends"])


def _ask(packed: dict[str, Any] | None) -> Ask | None:
    if packed is None:
        return None
    lists = {name: tuple(packed[name]) for name in ("proposals", "seen")}
    return Ask(**{**packed, **lists, "sampling": Sampling(**packed["sampling"])})


def pack_answers(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """For ``unpack_answers``."""
    return [asdict(answer) for answer in answers]


def unpack_answers(packed: Sequence[dict[str, Any]]) -> list[Answer]:
    """What ``pack_answers`` was given."""
    found = []
    for each in packed:
        logprobs = tuple(
            LogProbs(one["emitted"], {int(token): value for token, value in one["top"].items()})
            for one in each["logprobs"]
        )
        found.append(Answer(tuple(each["tokens"]), tuple(each["confidences"]), logprobs, each["finite"]))
    return found


def pack_settings(settings: Settings) -> dict[str, Any]:
    """For ``unpack_settings``."""
    return {**asdict(settings), "ends": sorted(settings.ends), "eos": sorted(settings.eos)}


def unpack_settings(packed: dict[str, Any]) -> Settings:
    """What ``pack_settings`` was given."""
    policy = dict(packed["policy"])
    policy["thresholds"] = {int(layer): value for layer, value in policy["thresholds"].items()}
    return Settings(
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
