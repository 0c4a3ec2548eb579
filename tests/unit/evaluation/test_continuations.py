"""Continuations of prompts: what ends their generation, and which cached ones are used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.errors import Interrupted
from megatron_ee.evaluation.continuations import continuations
from megatron_ee.model.setup import build_setup
from megatron_ee.tuning.full_model import FullModel
from megatron_ee.tuning.interrupt import Interrupt

PROMPTS = [(5, 6, 7), (8, 9)]


@pytest.fixture
def full(saved_model: Any, groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], FullModel]:
    monkeypatch.setenv("MEGATRON_EE_CACHE", str(tmp_path))
    model = open_model(saved_model("llama2")[0])
    setup = build_setup(model.architecture, torch.float32, groups)
    return lambda: FullModel(setup, model, Interrupt())


def test_a_signal_ends_generation_and_nothing_is_cached(full: Callable[[], FullModel], tmp_path: Path) -> None:
    model = full()
    assert model.stage is not None  # loaded before the signal
    model.interrupt.name = "SIGTERM"
    with pytest.raises(Interrupted):
        continuations(model, "digest", PROMPTS, 5, frozenset())
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    "damage",
    ["{", "[]", '{"continuations": [[1]]}', '{"continuations": [[1], [-1]]}', '{"continuations": [[1], [1, 1, 1, 1]]}'],
)
def test_a_damaged_cache_is_not_used(damage: str, full: Callable[[], FullModel], tmp_path: Path) -> None:
    found = continuations(full(), "digest", PROMPTS, 3, frozenset())
    assert [each.prompt for each in found] == PROMPTS and all(len(each.tokens) <= each.limit == 3 for each in found)
    (cache,) = tmp_path.rglob("*.json")
    assert json.loads(cache.read_text())["continuations"] == [list(each.tokens) for each in found]
    cache.write_text(damage)
    assert continuations(full(), "digest", PROMPTS, 3, frozenset()) == found


@pytest.mark.parametrize("change", [{"digest": "other"}, {"limit": 4}, {"prompts": [(5, 6), (8, 9)]}, {"eos": {3}}])
def test_what_decides_the_result_is_in_the_key(change: Any, full: Callable[[], FullModel], tmp_path: Path) -> None:
    before: dict[str, Any] = {"digest": "digest", "prompts": PROMPTS, "limit": 3, "eos": frozenset()}
    continuations(full(), **before)
    continuations(full(), **{**before, **change})
    assert len(list(tmp_path.rglob("*.json"))) == 2
