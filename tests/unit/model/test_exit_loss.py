"""The chunked loss against plain autograd: value, statistics and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ee import platform
from megatron_ee.families.registry import read_architecture
from megatron_ee.model import exit_loss as exit_loss_module
from megatron_ee.model.backbone import VocabHead
from megatron_ee.model.exit_loss import LowRank, exit_loss, exit_statistics
from megatron_ee.model.setup import build_setup
from megatron_ee.parallel.tiles import Tiles, accelerator_tiles

TOKENS, HIDDEN, VOCAB, RANK = 50, 64, 131, 6


class Case:
    """Random inputs of one loss; ``z`` and the trained weights are leaves."""

    def __init__(self, setup: Any, *, low_rank: bool = False, frozen: bool = False, tokens: int = TOKENS) -> None:
        generator = torch.Generator().manual_seed(4)
        device = platform.device()

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(device, setup.dtype)

        with torch.device(device):
            self.head = VocabHead(setup).requires_grad_(not frozen)
        with torch.no_grad():
            # Padded rows point where they would win, were they not masked.
            self.head.weight.copy_(draw(*self.head.weight.shape, scale=0.3))
            self.head.weight[VOCAB:] *= 100
        self.z = draw(tokens, HIDDEN).requires_grad_()
        self.labels = torch.randint(0, VOCAB, (tokens,), generator=generator).to(device)
        mask = torch.rand(tokens, generator=generator) < 0.7
        self.coefficient = (mask * 0.25 / mask.sum()).to(device)
        self.down = draw(RANK, HIDDEN, scale=0.3).requires_grad_() if low_rank else None
        self.up = draw(len(self.head.weight), RANK, scale=0.3).requires_grad_() if low_rank else None
        self.group = setup.groups.tensor

    def low_rank(self) -> LowRank | None:
        return None if self.down is None or self.up is None else LowRank(F.linear(self.z, self.down), self.up)

    def loss(self, **kwargs: Any) -> Any:
        return exit_loss(
            self.z, self.head, self.labels, self.coefficient, self.group, low_rank=self.low_rank(), **kwargs
        )

    def leaves(self) -> dict[str, Tensor]:
        named = {"z": self.z, "weight": self.head.weight, "down": self.down, "up": self.up}
        return {name: tensor for name, tensor in named.items() if tensor is not None and tensor.requires_grad}


def reference(case: Case, dynamic: bool = False) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, gradients of the leaves and float32 logits, by autograd over all logits at once, in float32."""
    leaves = {name: tensor.detach().float().requires_grad_() for name, tensor in case.leaves().items()}
    weight = leaves.get("weight", case.head.weight.float())
    logits = leaves["z"] @ weight[:VOCAB].t()
    if "up" in leaves:
        logits = logits + leaves["z"] @ leaves["down"].t() @ leaves["up"][:VOCAB].t()
    if case.head.soft_cap is not None:
        logits = case.head.soft_cap * torch.tanh(logits / case.head.soft_cap)
    scale = case.coefficient
    if dynamic:
        scale = scale * logits.softmax(-1).amax(-1).detach()
    loss = (F.cross_entropy(logits, case.labels, reduction="none") * scale).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return loss.detach(), dict(zip(leaves, gradients, strict=True)), logits.detach()


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value."""
    ours, theirs = ours.detach().float(), theirs.detach().float()
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture(scope="module")
def setups(saved_model: Any, groups: Any) -> dict[torch.dtype, Any]:
    architecture = read_architecture(saved_model("llama3.1")[0])
    return {dtype: build_setup(architecture, dtype, groups) for dtype in (torch.float32, torch.bfloat16)}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kind", ["own", "frozen", "low_rank", "low_rank with its base trained"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_loss_statistics_and_gradients(
    dtype: torch.dtype, tolerance: float, kind: str, dynamic: bool, setups: dict[torch.dtype, Any]
) -> None:
    case = Case(setups[dtype], low_rank=kind.startswith("low_rank"), frozen=kind in ("frozen", "low_rank"))
    expected, gradients, logits = reference(case, dynamic)
    loss, stats = case.loss(dynamic=dynamic, chunk_tokens=16)  # does not divide 50
    assert loss.dtype == torch.float32 and relative(loss, expected) < tolerance
    assert stats.loss.dtype == stats.confidence.dtype == torch.float32 and stats.top1.dtype == torch.int64
    assert not any(t.requires_grad for t in (stats.loss, stats.confidence, stats.top1))
    assert relative(stats.loss, F.cross_entropy(logits, case.labels, reduction="none")) < tolerance
    assert relative(stats.confidence, logits.softmax(-1).amax(-1)) < 2 * tolerance
    if dtype == torch.float32:
        assert torch.equal(stats.top1, logits.argmax(-1))

    loss.backward()
    assert set(gradients) == set(case.leaves())
    for name, leaf in case.leaves().items():
        assert leaf.grad is not None and leaf.grad.dtype == dtype, name
        assert relative(leaf.grad, gradients[name]) < tolerance, name
    if kind in ("frozen", "low_rank"):
        assert case.head.weight.grad is None


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("low_rank", [False, True])
def test_capped_logits(dtype: torch.dtype, tolerance: float, low_rank: bool, setups: dict[torch.dtype, Any]) -> None:
    case = Case(setups[dtype], low_rank=low_rank, frozen=low_rank)
    case.head.soft_cap = 3.0
    expected, gradients, logits = reference(case, dynamic=True)
    loss, stats = case.loss(dynamic=True, chunk_tokens=16)
    assert relative(loss, expected) < tolerance
    assert relative(stats.loss, F.cross_entropy(logits, case.labels, reduction="none")) < tolerance
    assert relative(stats.confidence, logits.softmax(-1).amax(-1)) < 2 * tolerance
    loss.backward()
    for name, leaf in case.leaves().items():
        assert relative(leaf.grad, gradients[name]) < tolerance, name


@pytest.mark.parametrize("chunk_tokens", [1, 7, 25, 49, 50, 512])
def test_any_chunk_size_gives_the_same(chunk_tokens: int, setups: dict[torch.dtype, Any]) -> None:
    whole, chunked = (Case(setups[torch.float32], low_rank=True) for _ in range(2))
    expected, expected_stats = whole.loss(dynamic=True)
    loss, stats = chunked.loss(dynamic=True, chunk_tokens=chunk_tokens)
    expected.backward()
    loss.backward()
    assert relative(loss, expected) < 1e-6
    assert relative(stats.loss, expected_stats.loss) < 1e-6
    for name, leaf in chunked.leaves().items():
        assert relative(leaf.grad, whole.leaves()[name].grad) < 1e-5, name


def test_what_a_machine_takes_at_a_time_changes_nothing(setups: dict[torch.dtype, Any]) -> None:
    whole, cut = (Case(setups[torch.float32], tokens=500) for _ in range(2))
    expected, _ = whole.loss()
    expected.backward()
    with Largest(cut.head.weight) as largest:
        loss, _ = cut.loss(tiles=Tiles(logit_tokens=7, head_rows=50))
    assert largest.numel == cut.z.numel() < 250 * VOCAB, largest.shape
    loss.backward()
    assert relative(loss, expected) < 1e-6
    for name, leaf in cut.leaves().items():
        assert relative(leaf.grad, whole.leaves()[name].grad) < 1e-5, name


def test_masked_tokens_count_for_nothing(setups: dict[torch.dtype, Any]) -> None:
    case = Case(setups[torch.float32])
    loss, stats = case.loss()
    loss.backward()
    masked = case.coefficient == 0
    assert masked.any() and not case.z.grad[masked].any() and case.z.grad[~masked].any(1).all()
    assert stats.loss[masked].gt(0).all()  # statistics are of every token; the caller masks them
    other = Case(setups[torch.float32])
    other.labels[masked] = (other.labels[masked] + 1) % VOCAB
    again, _ = other.loss()
    again.backward()
    assert torch.equal(again, loss) and torch.equal(other.head.weight.grad, case.head.weight.grad)

    case.coefficient.zero_()
    case.z.grad = case.head.weight.grad = None
    nothing, _ = case.loss(dynamic=True)
    nothing.backward()
    assert nothing == 0 and not case.z.grad.any() and not case.head.weight.grad.any()


def test_dynamic_weights_are_detached_and_divided_by_the_number_of_tokens(setups: dict[torch.dtype, Any]) -> None:
    case = Case(setups[torch.float32])
    plain, _ = case.loss()
    weighted, stats = case.loss(dynamic=True)
    assert relative(weighted, (case.coefficient * stats.confidence * stats.loss).sum()) < 1e-6
    assert 0 < weighted < plain
    _, gradients, _ = reference(case, dynamic=True)
    weighted.backward()
    # Were the weights not detached, or normalised to sum to one, this gradient would be another.
    assert relative(case.z.grad, gradients["z"]) < 1e-5


def test_padded_rows_never_win_and_have_no_gradient(setups: dict[torch.dtype, Any]) -> None:
    for low_rank in (False, True):
        case = Case(setups[torch.float32], low_rank=low_rank)
        with torch.no_grad():
            whole = case.z @ case.head.weight.t()
        assert (whole.argmax(-1) >= VOCAB).any(), "the padded rows would not have won anyway"
        loss, stats = case.loss(chunk_tokens=16)
        loss.backward()
        assert stats.top1.max() < VOCAB
        assert not case.head.weight.grad[VOCAB:].any()
        if case.up is not None:
            assert not case.up.grad[VOCAB:].any()


@pytest.mark.parametrize("rows", [exit_loss_module.ROW_RUN, 50])  # at a time: all, and a number that does not divide
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_takes_the_same_gradient(
    dtype: torch.dtype, rows: int, setups: dict[torch.dtype, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exit_loss_module, "ROW_RUN", rows)
    plain, buffered = Case(setups[dtype], low_rank=True), Case(setups[dtype], low_rank=True)
    plain.loss(chunk_tokens=16)[0].backward()
    trained = {"weight": buffered.head.weight, "up": buffered.up}
    for parameter in trained.values():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    for microbatch in (1, 2):
        buffered.loss(chunk_tokens=16)[0].backward()
        for name, parameter in trained.items():
            main_grad = parameter.main_grad
            once = plain.leaves()[name].grad.float()
            assert relative(main_grad, microbatch * once) < (1e-5 if dtype == torch.float32 else 1e-2)
            assert parameter.grad_added_to_main_grad
    assert relative(buffered.z.grad, 2 * plain.z.grad) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_an_accelerator_adds_up_a_heads_gradient_by_one_product_for_each_chunk(
    setups: dict[torch.dtype, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly, in float32, where a CPU rounds each chunk's products to bfloat16."""
    products, plain = [], torch.addmm

    def addmm(total: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        assert out is total and out_dtype == torch.float32 and a.dtype == b.dtype == torch.bfloat16
        products.append(a.shape)
        return plain(total, a.float(), b.float(), out=out)

    monkeypatch.setattr(torch, "addmm", addmm)
    exact, case = Case(setups[torch.float32], low_rank=True), Case(setups[torch.bfloat16], low_rank=True)
    with torch.no_grad():
        for name in ("z", "down", "up"):
            getattr(exact, name).copy_(getattr(case, name))
        exact.head.weight.copy_(case.head.weight)
    exact.loss()[0].backward()
    trained = {"weight": case.head.weight, "up": case.up}
    for parameter in trained.values():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    rows = len(case.head.weight)
    with Largest(case.head.weight, *(parameter.main_grad for parameter in trained.values())) as largest:
        case.loss(chunk_tokens=25, tiles=accelerator_tiles(rows))[0].backward()
    assert largest.numel <= rows * HIDDEN, "no product of the size of a head is kept in another dtype"
    assert products == [(rows, 25)] * 4, "head and low rank, of two chunks"
    for name, parameter in trained.items():
        assert relative(parameter.main_grad, exact.leaves()[name].grad) < 1e-2, name


def test_tiles_of_an_accelerator_grow_as_the_vocabulary_shrinks() -> None:
    tokens = {rows: accelerator_tiles(rows).logit_tokens for rows in (4000, 32000, 128256, 262144)}
    assert tokens == {4000: 16640, 32000: 2048, 128256: 512, 262144: 512}


def test_a_heads_gradient_exists_once(setups: dict[torch.dtype, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, where it is summed; in the model's dtype there are only so many rows of it."""
    monkeypatch.setattr(exit_loss_module, "ROW_RUN", 50)
    case = Case(setups[torch.bfloat16], tokens=16)
    case.head.weight.main_grad = torch.zeros_like(case.head.weight, dtype=torch.float32)
    with Largest(case.head.weight, case.head.weight.main_grad) as largest:
        case.loss()[0].backward()
    assert largest.numel <= max(50 * HIDDEN, 16 * len(case.head.weight)), largest.shape
    assert case.head.weight.main_grad.any()


def test_microbatches_accumulate_without_main_grad(setups: dict[torch.dtype, Any]) -> None:
    once, twice = Case(setups[torch.float32]), Case(setups[torch.float32])
    once.loss()[0].backward()
    for _ in range(2):
        twice.loss()[0].backward()
    assert relative(twice.head.weight.grad, 2 * once.head.weight.grad) < 1e-6


@pytest.mark.skipif(platform.has_accelerator(), reason="a device-side assertion ends the process")
@pytest.mark.parametrize("factor", [2.0, 0.5, 0.0])
def test_another_gradient_than_one_is_refused(factor: float, setups: dict[torch.dtype, Any]) -> None:
    loss, _ = Case(setups[torch.float32]).loss()
    with pytest.raises(RuntimeError, match="backpropagated with gradient 1"):
        (factor * loss).backward()


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation gives out, views of ``known`` left aside."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.numel, self.shape = 0, torch.Size()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or tensor.untyped_storage().data_ptr() in self._known:
                continue
            if tensor.numel() > self.numel and tensor.stride() != (0, 0):  # one element, however large it looks
                self.numel, self.shape = tensor.numel(), tensor.shape
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_all_tokens_never_exist(dtype: torch.dtype, setups: dict[torch.dtype, Any]) -> None:
    tokens, chunk = 2048, 32
    case = Case(setups[dtype], low_rank=True, tokens=tokens)
    rows = len(case.head.weight)
    allowed = max(tokens * HIDDEN, rows * HIDDEN, chunk * rows)
    assert allowed < tokens * VOCAB / 2
    with Largest() as largest:
        case.loss(chunk_tokens=chunk)[0].backward()
    assert largest.numel <= allowed, largest.shape
    with Largest() as largest:
        exit_statistics(case.z, case.head, case.labels, case.group, chunk_tokens=chunk)
    assert largest.numel <= allowed, largest.shape


def test_statistics_alone_are_those_of_the_loss(setups: dict[torch.dtype, Any]) -> None:
    case = Case(setups[torch.float32], low_rank=True)
    _, trained = case.loss(chunk_tokens=16)
    alone = exit_statistics(case.z, case.head, case.labels, case.group, low_rank=case.low_rank(), chunk_tokens=16)
    for name in ("loss", "confidence", "top1"):
        assert torch.equal(getattr(alone, name), getattr(trained, name)) and not getattr(alone, name).requires_grad


@pytest.mark.parametrize("low_rank", [False, True])
def test_statistics_leave_the_sums_of_gradients_alone(low_rank: bool, setups: dict[torch.dtype, Any]) -> None:
    """These may have no memory then: with an optimizer in host memory it is freed between steps."""
    case = Case(setups[torch.float32], low_rank=low_rank)
    trained = [each for each in (case.head.weight, case.up) if each is not None]
    for parameter in trained:
        buffer = torch.zeros_like(parameter, dtype=torch.float32)
        buffer.untyped_storage().resize_(0)
        parameter.main_grad = buffer  # type: ignore[attr-defined]
    with torch.no_grad():
        lowered = case.low_rank()
    stats = exit_statistics(case.z, case.head, case.labels, case.group, low_rank=lowered)
    for parameter in trained:
        del parameter.main_grad  # type: ignore[attr-defined]
    assert torch.equal(stats.loss, case.loss()[1].loss)


def test_extreme_logits_stay_finite(setups: dict[torch.dtype, Any]) -> None:
    case = Case(setups[torch.float32])
    with torch.no_grad():
        case.z *= 1e4
    loss, stats = case.loss()
    loss.backward()
    for tensor in (loss, stats.loss, stats.confidence, case.z.grad, case.head.weight.grad):
        assert tensor is not None and tensor.isfinite().all()
    assert stats.confidence.max() <= 1 and stats.loss.min() >= 0
