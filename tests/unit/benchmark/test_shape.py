"""The measured models: what exists, how large they are, where their exits stand."""

from __future__ import annotations

import pytest

from megatron_ee.benchmark.shape import Shape, default_ffn, shape_of_size, spread_exits
from megatron_ee.errors import ConfigError


@pytest.mark.parametrize(
    ("count", "layers", "places"),
    [(4, 12, (2, 4, 7, 9)), (8, 12, (1, 2, 3, 4, 6, 7, 8, 9)), (1, 12, (9,)), (3, 4, (1, 2, 3)), (1, 1, (1,))],
)
def test_exits_spread_to_three_quarters(count: int, layers: int, places: tuple[int, ...]) -> None:
    assert spread_exits(count, layers) == places


def test_no_two_exits_share_a_layer() -> None:
    for layers in range(1, 40):
        deepest = max(1, round(0.75 * layers))
        for count in range(1, deepest + 1):
            places = spread_exits(count, layers)
            assert len(set(places)) == count
            assert places[-1] == deepest
        with pytest.raises(ConfigError, match=f"--exits: {deepest + 1} exits do not fit {deepest} layers"):
            spread_exits(deepest + 1, layers)


def test_heads_must_divide_the_hidden_size() -> None:
    Shape(96, 1, 64, 3, 10).check()
    for heads in (5, 96):  # no whole head size, an odd one
        with pytest.raises(ConfigError, match="--heads"):
            Shape(96, 1, 64, heads, 10).check()


def test_the_default_is_about_100m_parameters() -> None:
    assert default_ffn(768) == 2048
    assert 90e6 < Shape(768, 12, 2048, 12, 32000).parameters < 120e6


@pytest.mark.parametrize("megabytes", [2, 30, 100, 500, 1000, 5000])
def test_models_have_the_size_asked_for(megabytes: int) -> None:
    shape = shape_of_size(megabytes, 2)
    shape.check()
    assert shape.layers >= 4
    assert shape.parameters * 2e-6 == pytest.approx(megabytes, rel=0.15)
