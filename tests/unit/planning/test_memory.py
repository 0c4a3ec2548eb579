"""Counted memory: parameters as real stages hold them, and the peak of a real step."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ee import platform
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import DistillationConfig, LossConfig, OptimizerConfig, ScheduleConfig
from megatron_ee.data.loader import Batch
from megatron_ee.exits.stage import Stage, build_stage
from megatron_ee.families.registry import parse_architecture
from megatron_ee.model.setup import build_setup
from megatron_ee.parallel.groups import Groups
from megatron_ee.parallel.layout import Layout, StageLayout
from megatron_ee.parallel.optimizer import ExitOptimizer
from megatron_ee.parallel.tiles import Tiles, accelerator_tiles
from megatron_ee.planning.memory import Memory, stage_memory
from megatron_ee.planning.parameters import stage_parameters
from megatron_ee.planning.workload import Workload
from megatron_ee.testing.models import FAMILIES, llama2_7b
from megatron_ee.tuning.schedule import Pipeline
from megatron_ee.tuning.step import tuning_step
from megatron_ee.tuning.teacher import of_distillation

EXITS: dict[str, tuple[ExitSpec, ...]] = {
    "bodies": (ExitSpec(1, "embedding"), ExitSpec(2, "norm"), ExitSpec(3, "mlp"), ExitSpec(4, "layer")),
    "shared": (ExitSpec(1, "mlp", "shared"), ExitSpec(3, "layer", "shared")),
    "low rank": (ExitSpec(2, "embedding", "low_rank", rank=4), ExitSpec(3, "mlp", "low_rank", rank=8)),
}


def layout(*stages: tuple[tuple[int, int] | None, tuple[int, ...]]) -> Layout:
    return Layout(
        tuple(StageLayout(range(0) if ends is None else range(ends[0], ends[1] + 1), exits) for ends, exits in stages)
    )


class FakeGroup:
    """One rank of several that do not run."""

    def __init__(self, size: int, rank: int) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


def held(stage: Stage) -> tuple[int, int]:
    """Frozen and trained parameters."""
    parameters = list(stage.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return sum(p.numel() for p in parameters) - trained, trained


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize("tensor", [1, 2])
def test_parameters_of_real_stages(family: str, exits: str, tensor: int, saved_model: Any, groups: Groups) -> None:
    architecture, specs = open_model(saved_model(family)[0]).architecture, EXITS[exits]
    layers = tuple(spec.layer for spec in specs)
    layouts = (
        layout(((1, 4), layers)),
        layout(((1, 1), ()), ((2, 4), ()), (None, layers)),
        layout(((1, 2), layers[:1]), ((3, 4), ()), (None, layers[1:])),
    )
    for stages in layouts:
        for index in range(len(stages.stages)):
            fake: Any = {"tensor": FakeGroup(tensor, tensor - 1), "pipeline": FakeGroup(len(stages.stages), index)}
            setup = build_setup(architecture, torch.bfloat16, dataclasses.replace(groups, **fake))
            for distillation in (False, True):
                stage = build_stage(setup, stages, specs, final_exit=distillation)
                counted = stage_parameters(stages, index, architecture, specs, tensor, distillation)
                assert counted == held(stage), (stages.stages[index], distillation)


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made inside that are still alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.now -= size


def step_memory(
    groups: Groups,
    architecture: Architecture,
    specs: tuple[ExitSpec, ...],
    dtype: torch.dtype,
    loss: LossConfig,
    tiles: Tiles,
    settings: OptimizerConfig,
) -> tuple[Layout, int, int]:
    """Layout, bytes held between steps, and bytes at the peak of one, of two microbatches of 2 x 256 tokens."""
    deepest = architecture.num_layers if loss.distillation.kl else max(spec.layer for spec in specs)
    stages = layout(((1, deepest), tuple(spec.layer for spec in specs)))
    setup = dataclasses.replace(build_setup(architecture, dtype, groups), tiles=tiles)
    tokens = torch.randint(0, architecture.vocab_size, (2, 257))
    mask = torch.ones(2, 256, dtype=torch.bool)
    batches = [Batch(tokens[:, :-1], tokens[:, 1:], mask, 512)] * 2
    with LiveBytes() as live:
        stage = build_stage(setup, stages, specs, final_exit=loss.distillation.kl > 0)
        for parameter in stage.parameters():
            parameter.data.normal_(0, 0.02)
        optimizer = ExitOptimizer(stage.exits, setup.config, groups, settings, ScheduleConfig(), 10)
        pipeline = Pipeline(stage, stages, specs, teacher=of_distillation(loss.distillation))
        tuning_step(pipeline, optimizer, batches, loss, 1.0)  # makes the optimizer's state
        between = live.most = live.now
        tuning_step(pipeline, optimizer, batches, loss, 1.0)
    return stages, between, live.most


STEPS: list[tuple[tuple[ExitSpec, ...], int, int, float]] = [
    ((ExitSpec(2), ExitSpec(4)), 32, 512, 0.0),
    ((ExitSpec(2), ExitSpec(4)), 512, 512, 0.0),
    ((ExitSpec(2), ExitSpec(4)), 256, 1, 0.0),
    ((ExitSpec(3, "layer"),), 128, 1, 0.0),
    ((ExitSpec(1, "norm", "shared"), ExitSpec(2, "norm", "shared")), 16, 512, 0.0),
    ((ExitSpec(2, "norm"),), 512, 512, 0.0),
    ((ExitSpec(2, "mlp", "low_rank"),), 512, 512, 0.0),
    ((ExitSpec(2, "mlp", "low_rank"),), 64, 200, 0.0),
    ((ExitSpec(2),), 256, 512, 1.0),
]
MODEL = parse_architecture(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4000,
    }
)
KEEP_INITIAL = (512,)
"""Chunks of tokens for which the steps also decay towards the initial values."""


@pytest.mark.parametrize(
    ("specs", "chunk_tokens", "graph_tokens", "kl", "dtype"),
    [
        pytest.param(*step, dtype, marks=() if dtype == "float32" else pytest.mark.slow)
        for step in STEPS
        for dtype in ("float32", "bfloat16")
    ],
)
def test_memory_of_a_real_step(
    dtype: str,
    specs: tuple[ExitSpec, ...],
    chunk_tokens: int,
    graph_tokens: int,
    kl: float,
    groups: Groups,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(platform, "cached_bytes", lambda: 2**62)
    monkeypatch.setattr(torch, "addmm", lambda total, *_, out, **__: out)  # no memory of its own, but no CPU has it
    tiles = dataclasses.replace(accelerator_tiles(MODEL.vocab_size), graph_tokens=graph_tokens)
    loss = LossConfig(chunk_tokens=chunk_tokens, distillation=DistillationConfig(kl=kl, temperature=2.0))
    settings = OptimizerConfig(decay_towards="initial" if chunk_tokens in KEEP_INITIAL else "zero")
    stages, between, most = step_memory(groups, MODEL, specs, platform.DTYPES[dtype], loss, tiles, settings)
    workload = Workload(
        itemsize=platform.DTYPES[dtype].itemsize,
        micro_batch_size=2,
        sequence_length=256,
        microbatches=2,
        chunk_tokens=chunk_tokens,
        tiles=tiles,
        top_k=loss.distillation.top_k if kl else 0,
        tempered=kl > 0,
        keeps_initial=settings.decay_towards == "initial",
    )
    memory = stage_memory(stages, 0, MODEL, specs, workload)
    assert memory.transfer == 0
    assert memory.total - working(memory) == pytest.approx(between, rel=0.01)
    # Activations matter here, which they hardly do for a large model.
    assert working(memory) > 0.1 * memory.total
    assert working(memory) == pytest.approx(most - between, rel=0.2)
    # On a CPU a norm of bfloat16 keeps its input in float32 too.
    assert memory.total == pytest.approx(most, rel=0.06 if dtype == "bfloat16" else 0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "tiles",
    [pytest.param(Tiles(), marks=pytest.mark.slow), Tiles(logit_tokens=128, graph_tokens=128, cached_bytes=2**19)],
    ids=["cpu", "small"],
)
def test_memory_of_a_step_with_the_tiles_of_a_cpu(dtype: str, tiles: Tiles, groups: Groups) -> None:
    """Smaller pieces, and in bfloat16 blocks of a head's gradient."""
    specs = (ExitSpec(4),)
    stages, _, most = step_memory(groups, MODEL, specs, platform.DTYPES[dtype], LossConfig(), tiles, OptimizerConfig())
    workload = Workload(
        platform.DTYPES[dtype].itemsize, micro_batch_size=2, sequence_length=256, microbatches=2, tiles=tiles
    )
    memory = stage_memory(stages, 0, MODEL, specs, workload)
    assert memory.total == pytest.approx(most, rel=0.06 if dtype == "bfloat16" else 0.05)
    large = stage_memory(stages, 0, MODEL, specs, dataclasses.replace(workload, tiles=None))
    assert working(memory) < 0.9 * working(large), "an accelerator's tiles take more"


