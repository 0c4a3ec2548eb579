"""Products and attention of a few tokens: whatever way a processor takes, they say the same."""

from __future__ import annotations

import os
import shutil
import sys

import pytest
import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.model import bfloat16, kernels


@pytest.fixture(autouse=True)
def not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the product of our own, whatever other tests have built."""
    monkeypatch.setattr(bfloat16, "built", False)


@pytest.mark.parametrize("rows", [1, 2, 3, 9, 70])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_products(rows: int, one_by_one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ONE_BY_ONE", 2**40 if one_by_one else 0)
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((rows, 48), (96, 48), (96,)))
    x, weight, bias = (tensor.to(platform.device(), torch.bfloat16) for tensor in (x, weight, bias))
    expected = x.double() @ weight.double().t()
    for given, exact in ((None, expected), (bias, expected + bias.double())):
        found = kernels.product(x, weight, given)
        assert found.shape == (rows, 96) and found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), exact, atol=0.02, rtol=2**-7)
    assert torch.backends.mkldnn.is_available() == torch._C._get_mkldnn_enabled()


@pytest.mark.parametrize("rows", [1, 15, 16, 70])
def test_products_without_instructions_of_bfloat16(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows are multiplied in float32, some of the weight's rows at a time, the last ones fewer."""
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(kernels, "WIDENED_BYTES", 40 * 4 * 48)
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((rows, 48), (96, 48), (96,)))
    x, weight, bias = (tensor.to(platform.device(), torch.bfloat16) for tensor in (x, weight, bias))
    expected = x.double() @ weight.double().t()
    for given, exact in ((None, expected), (bias, expected + bias.double())):
        found = kernels.product(x, weight, given)
        torch.testing.assert_close(found.double(), exact, atol=1e-5 if rows >= 16 else 0.02, rtol=2**-7)
    out = torch.empty(rows, 96, dtype=torch.bfloat16, device=x.device)
    kernels.write_product(out, x, weight)
    torch.testing.assert_close(out.double(), expected, atol=1e-5 if rows >= 16 else 0.02, rtol=2**-7)
    for learnt in (x, weight):
        learnt.requires_grad_()
        kernels.product(x, weight, bias).sum().backward()
        assert learnt.grad is not None and learnt.grad.any()


@pytest.fixture
def built(not_built: None) -> None:
    """With the product of our own, for this test alone."""
    if platform.has_accelerator() or shutil.which("g++") is None:
        pytest.skip("it is for CPUs, and needs a C++ compiler")
    bfloat16.build()


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 16, 17, 32, 33, 63])
@pytest.mark.parametrize("size", [5, 16, 32, 80, 96, 133])
@pytest.mark.parametrize("features", [13, 16, 33])
def test_products_of_our_own(rows: int, size: int, features: int) -> None:
    """Any number of features, rows that do not lie together, and sums that are rounded once."""
    generator = torch.Generator().manual_seed(rows)
    sizes = ((rows, 2 * size), (features, size), (features,))
    wide, weight, bias = (torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in sizes)
    weight[1] = torch.inf  # beside the first row's end
    x = wide[:, :size]
    expected = x.double() @ weight.double().t()
    for given, exact in ((None, expected), (bias, expected + bias.double())):
        ours = bfloat16.product(x, weight, given)
        found = kernels.product(x, weight, given)
        assert torch.equal(found.view(torch.int16), ours.view(torch.int16))
        kept = [0, *range(2, features)]
        torch.testing.assert_close(found[:, kept].double(), exact[:, kept], atol=1e-4, rtol=2**-8)
    weight = weight[2:].requires_grad_()
    kernels.product(x, weight).sum().backward()
    assert weight.grad is not None and weight.grad.any()
    with pytest.raises(RuntimeError, match=f"x has {size} features, the weight takes {size - 1}"):
        bfloat16.product(x, weight.detach()[:, 1:], None)


@pytest.mark.usefixtures("built")
def test_a_row_is_the_same_whatever_is_beside_it() -> None:
    if not (bfloat16.has_tiles() or bfloat16.has_pairs()):
        pytest.skip("this processor has no instructions of bfloat16")
    x, weight = torch.randn(40, 210).to(torch.bfloat16), torch.randn(51, 210).to(torch.bfloat16)
    alone = torch.cat([bfloat16.product(row, weight, None) for row in x.split(1)])
    assert torch.equal(bfloat16.product(x, weight, None), alone)


