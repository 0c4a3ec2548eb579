"""Exit decisions from a trace, and the chains of layers that follow from them: counted, and timed one by one."""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_ee import platform
from megatron_ee.benchmark.machine import seconds
from megatron_ee.inference.heads import Ask
from megatron_ee.inference.passes import Chain, StageRunner, Work
from megatron_ee.inference.policy import ExitPolicy

LEAVES, STAYS = 1e-6, 2.0
ROUNDS = 7
ChainKind = tuple[int, int, bool, int]
"""Places where a chain starts and stops, whether a head is asked there, and the tokens that it starts with."""


class TracePolicy(ExitPolicy):
    """Leaves where a trace says so, whatever the exits say: by token, the layer that emits it."""

    def __init__(self, layers: Sequence[int], exits: Sequence[int]) -> None:
        super().__init__(patience=0)
        decisions = deque(LEAVES if layer == exit_ else STAYS for layer in layers for exit_ in exits if exit_ <= layer)
        object.__setattr__(self, "_decisions", decisions)

    def at(self, layer: int) -> float:
        """The next decision; exits are asked in order."""
        return self._decisions.popleft() if self._decisions else STAYS  # type: ignore[attr-defined, no-any-return]


@dataclass
class Recorder:
    """A runner that notes which chains ran."""

    runner: StageRunner
    seen: Counter[ChainKind] = field(default_factory=Counter)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def run(self, chain: Chain) -> None:
        """Count and run it."""
        tokens = sum(len(work.tokens) for work in chain.works)
        if chain.start > 0:
            tokens = sum(len(tap) for work in chain.works for tap in self.runner.rows[work.row].held[chain.start])
        asked = any(work.ask is not None for work in chain.works)
        self.seen[chain.start, chain.stop, asked, tokens] += 1
        self.runner.run(chain)


def seconds_alone(runner: StageRunner, length: int, chains: Sequence[ChainKind]) -> dict[ChainKind, float]:
    """Median seconds of each chain, on a row of ``length`` positions of a runner that has none.

    In turns: one that is repeated may find in a cache the weights that it has just read, which decoding does not.
    """
    final = runner.stage.setup.architecture.num_layers + 1
    runner.open(1, length + 64)
    runner.run(Chain(0, final, (Work(1, length, (1,) * length),)))
    times: dict[ChainKind, list[float]] = {chain: [] for chain in chains}
    for _ in range(ROUNDS):
        for chain, taken in times.items():
            taken.append(_once(runner, length, chain))
    return {chain: statistics.median(taken) for chain, taken in times.items()}


def _once(runner: StageRunner, length: int, chain: ChainKind) -> float:
    """Seconds of one chain, after which its row has ``length`` positions again."""
    start, stop, asked, tokens = chain
    setup, row = runner.stage.setup, runner.rows[1]
    kind: Any = "emit" if stop == setup.architecture.num_layers + 1 else "leave"
    ask = Ask(kind, length, threshold=STAYS) if asked else None
    work = Work(1, length + tokens, (1,) * tokens if start == 0 else (), ask)
    if start > 0:
        tap = torch.randn(tokens, 1, setup.architecture.hidden_size, device=platform.device())
        row.held[start] = [tap.to(setup.dtype)]
    elapsed = seconds(lambda: runner.run(Chain(start, stop, (work,))))
    if ask is not None:
        runner.answers()
    row.held.clear()
    row.crop(length)
    return elapsed
