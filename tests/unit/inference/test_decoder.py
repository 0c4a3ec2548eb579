"""Decoding with early exits against one that computes everything anew for each token, and what it leaves behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from megatron_ee import platform
from megatron_ee.config.exits import ExitSpec
from megatron_ee.inference.decoder import Emitted, Row, decode, run_pass
from megatron_ee.inference.policy import MAX_DEFERRED, ExitPolicy
from megatron_ee.model.stage import Stage

MakeStage = Callable[[str, Sequence[ExitSpec]], Stage]

PROMPT = [5, 17, 99, 42, 3, 77, 120]
LAYERS = 4
TOKENS = 40  # with the prompt past the windows (16) and past Llama 3's original positions (32)
BODIES = {
    "mlp": [ExitSpec(1), ExitSpec(2), ExitSpec(3)],
    "norm": [ExitSpec(1, "norm"), ExitSpec(2, "norm"), ExitSpec(3, "norm")],
    "embedding": [ExitSpec(1, "embedding"), ExitSpec(3, "embedding")],
    "layer": [ExitSpec(1, "layer"), ExitSpec(2, "layer"), ExitSpec(3, "layer")],
    "mixed": [ExitSpec(1, "layer"), ExitSpec(2), ExitSpec(3, "norm")],
    "heads": [ExitSpec(1, "mlp", "low_rank", rank=4), ExitSpec(2, "layer", "shared"), ExitSpec(3, "norm", "low_rank")],
    "mlp at the last layer": [ExitSpec(2, "norm"), ExitSpec(4)],
    "layer at the last layer": [ExitSpec(2), ExitSpec(4, "layer")],
}


def row_of(stage: Stage) -> Row:
    return Row(stage, stage.setup.architecture.max_positions)


def tokens_of(ids: Sequence[int]) -> torch.Tensor:
    return torch.tensor([list(ids)], device=platform.device())


@torch.no_grad()
def from_scratch(stage: Stage, prompt: Sequence[int], threshold: float, cap: int, count: int) -> list[Emitted]:
    """What must be emitted: every token through every layer again, without cache or deferral."""
    ids, emitted, deferred = list(prompt), [], 0
    labels = torch.zeros(1, dtype=torch.int64, device=platform.device())
    for step in range(count):
        positions = stage.backbone.positions(0, len(ids))
        h, taps = stage.run_layers(stage.backbone.embed(tokens_of(ids)), positions, to_end=True)
        stats = stage.final_statistics(h[-1:], labels)
        best = Emitted(int(stats.top1), LAYERS, float(stats.confidence))
        for exit_ in stage.exits if step > 0 and deferred < cap else []:
            logits = exit_.logits(exit_.features(taps[exit_.spec.layer], positions)[-1, 0])
            confidence, token = logits.softmax(-1).max(-1)
            if confidence >= threshold:
                best = Emitted(int(token), exit_.spec.layer, float(confidence))
                break
        deferred = 0 if best.layer == LAYERS else deferred + 1
        emitted.append(best)
        ids.append(best.token)
    return emitted


def some_threshold(stage: Stage) -> float:
    """A threshold that about half of the tokens reach at the shallowest exit, and none all but exactly."""
    everything = from_scratch(stage, PROMPT, 0.0, TOKENS, TOKENS)[1:]
    ordered = sorted(emitted.confidence for emitted in everything)
    middle = ordered[len(ordered) // 3 : 2 * len(ordered) // 3]
    low, high = max(zip(middle, middle[1:], strict=False), key=lambda pair: pair[1] - pair[0])
    return (low + high) / 2


def assert_same(ours: Sequence[Emitted], theirs: Sequence[Emitted]) -> None:
    assert [(e.token, e.layer) for e in ours] == [(e.token, e.layer) for e in theirs]
    assert [e.confidence for e in ours] == pytest.approx([e.confidence for e in theirs], abs=1e-4)


@pytest.mark.parametrize("cap", [MAX_DEFERRED, 2])
@pytest.mark.parametrize("bodies", BODIES)
@pytest.mark.parametrize("family", ["llama3.1", "mistral", "qwen3"])
def test_emits_what_computing_everything_anew_emits(family: str, bodies: str, cap: int, exit_stage: MakeStage) -> None:
    stage = exit_stage(family, BODIES[bodies])
    threshold = some_threshold(stage)
    ours = list(decode(stage, row_of(stage), PROMPT, ExitPolicy(threshold, cap), (), TOKENS))
    assert_same(ours, from_scratch(stage, PROMPT, threshold, cap, TOKENS))
    layers = Counter(e.layer for e in ours)
    assert len(layers) > 1 and TOKENS - layers[LAYERS] > 5, f"too little happens: {layers}"


@pytest.mark.parametrize("bodies", BODIES)
@pytest.mark.parametrize("family", ["llama3.1", "qwen2-window"])
def test_caches_are_those_of_a_pass_of_all_tokens_through_all_layers(
    family: str, bodies: str, exit_stage: MakeStage
) -> None:
    stage = exit_stage(family, BODIES[bodies])
    row = row_of(stage)
    emitted = list(decode(stage, row, PROMPT, ExitPolicy(some_threshold(stage)), (), TOKENS))
    ids = [*PROMPT, *(e.token for e in emitted)]
    reference = row_of(stage)
    run_pass(stage, reference, tokens_of(ids))

    def compare(*, whole: bool) -> None:
        for kind in ("caches", "exit_caches"):
            for number, cache in getattr(row, kind).items():
                if whole:
                    assert cache.length == len(ids)
                for ours, theirs in zip(cache.kept(), getattr(reference, kind)[number].kept(), strict=True):
                    difference = (ours - theirs[:, :, : cache.length]).abs().max()
                    assert difference <= 1e-5, f"{kind} of layer {number}"

    compare(whole=False)
    run_pass(stage, row, tokens_of(ids[-1:]))  # takes along whatever is deferred
    assert row.deferred == 0 and not row.taps
    compare(whole=True)


@pytest.mark.parametrize("bodies", BODIES)
def test_no_layer_runs_a_token_twice(bodies: str, exit_stage: MakeStage) -> None:
    stage = exit_stage("llama3.1", BODIES[bodies])
    policy = ExitPolicy(some_threshold(stage))
    ran: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        return lambda _module, args, _output: ran.update({name: len(args[0])})

    handles = []
    for number, layer in stage.backbone.numbered_layers():
        handles.append(layer.attention.register_forward_hook(count(f"attention {number}")))
        handles.append(layer.mlp.register_forward_hook(count(f"mlp {number}")))
    for exit_ in stage.exits:
        if exit_.layer is not None:
            handles.append(exit_.layer.attention.register_forward_hook(count(f"exit {exit_.spec.layer}")))
    row = row_of(stage)
    try:
        emitted = list(decode(stage, row, PROMPT, policy, (), TOKENS))
    finally:
        for handle in handles:
            handle.remove()

    assert row.length == len(PROMPT) + TOKENS - 1  # the last token is not run
    lengths = [row.caches[number].length for number in range(1, LAYERS + 1)]
    assert lengths == [ran[f"attention {number}"] for number in range(1, LAYERS + 1)]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] == row.length
    assert row.length - lengths[-1] == row.deferred
    assert all(ran[f"mlp {number}"] <= lengths[number - 1] for number in range(1, LAYERS + 1))
    for number, cache in row.exit_caches.items():
        assert ran[f"exit {number}"] == cache.length == lengths[number - 1]
    # Those still deferred are the tokens since the last that the final exit emitted.
    since = 0
    for e in emitted[1:]:
        since = 0 if e.layer == LAYERS else since + 1
    assert row.deferred == since


@pytest.mark.parametrize("cap", [0, 1, 3, MAX_DEFERRED])
def test_cap_forces_a_full_pass(cap: int, exit_stage: MakeStage) -> None:
    stage = exit_stage("llama2", BODIES["mixed"])
    row, layers = row_of(stage), []
    for emitted in decode(stage, row, PROMPT, ExitPolicy(1e-9, cap), (), 20):
        layers.append(emitted.layer)
        assert row.deferred <= cap
    assert layers == ([LAYERS, *[1] * cap] * 20)[:20]


def test_heads_are_computed_for_one_position_and_only_while_asked(
    exit_stage: MakeStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    import megatron_ee.model.exits as exits
    import megatron_ee.model.stage as stages

    seen: list[tuple[int, ...]] = []
    original = exits.exit_statistics

    def recording(z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(z.shape))
        return original(z, *args, **kwargs)

    monkeypatch.setattr(exits, "exit_statistics", recording)
    monkeypatch.setattr(stages, "exit_statistics", recording)
    stage = exit_stage("llama2", BODIES["mixed"])
    row = row_of(stage)
    one = (1, stage.setup.architecture.hidden_size)
    run_pass(stage, row, tokens_of(PROMPT))
    assert seen == [one]  # prefill: the final exit
    run_pass(stage, row, tokens_of([1]), ExitPolicy(2.0))
    assert seen[1:] == [one] * 4
    run_pass(stage, row, tokens_of([1]), ExitPolicy(1e-9, 1))
    assert seen[5:] == [one]  # the first exit was enough
    run_pass(stage, row, tokens_of([1]), ExitPolicy(1e-9, 1))
    assert seen[6:] == [one]  # the cap: the final exit alone


def test_prefill_never_exits(exit_stage: MakeStage) -> None:
    stage = exit_stage("llama2", BODIES["norm"])
    row = row_of(stage)
    first = next(decode(stage, row, PROMPT, ExitPolicy(1e-9), (), 5))
    assert first.layer == LAYERS and row.deferred == 0


def test_end_of_text_stops_and_is_emitted(exit_stage: MakeStage) -> None:
    stage = exit_stage("llama2", BODIES["mlp"])
    policy = ExitPolicy(some_threshold(stage))
    free = [e.token for e in decode(stage, row_of(stage), PROMPT, policy, (), TOKENS)]
    stop = next(i for i in range(3, TOKENS) if free[i] not in free[:i])
    for eos in ({free[stop]}, frozenset([130, free[stop]])):
        assert [e.token for e in decode(stage, row_of(stage), PROMPT, policy, eos, TOKENS)] == free[: stop + 1]
    assert [e.token for e in decode(stage, row_of(stage), PROMPT, policy, {free[0]}, TOKENS)] == free[:1]
    assert [e.token for e in decode(stage, row_of(stage), PROMPT, policy, (), 1)] == free[:1]


def test_bfloat16_runs(saved_model: Any, load_stage: Any) -> None:
    stage = load_stage(saved_model("qwen3")[0], BODIES["mixed"], dtype=torch.bfloat16)
    emitted = list(decode(stage, row_of(stage), PROMPT, ExitPolicy(0.02), (), TOKENS))
    assert len(emitted) == TOKENS and all(0 <= e.token < 131 for e in emitted)
