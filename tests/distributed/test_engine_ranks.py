"""The engine over tensor-parallel ranks and stages gives what one process gives: every mode, one by one and batched."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from megatron_ee import platform
from megatron_ee.config.exits import ExitSpec
from megatron_ee.inference import kv_cache, kv_cache_manager, scheduler
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.loading import engine_on_ranks
from megatron_ee.inference.options import EngineOptions
from megatron_ee.inference.policy import MEASURES, POLICIES, ExitHistory, ExitPolicy, GatePolicy, ThresholdPolicy
from megatron_ee.inference.replay import ExitReplay
from megatron_ee.inference.requests import Completion, Draft, Event, Request
from megatron_ee.inference.sampling import Sampling
from megatron_ee.parallel.groups import process_groups
from megatron_ee.parallel.layout import even_layout
from megatron_ee.testing.models import save_tiny_model
from megatron_ee.testing.project import Project
from megatron_ee.testing.ranks import run_command, run_ranks

SPECS = [
    ExitSpec(1, gate=True),
    ExitSpec(2, "layer", "shared", gate=True),
    ExitSpec(3, "norm", "low_rank", rank=4, gate=True),
    ExitSpec(4, gate=True),
]
PROMPTS = [[5, 17, 99, 42, 3, 77, 120], [9, 8, 7], [30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40], [64]]
DRAWN = Sampling(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1, seed=3)


class RunOut(ExitPolicy):
    """A policy that the package does not know: each output asks one exit only, and leaves there but for every third
    token and where the head is all too sure."""

    name: Literal["run_out"] = "run_out"
    exit: int

    def exits_to_ask(self, exits: tuple[int, ...], index: int, history: ExitHistory) -> tuple[int, ...]:
        return () if index % 3 == 0 else (self.exit,)

    def leaves(self, layer: int, confidence: float) -> bool:
        assert layer == self.exit
        return confidence < 0.9


def requests() -> list[Request]:
    """Of every mode, with and without sampling, on prompts of several lengths."""
    found = []
    for number, prompt in enumerate(PROMPTS):
        count = 18 + 3 * number
        found += [
            Request(prompt=prompt, max_tokens=count),
            Request(
                prompt=prompt,
                mode="threshold",
                policy=ThresholdPolicy(threshold=0.06, max_deferred=4),
                max_tokens=count,
                logprobs=2,
            ),
            Request(
                prompt=prompt,
                mode="threshold",
                policy=ThresholdPolicy(threshold=0.04, thresholds={1: 0.08}),
                exits=(1, 3),
                max_tokens=count,
            ),
            Request(prompt=prompt, mode="speculative", draft=Draft(exit=1 + number % 3, length=3), max_tokens=count),
        ]
    found += [
        Request(prompt=PROMPTS[0], mode="speculative", max_tokens=20),
        Request(prompt=PROMPTS[0], mode="speculative", draft=Draft(exit=2, length=2), sampling=DRAWN, max_tokens=20),
        Request(
            prompt=PROMPTS[1],
            mode="threshold",
            policy=ThresholdPolicy(threshold=0.05),
            sampling=DRAWN,
            samples=3,
            max_tokens=16,
        ),
        Request(prompt=PROMPTS[1], mode="threshold", policy=ThresholdPolicy(threshold=1e-6), exits=(4,), max_tokens=8),
        Request(prompt=PROMPTS[2], sampling=DRAWN, samples=2, max_tokens=12, stop_ids=(7, 8)),
        Request(prompt=PROMPTS[3], sampling=Sampling(frequency_penalty=0.5, presence_penalty=1.0), max_tokens=12),
        Request(prompt=PROMPTS[3], replay_ids=PROMPTS[2], exits=(2,), logprobs=1),
        *(Request(prompt=PROMPTS[1], replay_ids=PROMPTS[2], policy=ThresholdPolicy(measure=m)) for m in MEASURES),
        *(Request(prompt=each, mode="threshold", policy=GatePolicy(threshold=0.7), max_tokens=14) for each in PROMPTS),
        *(Request(prompt=PROMPTS[0], mode="threshold", policy=RunOut(exit=k), max_tokens=14) for k in (1, 3)),
    ]
    return found


@contextmanager
def engine_of(directory: str, tensor: int, pipeline: int, **options: Any) -> Iterator[Engine | None]:
    """The engine on one rank, None on the ranks that only help."""
    from megatron_ee.checkpoint.initialise import initialise_exit
    from megatron_ee.checkpoint.loading import load_backbone
    from megatron_ee.checkpoint.saved_model import open_model
    from megatron_ee.exits.stage import Stage
    from megatron_ee.model.setup import build_setup

    torch.set_num_threads(1)
    model = open_model(Path(directory))
    POLICIES["run_out"] = RunOut  # on the ranks alone: other tests list the policies
    with process_groups(tensor, pipeline) as groups:
        setup = build_setup(model.architecture, torch.float32, groups)
        layout = even_layout(model.architecture.num_layers, pipeline)
        index = groups.pipeline.rank()
        layers = layout.stages[index].layers
        specs = [spec for spec in SPECS if spec.layer in layers]
        stage = Stage(setup, layers, specs, embedding=index == 0, final_exit=index == layout.last_layered)
        load_backbone(stage, model)
        for exit_ in stage.exits:
            initialise_exit(exit_, model, 1)
            with torch.no_grad():  # exits that differ from each other, and now and then from the final one
                exit_.body.norm.weight *= 1 + 0.2 * exit_.spec.layer
            generator = torch.Generator().manual_seed(exit_.spec.layer)
            exit_.gate.place(0.3 * torch.randn(len(exit_.gate.weight) + 1, generator=generator))
            exit_.head.restrict(torch.arange(0, 131, 2, device=platform.device()))  # of which each rank has some
        with engine_on_ranks(stage, layout, SPECS, EngineOptions(**options)) as engine:
            yield engine


def summary(completion: Completion) -> tuple[list[int], list[int], str]:
    """Tokens, layers and end of an output."""
    return [t.id for t in completion.tokens], [t.layer for t in completion.tokens], completion.finish_reason


def generate(directory: str, tensor: int, pipeline: int, batched: bool, prefix_cache_seqs: int = 0) -> Any:
    """On one rank, answers by request and sample, how many tokens were reused, and all replays."""
    kv_cache_manager.MIN_PREFIX = 2
    with engine_of(directory, tensor, pipeline, prefix_cache_seqs=prefix_cache_seqs) as engine:
        if engine is None:
            return None
        asked, found = requests(), []
        for some in [asked] if batched else [[request] for request in asked]:
            found += engine.generate(some)
        answers = [[summary(completion) for completion in completions] for completions in found]
        replays = [each for completions in found for one in completions for each in one.replay]
        return answers, engine.statistics()["reused_tokens"], replays


def schedules(directory: str, tensor: int, pipeline: int, kept: int, seeds: range) -> Any:
    """By seed, what comes of requests that arrive and are cancelled at random, with ``kept`` bytes for keys and values.

    Returns:
        For each output that ended: seed, index of its request, sample, whether it may be cut, and its ``summary``;
        and how often sequences were preempted.
    """
    kv_cache.CHUNK = kv_cache_manager.CHUNK = 4
    scheduler.PASS_TOKENS = 7
    kv_cache_manager.MIN_PREFIX = 2
    found: list[tuple[int, int, int, bool, Any]] = []
    everything = requests()
    with engine_of(directory, tensor, pipeline, kv_memory=kept, max_num_seqs=6, prefix_cache_seqs=2) as engine:
        for seed in seeds if engine is not None else ():
            assert engine is not None
            chance, asked, cancelled = random.Random(seed), dict[int, int](), set[int]()
            ended: list[Event] = []
            for _ in range(40):
                action = chance.random()
                if action < 0.4:
                    index = chance.randrange(len(everything))
                    asked[engine.submit(everything[index])] = index
                elif action < 0.5 and asked:
                    number = chance.choice(list(asked))  # which may have ended
                    cancelled.add(number)
                    engine.cancel(number)
                else:
                    for _ in range(chance.randint(1, 12)):
                        ended += [event for event in engine.step() if event.completion is not None]
            while not engine.idle:
                ended += [event for event in engine.step() if event.completion is not None]
            assert {event.request for event in ended} == asked.keys(), "an output is lost"
            for event in ended:
                cut = event.request in cancelled
                found.append((seed, asked[event.request], event.sample, cut, summary(event.completion)))  # type: ignore[arg-type]
        return None if engine is None else (found, engine.statistics()["num_preempted"])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    model = save_tiny_model("qwen3", path, num_attention_heads=4, num_key_value_heads=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("q_norm.weight"):
                parameter *= 6
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter *= 2
    model.save_pretrained(path)
    return os.fspath(path)


@pytest.fixture(scope="module")
def one_process(directory: str) -> Any:
    return run_ranks(1, generate, directory, 1, 1, False)[0]


@pytest.fixture(scope="module")
def alone(one_process: Any) -> Any:
    """The answers of one process."""
    return one_process[0]


def compare_replays(ours: list[ExitReplay], theirs: list[ExitReplay]) -> None:
    """Every exit on every stage says what it says in one process."""
    assert [each.depth for each in ours] == [2, 5] + [1, 2, 3, 4, 5] * len(MEASURES)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.depth, one.tokens, one.text_ranks) == (other.depth, other.tokens, other.text_ranks)
        assert len(one.gates) == (0 if one.depth == 5 else len(PROMPTS[2]))
        for name in ("probabilities", "confidences", "text_probabilities", "gates"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-4), (one.depth, name)
        for mine, its in zip(one.logprobs, other.logprobs, strict=True):
            assert (mine.emitted, mine.forced) == pytest.approx((its.emitted, its.forced), abs=1e-4)
            assert mine.top == pytest.approx(its.top, abs=1e-4)


def adaptive(index: int) -> bool:
    """Whether timing decides who drafts: then the tokens are the same, the layers need not be."""
    return index == 4 * len(PROMPTS)


MORE = [(1, 4, False, 3), (1, 1, True, 0), (2, 1, False, 0), (1, 2, True, 0), (2, 2, False, 2)]


@pytest.mark.parametrize(
    ("tensor", "pipeline", "batched", "prefix_cache_seqs"),
    [
        (2, 2, True, 0),
        pytest.param(2, 1, True, 3, marks=pytest.mark.slow),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE),
    ],
)
def test_equals_one_process(
    tensor: int, pipeline: int, batched: bool, prefix_cache_seqs: int, directory: str, one_process: Any
) -> None:
    alone, _, replays = one_process
    found, *others = run_ranks(tensor * pipeline, generate, directory, tensor, pipeline, batched, prefix_cache_seqs)
    assert all(other is None for other in others)
    first, reused, replayed = found
    compare_replays(replayed, replays)
    assert (reused > 0) == (prefix_cache_seqs > 0)
    for index, (ours, theirs) in enumerate(zip(first, alone, strict=True)):
        if adaptive(index):
            ours, theirs = ([(tokens, end) for tokens, _, end in each] for each in (ours, theirs))
        assert ours == theirs, requests()[index]
    for index, exit_ in ((-2, 1), (-1, 3)):
        (_, layers, _), *_ = alone[index]
        assert set(layers) == {exit_, 4} and layers[::3] == [4] * 5, "the policy of this file does not decide"
    layers = {layer for completions in alone for _, where, _ in completions for layer in where}
    assert layers == {1, 2, 3, 4}, "too little happens"


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "pipeline", "kept"), [(1, 2, 60_000), (2, 2, 30_000)])
def test_any_schedule_equals_one_process(tensor: int, pipeline: int, kept: int, directory: str, alone: Any) -> None:
    ranks = run_ranks(tensor * pipeline, schedules, directory, tensor, pipeline, kept, range(2))
    (found, num_preempted), *others = ranks
    assert all(other is None for other in others)
    cut_short = 0
    for seed, index, sample, cut, ours in found:
        theirs = alone[index][sample]
        if adaptive(index):
            ours, theirs = (ours[0], ours[2]), (theirs[0], theirs[2])
        if cut and ours[-1] == "cancelled":
            cut_short += 1
            ours, theirs = ours[0], theirs[0][: len(ours[0])]
        assert ours == theirs, f"schedule {seed}: {requests()[index]}"
    assert len(found) > 20 and cut_short > 1 and num_preempted > 1, "too little happens"


def leave(directory: str, read: bool) -> int:
    """On the first rank, leaves an engine while a cancelled request's pass is pending on the second stage.

    Returns:
        How many passes are pending after the end.
    """
    with engine_of(directory, 1, 2) as engine:
        if engine is None:
            return 0
        pending = engine._scheduler._pending
        policies = {1: ThresholdPolicy(threshold=1e-6), 3: ThresholdPolicy(threshold=1, backoff=0)}
        numbers = [
            engine.submit(Request(prompt=PROMPTS[1], mode="threshold", policy=policy, exits=(exit_,), max_tokens=100))
            for exit_, policy in policies.items()
        ]
        for _ in range(50):
            engine.step()
            if any(each.stage == 1 for each in pending):
                break
        else:
            raise AssertionError("no pass of the second stage is pending between two steps")
        if read:  # as between the requests of a server
            for number in numbers:
                engine.cancel(number)
            assert not engine.idle, "nobody would step an idle engine"
            while not engine.idle:
                engine.step()
    return len(pending)


@pytest.mark.parametrize("read", [False, True])
def test_an_engine_ends_with_a_pass_pending_on_another_stage(read: bool, directory: str) -> None:
    assert run_ranks(2, leave, directory, read, timeout=30) == [0, 0]


def command(output: str, arguments: list[str]) -> int:
    """On one rank: ``megatron-ee generate``, its stdout in ``output-RANK``."""
    import contextlib

    from megatron_ee.commands.main import main

    with open(f"{output}-{os.environ.get('RANK', '0')}", "w") as file, contextlib.redirect_stdout(file):
        return main(["generate", *arguments])


def said(answer: Any) -> list[list[tuple[int, bool, int, int]]]:
    """What each exit would have said at each token of an explained answer."""
    names = ("layer", "emitted", "token", "answer_rank")
    tokens = answer["explanation"]["tokens"]
    return [[tuple(each[name] for name in names) for each in token["exits"]] for token in tokens]


@pytest.mark.slow
def test_command_over_processes(project: Project, tuned: Path, tmp_path: Path) -> None:
    given = ["--model", str(project.model), "--adapter", str(tuned / "adapter"), "--dtype", "float32", "--json"]
    given += ["--prompt", "a quick", "--prompt", "some words", "--max-tokens", "12", "--mode", "speculative"]
    given += ["--draft-exit", "1", "--draft-length", "2", "--explain"]
    alone, spread = str(tmp_path / "alone"), str(tmp_path / "spread")
    assert run_ranks(1, command, alone, given) == [0]
    assert run_ranks(2, command, spread, [*given, "--pipeline", "2"]) == [0, 0]
    ours, theirs = (json.loads(Path(f"{path}-0").read_text())["outputs"] for path in (spread, alone))
    for mine, other in zip(ours, theirs, strict=True):
        assert [mine[name] for name in ("text", "token_ids", "layers")] == [
            other[name] for name in ("text", "token_ids", "layers")
        ]
        assert said(mine) == said(other)
    assert Path(f"{spread}-1").read_text() == ""


@pytest.mark.slow
def test_regenerate_over_processes(project: Project, tmp_path: Path) -> None:
    """The first rank writes the file, which is that of one process."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"some words {n}"}) + "\n" for n in range(5)))
    given = ["regenerate", "--model", str(project.model), "--dtype", "float32", "--prompts", str(prompts)]
    given += ["--max-tokens", "12", "--temperature", "1", "--samples", "2", "--resume", "--output"]
    alone, spread, errors = tmp_path / "alone.jsonl", tmp_path / "spread.jsonl", str(tmp_path / "errors")
    assert run_ranks(1, run_command, [*given, str(alone)], {}, errors) == [0]
    for options in (["--pipeline", "2"], ["--tensor", "2"]):
        spread.unlink(missing_ok=True)
        for _ in range(2):  # the second time it is complete, and no rank waits for another one
            assert run_ranks(2, run_command, [*given, str(spread), *options], {}, errors) == [0, 0]
        assert spread.read_text() == alone.read_text() and len(spread.read_text().splitlines()) == 10