def working(memory: Memory) -> int:
    """Bytes that are not held between steps."""
    return memory.taps + memory.activations


def test_what_parallelism_divides() -> None:
    model, specs, stages = llama2_7b(), [ExitSpec(16)], layout(((1, 16), (16,)))
    whole = stage_memory(stages, 0, model, specs, Workload(2))
    trained = 3 * 4096 * 11008 + 4096 + 32000 * 4096
    assert (whole.trained, whole.gradients, whole.optimizer) == (2 * trained, 4 * trained, 10 * trained)
    assert stage_memory(stages, 0, model, specs, Workload(4)).optimizer == 8 * trained
    # Data-parallel ranks share the optimizer's state and nothing else.
    spread = stage_memory(stages, 0, model, specs, Workload(2, data=4))
    assert spread == dataclasses.replace(whole, optimizer=-(-trained // 4) * 10)
    assert stage_memory(stages, 0, model, specs, Workload(2, remainder=4)).optimizer == 12 * trained
    assert stage_memory(stages, 0, model, specs, Workload(4, remainder=4)).optimizer == 8 * trained
    assert stage_memory(stages, 0, model, specs, Workload(2, host_optimizer=True)).optimizer == 0
    # The initial values of all but the norm, in the weights' dtype.
    initial = stage_memory(stages, 0, model, specs, Workload(2, data=4, keeps_initial=True))
    assert initial == dataclasses.replace(spread, optimizer=spread.optimizer + (trained - 4096) // 4 * 2)
    host = Workload(2, host_optimizer=True, keeps_initial=True)
    assert stage_memory(stages, 0, model, specs, host).optimizer == 0
    halves = stage_memory(stages, 0, model, specs, Workload(2, tensor=2))
    assert halves.trained == pytest.approx(whole.trained / 2, rel=1e-4)
    assert halves.frozen == pytest.approx(whole.frozen / 2, rel=1e-4)
    # Norms and taps are whole on every tensor-parallel rank, unless the sequence is spread too.
    assert working(halves) > working(whole) / 2
    sequence = stage_memory(stages, 0, model, specs, Workload(2, tensor=2, sequence_parallel=True))
    assert working(whole) / 2 < working(sequence) < working(halves)
    assert (whole.taps, halves.taps, sequence.taps) == (2048 * 4096 * 2, 2048 * 4096 * 2, 2048 * 4096)


def test_buffers_for_transfer() -> None:
    model, specs = llama2_7b(), [ExitSpec(4), ExitSpec(8), ExitSpec(12)]
    stages = layout(((1, 8), ()), ((9, 12), (12,)), (None, (4, 8)))
    hidden = 2048 * 4096 * 2
    # h to the next stage and both taps, in two buffers more than the stages between them.
    sizes = [stage_memory(stages, index, model, specs, Workload(2)).transfer for index in range(3)]
    assert sizes == [3 * hidden + 2 * 2 * hidden, 3 * hidden, 2 * 2 * hidden]
    # With a teacher on the second stage, the third keeps its taps until the teacher message is there.
    teachers = 2 * 2 * 2048 * 8 * 4
    stages = layout(((1, 8), ()), ((9, 32), (12,)), (None, (4, 8)))
    sizes = [stage_memory(stages, index, model, specs, Workload(2, top_k=8)).transfer for index in range(3)]
    assert sizes == [3 * hidden + 2 * 2 * hidden, 3 * hidden + teachers, 3 * 2 * hidden + teachers]


def test_the_first_stage_keeps_the_embedded_tokens_beside_its_layers() -> None:
    """A later stage runs on the transfer buffer, which is counted there."""
    stages = layout(((1, 4), ()), ((5, 8), ()), ((9, 12), (12,)))
    first, second = (stage_memory(stages, index, llama2_7b(), [ExitSpec(12)], Workload(2)) for index in range(2))
    assert first.activations - second.activations == 2048 * 4096 * 2
