"""Distillation from the final exit against plain autograd, and the teacher's tokens against ``torch.topk``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ee import platform
from megatron_ee.config.exits import ExitSpec
from megatron_ee.families.registry import read_architecture
from megatron_ee.model.backbone import VocabHead
from megatron_ee.model.distillation import Distillation, Teacher, teacher_top_k
from megatron_ee.model.exit_loss import LowRank, exit_loss
from megatron_ee.model.setup import build_setup

TOKENS, HIDDEN, VOCAB, RANK, TOP_K = 50, 64, 131, 6, 9


class Lesson:
    """Random inputs of one exit's loss, and a teacher of the same tokens; ``z`` and the trained weights are leaves."""

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
        # Somewhat like the exit's own: a teacher that has nothing in common would hide what they share.
        self.teacher_logits = self.logits(self.leaves()).detach() + draw(tokens, VOCAB).double()

    def leaves(self) -> dict[str, Tensor]:
        named = {"z": self.z, "weight": self.head.weight, "down": self.down, "up": self.up}
        return {name: tensor for name, tensor in named.items() if tensor is not None and tensor.requires_grad}

    def logits(self, leaves: dict[str, Tensor]) -> Tensor:
        """``[tokens, vocab]`` float64, by plain operations."""
        leaves = {name: tensor.double() for name, tensor in leaves.items()}
        weight = leaves.get("weight", self.head.weight.double())
        logits = leaves["z"] @ weight[:VOCAB].t()
        if "up" in leaves:
            logits = logits + leaves["z"] @ leaves["down"].t() @ leaves["up"][:VOCAB].t()
        cap = self.head.soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def loss(self, **kwargs: Any) -> Any:
        low_rank = None
        if self.down is not None and self.up is not None:
            low_rank = LowRank(F.linear(self.z, self.down), self.up)
        return exit_loss(self.z, self.head, self.labels, self.coefficient, self.group, low_rank=low_rank, **kwargs)

    def distillation(self, temperature: float = 1.0, kl: float = 0.7, cross_entropy: float = 0.4) -> Distillation:
        return Distillation(self.teacher(temperature), kl, cross_entropy, temperature)

    def teacher(self, temperature: float) -> Teacher:
        top = (self.teacher_logits / temperature).log_softmax(-1).topk(TOP_K)
        return Teacher(top.indices, top.values.float())


def with_others(probabilities: Tensor, ids: Tensor) -> Tensor:
    """``[tokens, k + 1]``: of the tokens ``ids``, and of all others together."""
    others = torch.ones_like(probabilities).scatter_(1, ids, 0.0) * probabilities
    return torch.cat([probabilities.gather(1, ids), others.sum(-1, keepdim=True)], dim=-1)


