"""What travels between stages and when, and what each rank holds."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ee import platform
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import DistillationConfig, LossConfig
from megatron_ee.parallel import transfer
from megatron_ee.parallel.groups import joined_processes, model_groups
from megatron_ee.testing.ranks import run_ranks
from megatron_ee.testing.tuning import Case, prepare, random_batches
from megatron_ee.tuning import schedule
from megatron_ee.tuning.step import tuning_step

SPECS = (ExitSpec(1), ExitSpec(2, "norm"), ExitSpec(3, "mlp", "shared"), ExitSpec(4, "layer", "low_rank", rank=4))
HALVES = (((1, 2), (1, 2)), ((3, 4), (3, 4)))
MIXED = (((1, 2), (2,)), ((3, 4), (4,)), (None, (1, 3)))
TEACHER = LossConfig(distillation=DistillationConfig(kl=1.0, top_k=4))


def _steps(path: Path, case: Case, steps: int, before: Callable[[Any], None] | None = None) -> Any:
    """On one rank: some steps; the pipeline, its optimizer and the groups, while the groups exist."""
    with joined_processes() as control, model_groups(control, case.tensor, len(case.stages)) as groups:
        pipeline, optimizer = prepare(path, case, groups)
        if before is not None:
            before(pipeline)
        vocab = pipeline.stage.setup.architecture.vocab_size
        for step in range(steps):
            pipeline.events = []
            batches = random_batches(vocab, step, groups.data.rank(), groups.data.size(), case.micro_batch_size)
            tuning_step(pipeline, optimizer, batches, case.loss, 1.0)
        yield pipeline, optimizer, groups


def record_messages(path: Path, case: Case) -> list[tuple[bool, int, int, int]]:
    """Whether for pupils, source, target and elements of every message that this rank sent in one step."""
    sent = []

    def isend(tensor: torch.Tensor, *, group: dist.ProcessGroup, group_dst: int) -> Any:
        sent.append((group, group_dst, tensor.numel()))
        return dist.isend(tensor, group=group, group_dst=group_dst)

    class Recording:
        def __getattr__(self, name: str) -> Any:
            return isend if name == "isend" else getattr(dist, name)

    transfer.dist = Recording()  # type: ignore[attr-defined]
    try:
        for _, _, groups in _steps(path, case, 1):
            rank = groups.pipeline.rank()
            return [(group is groups.teacher, rank, target, numel) for group, target, numel in sent]
    finally:
        transfer.dist = dist  # type: ignore[attr-defined]
    raise AssertionError


@pytest.mark.parametrize("stages", [pytest.param(HALVES, marks=pytest.mark.slow), MIXED])
@pytest.mark.parametrize("loss", [LossConfig(), TEACHER], ids=["tuning", "distillation"])
def test_nothing_but_the_teacher_goes_backward(
    stages: Any, loss: LossConfig, saved_model: Callable[..., tuple[Path, Any]]
) -> None:
    path, model = saved_model("llama2")
    case = Case("", "llama2", SPECS, stages, loss=loss)
    sent = [message for rank in run_ranks(len(stages), record_messages, path, case) for message in rank]
    forward = [message for message in sent if not message[0]]
    backward = [message for message in sent if message[0]]
    links = [(m.source, m.target, m.hidden + len(m.taps)) for m in case.layout.messages]
    microbatch, hidden = 16, model.config.hidden_size
    # Twelve microbatches, each link's whole message at once, and no link but these.
    expected = sorted((False, source, target, tensors * microbatch * hidden) for source, target, tensors in links)
    assert sorted(forward) == sorted(expected * 12)
    assert all(source < target for _, source, target, _ in forward)
    last = case.layout.last_layered
    hosts = [index for index, (_, exits) in enumerate(stages) if exits and index != last]
    taught = [(True, last, host, 2 * microbatch * 4) for host in hosts] if loss is TEACHER else []
    assert sorted(backward) == sorted(taught * 12)


def message_order(path: Path, case: Case, warm_up: bool) -> tuple[list[tuple[str, bool, int]], list[str], list[Any]]:
    """What this rank did in one step, in order: sends, receives posted and exits' forwards, then its final weights.

    A send or receive is its kind, whether it is the teacher's, and its microbatch.
    """
    happened: list[tuple[str, bool, int]] = []
    counts: Counter[tuple[str, bool, int]] = Counter()
    forwards: list[str] = []

    def record(kind: str, group: dist.ProcessGroup, peer: int) -> None:
        from_teacher = group is groups_of_run[0].teacher
        happened.append((kind, from_teacher, counts[kind, from_teacher, peer]))
        counts[kind, from_teacher, peer] += 1

    class Recording:
        def __getattr__(self, name: str) -> Any:
            return {"isend": isend, "irecv": irecv}.get(name) or getattr(dist, name)

    def isend(tensor: torch.Tensor, *, group: dist.ProcessGroup, group_dst: int) -> Any:
        record("send", group, group_dst)
        return dist.isend(tensor, group=group, group_dst=group_dst)

    def irecv(tensor: torch.Tensor, *, group: dist.ProcessGroup, group_src: int) -> Any:
        record("receive", group, group_src)
        return dist.irecv(tensor, group=group, group_src=group_src)

    groups_of_run: list[Any] = []

    def watch(pipeline: schedule.Pipeline) -> None:
        groups_of_run.append(pipeline.stage.setup.groups)
        for exit_ in pipeline.stage.exits:
            exit_.register_forward_pre_hook(lambda *_: forwards.append(f"after {len(happened)} messages"))

    transfer.dist = Recording()  # type: ignore[attr-defined]
    lazily, platform.loads_kernels_lazily = platform.loads_kernels_lazily, lambda: warm_up
    try:
        for pipeline, _, _ in _steps(path, case, 1, watch):
            trained = [p.detach().tolist() for p in pipeline.stage.parameters() if p.requires_grad]
            return happened, forwards, trained
    finally:
        transfer.dist, platform.loads_kernels_lazily = dist, lazily  # type: ignore[attr-defined]
    raise AssertionError


THIRDS = (((1, 1), (1,)), ((2, 3), (2, 3)), ((4, 4), (4,)))


@pytest.mark.slow
@pytest.mark.parametrize("stages", [THIRDS, MIXED], ids=["thirds", "late"])
def test_a_verdict_is_awaited_only_after_what_it_depends_on_was_sent(
    stages: Any, saved_model: Callable[..., tuple[Path, Any]]
) -> None:
    """With a warm-up and without: it computes before the first receive is posted, and changes nothing."""
    path, _ = saved_model("llama2")
    case = Case("", "llama2", SPECS, stages, loss=TEACHER)
    cold = run_ranks(len(stages), message_order, path, case, False)
    warm = run_ranks(len(stages), message_order, path, case, True)
    for rank, (happened, forwards, trained) in enumerate(cold):
        sources = {message.source for message in case.layout.messages}
        received = [number for kind, from_teacher, number in happened if kind == "receive" and from_teacher]
        hosts = bool(stages[rank][1]) and rank != case.layout.last_layered
        assert received == (list(range(12)) if hosts else [])
        for place, (kind, from_teacher, number) in enumerate(happened):
            if kind == "receive" and from_teacher and rank in sources:
                assert ("send", False, number) in happened[:place]
        warm_happened, warm_forwards, warm_trained = warm[rank]
        assert sorted(warm_happened) == sorted(happened)
        assert warm_trained == trained
        extra = len(stages[rank][1])
        assert len(warm_forwards) == len(forwards) + extra
        assert set(warm_forwards[:extra]) == {"after 0 messages"} or not extra


class HostReads(TorchDispatchMode):
    """Counts the values that the host reads from tensors one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def host_traffic(path: Path, case: Case) -> tuple[int, int]:
    """Values that the host read, and copies that it started, in the second step of this rank."""
    copies, to_device = [0], platform.to_device

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        copies[0] += 1
        return to_device(tensor)

    platform.to_device = counted
    try:
        for pipeline, optimizer, groups in _steps(path, case, 1):
            copies[0] = 0
            vocab = pipeline.stage.setup.architecture.vocab_size
            batches = random_batches(vocab, 1, groups.data.rank(), groups.data.size(), case.micro_batch_size)
            with HostReads() as reads:
                tuning_step(pipeline, optimizer, batches, case.loss, 1.0)
            return reads.count, copies[0]
    finally:
        platform.to_device = to_device
    raise AssertionError


