"""One decoder layer against transformers', its halves, and what its linears leave uncomputed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_ee import platform
from megatron_ee.model.linear import ColumnLinear, RMSNorm, RowLinear
from megatron_ee.model.setup import ModelSetup, build_setup
from megatron_ee.testing.models import FAMILIES


@pytest.fixture(scope="module")
def setup(saved_model: Any, groups: Any) -> ModelSetup:
    from megatron_ee.families.registry import read_architecture

    return build_setup(read_architecture(saved_model("llama2")[0]), torch.float32, groups)


@pytest.mark.parametrize("family", FAMILIES)
def test_halves_and_gradients_equal_transformers(
    family: str, tokens: Tensor, saved_model: Any, load_stage: Any, trace: Callable[..., dict[str, list[Tensor]]]
) -> None:
    path, reference = saved_model(family)
    stage, theirs = load_stage(path), trace(reference, tokens)
    device = platform.device()
    layer = stage.backbone.layers["4"]
    positions = stage.backbone.positions(tokens.shape[1])
    h = theirs["h"][3].to(device).requires_grad_()
    r = layer.attention_half(h, positions)
    out = layer.mlp_half(r)
    torch.testing.assert_close(r.cpu(), theirs["r"][4], atol=1e-4, rtol=0)
    torch.testing.assert_close(out.cpu(), theirs["h"][4], atol=1e-4, rtol=0)
    assert torch.equal(layer(h, positions), out)

    # The same through transformers' layer: the gradient of its input is that of ours.
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    out.backward(probe.to(device))
    caught: dict[str, Tensor] = {}

    def swap(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        caught["h"] = args[0].detach().requires_grad_()
        return (caught["h"], *args[1:]), kwargs

    last = reference.model.layers[3]
    handles = [
        last.register_forward_pre_hook(swap, with_kwargs=True),
        last.register_forward_hook(lambda _, __, output: caught.update(out=output)),
    ]
    reference(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    (expected,) = torch.autograd.grad(caught["out"], caught["h"], probe.transpose(0, 1))
    difference = (h.grad.cpu() - expected.transpose(0, 1)).abs().max()
    assert float(difference) <= 1e-4 * max(1.0, float(expected.abs().max()))


def test_norm_is_in_float32_and_keeps_the_dtype(setup: ModelSetup) -> None:
    norm = RMSNorm(setup, 64).to(torch.bfloat16)
    torch.nn.init.constant_(norm.weight, 1.5)
    x = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(1)) * 100
    expected = x.bfloat16().float()
    expected = expected * (expected.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * 1.5
    out = norm(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-3)


def filled(linear: Any) -> Any:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear


@pytest.mark.parametrize("kind", [ColumnLinear, RowLinear])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("input_gradient", [False, True])
def test_linears_and_their_gradients(
    kind: Any, bias: bool, frozen: bool, input_gradient: bool, setup: ModelSetup
) -> None:
    linear = filled(kind(setup, 24, 40, bias=bias)).requires_grad_(not frozen)
    x = torch.randn(6, 2, 24, generator=torch.Generator().manual_seed(3), requires_grad=input_gradient)
    weight, shift = (
        None if p is None else p.detach().clone().requires_grad_(not frozen) for p in (linear.weight, linear.bias)
    )
    expected_x = x.detach().clone().requires_grad_(input_gradient)
    expected = torch.nn.functional.linear(expected_x, weight, shift)
    out = linear(x)
    torch.testing.assert_close(out, expected)
    assert out.requires_grad == (input_gradient or not frozen)
    if not out.requires_grad:
        return
    out.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in ((x, expected_x), (linear.weight, weight), (linear.bias, shift)):
        if ours is None:
            continue
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_an_input_without_gradient_gets_none_computed(setup: ModelSetup) -> None:
    linear, product = filled(ColumnLinear(setup, 24, 40, bias=False)), 2 * 12 * 24 * 40
    for input_gradient, products in ((False, 2), (True, 3)):
        x = torch.randn(6, 2, 24).requires_grad_(input_gradient)
        with FlopCounterMode(display=False) as counter:
            linear(x).sum().backward()
        assert counter.get_total_flops() == products * product
