"""The decoding benchmark: figures from a tiny model, and what they are made of."""

from __future__ import annotations

import dataclasses
import json

import pytest

from megatron_ee.benchmark.generate import GenerateBenchmark, Load, _departure, _trace, _traced, benchmark_generate
from megatron_ee.benchmark.generate_report import print_generate
from megatron_ee.benchmark.shape import Shape
from megatron_ee.commands.benchmark.generate import PARTS

EXITS = 2
LAYERS = 4
TOKENS = 24


@pytest.fixture(scope="module")
def result() -> GenerateBenchmark:
    load = Load(prompts=2, prompt_tokens=12, tokens=TOKENS, repeats=1)
    return benchmark_generate(
        None, None, Shape(32, LAYERS, 64, 2, 96), load, parts=PARTS, batches=(1, 2), exits=EXITS, dtype="float32"
    )


def test_full_mode_says_what_transformers_says(result: GenerateBenchmark) -> None:
    assert [full.batch for full in result.full] == [1, 2]
    for full in result.full:
        assert full.same, "in float32 both are greedy over the same logits"
        assert full.ratio == pytest.approx(full.ours / full.transformers)
    one, two = result.full
    assert one.bandwidth_share is not None and one.fastest_share is not None and one.products_share is not None
    assert 0 < one.fastest_share <= one.bandwidth_share and one.products_share > 0
    assert two.bandwidth_share is two.fastest_share is two.products_share is None


def test_speculation_keeps_the_output(result: GenerateBenchmark) -> None:
    ways = {way.name: way for way in result.speculative}
    assert {"full mode", "speculative", "transformers"} < ways.keys()
    assert ways["full mode"].speedup == 1 and ways["full mode"].layers_per_token == LAYERS
    for way in ways.values():
        assert way.same == 1, way
    fixed = [way for way in ways.values() if way.name.endswith(", 3")]
    assert len(fixed) == EXITS and all(way.acceptance is not None for way in fixed)


def test_threshold_mode_agrees_more_the_higher_the_threshold(result: GenerateBenchmark) -> None:
    agreements = [point.agreement for point in result.threshold]
    assert agreements == sorted(agreements)
    for point in result.threshold:
        assert 0 <= point.departure <= TOKENS
        assert 0 < point.layers_per_token <= LAYERS


def test_a_trace_is_replayed_chain_by_chain(result: GenerateBenchmark) -> None:
    over = result.overhead
    assert over is not None and over.ratio == pytest.approx(over.seconds / over.chains)
    assert over.count > TOKENS  # more than one chain for most tokens


def test_batches(result: GenerateBenchmark) -> None:
    assert [batch.rows for batch in result.batch] == [1, 4, 16]
    assert all(batch.ratio == pytest.approx(batch.mixed / batch.full) for batch in result.batch)


def test_is_json_and_tables(result: GenerateBenchmark, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_ee.tables import make_console

    json.dumps(dataclasses.asdict(result), allow_nan=False)
    print_generate(result, make_console())
    shown = capsys.readouterr().out
    assert "Full mode against transformers' generate" in shown and "assistant_early_exit" in shown


def test_departure() -> None:
    assert _departure([1, 2, 3], [1, 2, 3]) == 3
    assert _departure([1, 9, 3], [1, 2, 3]) == 1


def test_traces_keep_the_rules_of_threshold_mode() -> None:
    model = {"exits": [1, 2], "layers": 4, "max_deferred": 5}
    layers = _trace(model, 200, seed=1)
    assert layers[0] == 4 and set(layers) == {1, 2, 4}
    runs = "".join("." if layer == 4 else "x" for layer in layers).split(".")
    assert max(map(len, runs)) == 5
    # The first token asks no exit, and one after five early ones neither.
    assert len(_traced(model, 200, seed=1)) == 199 - sum(len(run) == 5 for run in runs[:-1])
