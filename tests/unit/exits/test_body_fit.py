"""Fitted bodies equal float64 least squares, and an exit stays what it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ee.config.exits import ExitSpec
from megatron_ee.errors import ConfigError, UserError
from megatron_ee.exits.exit import Exit
from megatron_ee.exits.fit import SHARES, Fit, Solution, fit_bytes
from megatron_ee.exits.registry import resolve_init
from megatron_ee.exits.stage import Stage

TOKENS, HELD_OUT = 400, 64
RIDGE = 0.01


def run(stage: Stage, seed: int, length: int) -> tuple[Tensor, dict[int, Tensor], Tensor, Any, Tensor]:
    """Tokens, taps, last hidden state and mask of four random sequences, of which the tokens 1 in 5 are masked."""
    generator = torch.Generator().manual_seed(seed)
    vocab = stage.setup.architecture.vocab_size
    tokens = torch.randint(0, vocab, (4, length), generator=generator)
    positions = stage.backbone.positions(length)
    last, taps = stage.run_layers(stage.backbone.embed(tokens), positions, to_end=True)
    mask = (torch.rand(4 * length, generator=generator) < 0.8).float()
    return tokens, taps, last, positions, mask


def fitted(stage: Stage, exit_: Exit, ridge: float = RIDGE) -> tuple[Fit, Solution]:
    """The sums over two microbatches, and their solution."""
    fit = exit_.body.fit(exit_.setup)
    assert fit is not None
    for seed in (1, 2):
        _, taps, last, positions, mask = run(stage, seed, TOKENS // 8)
        fit.add(exit_.attention_half(taps[exit_.spec.layer], positions), last, mask)
    fit.reduce()
    return fit, fit.solve([ridge])[0]


def unit(x: Tensor, eps: float) -> Tensor:
    """float64, divided by the root mean square."""
    x = x.double()
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def rows(stage: Stage, exit_: Exit, mlp: Any, before: Any, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the unmasked tokens, in float64: design matrix a / rms(r), r / rms(r), target, and 1 / rms(r)."""
    eps = stage.setup.architecture.norm_eps
    _, taps, last, positions, mask = run(stage, seed, TOKENS // 8)
    with torch.no_grad():
        r = exit_.attention_half(taps[exit_.spec.layer], positions)
        a = mlp.activated(r if before is None else before(r))
    counted = mask.bool()
    r, a, last = (x.flatten(0, 1)[counted] for x in (r, a, last))
    inverse = 1 / (r.double().square().mean(dim=-1, keepdim=True) + eps).sqrt()
    design = a.double() * inverse
    if mlp.down.bias is not None:
        design = torch.cat([design, inverse], dim=1)
    return design, unit(r, eps), unit(last, eps), inverse


def close(found: Tensor, expected: Tensor) -> None:
    assert (found.double() - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    "family, body",
    [("llama2", "mlp"), ("granite", "mlp"), ("llama-biases", "mlp"), ("qwen3", "layer"), ("olmo2", "mlp")],
)
def test_a_projection_is_the_least_squares_solution(family: str, body: str, saved_model: Any, load_stage: Any) -> None:
    """With every share, and on other tokens too: its product with the activations is the one of ``lstsq`` on the rows
    of all tokens."""
    stage = load_stage(saved_model(family)[0], [ExitSpec(2, body)])  # type: ignore[arg-type]
    (exit_,) = stage.exits
    inner = exit_.body if body == "mlp" else exit_.body.layer
    parts = [rows(stage, exit_, inner.mlp, inner.mlp_norm, seed) for seed in (1, 2)]
    design, residual, target, _ = (torch.cat(column) for column in zip(*parts, strict=True))
    strength = RIDGE * design.square().sum(dim=0).mean()
    wide = torch.cat([design, strength.sqrt() * torch.eye(design.shape[1], dtype=torch.float64)])
    _, first = fitted(stage, exit_)
    solutions = [first, *first.with_other_shares()]
    assert [(each.ridge, each.share) for each in solutions] == [(RIDGE, share) for share in SHARES]
    held_out, other, *_ = rows(stage, exit_, inner.mlp, inner.mlp_norm, 3)
    _, taps, _, positions, mask = run(stage, 3, TOKENS // 8)
    for solution, share in zip(solutions, SHARES, strict=True):
        goal = torch.cat([target - share * residual, torch.zeros(design.shape[1], target.shape[1])])
        expected = torch.linalg.lstsq(wide, goal, driver="gelsd").solution
        solution.place()
        down = inner.mlp.down
        found = down.weight.detach().t().double()
        if down.bias is not None:
            found = torch.cat([found, down.bias.detach()[None].double()])
        close(held_out @ found * share * stage.setup.architecture.residual_multiplier, held_out @ expected)
        if not stage.setup.architecture.norms_after:  # then the exit's features are those of the regression
            with torch.no_grad():
                features = exit_.features(taps[2], positions) / stage.setup.architecture.logit_multiplier
            predicted = unit(share * other + held_out @ expected, 0)
            close(features.flatten(0, 1)[mask.bool()], predicted * exit_.body.norm.scale())


@pytest.mark.parametrize("family", ["llama2", "gemma3"])
def test_a_norms_scale_is_the_least_squares_solution(family: str, saved_model: Any, load_stage: Any) -> None:
    stage = load_stage(saved_model(family)[0], [ExitSpec(2, "norm")])
    (exit_,) = stage.exits
    arch, norm = stage.setup.architecture, exit_.body.norm
    final = stage.backbone.final_norm.scale().double()
    design, target = [], []
    for seed in (1, 2):
        _, taps, last, _, mask = run(stage, seed, TOKENS // 8)
        design.append(unit(taps[2], arch.norm_eps).flatten(0, 1)[mask.bool()])
        target.append(unit(last, arch.norm_eps).flatten(0, 1)[mask.bool()] * final)
    x, y = torch.cat(design), torch.cat(target)
    expected = torch.stack([torch.linalg.lstsq(x[:, [j]], y[:, [j]]).solution[0, 0] for j in range(x.shape[1])])
    _, solution = fitted(stage, exit_)
    solution.place()
    close(norm.scale(), expected)
    assert solution.with_other_shares() == []
    assert norm.plus_one == (family == "gemma3")


@pytest.mark.parametrize("share", [SHARES[0], SHARES[-1]])
@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_a_norm_after_the_projection_is_fitted_too(
    family: str, share: float, saved_model: Any, load_stage: Any
) -> None:
    stage = load_stage(saved_model(family)[0], [ExitSpec(2, "mlp")])
    (exit_,) = stage.exits
    body, eps = exit_.body, stage.setup.architecture.norm_eps
    assert body.mlp_post_norm.weight.requires_grad
    fit, first = fitted(stage, exit_)
    solution = first if share == first.share else first.with_other_shares()[SHARES.index(share) - 1]
    second = fit.then(solution)
    assert second is not None
    solution.place()
    x, y = [], []
    for seed in (1, 2):
        _, taps, last, positions, mask = run(stage, seed, TOKENS // 8)
        second.add(exit_.attention_half(taps[2], positions), last, mask)
        with torch.no_grad():
            added = body.mlp(taps[2] if body.mlp_norm is None else body.mlp_norm(taps[2]))
        r, last, added = (each.flatten(0, 1)[mask.bool()] for each in (taps[2], last, added))
        inverse = 1 / (r.double().square().mean(dim=-1, keepdim=True) + eps).sqrt()
        x.append(share * inverse * unit(added, eps))
        y.append(unit(last, eps) - share * inverse * r.double())
    design, target = torch.cat(x), torch.cat(y)
    expected = (design * target).sum(dim=0) / design.square().sum(dim=0)
    second.reduce()
    second.solve([RIDGE])[0].place()
    close(body.mlp_post_norm.scale(), expected)


def test_equal_features_and_no_ridge_raise_it(saved_model: Any, load_stage: Any) -> None:
    stage = load_stage(saved_model("llama2")[0], [ExitSpec(2)])
    (exit_,) = stage.exits
    with torch.no_grad():
        for half in exit_.body.mlp.gate_up.weight.chunk(2):
            half[1] = half[0]
    _, solution = fitted(stage, exit_, ridge=0.0)
    for parts in (solution.values, solution.smallest):
        (down,) = parts.values()
        assert 0 < solution.ridge < 1e-4 and torch.isfinite(down).all()
        assert (down[:, 0] - down[:, 1]).abs().max() <= 1e-3 * down.abs().max()


def test_activations_that_are_not_finite_are_refused(saved_model: Any, load_stage: Any) -> None:
    stage = load_stage(saved_model("llama2")[0], [ExitSpec(2)])
    with torch.no_grad():
        stage.exits[0].body.mlp.gate_up.weight[3] = torch.inf
    with pytest.raises(UserError, match="the mean square of its MLP's activations is"):
        fitted(stage, stage.exits[0])


@pytest.mark.parametrize("body", ["mlp", "norm"])
def test_last_hidden_states_that_are_not_finite_are_refused(body: Any, saved_model: Any, load_stage: Any) -> None:
    stage = load_stage(saved_model("llama2")[0], [ExitSpec(2, body)])
    with torch.no_grad():
        list(stage.backbone.layers.values())[-1].mlp.down.weight[0] = torch.nan
    with pytest.raises(UserError, match="the residual or the last hidden state is not finite"):
        fitted(stage, stage.exits[0])


def test_auto_fits_where_there_is_a_matrix(saved_model: Any, load_stage: Any) -> None:
    arch = load_stage(saved_model("llama2")[0]).setup.architecture
    specs = [ExitSpec(1, "embedding", init="auto"), ExitSpec(2, "norm", init="auto"), ExitSpec(3, init="auto")]
    specs += [ExitSpec(4, "layer", init="auto"), ExitSpec(5, "norm", init="fit"), ExitSpec(6, init="random")]
    assert [spec.init for spec in resolve_init(specs, arch)] == ["copy", "copy", "fit", "fit", "fit", "random"]
    with pytest.raises(ConfigError, match="the exit after layer 7 has init fit, but body embedding has nothing to fit"):
        resolve_init([ExitSpec(7, "embedding", init="fit")], arch)
    assert exit_fits(load_stage(saved_model("llama2")[0], [ExitSpec(1, "embedding")])) == [None]


def exit_fits(stage: Stage) -> list[Fit | None]:
    return [exit_.body.fit(exit_.setup) for exit_ in stage.exits]


def test_bytes_are_those_of_the_sums(saved_model: Any, load_stage: Any) -> None:
    stage = load_stage(saved_model("llama-biases")[0], [ExitSpec(2)])
    (exit_,) = stage.exits
    fit, arch = exit_.body.fit(exit_.setup), stage.setup.architecture
    held = sum(each.nbytes for each in vars(fit).values() if isinstance(each, Tensor))
    assert held == fit_bytes(exit_.body.fitted_rows(arch), arch.hidden_size, 1)[0]
    sums, solving = fit_bytes(28672, 8192, 8)  # of a 70B model
    assert 8 * sums == pytest.approx(10.3e9, rel=0.01) and solving == pytest.approx(8.5e9, rel=0.01)
