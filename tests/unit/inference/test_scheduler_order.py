"""The order in which a scheduler starts work, commands other stages, and waits for the device."""

from __future__ import annotations

import itertools

import pytest

from megatron_ee.inference.heads import HeadInput, HeadOutput
from megatron_ee.inference.kv_cache_manager import KVBudget, KVCacheManager, StageMemory
from megatron_ee.inference.passes import Pass, StageMap
from megatron_ee.inference.policy import ThresholdPolicy
from megatron_ee.inference.requests import Draft
from megatron_ee.inference.sampling import Sampling
from megatron_ee.inference.scheduler import Scheduler
from megatron_ee.inference.sequence import Sequence, SequenceParams
from megatron_ee.inference.speculation import Acceptance, Costs, Drafter
from megatron_ee.parallel.tiles import PASS_TOKENS

LAYERS, EXIT = 4, 1


class Recorder:
    """A stage that runs nothing and accepts every proposal."""

    def __init__(self, stage: int, log: list[str]) -> None:
        self.stage, self.log = stage, log
        self.asked: list[list[HeadInput]] = []

    def run(self, pass_: Pass) -> None:
        self.log.append(f"{'send' if pass_.sends else 'run'} {self.stage}")
        inputs = [work.head_input for work in pass_.sequences if work.head_input is not None]
        if inputs:
            self.asked.append(inputs)

    def receive(self, seq_ids: list[int]) -> None:
        self.log.append(f"receive {self.stage}")

    def outputs(self) -> list[HeadOutput]:
        self.log.append(f"outputs {self.stage}")
        found = []
        for head_input in self.asked.pop(0):
            tokens = (*head_input.proposals, 7)
            found.append(HeadOutput(tokens, (0.9,) * len(tokens)))
        return found

    def open(self, seq_id: int, limit: int) -> None: ...
    def close(self, seq_id: int) -> None: ...
    def crop(self, seq_id: int, length: int) -> None: ...
    def copy(self, seq_id: int, other: int, length: int) -> None: ...
    def keep(self, seq_id: int, length: int) -> None: ...


class Timer:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def stop(self) -> None: ...

    def seconds(self) -> float:
        self.log.append("wait")
        return 0.01


def make_scheduler(stages: int, log: list[str]) -> Scheduler:
    final = LAYERS + 1
    ends = (final,) if stages == 1 else (LAYERS // 2, final)
    workers = [Recorder(stage, log) for stage in range(stages)]
    return Scheduler(
        workers,
        StageMap(ends),
        KVCacheManager(workers, KVBudget(10**9, [StageMemory(8, (None,))], 16, 512)),
        max_num_seqs=4,
        drafter=Drafter(Costs({EXIT: 1.0, final: 1.0}), {EXIT: Acceptance()}),
        start_timer=lambda: Timer(log),
    )


def run_speculative(stages: int) -> list[str]:
    """What a scheduler does for one request of speculative mode whose drafts are planned by time."""
    log: list[str] = []
    scheduler = make_scheduler(stages, log)
    params = SequenceParams(
        0,
        0,
        tuple(range(700)),
        "speculative",
        ThresholdPolicy(),
        Draft(),
        (EXIT,),
        Sampling(),
        60,
        900,
        draft_exits=(EXIT,),
    )
    scheduler.add([Sequence(0, params)])
    for _ in range(200):
        if scheduler.idle:
            return log
        scheduler.step()
    raise AssertionError("the request does not end")


def test_the_command_to_receive_follows_the_send_directly() -> None:
    """The host waits for nothing in between: a device that sends is not done before the other side receives."""
    log = run_speculative(stages=2)
    sends = [after for before, after in itertools.pairwise(log) if before == "send 0"]
    assert len(sends) > 3 and set(sends) == {"receive 1"}


@pytest.mark.parametrize("stages", [1, 2])
def test_device_time_is_read_with_the_outputs_alone(stages: int) -> None:
    log = run_speculative(stages)
    before = [before for before, after in itertools.pairwise(log) if after == "wait"]
    assert len(before) > 3 and set(before) == {"outputs 0"}


@pytest.mark.parametrize("stages", [1, 2])
def test_a_long_prompt_takes_turns_with_a_running_sequence(stages: int) -> None:
    scheduler = make_scheduler(stages, [])
    policy, draft, sampling = ThresholdPolicy(), Draft(), Sampling()
    running, long = (
        Sequence(number, SequenceParams(number, 0, (7,) * length, "full", policy, draft, (), sampling, 60, 5000))
        for number, length in enumerate((2, 8 * PASS_TOKENS))
    )
    scheduler.add([running])
    while not running.tokens:
        scheduler.step()
    scheduler.add([long])
    turns = []
    while long.prefilling:
        before = len(running.tokens), long.num_computed_tokens
        scheduler.step()
        turns.append((len(running.tokens) > before[0], long.num_computed_tokens > before[1]))
    assert len(turns) > 8 and all(not (one[1] and other[1]) for one, other in itertools.pairwise(turns)), (
        "the prompt runs twice in a row"
    )