@pytest.mark.slow
def test_host_traffic_does_not_grow_with_the_microbatches(saved_model: Callable[..., tuple[Path, Any]]) -> None:
    path, _ = saved_model("llama2")
    found = []
    for size in (1, 6):
        case = Case("", "llama2", SPECS, (((1, 4), (1, 2, 3, 4)),), tensor=2, micro_batch_size=size, loss=TEACHER)
        found += run_ranks(2, host_traffic, path, case)
    reads, copies = zip(*found, strict=True)
    assert len(set(reads)) == 1
    assert set(copies) == {3}, "tokens, labels and mask"


SLOW = 0.25


def slow_exits(path: Path, case: Case) -> list[schedule.Span]:
    """Events of a step in which the exits' work of the first stage takes long."""

    def slow_down(pipeline: schedule.Pipeline) -> None:
        if pipeline.index == 0:
            for exit_ in pipeline.stage.exits:
                exit_.register_forward_pre_hook(lambda *_: time.sleep(SLOW / len(pipeline.stage.exits)))

    for pipeline, _, _ in _steps(path, case, 1, slow_down):
        assert pipeline.events is not None
        return pipeline.events
    raise AssertionError


def test_no_stage_waits_for_an_earlier_ones_exits(saved_model: Callable[..., tuple[Path, Any]]) -> None:
    path, _ = saved_model("llama2")
    case = Case("", "llama2", SPECS, HALVES, micro_batch_size=3)
    first, second = run_ranks(2, slow_exits, path, case)
    for microbatch in range(4):
        (slow,) = (event for event in first if event.kind == "exits" and event.number == microbatch)
        (work,) = (event for event in second if event.kind == "exits" and event.number == microbatch)
        assert slow.end - slow.start >= SLOW
        assert work.end < slow.end, "the second stage was done with this microbatch before the first"


