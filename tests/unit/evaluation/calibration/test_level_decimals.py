"""How levels are shown."""

import pytest

from megatron_ee.evaluation.calibration.candidates import level_decimals


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        (0.71095, "0.71095"),
        (0.99997, "0.999970"),
        (0.9999989, "0.9999989"),
        (0.99999989, "0.99999989"),
        (1.0, "1.00000"),
    ],
)
def test_a_level_close_to_one_is_told_from_it(level: float, shown: str) -> None:
    assert f"{level:.{level_decimals(level)}f}" == shown
