"""What a probe recommends and says, and how much it does in a given time."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

from megatron_ee.config.exits import resolve_exits
from megatron_ee.config.schema import ExitConfig
from megatron_ee.evaluation.probe.decode_times import typical
from megatron_ee.evaluation.probe.forecast import DecodeTimes, Forecast
from megatron_ee.evaluation.probe.report import judgement, print_probe, probe_dict, recommended, yaml_block
from megatron_ee.evaluation.probe.run import AGREEMENTS, LayerFigures, Probe
from megatron_ee.evaluation.probe.work import Pace, Work, choose_work, spaced

FULL = Forecast((), 1.0, 0.012, 1.0)
SPECULATIVE = Forecast((3,), 1.0, 0.010, 1.2, draft_length=2, tokens_per_round=2.0)
SLOW = dataclasses.replace(SPECULATIVE, speedup=0.9)


def probe(
    speculative: Forecast,
    threshold: tuple[Forecast, ...],
    *,
    gate: tuple[Forecast, ...] = (),
    head: float = 2.0,
    agreement: float = 0.8,
) -> Probe:
    times = DecodeTimes(10, layer={1: 1e-3}, head={1: head * 1e-3}, body={1: 5e-4}, skipped=True)
    layers = tuple(LayerFigures(layer, agreement, 3.0, 0.4, 0.2, None if layer == 3 else 0.9) for layer in (3, 7, 9))
    work = Work((3, 7, 9), "mlp", 1000, 200, 5.0)
    return Probe(
        "model",
        "data",
        "float32",
        50_000,
        (1, 2, 1),
        work,
        2.0,
        layers,
        times,
        dict(zip(AGREEMENTS, threshold, strict=True)),
        dict(zip(AGREEMENTS, gate, strict=False)),
        speculative,
        (),
    )


def test_exits_that_pay_are_a_configuration() -> None:
    faster = Forecast((7, 9), 0.96, 0.008, 1.5, early=0.6, threshold=0.8)
    found = probe(SPECULATIVE, (FULL, faster, faster))
    assert recommended(found) == dict.fromkeys((3, 7, 9), False)
    read = yaml.safe_load(yaml_block(recommended(found)))["exits"]
    specs = resolve_exits([ExitConfig(**each) for each in read], 10)
    assert [(s.layer, s.body, s.head, s.gate) for s in specs] == [(k, "mlp", "shared", False) for k in (3, 7, 9)]
    assert "1.20 times" in judgement(found) and "1.50 times" in judgement(found)
    # Less agreement, if nothing better pays.
    assert list(recommended(probe(SLOW, (FULL, FULL, faster)))) == [7, 9]


def test_the_sentence_names_only_what_pays() -> None:
    hardly, lower = (Forecast((7,), 0.96, 0.009, speedup, early=0.1, threshold=0.8) for speedup in (1.02, 1.09))
    found = probe(SLOW, (FULL, hardly, lower))
    said = judgement(found)
    assert said.startswith("Exits should pay: forecast are threshold mode with 90% of the tokens equal at 1.09 times")
    assert "1.02" not in said and "speculative" not in said


def test_gates_are_recommended_where_they_pay() -> None:
    by_heads = Forecast((7,), 0.96, 0.009, 1.3, early=0.5, threshold=0.8)
    by_gates = Forecast((5, 7), 0.95, 0.008, 1.4, early=0.5, threshold=0.7, gated=True)
    found = probe(SPECULATIVE, (FULL, by_heads, by_heads), gate=(FULL, by_gates, by_gates))
    assert recommended(found) == {3: False, 5: True, 7: True}
    assert "policy gate with 95% of the tokens equal at 1.40 times" in judgement(found)
    read = yaml.safe_load(yaml_block(recommended(found)))["exits"]
    assert [spec.gate for spec in resolve_exits([ExitConfig(**each) for each in read], 10)] == [False, True, True]
    hardly = dataclasses.replace(by_gates, speedup=1.31)
    assert recommended(probe(SLOW, (FULL, by_heads, FULL), gate=(FULL, hardly, FULL))) == {7: False}


@pytest.mark.parametrize(
    ("head", "agreement", "reason"),
    [(2.0, 0.8, "asked"), (6.0, 0.8, "6.5 of the 10 layers"), (0.1, 0.3, "do not saturate"), (0.1, 0.8, "no longer")],
)
def test_it_says_that_exits_will_not_pay(
    head: float, agreement: float, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = probe(SLOW, (FULL, FULL, FULL), head=head, agreement=agreement)
    said = judgement(found)
    assert said.startswith("Exits will not pay here: nothing is forecast above 1.00 times") and not recommended(found)
    assert reason in said or (reason == "asked" and "Asking an exit takes as long as 2.5" in said)
    print_probe(found)
    out = capsys.readouterr().out
    assert "exits:" not in out and said in out and "none (full mode)" in out and "tensor 1 x pipeline 2" in out


def test_norm_exits_cannot_tell_that_exits_do_not_pay() -> None:
    found = probe(SLOW, (FULL, FULL, FULL))
    found = dataclasses.replace(found, work=dataclasses.replace(found.work, body="norm"))
    assert judgement(found).startswith("It cannot be told") and not recommended(found)


def test_json() -> None:
    found = json.loads(json.dumps(probe_dict(probe(SPECULATIVE, (FULL, FULL, FULL)))))
    assert found["milliseconds"] == {"layer": {"1": 1.0}, "head": {"1": 2.0}, "body": {"1": 0.5}}
    assert [each["at_least"] for each in found["threshold"]] == [0.99, 0.95, 0.9]
    assert found["exits"] == [{"layer": 3, "body": "mlp", "head": "shared", "gate": False}]
    assert found["gate"] == found["shapes"] == [] and found["parallel"]["pipeline"] == 2
    assert found["layers"][0] == {
        "layer": 3,
        "agreement": 0.8,
        "loss": 3.0,
        "confidence": 0.4,
        "above": 0.2,
        "agreement_above": None,
    }


def test_work_that_fits() -> None:
    pace = Pace(forward=1e-3, fit=1e-4, measure=1e-3, solve=1.0, gate=1e-4)
    rich = choose_work(pace, 1e6, 32, 1000, 1_000_000, 99, 100)
    assert (rich.layers, rich.body, rich.fitted, rich.held_out) == (tuple(range(1, 32)), "mlp", 16_000, 4096)
    assert rich.seconds == pytest.approx(20.196 + 31 * (1.6 + 4.096 + 0.7 + 1))
    fewer = choose_work(pace, 60, 32, 1000, 1_000_000, 99, 100)
    assert fewer.body == "mlp" and fewer.seconds <= 60 and (fewer.fitted < 16_000 or len(fewer.layers) < 31)
    assert len(choose_work(pace, 1e6, 32, 1000, 1_000_000, 8, 100).layers) == 8
    cheap = choose_work(pace, 12, 32, 1000, 1_000_000, 99, 100)
    assert cheap.body == "norm" and cheap.seconds <= 12
    least = choose_work(pace, 0.0, 32, 1000, 1_000_000, 99, 100)
    assert least.body == "norm" and len(least.layers) == 1 and least.seconds > 0
    assert choose_work(pace, 1e6, 32, 1000, 2000, 99, 100).body == "norm"  # too little text to fit an MLP
    assert choose_work(pace, 1e6, 2, 10, 1000, 99, 100).layers == (1,)
    assert spaced(3, 32) == (8, 16, 24)


def test_typical_times() -> None:
    measured = {1: [2.0, 2.0, 2.0, 9.0, 9.0, 9.0, 9.0], 2: [1.0] * 7, 4: [3.0] * 7}
    assert typical(measured) == {1: 1.0, 2: 1.0, 4: 3.0}
    assert typical({1: [2.0, 2.0, 2.0, 9.0, 9.0, 9.0, 9.0]}) == {1: 2.0}
