"""AdamW on main weights in two halves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import AdamW

from megatron_ee import platform
from megatron_ee.parallel import split_adam
from megatron_ee.parallel.split_adam import SplitAdam, join, remainder_of, split_

HALF = 2**15


def halves(main: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.empty_like(main, dtype=torch.bfloat16)
    remainder = torch.empty_like(main, dtype=torch.int16)
    split_(main.clone(), weight, remainder)
    return weight, remainder


def from_bits(bits: list[int]) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32).to(platform.device())


def every_kind() -> torch.Tensor:
    """Both signs, zeros, subnormal numbers, every low half for two high ones, and random patterns of finite numbers."""
    generator = torch.Generator().manual_seed(5)
    low = torch.arange(2**16)
    patterns = torch.cat(
        [(0x3F80 << 16) + low, (0x0001 << 16) + low, torch.randint(0x7F7F0000, (10**5,), generator=generator)]
    )
    bits = torch.cat([patterns, patterns - 2**31])
    return bits.to(torch.int32).view(torch.float32).to(platform.device())


def test_two_halves_make_the_whole() -> None:
    main = every_kind()
    weight, remainder = halves(main)
    assert torch.equal(join(weight, remainder).view(torch.int32), main.view(torch.int32))
    out = torch.empty_like(main)
    assert join(weight, remainder, out).data_ptr() == out.data_ptr() and torch.equal(out, main)


def test_the_weight_is_the_nearest() -> None:
    main = every_kind()
    weight, _ = halves(main)
    tie = (main.view(torch.int32) & 0xFFFF) == HALF
    assert int(tie.sum()) >= 4
    assert torch.equal(weight[~tie], main[~tie].bfloat16())
    assert torch.equal(weight[tie].abs() > main[tie].abs(), torch.ones_like(tie[tie]))


def test_remainders_of_weights_rounded_by_others() -> None:
    main = every_kind()
    weight = main.bfloat16()
    made = join(weight, remainder_of(main, weight))
    off = made.view(torch.int32) != main.view(torch.int32)
    assert int(off.sum()) > 0  # the ties that were rounded to the even, smaller one
    assert bool(((main.view(torch.int32) - made.view(torch.int32))[off] == 1).all())


def test_known_halves() -> None:
    weight, remainder = halves(from_bits([0x3F800000, 0x3F800001, 0x3F807FFF, 0x3F808000, 0xBF80FFFF]))
    assert weight.tolist() == [1.0, 1.0, 1.0, 1.0078125, -1.0078125]
    assert remainder.tolist() == [0, 1, HALF - 1, -HALF, -1]


@pytest.mark.parametrize("run", [2**24, 1, 7, 100])
def test_a_step_is_torchs_bit_for_bit(run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_adam, "UPDATE_RUN", run)
    generator = torch.Generator().manual_seed(1)
    sizes = (256, 24, 1) if run > 7 else (21, 7, 1)
    weights = [torch.randn(size, generator=generator).bfloat16().to(platform.device()) for size in sizes]
    mains = [weight.float() for weight in weights]
    options = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-5}
    ours = SplitAdam(
        [{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:], "weight_decay": 0.0}],
        weight_decay=0.0, **options,
    )  # fmt: skip
    theirs = AdamW(
        [{"params": mains[:1], "weight_decay": 0.1}, {"params": mains[1:], "weight_decay": 0.0}], fused=True, **options
    )
    ours.allocate()
    for _ in range(5):
        for weight, main in zip(weights, mains, strict=True):
            gradient = torch.randn(len(main), generator=generator).to(platform.device())
            weight.decoupled_grad, main.grad = gradient, gradient.clone()  # type: ignore[attr-defined]
        for group in ours.param_groups:
            group["lr"] *= 1.5
        for group in theirs.param_groups:
            group["lr"] *= 1.5
        ours.step()
        theirs.step()
    for weight, main in zip(weights, mains, strict=True):
        state, other = ours.state[weight], theirs.state[main]
        assert state["master_param"].dtype == torch.int16
        # The last elements of a run may fill no vector register, and torch then rounds in another order.
        tolerance = {"rtol": 0.0, "atol": 0.0} if run == 2**24 else {"rtol": 1e-6, "atol": 1e-7}
        torch.testing.assert_close(join(weight, state["master_param"]), main, **tolerance)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[name], other[name], **tolerance)
    assert [group["step"] for group in ours.param_groups] == [5, 5]


def test_copied_optimizer_state_continues_alike() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(100, generator=generator).bfloat16().to(platform.device())
    first = SplitAdam([weight], lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    first.allocate()
    weight.decoupled_grad = torch.ones(100, device=platform.device())  # type: ignore[attr-defined]
    first.step()
    other = weight.clone()
    second = SplitAdam([other], lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    second.allocate()
    for name, tensor in second.state[other].items():
        tensor.copy_(first.state[weight][name])
    second.param_groups[0]["step"] = copy.copy(first.param_groups[0]["step"])
    other.decoupled_grad = weight.decoupled_grad  # type: ignore[attr-defined]
    first.step()
    second.step()
    assert torch.equal(weight, other)
    assert torch.equal(first.state[weight]["master_param"], second.state[other]["master_param"])


def test_float32_weights_have_no_remainder() -> None:
    weight = torch.ones(4, device=platform.device())
    adam = SplitAdam([weight], lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    with pytest.raises(AssertionError, match="no remainder"):
        adam.allocate()