@pytest.mark.slow
def test_calibrate_gives_one_certificate_on_any_layout(project: Project, tuned: Path, tmp_path: Path) -> None:
    data = tmp_path / "sample.jsonl"
    data.write_text("".join(json.dumps({"id": str(i), "prompt": f"def f{i}("}) + "\n" for i in range(30)))
    given = ["calibrate", "--model", str(project.model), "--adapter", str(tuned / "adapter"), "--dtype", "float32"]
    given += ["--data", str(data), "--risk", "0.5", "--delta", "0.2", "--loss", "rouge", "--max-tokens", "8"]
    found = []
    for ranks, options in ((1, []), (2, ["--tensor", "2"]), (2, ["--pipeline", "2"])):
        output = tmp_path / f"{len(found)}.json"
        arguments = [*given, "--output", str(output), *options]
        assert run_ranks(ranks, run_command, arguments, {}, str(tmp_path / "errors")) == [0] * ranks
        found.append(json.loads(output.read_text()))
    assert found[0]["tested"]["all"][0]["passed"] and found[0]["overlap"] == "none"
    for certificate in found[1:]:
        assert certificate["tested"].keys() == found[0]["tested"].keys()
        for name in ("model_sha256", "adapter_sha256", "tokenizer_sha256", "data_sha256", "decoding", "n", "overlap"):
            assert certificate[name] == found[0][name]
        for mine, theirs in zip(certificate["tested"]["all"], found[0]["tested"]["all"], strict=False):
            assert mine["level"] == pytest.approx(theirs["level"], abs=0.01)
