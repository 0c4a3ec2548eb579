"""Which solutions are tried, which one a fitted exit keeps, and which exits are fitted together."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import FitConfig
from megatron_ee.errors import UserError
from megatron_ee.exits.fit import CANDIDATES, RIDGES, SHARES, Solution, fit_bytes
from megatron_ee.parallel.layout import even_layout
from megatron_ee.testing.tuning import random_batches
from megatron_ee.tuning.fit import Fitter, choose, split_turns
from megatron_ee.tuning.fit_tokens import Tokens
from megatron_ee.tuning.interrupt import Interrupt


def test_the_lowest_loss_is_taken_if_it_agrees_more() -> None:
    assert choose([(0.2, 5.0), (0.3, 4.0), (0.4, 3.5), (0.1, 4.5)]) == (2, True)
    assert choose([(0.4, 5.0), (0.3, 4.0), (0.4, 3.5)]) == (2, False)
    assert choose([(0.0, 5.0), (0.3, math.nan), (0.2, 6.0)]) == (2, True)


@pytest.mark.parametrize("family, body", [("llama-biases", "mlp"), ("gemma2", "mlp"), ("llama2", "norm")])
def test_shares_are_tried_with_the_best_ridge(
    family: str, body: Any, saved_model: Any, load_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit keeps the lowest loss of all that is measured, which is as often as the plan counts; or the copy."""
    specs = [ExitSpec(2, body, "shared", init="fit")]
    stage = load_stage(saved_model(family)[0], specs)
    arch, (exit_,) = stage.setup.architecture, stage.exits
    fitted, held_out = ([random_batches(arch.vocab_size, step, 0, 1, 2)] for step in (1, 2))
    counts = (sum(batch.num_tokens for batch in step[0]) for step in (fitted, held_out))
    tried: list[tuple[Solution, float, float, list[torch.Tensor]]] = []
    usual = Fitter._measure

    def measure(self: Fitter, candidates: Any) -> Any:
        found = usual(self, candidates)
        for solution, figures in zip(candidates[exit_], found[exit_], strict=True):
            solution.place()
            tried.append((solution, *figures, [each.detach().clone() for each in exit_.parameters()]))
        return found

    monkeypatch.setattr(Fitter, "_measure", measure)
    layout = even_layout(arch.num_layers, 1, [2])
    (outcome,) = Fitter(stage, layout, specs, Tokens(fitted, held_out, *counts), FitConfig(), Interrupt()).run()
    copied, *others = tried
    best = min(others, key=lambda each: each[2])
    if body == "norm":
        assert len(tried) == 2
    else:
        assert len(tried) == CANDIDATES
        ridges, shares = others[: len(RIDGES)], others[len(RIDGES) :]
        assert {each[0].share for each in ridges} == {SHARES[0]}
        first = min(ridges, key=lambda each: each[2])[0]
        assert [(each[0].ridge, each[0].share) for each in shares] == [(first.ridge, share) for share in SHARES[1:]]
    kept = best if best[1] > copied[1] else copied
    assert (outcome.ridge is None) == (kept is copied) and outcome.share == kept[0].share
    assert outcome.agreement == (copied[1], best[1]) and outcome.loss == (copied[2], best[2])
    assert all(torch.equal(found, each) for found, each in zip(exit_.parameters(), kept[3], strict=True))
    assert any(not torch.equal(found, each) for found, each in zip(best[3], copied[3], strict=True))


def test_an_exit_that_cannot_be_fitted_is_named(saved_model: Any, load_stage: Any) -> None:
    """Such as one after a pruned layer, whose MLP gives 0."""
    specs = [ExitSpec(1, head="shared", init="fit"), ExitSpec(2, head="shared", init="fit")]
    stage = load_stage(saved_model("llama2")[0], specs)
    arch, layout = stage.setup.architecture, even_layout(stage.setup.architecture.num_layers, 1, [1, 2])
    with torch.no_grad():
        stage.exits[1].body.mlp.gate_up.weight.zero_()
    fitted, held_out = ([random_batches(arch.vocab_size, step, 0, 1, 2)] for step in (1, 2))
    counts = (sum(batch.num_tokens for batch in step[0]) for step in (fitted, held_out))
    with pytest.raises(UserError, match=r"^the exit after layer 2 cannot be fitted: .* is 0.0; .* init: copy$"):
        Fitter(stage, layout, specs, Tokens(fitted, held_out, *counts), FitConfig(), Interrupt()).run()


def test_exits_share_a_turn_while_their_sums_fit(saved_model: Any, load_stage: Any) -> None:
    setup = load_stage(saved_model("llama2")[0]).setup
    specs = [ExitSpec(layer) for layer in (1, 2, 3)] + [ExitSpec(4, "norm")]
    sums, solving = fit_bytes(setup.architecture.ffn_size, setup.architecture.hidden_size, 1)
    assert split_turns(specs, setup, 2 * sums + solving) == [{1, 2}, {3, 4}]
    assert split_turns(specs, setup, 3 * sums + solving) == [{1, 2, 3, 4}]
    assert split_turns(specs, setup, 0) == [{1}, {2}, {3}, {4}]
    assert split_turns([], setup, 0) == []
