"""Compiled layers: the same tokens as eager ones, wherever they stand in for them."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from megatron_ee import platform
from megatron_ee.config.exits import ExitSpec
from megatron_ee.errors import ConfigError
from megatron_ee.exits.stage import Stage
from megatron_ee.families.registry import read_architecture
from megatron_ee.inference import kv_cache
from megatron_ee.inference.compiled import CompiledStage, check_compiler, compile_stage
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.kv_cache import Extent, LayerKV
from megatron_ee.inference.loading import make_engine
from megatron_ee.inference.policy import ThresholdPolicy
from megatron_ee.inference.requests import Draft, Request

MakeStage = Callable[[str, Sequence[ExitSpec]], Stage]

PROMPTS = [[5, 17, 99, 42, 3, 77, 120], [9]]
MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "threshold": {"mode": "threshold", "policy": ThresholdPolicy(threshold=0.3, backoff=0)},
    "speculative": {"mode": "speculative", "draft": Draft(exit=2, length=3)},
}


@pytest.fixture(scope="module")
def stage(exit_stage: MakeStage) -> Stage:
    """With a window in two of its four layers, and an exit that reads between the halves of its layer."""
    return exit_stage("qwen2-window", [ExitSpec(2)])


class Watched:
    """A compiled stage, and how often each part was asked for.

    Attributes:
        seen: start, stop, tokens, whether it took the work.
    """

    def __init__(self, stage: CompiledStage) -> None:
        self.stage = stage
        self.seen = Counter[tuple[int, int, int, bool]]()

    def run(self, start: int, stop: int, x: torch.Tensor, *rest: Any) -> Any:
        done = self.stage.run(start, stop, x, *rest)
        self.seen[start, stop, len(x), done is not None] += 1
        return done


def engine_with(stage: Stage, compiled: Any) -> Engine:
    """An engine with layers that are compiled already, or with eager ones."""
    engine = make_engine(stage)
    scheduler: Any = engine._scheduler
    scheduler.stages[0].compiled = compiled
    return engine


def answer(stage: Stage, watched: Any, *requests: Request) -> Any:
    """Tokens and their layers."""
    if watched is not None:
        watched.seen.clear()
    outputs = engine_with(stage, watched).generate(requests)
    return [[(token.id, token.layer) for token in one.tokens] for each in outputs for one in each]


@pytest.mark.slow
@pytest.mark.skipif(
    not platform.has_accelerator() and shutil.which("g++") is None, reason="compiling needs a C++ compiler"
)
def test_compiled_layers_are_the_eager_ones(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test, since what it compiles takes a minute or two."""
    from torch import _dynamo

    with _dynamo.config.patch(recompile_limit=_dynamo.config.recompile_limit):  # which compiling raises
        done = _dynamo.utils.counters
        done.clear()
        watched = Watched(compile_stage(stage))
        assert done["aot_autograd"]["total"] == done["stats"]["unique_graphs"] > 0  # nothing was traced twice
        for mode in MODES:
            for prompt in PROMPTS:
                check_mode(mode, prompt, stage, watched)
        check_caches(stage, watched)
        check_several_sequences(stage, watched)
        check_growth(stage, watched, monkeypatch)
    torch.compiler.reset()


def check_mode(mode: str, prompt: list[int], stage: Stage, watched: Watched) -> None:
    request = Request(prompt=prompt, max_tokens=40, **MODES[mode])
    assert answer(stage, watched, request) == answer(stage, None, request)
    taken = Counter({key[:3]: count for key, count in watched.seen.items() if key[3]})
    left = Counter({key[:3]: count for key, count in watched.seen.items() if not key[3]})
    # Left is the prompt, for which there is no room yet, and tokens that a window hides something from.
    window = min(layer.attention.window or 10**6 for _, layer in stage.backbone.numbered_layers())
    assert taken[0, 2, 1] > 0 and window < len(prompt) + 40 and left.total() > 0
    assert any(tokens > 1 for _, _, tokens in taken) == (mode != "full")
    if mode == "full":
        assert taken[0, 2, 1] + left[0, 2, 1] == (39 if len(prompt) > 1 else 40)


def check_caches(stage: Stage, watched: Watched) -> None:
    caches = {}
    for name, compiled in (("compiled", watched), ("eager", None)):
        engine = engine_with(stage, compiled)
        engine.submit(Request(prompt=PROMPTS[0], max_tokens=6, ignore_eos=True))
        for _ in range(4):
            engine.step()
        scheduler: Any = engine._scheduler
        (row,) = scheduler.stages[0].sequences.values()
        caches[name] = [cache.kept() for cache in row.all_caches]
        engine.close()
    for ours, theirs in zip(caches["compiled"], caches["eager"], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def check_several_sequences(stage: Stage, watched: Watched) -> None:
    """They run eagerly; the last tokens of the longest one are alone, and compiled."""
    requests = [Request(prompt=prompt, max_tokens=8, ignore_eos=True) for prompt in PROMPTS]
    longest = requests[0].model_copy(update={"max_tokens": 12})
    assert answer(stage, watched, *requests, longest) == answer(stage, None, *requests, longest)
    assert 0 < sum(count for (place, *_, taken), count in watched.seen.items() if taken and place == 0) <= 4
    mixed = [
        Request(prompt=prompt, max_tokens=16, ignore_eos=True, **mode) for prompt in PROMPTS for mode in MODES.values()
    ]
    assert answer(stage, watched, *mixed) == answer(stage, None, *mixed)


def check_growth(stage: Stage, watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(prompt=PROMPTS[1], max_tokens=14, ignore_eos=True)
    expected = answer(stage, None, request)
    monkeypatch.setattr(kv_cache, "CHUNK", 4)
    assert answer(stage, watched, request) == expected
    # Where a chunk is full, or about to be, the eager layers make room.
    assert watched.seen[0, 2, 1, True] > 0 and watched.seen[0, 2, 1, False] >= 6


def test_room() -> None:
    cache = LayerKV(Extent(limit=20, window=6))
    assert cache.room(1) is None  # nothing is there yet
    key = torch.zeros(4, 2, 8)
    cache.extend(key, key)
    found = cache.room(2)
    assert found is not None and found[0].shape == found[1].shape == (1, 2, 20, 8)
    assert cache.room(3) is None  # its first position would be hidden from the last token
    cache = LayerKV(Extent(limit=6))
    cache.extend(key, key)
    assert cache.room(1) is not None and cache.room(2) is None


def test_refused_before_anything_is_loaded(saved_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, capped = (read_architecture(saved_model(family)[0]) for family in ("llama2", "gemma2"))
    with pytest.raises(ConfigError, match=r"^compile: .* with a soft cap; leave it out$"):
        check_compiler(capped, 1)
    with pytest.raises(ConfigError, match=r"^compile: not supported with tensor parallelism \(2 ranks\)"):
        check_compiler(plain, 2)
    monkeypatch.setattr(platform, "has_accelerator", lambda: False)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(ConfigError, match="^compile: on a CPU it needs a C.. compiler, and there is no /nowhere"):
        check_compiler(plain, 1)
    monkeypatch.setattr(platform, "has_accelerator", lambda: True)
    check_compiler(plain, 1)


def test_what_cannot_be_compiled_is_one_line(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        def call(*_: Any) -> None:
            raise RuntimeError("\nCppCompileError: C++ compile error\nmany\nmore")

        return call

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(ConfigError, match=r"^compile: .* \(CppCompileError: C\+\+ compile error\); leave it out$"):
        compile_stage(stage)
