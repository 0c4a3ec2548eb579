"""A certificate for the tests of rules and audits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.evaluation.calibration.candidates import thresholds_at
from megatron_ee.inference.certificate import Calibration, Certificate, ExitScaling

LEVELS = (2.0, 1.5, 1.0, 0.5)  # logits, from safe to fast; the last did not pass
LOSSES = (0.0, 0.01, 0.01, 0.06)
SCALING = (
    {"layer": 2, "temperature": 1.5, "offset": 0.2, "tokens": 500, "agreement": 0.8},
    {"layer": 4, "temperature": 0.9, "offset": -0.1, "tokens": 500, "agreement": 0.9},
)


def sigmoid(logit: float) -> float:
    return 1 / (1 + 2.718281828459045**-logit)


def thresholds(logit: float) -> dict[int, float]:
    return thresholds_at([ExitScaling(**each) for each in SCALING], logit)


def tested(losses: tuple[float, ...] = LOSSES) -> list[dict[str, Any]]:
    return [
        {
            **{"level": sigmoid(level), "p_value": 0.01 if loss < 0.05 else 0.4, "passed": loss < 0.05, "loss": loss},
            "mean_exit_layer": 5.0 - place / 2,
        }
        for place, (level, loss) in enumerate(zip(LEVELS, losses, strict=True))
    ]


def certificate(task: str = "inquiries", **changes: Any) -> Certificate:
    content = {
        **{"made_by": "megatron-ee calibrate", "version": 1, "task": task, "loss": "disagreement"},
        **{"risk": 0.05, "delta": 0.1, "p_value": "betting", "n": 200, "n_fit": 50, "full_layers": 6},
        "policy": {"name": "threshold", "threshold": 2.0, "thresholds": thresholds(LEVELS[2])},
        "scaling": list(SCALING),
        "tested": {"all": tested()},
        **{f"{name}_sha256": "0" * 64 for name in ("model", "adapter", "tokenizer", "data")},
        "decoding": {
            **{"chat": True, "max_tokens": 32, "sampling": {}, "dtype": "float32", "weights": "packed"},
            "quantise": "none",
        },
        **{"overlap": "none", "seed": 0, "date": "2026-01-01T00:00:00+00:00"},
    }
    return Certificate.model_validate(content | changes)


Calibrate = Callable[..., Calibration]


@pytest.fixture
def calibrate() -> Calibrate:
    """Makes a certificate that fits an engine; ``letter`` makes its hash."""

    def make(task: str = "inquiries", letter: str = "a", **changes: Any) -> Calibration:
        content = certificate(task, **changes)
        return Calibration(content, Path(f"/{task}.json"), letter * 64, "float32", "packed", "none")

    return make
