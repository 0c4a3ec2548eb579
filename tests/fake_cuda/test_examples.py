"""The example configurations, at their real size and in their own layout, as if on CUDA."""

from __future__ import annotations

import json

import pytest

from megatron_ee.commands.main import main
from megatron_ee.testing.examples import EXAMPLES, MODELS

from . import report
from .checks import TOLERANCE, problems
from .runs import MODES, Fitting, Inference, Tuning
from .worker import Worker

QUICK = ("llama2_70b", "threshold")


@pytest.mark.parametrize("example", MODELS)
def test_tuning_step(example: str, worker: Worker, capsys: pytest.CaptureFixture[str]) -> None:
    """On the last rank, which has the deepest layers."""
    result = worker.run(Tuning(example, rank=-1))
    print(report.line(result), report.details(result), sep="\n")
    assert problems(result) == []
    capsys.readouterr()
    # The command plans the same without the model.
    assert main(["plan", "--config", str(EXAMPLES / example / "config.yaml"), "--json"]) == 0
    stage = json.loads(capsys.readouterr().out)["run"]["stages"][-1]
    assert stage["phases"]["tuning"] == sum(stage["memory"].values()) == pytest.approx(result.peak, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("example", MODELS)
def test_fit(example: str, worker: Worker) -> None:
    """On the first rank, which solves for the others."""
    result = worker.run(Fitting(example))
    print(report.line(result), report.details(result), sep="\n")
    assert problems(result) == []


@pytest.mark.parametrize(
    "example, mode",
    [
        pytest.param(example, mode, marks=() if (example, mode) == QUICK else pytest.mark.slow)
        for example in MODELS
        for mode in MODES
    ],
)
def test_inference(example: str, mode: str, worker: Worker) -> None:
    result = worker.run(Inference(example, mode))
    print(report.line(result), report.details(result), sep="\n")
    assert problems(result) == []
