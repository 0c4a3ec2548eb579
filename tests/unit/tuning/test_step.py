"""One step on one process: the factor of the losses, and what happens where something is not finite."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import DistillationConfig, LossConfig
from megatron_ee.parallel.optimizer import ExitOptimizer
from megatron_ee.testing.tuning import GLOBAL_BATCH, Case, prepare, random_batches
from megatron_ee.tuning.schedule import Pipeline
from megatron_ee.tuning.step import StepResult, tuning_step, weight_ramp

SPECS = (ExitSpec(1), ExitSpec(3, "norm", "shared", weight=0.5))
CASE = Case("", "llama2", SPECS, (((1, 4), (1, 3)),))

Make = Callable[[], tuple[Pipeline, ExitOptimizer]]


@pytest.fixture
def make(saved_model: Any, groups: Any) -> Make:
    path, _ = saved_model("llama2")
    return lambda: prepare(path, CASE, groups)


def step(pipeline: Pipeline, optimizer: ExitOptimizer, ramp: float = 1.0) -> StepResult:
    vocab = pipeline.stage.setup.architecture.vocab_size
    return tuning_step(pipeline, optimizer, random_batches(vocab, 0, 0, 1, 2), CASE.loss, ramp)


def weights(pipeline: Pipeline) -> list[torch.Tensor]:
    return [p.detach().clone() for p in pipeline.stage.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    "shape, expected",
    [
        ("none", [1, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 1]),
        ("cosine", [0.5 - math.sqrt(0.125), 0.5, 0.5 + math.sqrt(0.125), 1, 1, 1]),
    ],
)
def test_loss_weights_rise_to_what_they_are(shape: Any, expected: list[float]) -> None:
    loss = LossConfig(weight_warmup=shape, weight_warmup_fraction=0.4)
    assert [weight_ramp(loss, number, 10) for number in range(6)] == pytest.approx(expected)


def test_a_factor_scales_gradients_and_not_what_is_reported(make: Make) -> None:
    whole, half = step(*make()), step(*make(), ramp=0.5)
    for one, other in zip(whole.exits, half.exits, strict=True):
        assert one.loss == other.loss and other.weight == one.weight / 2
        assert other.grad_norm == pytest.approx(one.grad_norm / 2)
    assert [exit_.weight for exit_ in whole.exits] == [1.0, 0.5]


@pytest.mark.parametrize("kl", [0.0, 0.6])
def test_pieces_of_a_microbatch_add_up_to_the_whole(
    kl: float, saved_model: Any, groups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bodies that see tokens alone are cut, attention is not; 40 tokens are no multiple of 9."""
    specs = (ExitSpec(1), ExitSpec(2, "layer"), ExitSpec(3, "norm", "low_rank"), ExitSpec(4, "embedding"))
    loss = LossConfig(chunk_tokens=9, dynamic_token_weights=True, distillation=DistillationConfig(kl=kl, top_k=5))
    case = Case("", "llama2", specs, (((1, 4), (1, 2, 3, 4)),), loss=loss)
    path, _ = saved_model("llama2")
    found, calls = [], Counter[int]()
    for at_least in (10**6, 1):
        pipeline, optimizer = prepare(path, case, groups)
        tiles = dataclasses.replace(pipeline.stage.setup.tiles, graph_tokens=at_least)
        monkeypatch.setattr(pipeline.stage, "setup", dataclasses.replace(pipeline.stage.setup, tiles=tiles))
        for exit_ in pipeline.stage.exits:
            exit_.register_forward_hook(lambda module, *_: calls.update([module.spec.layer]))
        batches = random_batches(pipeline.stage.setup.architecture.vocab_size, 0, 0, 1, 2)
        result = tuning_step(pipeline, optimizer, batches, loss, 1.0)
        gradients = [p.main_grad.clone() for p in pipeline.stage.parameters() if p.requires_grad]
        found.append((result, gradients))
        tokens = [batch.tokens.numel() for batch in batches]
        pieces = sum(-(-count // max(9, at_least)) for count in tokens)
        assert calls == {1: pieces, 2: len(batches), 3: pieces, 4: pieces}
        calls.clear()
    (whole, expected), (cut, gradients) = found
    assert whole.tokens == cut.tokens and cut.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
    for one, other in zip(whole.exits, cut.exits, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
    for one, other in zip(expected, gradients, strict=True):
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()


def test_a_loss_that_is_not_finite_is_told_by_exit_and_sequences(make: Make) -> None:
    pipeline, optimizer = make()
    batches = random_batches(pipeline.stage.setup.architecture.vocab_size, 0, 0, 1, 2)
    token = int(batches[2].tokens[1, 3])
    with torch.no_grad():
        pipeline.stage.backbone.embedding.weight[token] = torch.nan
    bad = [list(batch.sequences) for batch in batches if (batch.tokens == token).any()]
    assert [4, 5] in bad and len(bad) < GLOBAL_BATCH / 2
    before, rate = weights(pipeline), optimizer.learning_rate
    result = step(pipeline, optimizer)
    named = sorted(number for numbers in bad for number in numbers)
    assert result.skipped == f"exit 1: loss nan in sequences {named}; exit 3: loss nan in sequences {named}"
    assert all(map(torch.equal, before, weights(pipeline))) and optimizer.learning_rate != rate


def test_a_gradient_that_is_not_finite_is_told_by_exit_and_the_steps_sequences(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, optimizer = make()
    before, real = weights(pipeline), optimizer.wrappers[pipeline.stage.exits[0]].forward

    def overflow() -> None:  # adding up the microbatches
        pipeline.stage.exits[1].body.norm.weight.main_grad[0] = torch.inf

    with monkeypatch.context() as patch:
        patch.setattr(optimizer, "reduce_gradients", overflow)
        result = step(pipeline, optimizer)
    assert result.skipped == "exit 3: gradient norm inf, loss finite, in sequences 0 to 11"
    assert all(map(torch.equal, before, weights(pipeline)))
    with monkeypatch.context() as patch:  # beside an exit whose loss is not finite either, for some sequences
        patch.setattr(optimizer, "reduce_gradients", overflow)
        wrapper = optimizer.wrappers[pipeline.stage.exits[0]]
        patch.setattr(wrapper, "forward", lambda tap, *args, **kw: real(tap * torch.inf, *args, **kw))
        both = step(pipeline, optimizer)
    assert both.skipped.startswith("exit 1: loss nan in sequences [0, 1, 2")
    assert both.skipped.endswith("; exit 3: gradient norm inf, loss finite, in sequences 0 to 11")
    after = step(pipeline, optimizer)
    assert not after.skipped and not all(map(torch.equal, before, weights(pipeline)))
    assert [exit_.loss for exit_ in after.exits] == [exit_.loss for exit_ in result.exits]
