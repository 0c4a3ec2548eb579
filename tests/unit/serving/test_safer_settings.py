"""Safer settings: only what was tested, passed, and lost less."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron_ee.inference.certificate import Calibration
from megatron_ee.serving.rules.safer_settings import safer_settings

Calibrate = Callable[..., Calibration]


def setting(level: float, loss: float, layer: float | None = 4.0, passed: bool = True) -> dict[str, Any]:
    return {"level": level, "p_value": 0.01, "passed": passed, "loss": loss, "mean_exit_layer": layer}


def chosen(calibrate: Calibrate, tests: dict[str, list[dict[str, Any]]], place: int, **changes: Any) -> list[float]:
    """The levels that are safer than the one at ``place``."""
    level = next(iter(tests.values()))[place]["level"]
    # The scaling is the identity, so a level is a threshold of both exits.
    plain = [{"layer": k, "temperature": 1.0, "offset": 0.0, "tokens": 9, "agreement": 0.9} for k in (2, 4)]
    policy = {"name": "threshold", "threshold": 2.0, "thresholds": {2: level, 4: level}}
    content = calibrate(**{"tested": tests, "scaling": plain, "policy": policy, **changes}).certificate
    found = safer_settings(content)
    for each in found:
        assert each.policy.thresholds == pytest.approx({2: each.level, 4: each.level})  # type: ignore[attr-defined]
        assert each.policy.threshold == 2.0  # type: ignore[attr-defined]
    return [each.level for each in found]


def test_steps_lead_to_lower_losses_only(calibrate: Calibrate) -> None:
    tests = [setting(0.99, 0.0), setting(0.97, 0.01), setting(0.95, 0.01), setting(0.9, 0.02), setting(0.8, 0.1)]
    tests[-1]["passed"] = False
    assert chosen(calibrate, {"all": tests}, 3) == [0.95, 0.99]
    assert chosen(calibrate, {"all": tests[:2]}, 1) == [0.99]
    assert chosen(calibrate, {"all": tests[:1]}, 0) == []


def test_a_setting_that_saves_no_layers_is_full_mode(calibrate: Calibrate) -> None:
    tests = [setting(0.99, 0.0, 6.0), setting(0.97, 0.005, None), setting(0.95, 0.01), setting(0.9, 0.02)]
    assert chosen(calibrate, {"all": tests}, 3) == [0.95]


def test_a_setting_that_lost_nothing_has_no_safer_one(calibrate: Calibrate) -> None:
    assert chosen(calibrate, {"all": [setting(0.99, 0.0), setting(0.9, 0.0)]}, 1) == []


def test_the_worst_group_counts(calibrate: Calibrate) -> None:
    one = [setting(0.99, 0.0), setting(0.97, 0.0), setting(0.9, 0.0)]
    other = [setting(0.99, 0.01), setting(0.97, 0.03), setting(0.9, 0.03)]
    assert chosen(calibrate, {"a": one, "b": other}, 2, per_group="worst") == [0.99]
    other[1]["passed"] = False
    assert chosen(calibrate, {"a": one, "b": other}, 2, per_group="worst") == []


def test_certificates_without_a_known_setting_have_none(calibrate: Calibrate) -> None:
    certificate = calibrate().certificate
    assert len(safer_settings(certificate)) == 1
    assert safer_settings(certificate.model_copy(update={"policy": None})) == ()
    assert safer_settings(certificate.model_copy(update={"tested": {}})) == ()
    other = certificate.policy.model_copy(update={"thresholds": {2: 0.5}})  # type: ignore[union-attr]
    assert safer_settings(certificate.model_copy(update={"policy": other})) == ()
