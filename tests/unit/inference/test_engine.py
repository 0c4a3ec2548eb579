"""Early exit in the engine against one pass that computes everything anew, and what it leaves behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.loading import make_engine
from megatron_ee.inference.passes import Pass, ScheduledSequence
from megatron_ee.inference.policy import MAX_DEFERRED, MEASURES, ThresholdPolicy, backoff_length
from megatron_ee.inference.requests import Completion, Draft, Request, Token
from megatron_ee.inference.stage_runner import StageRunner, StageSequence

MakeStage = Callable[[str, Sequence[ExitSpec]], Stage]
EveryLogit = Callable[[Stage, Sequence[int]], dict[int, Tensor]]

PROMPT = [5, 17, 99, 42, 3, 77, 120]
LAYERS = 4
TOKENS = 40  # with the prompt past the windows (16) and past Llama 3's original positions (32)
NO_CAP = 255
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


def generate(stage: Stage, *requests: Request) -> list[Completion]:
    engine = make_engine(stage)
    return [completion for outputs in engine.generate(requests) for completion in outputs]


def threshold_request(policy: ThresholdPolicy, count: int = TOKENS, **fields: Any) -> Request:
    return Request(prompt=PROMPT, mode="threshold", policy=policy, max_tokens=count, **fields)


def ids_of(completion: Completion) -> list[int]:
    return [token.id for token in completion.tokens]


def must_emit(
    logits: dict[int, Tensor], prompt: int, count: int, policy: ThresholdPolicy
) -> list[tuple[int, int, float]]:
    """Token, layer and confidence at each position, decided from the logits of every head there."""
    found: list[tuple[int, int, float]] = []
    deferred = 0
    exits = sorted(logits)[:-1]
    stayed, rests = dict.fromkeys(exits, 0), dict.fromkeys(exits, 0)
    for emitted in range(count):
        at = prompt - 1 + emitted
        resting = [layer for layer in exits if rests[layer]]
        rests = {layer: max(0, left - 1) for layer, left in rests.items()}
        for layer in [*exits, LAYERS + 1]:
            final = layer == LAYERS + 1
            if not final and (emitted < policy.min_full or deferred >= policy.max_deferred or layer in resting):
                continue
            row = logits[layer][at]
            sure = float(MEASURES[policy.measure](row[None]))
            if final or policy.leaves(layer, sure):
                deferred = deferred + 1 if layer < LAYERS else 0
                found.append((int(row.argmax()), min(layer, LAYERS), sure))
                stayed[layer] = 0
                break
            stayed[layer] += 1
            rests[layer] = backoff_length(stayed[layer], policy.backoff)
    return found


def assert_emits(tokens: Sequence[Token], expected: Sequence[tuple[int, int, float]]) -> None:
    assert [(t.id, t.layer) for t in tokens] == [(token, layer) for token, layer, _ in expected]
    assert [t.confidence for t in tokens] == pytest.approx([sure for _, _, sure in expected], abs=1e-4)


def some_threshold(stage: Stage, measure: Any = "probability") -> float:
    """A threshold that about half of the tokens reach at the shallowest exit, and none all but exactly."""
    [everything] = generate(
        stage, threshold_request(ThresholdPolicy(threshold=1e-9, measure=measure, max_deferred=NO_CAP))
    )
    ordered = sorted(token.confidence for token in everything.tokens[1:])
    middle = ordered[len(ordered) // 3 : 2 * len(ordered) // 3]
    low, high = max(zip(middle, middle[1:], strict=False), key=lambda pair: pair[1] - pair[0])
    return (low + high) / 2


@pytest.mark.parametrize("bodies", BODIES)
@pytest.mark.parametrize("family", ["llama3.1", "mistral"])
def test_emits_what_computing_everything_anew_emits(
    family: str, bodies: str, exit_stage: MakeStage, every_logit: EveryLogit
) -> None:
    stage = exit_stage(family, BODIES[bodies])
    threshold = some_threshold(stage)
    for cap in (MAX_DEFERRED, 2):
        policy = ThresholdPolicy(threshold=threshold, max_deferred=cap, backoff=0)
        [ours] = generate(stage, threshold_request(policy))
        logits = every_logit(stage, [*PROMPT, *ids_of(ours)])
        assert_emits(ours.tokens, must_emit(logits, len(PROMPT), TOKENS, policy))
        layers = Counter(token.layer for token in ours.tokens)
        assert len(layers) > 1 and TOKENS - layers[LAYERS] > 5, f"too little happens: {layers}"


@pytest.mark.parametrize(
    "policy",
    [
        ThresholdPolicy(measure="margin"),
        ThresholdPolicy(measure="entropy"),
        ThresholdPolicy(thresholds={1: 1.5}),
        ThresholdPolicy(thresholds={1: 1e-9, 2: 1.5, 3: 1.5}),
        ThresholdPolicy(min_full=7),
        ThresholdPolicy(backoff=1),
        ThresholdPolicy(backoff=0),
        ThresholdPolicy(measure="margin", thresholds={2: 0.02}, min_full=3, max_deferred=3, backoff=2),
    ],
    ids=["margin", "entropy", "none at 1", "all at 1", "min_full", "impatient", "patient", "everything"],
)
def test_the_whole_policy_counts(policy: ThresholdPolicy, exit_stage: MakeStage, every_logit: EveryLogit) -> None:
    stage = exit_stage("llama3.1", BODIES["mixed"])
    threshold = some_threshold(stage, policy.measure)
    policy = policy.model_copy(update={"threshold": threshold})
    [ours] = generate(stage, threshold_request(policy))
    logits = every_logit(stage, [*PROMPT, *ids_of(ours)])
    assert_emits(ours.tokens, must_emit(logits, len(PROMPT), TOKENS, policy))
    layers = [token.layer for token in ours.tokens]
    assert len(set(layers)) > 1 and set(layers[: policy.min_full]) == {LAYERS}
    if policy.thresholds.get(1, 0) > 1:
        assert 1 not in layers


@pytest.mark.parametrize("exits", [(2,), (1, 3)])
def test_only_enabled_exits_are_asked(exits: tuple[int, ...], exit_stage: MakeStage, every_logit: EveryLogit) -> None:
    stage = exit_stage("llama2", BODIES["mixed"])
    policy = ThresholdPolicy(threshold=some_threshold(stage))
    [ours] = generate(stage, threshold_request(policy, exits=exits))
    logits = every_logit(stage, [*PROMPT, *ids_of(ours)])
    asked = {layer: logits[layer] for layer in (*exits, LAYERS + 1)}
    assert_emits(ours.tokens, must_emit(asked, len(PROMPT), TOKENS, policy))
    assert {token.layer for token in ours.tokens} >= {exits[0], LAYERS}


@pytest.mark.parametrize("mode", ["threshold", "full"])
def test_forced_ids_decide_on_a_given_text(mode: Any, exit_stage: MakeStage, every_logit: EveryLogit) -> None:
    stage = exit_stage("mistral", BODIES["mixed"])
    policy = ThresholdPolicy(threshold=some_threshold(stage), max_deferred=4)
    text = torch.randint(3, 131, (TOKENS,), generator=torch.Generator().manual_seed(5)).tolist()
    [ours] = generate(stage, Request(prompt=PROMPT, mode=mode, policy=policy, forced_ids=text, max_tokens=1000))
    logits = every_logit(stage, [*PROMPT, *text])
    if mode == "full":
        logits = {LAYERS + 1: logits[LAYERS + 1]}
    assert_emits(ours.tokens, must_emit(logits, len(PROMPT), TOKENS, policy))
    assert len(ours.tokens) == TOKENS and ids_of(ours) != text and ours.finish_reason == "length"
    [short] = generate(stage, Request(prompt=PROMPT, mode=mode, policy=policy, forced_ids=text, max_tokens=5))
    assert ids_of(short) == ids_of(ours)[:5]


def test_the_last_forced_token_may_follow_the_last_position(exit_stage: MakeStage, every_logit: EveryLogit) -> None:
    stage = exit_stage("llama2", BODIES["mixed"])
    positions = stage.setup.architecture.max_positions
    text = torch.randint(3, 131, (positions,), generator=torch.Generator().manual_seed(5)).tolist()
    count = positions - len(PROMPT) + 1
    [ours] = generate(stage, Request(prompt=PROMPT, forced_ids=text[:count], max_tokens=count, logprobs=0))
    scores = every_logit(stage, [*PROMPT, *text[: count - 1]])[LAYERS + 1][-1].log_softmax(-1)
    assert len(ours.tokens) == count and ours.finish_reason == "length" and ours.tokens[-1].logprobs is not None
    assert ours.tokens[-1].logprobs.forced == pytest.approx(float(scores[text[count - 1]]), abs=1e-4)
    [longer] = generate(stage, Request(prompt=PROMPT, forced_ids=text, max_tokens=positions))
    assert len(longer.tokens) == count and longer.finish_reason == "context"


@pytest.mark.parametrize("mode", ["threshold", "full"])
def test_forced_tokens_have_the_probability_of_the_exit_that_decides(
    mode: Any, exit_stage: MakeStage, every_logit: EveryLogit
) -> None:
    stage = exit_stage("mistral", BODIES["mixed"])
    policy = ThresholdPolicy(threshold=some_threshold(stage))
    text = torch.randint(3, 131, (TOKENS,), generator=torch.Generator().manual_seed(5)).tolist()
    request = Request(prompt=PROMPT, mode=mode, policy=policy, forced_ids=text, max_tokens=TOKENS)
    free = Request(prompt=PROMPT, max_tokens=TOKENS, logprobs=0)  # in the same passes
    ours, others = generate(stage, request.model_copy(update={"logprobs": 1}), free)
    logits = every_logit(stage, [*PROMPT, *text])
    assert len({token.layer for token in ours.tokens}) > (mode == "threshold")
    for place, (token, given) in enumerate(zip(ours.tokens, text, strict=True)):
        depth = LAYERS + 1 if token.layer == LAYERS else token.layer
        scores = logits[depth][len(PROMPT) + place - 1].log_softmax(-1)
        assert token.logprobs is not None
        assert token.logprobs.forced == pytest.approx(float(scores[given]), abs=1e-4)
        assert token.logprobs.emitted == pytest.approx(float(scores[token.id]), abs=1e-4)
    assert all(token.logprobs is not None and token.logprobs.forced is None for token in others.tokens)


def sequences_of(engine: Engine) -> dict[int, StageSequence]:
    runner: Any = engine._scheduler.stages[0]  # type: ignore[union-attr]
    return runner.sequences


def full_pass(stage: Stage, ids: Sequence[int]) -> StageSequence:
    """A sequence that has run all these tokens through all layers at once."""
    runner = StageRunner(stage, 0, len(ids))
    runner.open(1, len(ids))
    runner.run(Pass(0, LAYERS + 1, (ScheduledSequence(1, len(ids), tuple(ids)),)))
    return runner.sequences[1]


def assert_same_caches(row: StageSequence, reference: StageSequence) -> None:
    """What a sequence has kept is what a pass of all tokens has, 1e-5."""
    for kind in ("caches", "exit_caches"):
        for number, cache in getattr(row, kind).items():
            full = getattr(reference, kind)[number]
            assert full.first == 0
            for kept, theirs in zip(cache.kept(), full.kept(), strict=True):
                stop = min(cache.length, full.length)
                theirs = theirs[:, :, cache.first : stop]
                ours = kept[:, :, : stop - cache.first]
                assert ours.shape == theirs.shape and stop > cache.first
                assert (ours - theirs).abs().max() <= 1e-5, f"{kind} of layer {number}"


@pytest.mark.parametrize("mode", ["threshold", "speculative"])
@pytest.mark.parametrize("bodies", BODIES)
@pytest.mark.parametrize("family", [pytest.param("llama3.1", marks=pytest.mark.slow), "qwen2-window"])
def test_caches_are_those_of_a_pass_of_all_tokens_through_all_layers(
    family: str, bodies: str, mode: Any, exit_stage: MakeStage
) -> None:
    stage = exit_stage(family, BODIES[bodies])
    policy = ThresholdPolicy(threshold=some_threshold(stage))
    request = Request(prompt=PROMPT, mode=mode, policy=policy, draft=Draft(exit=None, length=3), max_tokens=TOKENS)
    engine = make_engine(stage)
    number = engine.submit(request)
    tokens: list[int] = []
    steps, whole, deferred = 0, 0, 0
    while len(tokens) < TOKENS - 1:
        before = len(tokens)
        tokens += [token.id for event in engine.step() for token in event.tokens]
        if len(tokens) in (before, TOKENS):
            continue
        steps += 1
        [row] = sequences_of(engine).values()
        settled = len(PROMPT) + len(tokens) - 1  # beyond lie proposals that fell
        deferred += bool(row.waiting)
        if not row.waiting:
            whole += 1
            assert {cache.length for cache in row.all_caches} == {settled}
        if steps % 6 == 1 or len(tokens) == TOKENS - 1:
            assert_same_caches(row, full_pass(stage, [*PROMPT, *tokens][:settled]))
    assert whole > 2 and (deferred > 2 or mode == "speculative" or max(e.spec.layer for e in stage.exits) == LAYERS)
    engine.cancel(number)
    assert not sequences_of(engine)


@pytest.mark.parametrize("mode", ["threshold", "speculative"])
@pytest.mark.parametrize("bodies", BODIES)
def test_no_layer_runs_a_token_twice(bodies: str, mode: Any, exit_stage: MakeStage) -> None:
    stage = exit_stage("llama3.1", BODIES[bodies])
    request = threshold_request(ThresholdPolicy(threshold=some_threshold(stage)))
    if mode == "speculative":
        request = Request(
            prompt=PROMPT, mode=mode, draft=Draft(exit=stage.exits[0].spec.layer, length=3), max_tokens=TOKENS
        )
    ran: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        return lambda _module, args, _output: ran.update({name: len(args[0])})

    handles = []
    for number, layer in stage.backbone.numbered_layers():
        handles.append(layer.attention.register_forward_hook(count(f"attention {number}")))
        handles.append(layer.mlp.register_forward_hook(count(f"mlp {number}")))
    for exit_ in stage.exits:
        if exit_.windows:
            handles.append(exit_.body.layer.attention.register_forward_hook(count(f"exit {exit_.spec.layer}")))
            handles.append(exit_.body.layer.mlp.register_forward_hook(count(f"asked {exit_.spec.layer}")))
    try:
        [completion] = generate(stage, request)
    finally:
        for handle in handles:
            handle.remove()

    figures = completion.statistics
    fell = figures["proposed"] - figures["accepted"]
    lengths = [ran[f"attention {number}"] for number in range(1, LAYERS + 1)]
    assert lengths == sorted(lengths, reverse=True)
    if mode == "threshold":
        assert lengths[0] == len(PROMPT) + TOKENS - 1  # the last token is not run
        # Those still deferred are the tokens since the last one that ran all layers.
        since = 0
        for token in completion.tokens[1:]:
            since = 0 if token.layer == LAYERS else since + 1
        assert lengths[0] - lengths[-1] == since == figures["deferred_tokens"]
    else:  # no token twice but where a proposal fell, or came after one that did
        assert fell > 0 and lengths[0] == lengths[-1]
        most = len(PROMPT) + TOKENS - 1 + 3 * figures["rounds"]
        assert len(PROMPT) + TOKENS - 1 + fell <= lengths[0] <= most
    assert all(ran[f"mlp {number}"] <= lengths[number - 1] for number in range(1, LAYERS + 1))
    own = [exit_.spec.layer for exit_ in stage.exits if exit_.windows]
    assert all(ran[f"exit {layer}"] == lengths[layer - 1] for layer in own)
    later = sum(lengths) + sum(ran[f"asked {layer}"] for layer in own) - len(PROMPT) * LAYERS
    assert figures["layers_per_token"] == pytest.approx(later / (TOKENS - 1))


@pytest.mark.parametrize("cap", [0, 1, 3, MAX_DEFERRED])
def test_max_deferred_forces_a_full_pass(cap: int, exit_stage: MakeStage) -> None:
    stage = exit_stage("llama2", BODIES["mixed"])
    engine = make_engine(stage)
    number = engine.submit(threshold_request(ThresholdPolicy(threshold=1e-9, max_deferred=cap), 20))
    layers = []
    for event in engine.stream(number):
        layers += [token.layer for token in event.tokens]
        for row in sequences_of(engine).values():
            assert sum(len(tap) for taps in row.waiting.values() for tap in taps) <= cap
    assert layers == ([LAYERS, *[1] * cap] * 20)[:20]


def test_heads_are_computed_for_one_position_and_only_while_asked(
    exit_stage: MakeStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_ee.exits.head import ExitHead

    seen: list[tuple[str, int]] = []

    def record(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def recording(self: Any, z: Tensor) -> Tensor:
            seen.append((name, len(z)))
            return original(self, z)  # type: ignore[no-any-return]

        monkeypatch.setattr(owner, name, recording)

    record(ExitHead, "logits")
    record(Stage, "final_logits")
    stage = exit_stage("llama2", BODIES["mixed"])

    def heads_of(count: int, **fields: Any) -> list[tuple[str, int]]:
        seen.clear()
        generate(stage, Request(prompt=PROMPT, max_tokens=count, **fields))
        return list(seen)

    def threshold(policy: ThresholdPolicy) -> dict[str, Any]:
        return {"mode": "threshold", "policy": policy}

    one, final = ("logits", 1), ("final_logits", 1)
    assert heads_of(3) == [final] * 3  # full mode, of which the first is the prompt's
    assert heads_of(3, **threshold(ThresholdPolicy(threshold=2.0))) == [final, *[one, one, one, final] * 2]
    assert heads_of(3, **threshold(ThresholdPolicy(threshold=2.0)), exits=(2,)) == [final, *[one, final] * 2]
    assert heads_of(5, **threshold(ThresholdPolicy(threshold=1e-9, max_deferred=1))) == [final, one, final, one, final]
    assert heads_of(3, **threshold(ThresholdPolicy(threshold=1e-9, min_full=2))) == [final, final, one]
    # Asked, asked, not, asked, and then not for three tokens.
    impatient = threshold(ThresholdPolicy(threshold=2.0, backoff=2))
    asked = [(one, final), (one, final), (final,), (one, final), (final,), (final,), (final,), (one, final)]
    assert heads_of(9, **impatient, exits=(2,)) == [final, *(head for heads in asked for head in heads)]
    drafted = heads_of(5, mode="speculative", draft=Draft(exit=2, length=3))
    assert drafted[:5] == [final, one, one, one, ("final_logits", 4)]


def test_prefill_never_exits(exit_stage: MakeStage) -> None:
    stage = exit_stage("llama2", BODIES["norm"])
    [completion] = generate(stage, threshold_request(ThresholdPolicy(threshold=1e-9), 5))
    assert [token.layer for token in completion.tokens] == [LAYERS, 1, 1, 1, 1]


@pytest.mark.parametrize("chunk", [3, 5, 64])
def test_prompts_may_run_in_parts(chunk: int, exit_stage: MakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron_ee.inference.scheduler as scheduler

    stage = exit_stage("qwen2-window", BODIES["mixed"])
    policy = ThresholdPolicy(threshold=some_threshold(stage))
    prompt = torch.randint(3, 131, (50,), generator=torch.Generator().manual_seed(1)).tolist()
    requests = [
        Request(prompt=prompt, max_tokens=6, logprobs=0),
        Request(prompt=prompt[:11], mode="threshold", policy=policy, max_tokens=12),
        Request(prompt=prompt[:30], mode="speculative", draft=Draft(exit=2, length=2), max_tokens=12),
    ]
    whole = generate(stage, *requests)
    monkeypatch.setattr(scheduler, "PASS_TOKENS", chunk)
    parts = generate(stage, *requests)
    for ours, theirs in zip(parts, whole, strict=True):
        assert_emits(ours.tokens, [(t.id, t.layer, t.confidence) for t in theirs.tokens])


def test_bfloat16_runs(saved_model: Any, load_stage: Any) -> None:
    stage = load_stage(saved_model("qwen3")[0], BODIES["mixed"], dtype=torch.bfloat16)
    for mode in ("threshold", "speculative"):
        [completion] = generate(
            stage, Request(prompt=PROMPT, mode=mode, policy=ThresholdPolicy(threshold=0.02), max_tokens=TOKENS)
        )
        assert len(completion.tokens) == TOKENS and all(0 <= token.id < 131 for token in completion.tokens)
