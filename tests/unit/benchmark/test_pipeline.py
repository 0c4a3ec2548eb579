"""The pipeline's figures: what is counted, a real run of two small processes, and the tables and the picture."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from megatron_ee.benchmark.memory import benchmark_memory
from megatron_ee.benchmark.pipeline import benchmark_pipeline, busy_shares, least_bytes
from megatron_ee.benchmark.ranks import ParallelStep, exit_specs, parallel_step
from megatron_ee.benchmark.report import print_memory, print_pipeline
from megatron_ee.benchmark.results import (
    LinkTraffic,
    MemoryBenchmark,
    PipelineBenchmark,
    RankMemory,
    Span,
    StageShare,
)
from megatron_ee.benchmark.shape import Shape
from megatron_ee.benchmark.timeline import plot_timeline
from megatron_ee.benchmark.worker import call_all, start_worker
from megatron_ee.commands.main import main
from megatron_ee.config.exits import ExitSpec
from megatron_ee.errors import ConfigError, UserError
from megatron_ee.parallel.layout import Layout, StageLayout
from megatron_ee.parallel.memory import Memory

SMALL = Shape(hidden=32, layers=4, ffn=64, heads=2, vocab=200)
COMMAND = ["--hidden", "32", "--layers", "4", "--vocab", "200", "--sequence-length", "16", "--exits", "3"]


def small_step(distillation: bool = False, stages: int = 2, tensor: int = 1) -> ParallelStep:
    specs = exit_specs(3, SMALL.layers, mlp=1, head="own")
    return parallel_step(
        SMALL,
        specs,
        stages=stages,
        tensor=tensor,
        distillation=distillation,
        dtype="float32",
        tokens=16,
        microbatches=3,
    )


def test_exits_of_a_random_model() -> None:
    specs = exit_specs(8, 32, mlp=1, head="shared")
    assert [spec.layer for spec in specs] == [3, 6, 9, 12, 15, 18, 21, 24]
    assert [spec.body for spec in specs] == ["norm"] * 7 + ["mlp"]
    assert {spec.head for spec in specs} == {"shared"}
    assert [spec.body for spec in exit_specs(3, 8, mlp=5, head="own")] == ["mlp"] * 3


def test_refusals() -> None:
    specs = exit_specs(1, 4, mlp=1, head="own")
    for settings, message in (
        ({"tensor": 4}, "^--tensor: 4 does not divide 2 heads and 64 MLP features$"),
        ({"sequence_parallel": True}, "^--sequence-parallel: needs --tensor above 1"),
        ({"stages": 6}, "6 stages, but 3 layers and 1 exits"),
    ):
        with pytest.raises(ConfigError, match=message):
            parallel_step(SMALL, specs, dtype="float32", tokens=16, microbatches=1, **settings)


def test_least_bytes_of_each_link() -> None:
    # Layers 1-2 | 3-4, one of their exits each | the others, from both.
    layout = Layout((StageLayout(range(1, 3), (1,)), StageLayout(range(3, 5), (4,)), StageLayout(range(0), (2, 3))))
    specs = tuple(ExitSpec(layer) for layer in (1, 2, 3, 4))
    tensor = 16 * 32 * 4  # tokens, hidden size, bytes
    forward = {(0, 1, False): tensor, (0, 2, False): tensor, (1, 2, False): tensor}
    step = dataclasses.replace(small_step(), layout=layout, specs=specs)
    assert least_bytes(step) == forward
    verdict = 2 * 16 * 32 * 4  # ids and log-probabilities of 32 tokens each
    step = dataclasses.replace(small_step(distillation=True), layout=layout, specs=specs)
    assert least_bytes(step) == forward | {(1, 0, True): verdict, (1, 2, True): verdict}
    # Both taps of a stage in one message.
    layout = Layout((StageLayout(range(1, 5)), StageLayout(range(0), (1, 2, 3, 4))))
    assert least_bytes(dataclasses.replace(small_step(), layout=layout, specs=specs)) == {(0, 1, False): 4 * tensor}


def test_busy_shares_count_computing_only() -> None:
    # The second stage's receive begins before the step does; 10 s from the first forward to the last exit.
    first = [Span("forward", 0, 5, 7), Span("send", 0, 7, 8), Span("exits", 0, 8, 11)]
    second = [Span("receive", 0, 1, 8), Span("forward", 0, 8, 9), Span("teach", 0, 9, 11), Span("exits", 0, 11, 15)]
    assert busy_shares([[first, second]]) == [0.5, 0.7]
    # A second step, of half the time, weighs half.
    shorter = [[Span("forward", 0, 0, 5)], [Span("exits", 0, 1, 2)]]
    assert busy_shares([[first, second], shorter]) == pytest.approx([10 / 15, 8 / 15])


def test_a_real_run_of_two_stages() -> None:
    step = small_step(distillation=True)
    result = benchmark_pipeline(step, steps=2, simulated=False)
    hosts = [index for index, stage in enumerate(step.layout.stages) if stage.exits]
    assert hosts == [0, 1]
    assert {(link.source, link.target, link.verdicts) for link in result.links} == {(0, 1, False), (1, 0, True)}
    # Nothing but what has to travel does.
    assert [(link.bytes, link.ratio) for link in result.links] == [(link.least, 1.0) for link in result.links]
    assert len(result.step_seconds) == 2
    assert result.efficiency == pytest.approx(sum(stage.busy for stage in result.stages) / 2)
    assert (result.planned, result.reference) == (step.plan.efficiency, 3 / 4)
    assert result.machine["device"] == "cpu"
    assert result.machine["threads"] == 1
    for index, (stage, spans) in enumerate(zip(result.stages, result.timeline, strict=True)):
        assert (stage.layers, stage.exits) == (
            list(step.layout.stages[index].layers),
            list(step.layout.stages[index].exits),
        )
        assert 0 < stage.busy < 1
        assert 0 < stage.expected <= 1
        assert stage.planned == 1 - step.plan.stages[index].idle
        assert stage.forward_seconds > 0
        assert stage.exits_seconds > 0
        assert (stage.teach_seconds > 0) == (index == 1)
        exits = [span for span in spans if span.kind == "exits"]
        assert [span.microbatch for span in exits] == [0, 1, 2]
        assert all(0 <= span.start <= span.end for span in spans)
        assert max(span.end for span in spans) <= max(result.step_seconds)


def test_waiting_for_as_long_as_the_work_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "timeline.png"
    arguments = ["benchmark", "pipeline", *COMMAND, "--microbatches", "3", "--steps", "1", "--simulated", "--json"]
    assert main([*arguments, "--plot", str(picture)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["simulated"]
    assert len(result["step_seconds"]) == 1
    assert all(link["ratio"] == 1 for link in result["links"])
    for stage, spans in zip(result["stages"], result["timeline"], strict=True):
        exits = [span["end"] - span["start"] for span in spans if span["kind"] == "exits"]
        assert len(exits) == 3
        # The wait itself, never less.
        assert all(length >= stage["exits_seconds"] - 2e-6 for length in exits)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_memory_of_real_ranks() -> None:
    step = small_step(stages=1, tensor=2)
    result = benchmark_memory(step, steps=2)
    assert [(row.stage, row.tensor_rank) for row in result.ranks] == [(0, 0), (0, 1)]
    for row in result.ranks:
        assert row.planned == step.plan.stages[0].memory
        assert row.ratio == row.measured / row.planned.total
        assert row.libraries > 50e6  # torch itself is larger
        assert row.measured > row.planned.total
    assert result.together == sum(row.libraries + row.measured for row in result.ranks)
    first, second = result.losses
    assert len(first) == 3
    assert sum(second) < sum(first), "the same batch is learned"


class Subject:
    def wait(self) -> None:
        time.sleep(4)

    def refuse(self) -> None:
        raise UserError("no")


@contextlib.contextmanager
def waiting(fails: bool) -> Iterator[Subject]:
    subject = Subject()
    if fails:
        subject.wait = subject.refuse  # type: ignore[method-assign]
    yield subject


def test_one_ranks_failure_is_not_waited_for() -> None:
    with contextlib.ExitStack() as stack:
        make = f"{__name__}:waiting"
        workers = [stack.enter_context(start_worker("it", make, fails, wait=False)) for fails in (False, True)]
        call_all(workers, "")
        with pytest.raises(UserError, match="^no$"):
            call_all(workers, "wait")
        assert workers[0].connection.poll(30), "the other one's answer was not waited for"


MACHINE = {"device": "cpu", "threads": 1, "torch": "2.13.0", "load_before": 0.3}
MODEL = {
    "dtype": "float32",
    "hidden": 32,
    "layers": 4,
    "vocab": 200,
    "sequence_length": 16,
    "microbatches": 8,
    "exits": [[2, "mlp", "own"], [3, "norm", "shared"]],
    "distillation": True,
}


def figures() -> PipelineBenchmark:
    return PipelineBenchmark(
        machine=MACHINE,
        model=MODEL,
        simulated=False,
        step_seconds=[1.0],
        stages=[
            StageShare([1, 2, 3], [2], 0.01, 0.002, 0.03, 0.9, 0.95, 0.96),
            StageShare([], [3], 0.0, 0.0, 0.04, 0.5, 0.6, 0.7),
        ],
        links=[LinkTraffic(0, 1, False, 2048.0, 1024, 2.0), LinkTraffic(0, 1, True, 512.0, 512, 1.0)],
        efficiency=0.7,
        expected=0.775,
        planned=0.83,
        reference=8 / 9,
        timeline=[[Span("forward", 0, 0.0, 0.5), Span("teach", 0, 0.5, 0.6)], [Span("exits", 0, 0.6, 1.0)]],
    )


def shown(print_tables: object, result: object) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=160, highlight=False)
    print_tables(result, console)  # type: ignore[operator]
    return [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_the_tables_of_a_pipeline() -> None:
    lines = shown(print_pipeline, figures())
    assert ["0", "1-3", "2", "10.0", "2.0", "30.0", "90.0%", "95.0%", "96.0%"] in lines
    assert ["1", "-", "3", "0.0", "0.0", "40.0", "50.0%", "60.0%", "70.0%"] in lines
    assert ["0", "to", "1", "h,", "taps", "2,048", "1,024", "2.000x"] in lines
    assert ["0", "to", "1", "verdicts", "512", "512", "1.000x"] in lines
    text = "\n".join(" ".join(line) for line in lines)
    assert "exits 2 mlp/own, 3 norm/shared; distillation" in text
    assert "computed 70.0% of the time. The plan's simulation expects 77.5% from these times and 83.0%" in text
    assert "M / (M + P - 1) is 88.9%" in text
    alone = figures()
    (line,) = shown(print_pipeline, dataclasses.replace(alone, stages=[], links=[], simulated=True))[1:2]
    assert "alone;" in line


def test_the_table_of_memory() -> None:
    mib = 2**20
    plan = Memory(*(size * mib for size in (10, 5, 20, 40, 3, 2)))
    result = MemoryBenchmark(MACHINE, MODEL, False, [RankMemory(1, 0, 300 * mib, 88 * mib, plan, 1.1)], 2**31, 0.5, [])
    lines = shown(print_memory, result)
    assert ["stage", "1,", "0", "88.0", "80.0", "1.100x", "15.0", "20.0", "40.0", "3.0", "2.0"] in lines
    assert "All ranks together, libraries included: 2.00 GiB. A step took 0.50 s." in " ".join(lines[-1])
    assert "in use" in " ".join(lines[1])
    assert "resident" in " ".join(shown(print_memory, dataclasses.replace(result, resident=True))[1])


def test_the_picture_shows_one_row_per_stage(tmp_path: Path) -> None:
    plot_timeline(figures(), tmp_path / "a.svg")
    plot_timeline(dataclasses.replace(figures(), timeline=[[Span("exits", 0, 0.0, 1.0)]] * 2), tmp_path / "b.svg")
    # Text is drawn as shapes; the comments before them hold it.
    drawn, without = ((tmp_path / name).read_text() for name in ("a.svg", "b.svg"))
    for text in ("stage 0", "stage 1", "forward", "final exit", "exits", "waiting", "90%", "50%"):
        assert f"<!-- {text} -->" in drawn
    assert "<!-- final exit -->" not in without
    assert "<!-- forward -->" not in without