@pytest.mark.skipif(platform.has_accelerator() or sys.platform != "linux", reason="of CPUs")
def test_where_our_own_is_built() -> None:
    assert kernels.gains_from_ours(torch.bfloat16) == (os.uname().machine == "x86_64")
    assert not kernels.gains_from_ours(torch.float32)


@pytest.mark.skipif(platform.has_accelerator(), reason="of CPUs")
def test_which_dtype_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda: False)
    assert kernels.is_slow("bfloat16") and not kernels.is_slow("float32")
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda: True)
    assert not kernels.is_slow("bfloat16")


def test_exact_products_are_left_alone() -> None:
    weight, x = torch.randn(96, 48, device=platform.device()), torch.randn(1, 48, device=platform.device())
    assert torch.equal(kernels.product(x, weight), torch.nn.functional.linear(x, weight))


KEPT = (50, 1, 7)


def rows_with_caches(shared: int, size: int, dtype: str) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Queries of three rows, and keys and values in rooms that are larger."""
    generator = torch.Generator().manual_seed(shared)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(platform.device(), platform.DTYPES[dtype])

    keys, values = ([draw(1, 4, kept + 3, size)[:, :, :kept] for kept in KEPT] for _ in range(2))
    return draw(len(KEPT), 4, shared, size), keys, values


def exact_attention(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    parts = []
    for row, key, value in zip(query.double(), keys, values, strict=True):
        shares = (row @ key[0].double().transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
        parts.append((shares @ value[0].double()).flatten())
    return torch.stack(parts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("compiling", [False, True])
def test_attention_of_one_token(dtype: str, shared: int, compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = rows_with_caches(shared, 16, dtype)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)  # as the compiler is given it
    found = kernels.attend(*given)
    assert found.dtype == given[0].dtype
    tolerance = 1e-5 if dtype == "float32" else 0.02
    torch.testing.assert_close(found.double(), exact_attention(*given), atol=tolerance, rtol=0)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("shared", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [8, 16, 48, 64, 80, 128])
def test_attention_of_our_own(shared: int, size: int) -> None:
    """Rounded once; whatever rows are together; heads that it does not take are left to torch."""
    query, keys, values = rows_with_caches(shared, size, "bfloat16")
    found = kernels.attend(query, keys, values)
    ours = size % bfloat16.HEAD_FEATURES == 0
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(
        found.double(), exact_attention(query, keys, values), atol=1e-4 if ours else 0.02, rtol=2**-8
    )
    alone = [kernels.attend(*each) for each in zip(query.split(1), zip(keys), zip(values), strict=True)]
    assert torch.equal(found, torch.cat(alone))
    if not ours:
        with pytest.raises(RuntimeError, match=f"heads of {size} features; they have to be a multiple of 16"):
            bfloat16.attend(query, keys, values)
        return
    with pytest.raises(RuntimeError, match="keys of 3 rows, and values of 2"):
        bfloat16.attend(query, keys, values[:2])
    with pytest.raises(RuntimeError, match="do not lie together"):
        bfloat16.attend(query, keys, [each[..., ::2] for each in values])
    with pytest.raises(RuntimeError, match="3 tokens of 2 rows"):
        bfloat16.attend(query, keys[:2], values[:2])
    with pytest.raises(RuntimeError, match="keys or values of 1 positions, for 3 tokens"):
        bfloat16.attend(query, keys[1:2], values[1:2])


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("shared", [1, 2, 3])
@pytest.mark.parametrize("tokens", [2, 5, 7, 17])
def test_attention_of_several_tokens_of_a_row(shared: int, tokens: int) -> None:
    """Each attends as it would alone, with nothing after it."""
    generator = torch.Generator().manual_seed(tokens)
    query = torch.randn(2 * tokens, 4, shared, 32, generator=generator).bfloat16()
    keys, values = (
        [torch.randn(1, 4, kept + 3, 32, generator=generator).bfloat16()[:, :, :kept] for kept in (17, 40)]
        for _ in range(2)
    )
    alone = [
        [each[:, :, : each.shape[2] - tokens + 1 + token] for each in kept for token in range(tokens)]
        for kept in (keys, values)
    ]
    found = kernels.attend(query, keys, values)
    assert torch.equal(found, kernels.attend(query, *alone))
    torch.testing.assert_close(found.double(), exact_attention(query, *alone), atol=1e-4, rtol=2**-8)
    assert kernels.attends_several(tokens, query, 32) == (not bfloat16.has_tiles())
    assert not kernels.attends_several(64, query, 32) and not kernels.attends_several(tokens, query, 40)
