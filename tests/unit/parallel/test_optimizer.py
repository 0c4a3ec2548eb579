"""Data parallelism, clipping and AdamW through megatron-core equal the same in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ee import platform
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import OptimizerConfig, ScheduleConfig
from megatron_ee.exits.stage import Stage
from megatron_ee.parallel.optimizer import ExitOptimizer
from megatron_ee.parallel.split_adam import join

SPECS = [ExitSpec(1, "embedding", "own"), ExitSpec(2, "mlp", "low_rank", rank=4), ExitSpec(3, "layer", "own")]
LR = 1e-2
PLAIN = OptimizerConfig(lr=LR, min_lr=1e-3, clip_grad=1.0, weight_decay=0.1)
CONSTANT = ScheduleConfig(decay="constant", warmup_fraction=0.0)

Make = Callable[..., tuple[Stage, ExitOptimizer]]


@pytest.fixture
def make(saved_model: Any, load_stage: Any, groups: Any) -> Make:
    def make(
        settings: OptimizerConfig = PLAIN,
        schedule: ScheduleConfig = CONSTANT,
        steps: int = 10,
        specs: list[ExitSpec] = SPECS,
        family: str = "llama-biases",
        **kwargs: Any,
    ) -> tuple[Stage, ExitOptimizer]:
        stage = load_stage(saved_model(family)[0], specs, final_exit=False, **kwargs)
        return stage, ExitOptimizer(stage.exits, stage.setup.config, groups, settings, schedule, steps)

    return make


def microbatch(stage: Stage, seed: int) -> tuple[Any, dict[int, Tensor], Tensor, Tensor]:
    """Positions, taps, labels and coefficient of random tokens."""
    device = platform.device()
    tokens = torch.randint(0, 131, (2, 16), generator=torch.Generator().manual_seed(seed)).to(device)
    positions = stage.backbone.positions(16)
    _, taps = stage.run_layers(stage.backbone.embed(tokens), positions)
    return positions, taps, tokens.roll(-1, 1).t().reshape(-1), torch.full((32,), 1 / 64, device=device)


def backward(stage: Stage, optimizer: ExitOptimizer, seed: int) -> None:
    positions, taps, labels, coefficient = microbatch(stage, seed)
    for exit_ in stage.exits:
        optimizer.wrappers[exit_](taps[exit_.spec.layer], positions, labels, coefficient)[0].backward()


def train(stage: Stage, optimizer: ExitOptimizer, steps: range) -> list[tuple[float, list[float]]]:
    """Norms of each step: over all exits, and of each exit."""
    norms = []
    for step in steps:
        optimizer.zero_gradients()
        for part in (0, 1):  # two microbatches
            backward(stage, optimizer, 2 * step + part)
        optimizer.reduce_gradients()
        squares = [float(optimizer.squared_norm(exit_)) for exit_ in stage.exits]
        norms.append((math.sqrt(sum(squares)), [math.sqrt(square) for square in squares]))
        optimizer.step(norms[-1][0])
    return norms


def plain_loss(exit_: Any, tap: Tensor, positions: Any, labels: Tensor, coefficient: Tensor) -> Tensor:
    z = exit_.features(tap, positions).flatten(0, 1)
    logits = F.linear(z, exit_.head.matrix.weight)
    if exit_.head.up is not None:
        logits = logits + F.linear(F.linear(z, exit_.head.down), exit_.head.up)
    return (F.cross_entropy(logits[:, :131], labels, reduction="none") * coefficient).sum()


def trained(exits: list[Any]) -> list[tuple[str, nn.Parameter]]:
    return [(f"{e.spec.layer}.{n}", p) for e in exits for n, p in e.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("clip_grad", [0.05, 100.0, 0.0])
def test_steps_equal_plain_torch(clip_grad: float, make: Make, saved_model: Any, load_stage: Any) -> None:
    settings = OptimizerConfig(lr=LR, min_lr=1e-3, clip_grad=clip_grad, weight_decay=0.1)
    stage, optimizer = make(settings, ScheduleConfig("linear", 0.2), 5)
    norms = train(stage, optimizer, range(5))

    plain = load_stage(saved_model("llama-biases")[0], SPECS, final_exit=False)
    start = {name: parameter.detach().clone() for name, parameter in trained(plain.exits)}
    named = trained(plain.exits)
    groups = [
        {"params": [p for _, p in named if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for _, p in named if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-5)
    rates = [LR, LR - 0.25 * 9e-3, LR - 0.5 * 9e-3, LR - 0.75 * 9e-3, 1e-3]  # one step of warm-up
    for step, rate in enumerate(rates):
        adam.zero_grad()
        for part in (0, 1):
            positions, taps, labels, coefficient = microbatch(plain, 2 * step + part)
            for exit_ in plain.exits:
                plain_loss(exit_, taps[exit_.spec.layer], positions, labels, coefficient).backward()
        norm = nn.utils.clip_grad_norm_([p for _, p in named], clip_grad or float("inf"))
        assert norms[step][0] == pytest.approx(float(norm), rel=1e-5)
        assert float(norm) > 0.05, "nothing would be clipped"
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
    for (name, ours), (same, theirs) in zip(trained(stage.exits), named, strict=True):
        assert name == same
        ours, theirs = ours.detach(), theirs.detach()
        assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max())), name
        assert float((ours - start[name]).abs().max()) > 1e-3, f"{name} did not move"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_before_the_first_step_changes_nothing(dtype: torch.dtype, make: Make) -> None:
    """A run may be saved before its first step, and then go on as if it had not been."""
    stage, optimizer = make(dtype=dtype)
    straight, other = make(dtype=dtype)
    before = [parameter.detach().clone() for _, parameter in trained(stage.exits)]
    assert all(not state.tensors["exp_avg"].any() for state in optimizer.parameter_states())
    assert optimizer.counters()["adam_step"] == 0
    assert all(torch.equal(old, new) for old, (_, new) in zip(before, trained(stage.exits), strict=True))
    assert train(stage, optimizer, range(2)) == train(straight, other, range(2))
    for (name, mine), (_, theirs) in zip(trained(stage.exits), trained(straight.exits), strict=True):
        assert torch.equal(mine, theirs), name


def test_one_rank_gathers_no_weights(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.distributed import param_and_grad_buffer

    def gather(*arguments: object, **options: object) -> None:
        raise AssertionError("a copy of the weights, from this rank to itself")

    monkeypatch.setattr(param_and_grad_buffer, "dist_all_gather_func", gather)
    stage, optimizer = make()
    before = [parameter.detach().clone() for _, parameter in trained(stage.exits)]
    train(stage, optimizer, range(1))
    assert not any(torch.equal(old, new) for old, (_, new) in zip(before, trained(stage.exits), strict=True))


@pytest.mark.parametrize(
    ("family", "dtype", "some"),
    [
        ("llama-biases", torch.float32, {"qkv.bias", "norm.weight"}),
        ("llama-biases", torch.bfloat16, {"qkv.bias", "norm.weight"}),
        ("qwen3", torch.float32, {"q_layernorm.weight", "k_layernorm.weight"}),  # megatron-core can let these decay
    ],
)
def test_norms_and_biases_do_not_decay(family: str, dtype: torch.dtype, some: set[str], make: Make) -> None:
    settings = OptimizerConfig(lr=0.1, min_lr=0.1, weight_decay=0.5)
    stage, optimizer = make(settings, family=family, dtype=dtype)
    before = {name: parameter.detach().clone() for name, parameter in trained(stage.exits)}
    optimizer.zero_gradients()
    optimizer.reduce_gradients()
    optimizer.step(0.0)  # no gradient: decay alone
    for name, parameter in trained(stage.exits):
        if name.endswith(("norm.weight", ".bias")):
            assert torch.equal(parameter, before[name]) and bool(before[name].any()), f"{name} decayed, or was zero"
        else:
            torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.1 * 0.5), msg=name)
    assert some <= {".".join(name.split(".")[-2:]) for name in before}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decay_towards_initial_values(dtype: torch.dtype, make: Make) -> None:
    """Each step without a gradient goes a twentieth of the way back; norms and biases stay."""
    settings = OptimizerConfig(lr=0.1, min_lr=0.1, weight_decay=0.5, decay_towards="initial")
    stage, optimizer = make(settings, dtype=dtype)
    start = {name: parameter.detach().clone() for name, parameter in trained(stage.exits)}
    with torch.no_grad():  # in bfloat16 the main weights move with their weights
        for _, parameter in trained(stage.exits):
            parameter.add_(0.25 * torch.randn_like(parameter))
    moved = {name: parameter.detach().float().clone() for name, parameter in trained(stage.exits)}
    for _ in range(3):
        optimizer.zero_gradients()
        optimizer.reduce_gradients()
        optimizer.step(0.0)
    kept = {id(state.parameter): state.tensors.get("initial") for state in optimizer.parameter_states()}
    for name, parameter in trained(stage.exits):
        initial, first = kept[id(parameter)], start[name].float()
        if name.endswith(("norm.weight", ".bias")):
            assert initial is None and torch.equal(parameter.detach().float(), moved[name]), f"{name} decayed"
        else:
            assert initial is not None and initial.dtype == dtype and torch.equal(initial, start[name].view(-1)), name
            expected = first + (moved[name] - first) * 0.95**3
            tolerance = {} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-4}
            torch.testing.assert_close(parameter.detach().float(), expected, msg=name, **tolerance)


def test_weights_at_their_initial_values_do_not_decay(make: Make) -> None:
    """Bit for bit, whatever the rate."""
    settings = OptimizerConfig(lr=0.1, min_lr=0.1, weight_decay=0.3, decay_towards="initial")
    stage, optimizer = make(settings)
    start = [parameter.detach().clone() for _, parameter in trained(stage.exits)]
    optimizer.zero_gradients()
    optimizer.reduce_gradients()
    optimizer.step(0.0)
    assert all(torch.equal(old, new) for old, (_, new) in zip(start, trained(stage.exits), strict=True))


def test_an_exit_that_trains_nothing_is_left_alone(make: Make) -> None:
    stage, optimizer = make(specs=[ExitSpec(1, "embedding", "shared"), ExitSpec(2, "norm", "shared")])
    nothing, norm = stage.exits
    assert set(optimizer.wrappers) == {norm} and float(optimizer.squared_norm(nothing)) == 0.0
    positions, taps, labels, coefficient = microbatch(stage, 0)
    optimizer.zero_gradients()
    optimizer.wrappers[norm](taps[2], positions, labels, coefficient)[0].backward()
    optimizer.reduce_gradients()
    square = float(optimizer.squared_norm(norm))
    assert square > 0
    before = norm.body.norm.weight.detach().clone()
    optimizer.step(math.sqrt(square))
    assert not torch.equal(norm.body.norm.weight, before)


def test_the_backbone_has_no_gradient_no_buffer_and_no_state(make: Make) -> None:
    stage, optimizer = make()
    frozen = [*stage.backbone.parameters(), stage.shared_head.weight, stage.exits[1].body.mlp_norm.weight]
    before = [parameter.detach().clone() for parameter in frozen]
    train(stage, optimizer, range(2))
    owned = {id(state.parameter) for state in optimizer.parameter_states()}
    for parameter, old in zip(frozen, before, strict=True):
        assert parameter.grad is None and not hasattr(parameter, "main_grad") and id(parameter) not in owned
        assert torch.equal(parameter, old)
    assert owned == {id(parameter) for _, parameter in trained(stage.exits)}
    inner = [p for adam in optimizer._adams() for group in adam.param_groups for p in group["params"]]
    assert sum(p.numel() for p in inner) == sum(p.numel() for _, p in trained(stage.exits))


def test_bfloat16_keeps_float32_main_weights(make: Make) -> None:
    tiny = OptimizerConfig(lr=1e-6, min_lr=1e-6, weight_decay=0.0)  # far below a bfloat16's last bit
    stage, optimizer = make(tiny, dtype=torch.bfloat16)
    before = {id(parameter): parameter.detach().clone() for _, parameter in trained(stage.exits)}
    for _, parameter in trained(stage.exits):
        assert parameter.dtype == torch.bfloat16 and parameter.main_grad.dtype == torch.float32
    train(stage, optimizer, range(4))
    moved = 0
    for state in optimizer.parameter_states():
        assert {name: tensor.dtype for name, tensor in state.tensors.items()} == {
            "remainder": torch.int16,
            "exp_avg": torch.float32,
            "exp_avg_sq": torch.float32,
        }
        assert (state.start, state.stop) == (0, state.parameter.numel())
        old = before[id(state.parameter)].float().view(-1)
        main = join(state.parameter.detach().view(-1), state.tensors["remainder"])
        assert torch.equal(state.parameter.detach().view(-1), main.to(torch.bfloat16))
        assert float((main - old).abs().max()) <= 5e-6
        moved += int((main != old).sum())
    assert moved > 1000


def test_float32_weights_are_their_own_main_weights(make: Make) -> None:
    stage, optimizer = make()
    train(stage, optimizer, range(1))
    for state in optimizer.parameter_states():
        assert set(state.tensors) == {"exp_avg", "exp_avg_sq"}
        if state.parameter is not stage.exits[1].head.down:  # A has no gradient while B is zero
            assert state.tensors["exp_avg"].any()


TEN = {
    ("constant", 0.2): [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ("constant", 0.0): [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ("linear", 0.0): [0.91, 0.82, 0.73, 0.64, 0.55, 0.46, 0.37, 0.28, 0.19, 0.1],
    ("linear", 0.2): [0.5, 1, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125, 0.1],
    # 0.1 + 0.9 (1 + cos(pi i / 8)) / 2
    ("cosine", 0.2): [0.5, 1, 0.965746, 0.868198, 0.722208, 0.55, 0.377792, 0.231802, 0.134254, 0.1],
}


@pytest.mark.parametrize("decay, warmup", TEN)
def test_schedule(decay: Any, warmup: float, make: Make) -> None:
    settings = OptimizerConfig(lr=1e-3, min_lr=1e-4)
    _, optimizer = make(settings, ScheduleConfig(decay, warmup), 10, specs=[ExitSpec(1, "norm", "shared")])
    rates = []
    for _ in range(10):
        rates.append(optimizer.learning_rate)
        optimizer.zero_gradients()
        optimizer.reduce_gradients()
        optimizer.step(0.0)
    assert rates == pytest.approx([1e-3 * value for value in TEN[decay, warmup]], rel=1e-4)


@pytest.mark.parametrize("steps, warmup", [(1, 0.0), (1, 1.0), (3, 1.0), (2, 0.5)])
def test_short_runs_have_a_schedule(steps: int, warmup: float, make: Make) -> None:
    settings = OptimizerConfig(lr=1e-3, min_lr=1e-4)
    _, optimizer = make(settings, ScheduleConfig("linear", warmup), steps, specs=[ExitSpec(1, "norm", "shared")])
    for _ in range(steps):
        assert 0 < optimizer.learning_rate <= 1e-3
        optimizer.zero_gradients()
        optimizer.reduce_gradients()
        optimizer.step(0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_can_be_carried_over(dtype: torch.dtype, make: Make) -> None:
    schedule = ScheduleConfig("cosine", 0.2)
    straight, optimizer = make(schedule=schedule, dtype=dtype)
    train(straight, optimizer, range(5))

    first, before = make(schedule=schedule, dtype=dtype)
    train(first, before, range(3))
    second, after = make(schedule=schedule, dtype=dtype)
    for new, old in zip(list(after.parameter_states()), list(before.parameter_states()), strict=True):
        assert new.tensors.keys() == old.tensors.keys() and (new.start, new.stop) == (old.start, old.stop)
        for name, tensor in new.tensors.items():
            tensor.copy_(old.tensors[name])
    with torch.no_grad():
        for (_, new), (_, old) in zip(trained(second.exits), trained(first.exits), strict=True):
            new.copy_(old)
    after.restore_counters(before.counters())
    assert after.counters() == before.counters() and before.counters()["adam_step"] == 3
    assert after.learning_rate == before.learning_rate
    train(second, after, range(3, 5))
    for (name, ours), (_, theirs) in zip(trained(second.exits), trained(straight.exits), strict=True):
        assert torch.equal(ours, theirs), name
