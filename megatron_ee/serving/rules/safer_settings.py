"""Safer settings of a certificate, for when its audits have raised an alarm.

``calibrate`` tests settings from safe to fast, and certifies the fastest that passes. The ones before it have passed,
too: tests in a fixed order reject no true hypothesis with probability 1 - delta, whichever of them is used afterwards.
A certificate lists them by their level, from which the thresholds follow (``evaluation.calibration.candidates``).

*Safer* means here: tested, passed, and with a lower mean loss on the calibration's test part than the one before. It
does not mean certified. An alarm says that the requests are no longer like the sample, and then no result on the sample
holds for them. A safer setting is a smaller risk of unknown size, which is audited again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ee.evaluation.calibration.candidates import thresholds_at
from megatron_ee.inference.certificate import Certificate, ExitScaling, Tested
from megatron_ee.inference.policy import GatePolicy, ThresholdPolicy

Thresholds = ThresholdPolicy | GatePolicy
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
    policy: Thresholds


def safer_settings(certificate: Certificate) -> tuple[SaferSetting, ...]:
    """The settings that are safer than the certified one, step by step towards full mode.

    Returns:
        Empty if the certificate is full mode or has thresholds by group, if it lists no such setting, or if its policy
        is not the one that its tests chose.
    """
    chosen = certificate.policy
    if not isinstance(chosen, Thresholds) or certificate.per_group == "own":
        return ()
    index = certificate.chosen_test()
    if index is None:
        return ()
    by_setting = list(zip(*certificate.tested.values(), strict=False))[: index + 1]
    saving = [tests for tests in by_setting if any(test.saves(certificate.full_layers) for test in tests)]
    if not all(0 < tests[0].level < 1 for tests in saving):
        return ()
    *safer, certified = (_setting(tests, certificate.scaling, chosen) for tests in saving)
    return _towards_full(safer, certified.loss) if _same(certified.policy, chosen) else ()


def _setting(tests: Sequence[Tested], scaling: Sequence[ExitScaling], chosen: Thresholds) -> SaferSetting:
    """One tested setting, from its tests by group."""
    level = tests[0].level
    thresholds = thresholds_at(scaling, math.log(level) - math.log1p(-level))
    return SaferSetting(level, max(test.loss for test in tests), chosen.model_copy(update={"thresholds": thresholds}))


def _towards_full(passed: list[SaferSetting], loss: float) -> tuple[SaferSetting, ...]:
    found = []
    for setting in reversed(passed):
        if setting.loss < loss:
            found.append(setting)
            loss = setting.loss
    return tuple(found)


def _same(one: Thresholds, other: Thresholds) -> bool:
    return one.thresholds.keys() == other.thresholds.keys() and all(
        abs(value - other.thresholds[layer]) <= _SAME for layer, value in one.thresholds.items()
    )
