"""Which of the tested settings a certificate's requests run with."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_ee.inference import certificate as certificates
from megatron_ee.inference.certificate import Certificate, GroupResult
from megatron_ee.inference.policy import ThresholdPolicy

EXITS = ThresholdPolicy(thresholds={2: 0.9})


def outcome(*settings: tuple[bool, float | None]) -> tuple[certificates.Tested, ...]:
    return tuple(
        certificates.Tested(level=0.9, p_value=0.1, passed=passed, loss=0.1, mean_exit_layer=layer)
        for passed, layer in settings
    )


def certificate(per_group: str = "no", **values: Any) -> Certificate:
    defaults: dict[str, Any] = {"policy": EXITS, "groups": {}, "full_layers": 4, "per_group": per_group}
    return Certificate.model_construct(**{**defaults, **values})


PASSING, SLOW, FAILING = (True, 3.0), (True, 3.99), (False, 2.0)


@pytest.mark.parametrize(
    ("tests", "chosen"),
    [
        ((PASSING, PASSING, FAILING), 1),
        ((PASSING, SLOW, FAILING), 0),  # passes, but saves no layers
        ((PASSING, (True, None), FAILING), 0),
        ((PASSING, FAILING, PASSING), 0),  # nothing counts after the first that fails
        ((FAILING,), None),
    ],
)
def test_the_last_one_that_passes_and_saves_layers(tests: Any, chosen: int | None) -> None:
    assert certificate(tested={"all": outcome(*tests)}).chosen_test() == chosen
    assert certificate(tested={"all": outcome(*tests)}, policy=None).chosen_test() is None


def test_with_one_setting_for_all_it_has_to_pass_in_every_group() -> None:
    """It counts where some group saves layers."""
    outcomes = {"a": outcome(PASSING, PASSING, PASSING), "b": outcome(PASSING, SLOW, FAILING)}
    found = certificate("worst", tested=outcomes)
    assert found.chosen_test("a") == found.chosen_test("b") == 1


def test_each_group_may_have_its_own() -> None:
    outcomes = {"a": outcome(PASSING, PASSING), "b": outcome(PASSING, FAILING), "c": outcome(PASSING, FAILING)}
    groups = {name: GroupResult(n=9, needed=5, policy=EXITS) for name in ("a", "b")}
    groups["c"] = GroupResult(n=9, needed=5)
    found = certificate("own", tested=outcomes, groups=groups, policy=None)
    assert [found.chosen_test(name) for name in outcomes] == [1, 0, None]
