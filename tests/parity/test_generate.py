"""Greedy decoding equals transformers' ``generate``, token for token: in full mode, and while every exit is asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_ee.inference.decoder import Row, decode
from torch import Tensor

from megatron_ee.config.exits import ExitSpec
from megatron_ee.inference.policy import ExitPolicy
from megatron_ee.model.stage import Stage
from megatron_ee.testing.models import FAMILIES, tiny_model

Lively = Callable[[str], tuple[Path, Any]]
LoadStage = Callable[..., Stage]

EXITS = [ExitSpec(1), ExitSpec(2, "layer", "shared"), ExitSpec(3, "norm", "low_rank", rank=4), ExitSpec(4, "embedding")]
NEW = 40
NEVER = 10_000  # no such token: transformers takes None as the configuration's
LENGTHS = (1, 12, 30)  # with what is generated all go past the windows (16) and Llama 3's original positions (32)


@pytest.fixture(scope="module")
def lively_model(tmp_path_factory: pytest.TempPathFactory) -> Lively:
    """Gives a tiny model of a family, as a directory and as transformers', whose sharp attention keeps it from saying
    one token over and over, as random models do."""
    made: dict[str, tuple[Path, Any]] = {}

    def make(family: str) -> tuple[Path, Any]:
        if family not in made:
            model = tiny_model(family, seed=2)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("q_norm.weight" if family == "qwen3" else "q_proj.weight"):
                        parameter *= 10
                    elif name.endswith(("o_proj.weight", "down_proj.weight")):
                        parameter *= 2
            path = tmp_path_factory.mktemp(family)
            model.save_pretrained(path)
            made[family] = path, model
        return made[family]

    return make


def prompt_of(length: int) -> list[int]:
    tokens: Tensor = torch.randint(3, 131, (length,), generator=torch.Generator().manual_seed(length))
    return tokens.tolist()


@torch.no_grad()
def transformers_greedy(model: Any, prompt: list[int], eos: int | list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
    )
    result: list[int] = output[0, len(prompt) :].tolist()
    return result


def ours(stage: Stage, prompt: list[int], policy: ExitPolicy | None, eos: tuple[int, ...] = ()) -> list[int]:
    row = Row(stage, stage.setup.architecture.max_positions)
    emitted = list(decode(stage, row, prompt, policy, eos, NEW))
    assert {e.layer for e in emitted} == {stage.setup.architecture.num_layers}
    assert row.deferred == 0
    return [e.token for e in emitted]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy(family: str, lively_model: Lively, load_stage: LoadStage) -> None:
    path, model = lively_model(family)
    bare, with_exits = load_stage(path), load_stage(path, EXITS)
    variety = 0
    for length in LENGTHS:
        prompt = prompt_of(length)
        theirs = transformers_greedy(model, prompt, NEVER)
        assert len(theirs) == NEW
        assert ours(bare, prompt, None) == theirs
        assert ours(with_exits, prompt, ExitPolicy(1.5)) == theirs
        assert ours(with_exits, prompt, ExitPolicy(1.5, max_deferred=0)) == theirs
        variety = max(variety, len(set(theirs)))
    assert variety > 10, "a model that repeats itself shows little"


@pytest.mark.parametrize("several", [False, True])
def test_end_of_text(several: bool, lively_model: Lively, load_stage: LoadStage) -> None:
    path, model = lively_model("llama3.1")
    prompt = prompt_of(12)
    free = transformers_greedy(model, prompt, NEVER)
    first = next(i for i in range(4, NEW) if free[i] not in free[:i])
    unused = next(token for token in range(131) if token not in free)
    eos = [unused, free[first]] if several else [free[first]]
    theirs = transformers_greedy(model, prompt, eos if several else eos[0])
    assert theirs == free[: first + 1]
    assert ours(load_stage(path), prompt, None, tuple(eos)) == theirs
