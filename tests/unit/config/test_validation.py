"""Values that people or files give: what is read, and the one line that each mistake gets."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, field_validator

from megatron_ee.config.validation import Strict, validated
from megatron_ee.errors import CheckpointError, ConfigError


class Place(Strict):
    layer: int = Field(ge=1, le=100)
    body: Literal["mlp", "norm"] = "mlp"
    weight: float = Field(1.0, gt=0)


class Order(Strict):
    name: str = Field(min_length=1)
    count: int = Field(3, ge=0)
    places: tuple[Place, ...] = Field((), strict=False)
    by_layer: dict[int, float] = {}
    prompt: str | Sequence[int] = ""
    on: bool = False
    limit: int | None = None
    even: int = 0

    @field_validator("even")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"must be even, not {value}")
        return value


def refusal(values: Any, kind: Any = Order, **arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        validated(kind, values, **arguments)
    return str(caught.value)


def test_values_are_read() -> None:
    order = validated(Order, {"name": "a", "places": [{"layer": 2, "weight": 3}], "by_layer": {4: 1}, "prompt": [1]})
    assert order == Order(name="a", places=(Place(layer=2, weight=3.0),), by_layer={4: 1.0}, prompt=[1])
    assert type(order.places[0].weight) is float


@pytest.mark.parametrize(
    "values, text",
    [
        ({"count": "1"}, "count: must be a whole number, not '1'"),
        ({"count": True}, "count: must be a whole number, not True"),
        ({"count": 1.0}, "count: must be a whole number, not 1.0"),
        ({"count": -1}, "count: must be at least 0, not -1"),
        ({"name": 1}, "name: must be text, not 1"),
        ({"name": ""}, "name: must be text of 1 or more characters, not ''"),
        ({"name": "\ud800"}, "name: must be text without lone surrogates, not '\\ud800'"),
        ({"on": 1}, "on: must be true or false, not 1"),
        ({"places": {"layer": 1}}, "places: must be a list, not {'layer': 1}"),
        ({"places": [{"layer": 1}, 5]}, "places[1]: must be an object, not 5"),
        ({"places": [{"layer": 101}]}, "places[0].layer: must be at most 100, not 101"),
        ({"places": [{}]}, "places[0].layer: missing"),
        ({"places": [{"layer": 1, "body": "x"}]}, "places[0].body: must be one of 'mlp' or 'norm', not 'x'"),
        ({"places": [{"layer": 1, "weight": 0}]}, "places[0].weight: must be above 0, not 0"),
        ({"places": [{"layer": 1, "weight": float("nan")}]}, "places[0].weight: must be a finite number, not nan"),
        ({"places": [{"layer": 1, "wieght": 1}]}, "places[0].wieght: unknown key; did you mean 'weight'?"),
        ({"places": [{"layer": 1, "q": 1}]}, "places[0].q: unknown key; possible: layer, body, weight"),
        ({"nmae": "a", "count": "x"}, "nmae: unknown key; did you mean 'name'?"),
        ({"by_layer": {3: 1, "x": 1}}, "by_layer.x: its keys must be a whole number, not 'x'"),
        ({"by_layer": {3: "x"}}, "by_layer[3]: must be a number, not 'x'"),
        ({"prompt": 1}, "prompt: must be text or a list, not 1"),
        ({"prompt": {"a": 1}}, "prompt: must be text or a list, not {'a': 1}"),
        ({"prompt": [1, "a"]}, "prompt[1]: must be a whole number, not 'a'"),
        ({"limit": "a"}, "limit: must be a whole number, not 'a'"),
        ({"even": 3}, "even: must be even, not 3"),
    ],
)
def test_refusals(values: Any, text: str) -> None:
    assert refusal({"name": "a", **values}) == text


def test_refusals_of_the_whole() -> None:
    assert refusal({}) == "name: missing"
    assert refusal([1], where="FILE:3") == "FILE:3: must be an object, not [1]"
    with pytest.raises(CheckpointError, match="^x: layer: must be at least 1, not 0$"):
        validated(Place, {"layer": 0}, where="x", error=CheckpointError)


ODD = [None, True, 0, -1, 2**70, 10**400, 1.5, float("nan"), "", "a", "\x1b[31m", "\ud800", [], [[1]], {}, {"layer": 1}]
KEYS = st.sampled_from([*Order.model_fields, "layer", "body", "\x1b[31m", "x" * 1000, "\ud800"])
VALUES = st.sampled_from(ODD) | st.lists(st.dictionaries(KEYS, st.sampled_from(ODD), max_size=2), max_size=2)


@settings(derandomize=True, database=None, deadline=None)
@given(st.sampled_from(ODD) | st.dictionaries(KEYS, VALUES, max_size=4))
def test_whatever_is_read_or_refused_in_one_line(values: Any) -> None:
    try:
        assert isinstance(validated(Order, values), Order)
    except ConfigError as error:
        assert str(error).isprintable() and len(str(error)) < 600


def test_help_does_not_wait_for_it() -> None:
    code = "import sys, megatron_ee.commands.main as m; m.main(['--help'])\n"
    code = f"import atexit, sys\natexit.register(lambda: print('pydantic' in sys.modules, file=sys.stderr))\n{code}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == "False\n"
