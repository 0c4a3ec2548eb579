"""Safer settings of a certificate, for when its audits have raised an alarm.

``calibrate`` tests settings from safe to fast, and certifies the fastest that passes. The ones before it have passed,
too: tests in a fixed order reject no true hypothesis with probability 1 - delta, whichever of them is used afterwards.
A certificate lists them by their level, from which the thresholds follow (``evaluation.calibration.family``).

*Safer* means here: tested, passed, and with a lower mean loss on the calibration's test part than the one before. It
does not mean certified. An alarm says that the requests are no longer like the sample, and then no result on the sample
holds for them. A safer setting is a smaller risk of unknown size, which is audited again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_ee.evaluation.calibration.family import LEAST_SAVED, thresholds_at
from megatron_ee.inference.certificate import Certificate
from megatron_ee.inference.policy import ExitPolicy, GatePolicy, ThresholdPolicy

_SAME = 1e-6
"""Largest difference of thresholds that rounding makes."""


@dataclass(frozen=True)
class SaferSetting:
    """A setting that passed its test, and is safer than the certified one.

    Attributes:
        level: see ``Tested``.
        loss: mean loss on the test part; of the worst group, if groups were tested.
        policy: with its thresholds.
    """

    level: float
    loss: float
    policy: ExitPolicy


def safer_settings(certificate: Certificate) -> tuple[SaferSetting, ...]:
    """The settings that are safer than the certified one, step by step towards full mode.

    Returns:
        Empty if the certificate is full mode or has thresholds by group, if it lists no such setting, or if its policy
        is not one of those that it says were tested.
    """
    chosen = certificate.policy
    if not isinstance(chosen, ThresholdPolicy | GatePolicy) or certificate.per_group == "own":
        return ()
    passed: list[SaferSetting] = []
    for tests in zip(*certificate.tested.values(), strict=False):  # one setting, by group
        level, layer = tests[0].level, min((t.mean_exit_layer or math.inf for t in tests), default=math.inf)
        if not all(test.passed for test in tests) or not 0 < level < 1:
            break
        thresholds = thresholds_at(certificate.scaling, math.log(level) - math.log1p(-level))
        setting = SaferSetting(
            level, max(test.loss for test in tests), chosen.model_copy(update={"thresholds": thresholds})
        )
        if _same(thresholds, dict(chosen.thresholds)):
            return _towards_full(passed, setting.loss)
        if layer <= (1 - LEAST_SAVED) * certificate.full_layers:
            passed.append(setting)
    return ()


def _towards_full(passed: list[SaferSetting], loss: float) -> tuple[SaferSetting, ...]:
    found = []
    for setting in reversed(passed):
        if setting.loss < loss:
            found.append(setting)
            loss = setting.loss
    return tuple(found)


def _same(one: dict[int, float], other: dict[int, float]) -> bool:
    return one.keys() == other.keys() and all(abs(one[layer] - other[layer]) <= _SAME for layer in one)