def reduction_order(path: Path, case: Case) -> list[str]:
    """What happens in the second step: an exit's forward by its layer, and the start of a reduction over replicas.

    In the first step megatron-core only learns which gradients a microbatch brings, and reduces at the end.
    """
    happened: list[str] = []

    def watch(pipeline: schedule.Pipeline) -> None:
        for exit_ in pipeline.stage.exits:
            exit_.register_forward_pre_hook(lambda module, _: happened.append(f"exit {module.spec.layer}"))

    from megatron.core.distributed import param_and_grad_buffer

    real = param_and_grad_buffer.dist_reduce_scatter_func

    def reduce(*arguments: Any, **options: Any) -> Any:
        happened.append("reduction")
        return real(*arguments, **options)

    param_and_grad_buffer.dist_reduce_scatter_func = reduce
    for _ in _steps(path, case, 2, watch):
        return happened[len(happened) // 2 :]
    raise AssertionError


def test_an_exits_gradients_are_reduced_while_others_work(saved_model: Callable[..., tuple[Path, Any]]) -> None:
    path, _ = saved_model("llama2")
    case = Case("", "llama2", SPECS, (((1, 4), (1, 2, 3, 4)),), micro_batch_size=3)
    for happened in run_ranks(2, reduction_order, path, case):
        first, last = happened[:4], happened[4:]
        assert first == ["exit 1", "exit 2", "exit 3", "exit 4"], "nothing is reduced before the last microbatch"
        assert [each for each in last if each != "reduction"] == first
        for layer in (1, 2, 3):
            between = last[last.index(f"exit {layer}") : last.index(f"exit {layer + 1}")]
            assert "reduction" in between, "the next exit starts with this one's reduction under way"


def held_memory(path: Path, case: Case) -> dict[str, Any]:
    """Bytes of every tensor that this rank holds after two steps, and of what it should."""
    for pipeline, optimizer, groups in _steps(path, case, 2):
        frozen = [p for p in pipeline.stage.parameters() if not p.requires_grad]
        trained = [p for p in pipeline.stage.parameters() if p.requires_grad]
        gc.collect()
        storages = {}
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor) and thing.device.type != "meta":
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        for state in optimizer.parameter_states():
            for tensor in state.tensors.values():
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        states = list(optimizer.parameter_states())
        return {
            "frozen": sum(p.numel() * p.element_size() for p in frozen),
            "weights": sum(p.numel() * p.element_size() for p in trained),
            "trained": sum(p.numel() for p in trained),
            "state": sum(t.numel() * t.element_size() for s in states for t in s.tensors.values()),
            "total": sum(storages.values()),
            "touched": any(p.grad is not None or hasattr(p, "main_grad") for p in frozen),
            "owned": {id(s.parameter) for s in states} <= {id(p) for p in trained},
            "data": groups.data.size(),
        }
    raise AssertionError


@pytest.mark.parametrize(
    "world_size, stages, tensor",
    [
        (2, (((1, 4), (1, 2, 3, 4)),), 2),
        pytest.param(2, (((1, 4), (1, 2, 3, 4)),), 1, marks=pytest.mark.slow),
        pytest.param(3, MIXED, 1, marks=pytest.mark.slow),
        pytest.param(4, HALVES, 1, marks=pytest.mark.slow),
    ],
    ids=["tensor", "data", "pipeline", "pipeline-data"],
)
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_a_rank_holds_nothing_for_what_is_frozen(
    dtype: str, world_size: int, stages: Any, tensor: int, saved_model: Callable[..., tuple[Path, Any]]
) -> None:
    path, _ = saved_model("llama2", hidden_size=128, intermediate_size=512, vocab_size=1000)
    case = Case("", "llama2", SPECS, stages, tensor, dtype=dtype)
    for held in run_ranks(world_size, held_memory, path, case):
        assert not held["touched"] and held["owned"]
        # What makes float32 main weights of the model's; two moments; all spread over the data-parallel ranks.
        copies = 10 if dtype == "bfloat16" else 8
        assert held["state"] <= copies * held["trained"] / held["data"] + copies * 512
        expected = held["frozen"] + held["weights"] + 4 * held["trained"] + held["state"]
        assert held["total"] <= 1.1 * expected + 100_000, held
