"""Greedy decoding equals transformers' ``generate``, token for token: full, while exits are asked, and drafting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.loading import make_engine
from megatron_ee.inference.policy import ThresholdPolicy
from megatron_ee.inference.requests import Draft, Request
from megatron_ee.testing.models import FAMILIES, sharpen, tiny_model

Lively = Callable[[str], tuple[Path, Any]]
LoadStage = Callable[..., Stage]

EXITS = [ExitSpec(1), ExitSpec(2, "layer", "shared"), ExitSpec(3, "norm", "low_rank", rank=4), ExitSpec(4, "embedding")]
NEW = 32
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
            sharpen(model)
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


def ours(stage: Stage, requests: Sequence[Request], **options: Any) -> list[list[int]]:
    engine = make_engine(stage, **options)
    return [[token.id for token in outputs[0].tokens] for outputs in engine.generate(requests)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy(family: str, lively_model: Lively, load_stage: LoadStage) -> None:
    path, model = lively_model(family)
    bare, with_exits = load_stage(path), load_stage(path, EXITS)
    prompts = [prompt_of(length) for length in LENGTHS]
    theirs = [transformers_greedy(model, prompt, NEVER) for prompt in prompts]
    assert {len(tokens) for tokens in theirs} == {NEW}
    assert max(len(set(tokens)) for tokens in theirs) > 10, "a model that repeats itself shows little"
    thorough = family == "llama3.1"  # what a family does not change: single requests, and how the others draft
    kinds: dict[str, dict[str, Any]] = {
        "full": {},
        "threshold": {"mode": "threshold", "policy": ThresholdPolicy(threshold=1.5)},
        **{
            f"exit {layer}": {"mode": "speculative", "draft": Draft(exit=layer, length=3)}
            for layer in ((1, 2, 3) if thorough else (2,))
        },
    }
    for kind, fields in kinds.items():
        requests = [Request(prompt=prompt, max_tokens=NEW, **fields) for prompt in prompts]
        assert ours(with_exits, requests) == theirs, f"{kind}, as one batch"
        if thorough:
            assert [ours(with_exits, [request])[0] for request in requests] == theirs, f"{kind}, one by one"
    assert ours(bare, [Request(prompt=prompt, max_tokens=NEW) for prompt in prompts]) == theirs


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
    stage = load_stage(path, EXITS)
    for fields in ({}, {"mode": "speculative", "draft": Draft(exit=3, length=4)}):
        assert ours(stage, [Request(prompt=prompt, max_tokens=NEW, **fields)], eos=eos) == [theirs]
