"""The gate of an exit: its fit against a reference, and its tensors in an adapter."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ee.checkpoint.adapter import open_adapter
from megatron_ee.checkpoint.adapter_writing import save_adapter
from megatron_ee.checkpoint.loading import load_exits
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.config.exits import ExitSpec
from megatron_ee.conversion.edit import add_exits, change_heads, drop_exits, merge_exits
from megatron_ee.conversion.formats import open_contents
from megatron_ee.conversion.shallow import shallow_model
from megatron_ee.errors import CheckpointError, ConfigError
from megatron_ee.exits.gate import CHUNK, Gate, logistic_regression
from megatron_ee.exits.tensors import exit_saved_sources, trained_parts

SPECS = [ExitSpec(2, "norm", "low_rank", rank=3, gate=True), ExitSpec(3, "mlp", "shared")]
HASH = "ab" * 32


def tokens(count: int = CHUNK + 900, hidden: int = 12) -> tuple[Tensor, Tensor]:
    """Features, not of mean zero, and classes drawn from a linear probe."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(count, hidden, dtype=torch.float64, generator=generator) * torch.linspace(0.1, 5, hidden) + 0.5
    w = torch.randn(hidden, dtype=torch.float64, generator=generator) / torch.linspace(0.1, 5, hidden)
    return z, torch.rand(count, generator=generator) < (z @ w - 1).sigmoid()


def reference(z: Tensor, agrees: Tensor, ridge: float) -> Tensor:
    """The same minimum by L-BFGS."""
    found = torch.zeros(z.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [found], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    signs = torch.where(agrees, 1.0, -1.0).double()

    def closure() -> Tensor:
        optimizer.zero_grad()
        margins = signs * (z @ found[:-1] + found[-1])
        penalty = ridge / 2 * z.square().mean() * found[:-1].square().sum()
        prior = torch.nn.functional.softplus(torch.stack((found[-1], -found[-1]))).sum()
        loss = torch.nn.functional.softplus(-margins).mean() + penalty + prior / len(z)
        loss.backward()
        return loss

    optimizer.step(closure)
    return found.detach()


@pytest.mark.parametrize("ridge", [1e-4, 0.1])
def test_newton_finds_the_minimum(ridge: float) -> None:
    z, agrees = tokens()
    found, expected = logistic_regression(z, agrees, ridge), reference(z, agrees, ridge)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    gate = Gate(z.shape[1])
    gate.place(found)
    assert torch.allclose(gate(z.float()).double(), (z @ found[:-1] + found[-1]).sigmoid(), atol=1e-5)
    assert gate(z.float()).mean().item() == pytest.approx(agrees.double().mean().item(), abs=1e-3)


def test_ranks_add_their_sums() -> None:
    z, agrees = tokens()

    def twice(sums: Tensor) -> None:
        sums *= 2

    found = logistic_regression(z, agrees, 0.01, reduce=twice)
    both = logistic_regression(torch.cat((z, z)), torch.cat((agrees, agrees)), 0.01)
    assert (found - both).abs().max() < 1e-9


def test_separable_classes_give_finite_weights() -> None:
    z, _ = tokens(500)
    found = logistic_regression(z, z[:, 3] > 0.5, 1e-3)
    assert found.isfinite().all() and found.abs().max() < 100
    always = logistic_regression(z, torch.ones(500, dtype=torch.bool), 1e-3)
    assert ((z @ always[:-1] + always[-1]).sigmoid() > 0.95).all() and always.isfinite().all()
    few = logistic_regression(z[:3], torch.tensor([True, False, True]), 1e-3)  # fewer tokens than features
    assert few.isfinite().all()
    assert not logistic_regression(z[:0], torch.ones(0, dtype=torch.bool), 1e-3).any()


@pytest.fixture(scope="module")
def saved(
    saved_model: Any, load_stage: Any, groups: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A model, and an adapter of which one exit has a gate."""
    model, path = saved_model("llama2")[0], tmp_path_factory.mktemp("gate") / "adapter"
    stage = load_stage(model, SPECS)
    gate = stage.exits[0].gate
    gate.place(torch.arange(len(gate.weight) + 1, dtype=torch.float64) / 7)
    save_adapter(path, stage.exits, SPECS, groups, base_model=str(model), backbone_sha256=HASH, steps=3)
    return model, path


def test_a_gate_travels_in_an_adapter(saved: tuple[Path, Path], load_stage: Any) -> None:
    model, path = saved
    adapter = open_adapter(path)
    assert adapter.exits == tuple(SPECS)
    assert {name for name in adapter.weights if ".gate." in name} == {"exits.2.gate.weight", "exits.2.gate.bias"}
    assert adapter.weights["exits.2.gate.weight"].dtype == torch.float32
    stage = load_stage(model, SPECS)
    load_exits(stage.exits, adapter, open_model(model))
    gate = stage.exits[0].gate
    assert torch.equal(torch.cat((gate.weight, gate.bias)), (torch.arange(len(gate.weight) + 1).double() / 7).float())
    assert stage.exits[1].gate is None
    trained = {id(parameter) for parameter, _ in trained_parts(stage.exits[0])}
    untrained = [s.names[0] for p, s in exit_saved_sources(stage.exits[0]) if id(p) not in trained]
    assert untrained == ["exits.2.gate.weight", "exits.2.gate.bias"]
    assert not gate.weight.requires_grad

    without = [dataclasses.replace(spec, gate=False) for spec in SPECS]
    plain = load_stage(model, without)
    load_exits(plain.exits, adapter, open_model(model))  # tuning goes on without the gate, which would be stale
    assert plain.exits[0].gate is None


def test_description_and_gate_must_agree(
    saved: tuple[Path, Path], load_stage: Any, groups: Any, tmp_path: Path
) -> None:
    stage = load_stage(saved[0], SPECS)
    wrong = [dataclasses.replace(spec, gate=not spec.gate) for spec in SPECS]
    save_adapter(tmp_path / "a", stage.exits, wrong, groups, base_model="", backbone_sha256=HASH, steps=0)
    with pytest.raises(CheckpointError, match="layer 2 is said to have no gate, but there is a gate"):
        open_adapter(tmp_path / "a")


def test_conversion(saved: tuple[Path, Path]) -> None:
    model, path = saved
    exits = open_contents(path)
    assert not [name for name in drop_exits(exits, [2]).exit_tensors if ".gate." in name]
    whole = merge_exits(open_contents(model), [exits], lambda: HASH)
    assert whole.exits == tuple(SPECS) and "exits.2.gate.bias" in whole.exit_tensors
    assert "exits.2.gate.bias" in change_heads(whole, {2: "own"}, 1).exit_tensors
    shared = change_heads(whole, {2: "shared"}, 1)
    assert "exits.2.gate.bias" not in shared.exit_tensors and not shared.exits[0].gate
    assert "the gate of the exit after layer 2 is removed" in shared.notes[-1]

    plain = shallow_model(whole, 2)
    assert "the gate of the exit after layer 2 is left out" in plain.notes[-1]
    assert not any("gate.bias" in name for name in plain.backbone) and not plain.exit_tensors
    assert not any("gate of" in note for note in shallow_model(whole, 3).notes)
    with pytest.raises(ConfigError, match="the exit after layer 1 has a gate, which needs data"):
        add_exits(whole, [ExitSpec(1, gate=True)], 1)