def reference(lesson: Lesson, given: Distillation, dynamic: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the leaves by autograd over all logits at once, in float64, from the definition."""
    leaves = {name: tensor.detach().double().requires_grad_() for name, tensor in lesson.leaves().items()}
    logits = lesson.logits(leaves)
    p, q = (
        with_others((each / given.temperature).softmax(-1), given.teacher.ids)
        for each in (lesson.teacher_logits, logits)
    )
    divergence = F.kl_div(q.log(), p, reduction="none").sum(-1)
    nll = F.cross_entropy(logits, lesson.labels, reduction="none")
    per_token = given.cross_entropy * nll + given.kl * given.temperature**2 * divergence
    scale = lesson.coefficient * logits.softmax(-1).amax(-1).detach() if dynamic else lesson.coefficient
    loss = (per_token * scale).sum()
    return loss.detach(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def relative(ours: Tensor | None, theirs: Tensor | None) -> float:
    """Largest difference over the largest value."""
    assert ours is not None and theirs is not None
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture(scope="module")
def setups(saved_model: Any, groups: Any) -> dict[torch.dtype, Any]:
    architecture = read_architecture(saved_model("llama3.1")[0])
    return {dtype: build_setup(architecture, dtype, groups) for dtype in (torch.float32, torch.bfloat16)}


@pytest.fixture(scope="module")
def setup(setups: dict[torch.dtype, Any]) -> Any:
    return setups[torch.float32]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kind", ["own", "frozen", "low_rank", "low_rank with its base trained"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_loss_and_gradients(
    dtype: torch.dtype,
    tolerance: float,
    kind: str,
    dynamic: bool,
    temperature: float,
    setups: dict[torch.dtype, Any],
) -> None:
    lesson = Lesson(setups[dtype], low_rank=kind.startswith("low_rank"), frozen=kind in ("frozen", "low_rank"))
    given = lesson.distillation(temperature)
    expected, gradients = reference(lesson, given, dynamic)
    loss, stats = lesson.loss(distillation=given, dynamic=dynamic, chunk_tokens=16)  # does not divide 50
    assert loss.dtype == torch.float32 and relative(loss, expected) < tolerance
    loss.backward()
    assert set(gradients) == set(lesson.leaves())
    for name, leaf in lesson.leaves().items():
        assert leaf.grad is not None and leaf.grad.dtype == dtype, name
        assert relative(leaf.grad, gradients[name]) < tolerance, name
    # What is reported stays the exit's own, whatever it learns from.
    _, plain = lesson.loss(chunk_tokens=16)
    for name in ("loss", "confidence", "top1"):
        assert torch.equal(getattr(stats, name), getattr(plain, name)), name


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_capped_logits(temperature: float, setup: Any) -> None:
    lesson = Lesson(setup, low_rank=True)
    lesson.head.soft_cap = 3.0
    given = lesson.distillation(temperature)
    expected, gradients = reference(lesson, given, dynamic=False)
    loss, _ = lesson.loss(distillation=given, chunk_tokens=16)
    assert relative(loss, expected) < 1e-5
    loss.backward()
    for name, leaf in lesson.leaves().items():
        assert relative(leaf.grad, gradients[name]) < 1e-5, name
    # The teacher's logits are capped too: of oneself there is nothing to learn.
    plain = Lesson(setup)
    plain.head.soft_cap = 3.0
    itself = teacher_top_k(plain.z, plain.head, plain.group, TOP_K, temperature)
    assert abs(float(plain.loss(distillation=Distillation(itself, 1.0, 0.0, temperature))[0].detach())) < 1e-6


@pytest.mark.parametrize("chunk_tokens", [1, 7, 49, 50, 512])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_any_chunk_size_gives_the_same(chunk_tokens: int, temperature: float, setup: Any) -> None:
    whole, chunked = (Lesson(setup, low_rank=True) for _ in range(2))
    expected, _ = whole.loss(distillation=whole.distillation(temperature), dynamic=True, chunk_tokens=25)
    loss, _ = chunked.loss(distillation=chunked.distillation(temperature), dynamic=True, chunk_tokens=chunk_tokens)
    expected.backward()
    loss.backward()
    assert relative(loss, expected) < 1e-6
    for name, leaf in chunked.leaves().items():
        assert relative(leaf.grad, whole.leaves()[name].grad) < 1e-5, name


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_without_weight_the_teacher_changes_nothing(temperature: float, setup: Any) -> None:
    plain, taught = (Lesson(setup, low_rank=True) for _ in range(2))
    expected, _ = plain.loss(dynamic=True)
    loss, _ = taught.loss(distillation=taught.distillation(temperature, kl=0.0, cross_entropy=1.0), dynamic=True)
    expected.backward()
    loss.backward()
    assert torch.equal(loss, expected)
    for name, leaf in taught.leaves().items():
        assert torch.equal(leaf.grad, plain.leaves()[name].grad), name


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distilling_from_oneself_has_no_loss_or_gradient(temperature: float, setup: Any) -> None:
    lesson = Lesson(setup)
    for k in (VOCAB, TOP_K, 1):
        itself = teacher_top_k(lesson.z, lesson.head, lesson.group, k, temperature)
        loss, _ = lesson.loss(distillation=Distillation(itself, 1.0, 0.0, temperature))
        loss.backward()
        assert abs(float(loss.detach())) < 1e-6 and float(lesson.z.grad.abs().max()) < 1e-7, k
        lesson.z.grad = None
    lesson.loss(distillation=lesson.distillation(temperature, 1.0, 0.0))[0].backward()
    assert float(lesson.z.grad.abs().max()) > 1e-4


def test_masked_tokens_and_padded_rows_count_for_nothing(setup: Any) -> None:
    for temperature in (1.0, 2.0):
        first, second = (Lesson(setup, low_rank=True) for _ in range(2))
        masked = first.coefficient == 0
        second.teacher_logits[masked] = second.teacher_logits[masked].flip(1)
        losses = [lesson.loss(distillation=lesson.distillation(temperature))[0] for lesson in (first, second)]
        for loss in losses:
            loss.backward()
        assert masked.any() and torch.equal(*losses)
        assert torch.equal(first.head.weight.grad, second.head.weight.grad)
        assert not first.z.grad[masked].any() and first.z.grad[~masked].any(1).all()
        assert not first.head.weight.grad[VOCAB:].any() and not first.up.grad[VOCAB:].any()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.05])
def test_extreme_logits_stay_finite(temperature: float, setup: Any) -> None:
    lesson = Lesson(setup)
    with torch.no_grad():
        lesson.z *= 1e4
    teacher = teacher_top_k(lesson.z.flip(0), lesson.head, lesson.group, TOP_K, temperature)
    loss, _ = lesson.loss(distillation=Distillation(teacher, 0.7, 0.4, temperature))
    loss.backward()
    for tensor in (teacher.log_probabilities, loss, lesson.z.grad, lesson.head.weight.grad):
        assert tensor.isfinite().all()


class Exponentials(TorchDispatchMode):
    """Records the elements of each exponential taken, and of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[int] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        if func in (torch.ops.aten.exp_.default, torch.ops.aten.exp.default):
            self.taken.append(out.numel())
        return out


def test_only_another_temperature_takes_further_exponentials(setup: Any) -> None:
    tokens, chunk = 2048, 32
    lesson = Lesson(setup, tokens=tokens)
    rows = len(lesson.head.weight)
    allowed = max(tokens * HIDDEN, rows * HIDDEN, chunk * rows)
    assert allowed < tokens * VOCAB / 2
    for distillation, passes in ((None, 1), (lesson.distillation(), 1), (lesson.distillation(2.0), 2)):
        with Exponentials() as exponentials:
            lesson.loss(distillation=distillation, chunk_tokens=chunk)[0].backward()
        assert [size for size in exponentials.taken if size > chunk * TOP_K] == [chunk * rows] * (
            tokens // chunk * passes
        )
        assert exponentials.largest <= allowed, "logits of all tokens existed"
    with Exponentials() as exponentials:
        teacher_top_k(lesson.z, lesson.head, lesson.group, TOP_K, chunk_tokens=chunk)
    assert exponentials.taken and exponentials.largest <= allowed


@pytest.mark.parametrize("chunk_tokens", [7, 512])
@pytest.mark.parametrize("k, temperature", [(1, 1.0), (32, 1.0), (VOCAB, 1.0), (32, 2.0)])
def test_the_teacher_is_the_top_of_the_softmax(k: int, temperature: float, chunk_tokens: int, setup: Any) -> None:
    lesson = Lesson(setup)
    with torch.no_grad():
        assert ((lesson.z @ lesson.head.weight.t()).argmax(-1) >= VOCAB).any(), "padding would not have won anyway"
    teacher = teacher_top_k(lesson.z, lesson.head, lesson.group, k, temperature, chunk_tokens=chunk_tokens)
    expected = (lesson.logits(lesson.leaves()).detach() / temperature).log_softmax(-1).topk(k)
    assert torch.equal(teacher.ids, expected.indices) and teacher.ids.dtype == torch.int64
    assert teacher.log_probabilities.dtype == torch.float32 and not teacher.log_probabilities.requires_grad
    torch.testing.assert_close(teacher.log_probabilities.double(), expected.values, atol=1e-4, rtol=1e-5)


def test_no_more_tokens_are_kept_than_there_are(setup: Any) -> None:
    lesson = Lesson(setup)
    every, more = (teacher_top_k(lesson.z, lesson.head, lesson.group, k) for k in (VOCAB, 1000))
    assert torch.equal(every.ids, more.ids) and (every.ids.sort(1).values.cpu() == torch.arange(VOCAB)).all()
    assert torch.equal(every.log_probabilities, more.log_probabilities)
    assert float((every.log_probabilities.exp().sum(1) - 1).abs().max()) < 1e-5


@pytest.mark.parametrize("rows", [256, 131])
def test_of_equal_logits_the_lower_id_is_kept_first(rows: int, setup: Any) -> None:
    lesson = Lesson(setup)
    with torch.no_grad():
        # Small integers: sums are exact and every fourth token or so ties.
        lesson.head.weight = torch.nn.Parameter(lesson.head.weight[:rows].sign())
        lesson.head.weight[:, 6:] = 0
        lesson.z.copy_(lesson.z.sign())
    logits = lesson.logits(lesson.leaves()).detach()
    expected = [sorted(range(VOCAB), key=lambda token, row=row: (-row[token], token)) for row in logits.tolist()]
    for k in (1, 5, 40):
        teacher = teacher_top_k(lesson.z, lesson.head, lesson.group, k)
        assert teacher.ids.tolist() == [order[:k] for order in expected]


@pytest.mark.parametrize("spec", [ExitSpec(2, "mlp", "own"), ExitSpec(3, "norm", "low_rank", rank=4)])
def test_an_exit_passes_its_teacher_on(spec: ExitSpec, tokens: Tensor, saved_model: Any, load_stage: Any) -> None:
    stage = load_stage(saved_model("llama3.1")[0], [spec])
    (exit_,) = stage.exits
    positions = stage.backbone.positions(tokens.shape[1])
    h, taps = stage.run_layers(stage.backbone.embed(tokens.to(platform.device())), positions, to_end=True)
    labels = tokens.roll(-1, 1).t().reshape(-1).to(platform.device())
    coefficient = torch.full(labels.shape, 1 / labels.numel(), device=labels.device)
    group = stage.setup.groups.tensor
    teacher = teacher_top_k(stage.final_features(h).flatten(0, 1), stage.backbone.head, group, TOP_K, 2.0)
    given = Distillation(teacher, 0.7, 0.4, 2.0)
    loss, _ = exit_(taps[spec.layer], positions, labels, coefficient, distillation=given, chunk_tokens=20)
    loss.backward()
    trained = {name: p for name, p in exit_.named_parameters() if p.requires_grad}
    ours = {name: p.grad.clone() for name, p in trained.items()}

    logits = exit_.head.logits(exit_.features(taps[spec.layer], positions)).flatten(0, 1)
    nll = F.cross_entropy(logits, labels)
    q = with_others((logits / 2).softmax(-1), teacher.ids)
    p = with_others((stage.final_logits(stage.final_features(h).flatten(0, 1)) / 2).softmax(-1), teacher.ids)
    expected = 0.4 * nll + 0.7 * 4 * (p * (p.log() - q.log())).sum(-1).mean()
    assert relative(loss, expected) < 1e-5
    for (name, mine), theirs in zip(ours.items(), torch.autograd.grad(expected, list(trained.values())), strict=True):
        assert float((mine - theirs).abs().max()) <= 1e-5 * max(float(theirs.abs().max()), 1e-6), name
