"""Layouts: what a configuration may list, and what travels between the stages."""

from __future__ import annotations

import pytest

from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import StageConfig
from megatron_ee.errors import ConfigError
from megatron_ee.parallel.layout import Layout, Message, StageLayout, even_layout, parse_layout

SPECS = [ExitSpec(2), ExitSpec(4), ExitSpec(6)]


def layout(*stages: tuple[tuple[int, int] | None, tuple[int, ...]]) -> Layout:
    return Layout(
        tuple(StageLayout(range(0) if ends is None else range(ends[0], ends[1] + 1), exits) for ends, exits in stages)
    )


def parse(*stages: tuple[list[int], list[int | float]], run: int = 6) -> Layout:
    return parse_layout([StageConfig(layers, exits) for layers, exits in stages], SPECS, 8, run)


def test_stages_as_listed() -> None:
    assert parse(([1, 3], [2]), ([4, 6], [6, 4])) == layout(((1, 3), (2,)), ((4, 6), (4, 6)))
    assert parse(([1, 6], [2, 4, 6])) == layout(((1, 6), (2, 4, 6)))
    # By fractions of the depth of 8, without exits, without layers, and with layers that only a teacher needs.
    assert parse(([1, 1], []), ([2, 7], [0.25]), ([8, 8], []), ([], [0.75, 0.5]), run=8) == layout(
        ((1, 1), ()), ((2, 7), (2,)), ((8, 8), ()), (None, (4, 6))
    )
    # A stage without layers may stand between others.
    assert parse(([1, 4], [2]), ([], [4]), ([5, 6], [6])).layered == (0, 2)


def test_layers_that_are_only_kept() -> None:
    given = layout(((1, 3), (2,)), ((4, 6), (4,)), ((7, 8), ()))
    clipped = given.up_to(5)
    assert [stage.layers for stage in clipped.stages] == [range(1, 4), range(4, 6), range(0)]
    assert [stage.kept for stage in clipped.stages] == [range(0), range(6, 7), range(7, 9)]
    assert clipped.whole == given and given.up_to(8) == given
    assert clipped.layered == (0, 1) and clipped.messages == (Message(0, 1, True, ()),)
    assert clipped.decodes and clipped.of_all(8) == given.with_exits(())
    # With layers missing, or without layers on a stage, they are spread evenly.
    assert clipped.of_all(10) == even_layout(10, 3)
    apart = layout(((1, 8), (2,)), (None, (4,)))
    assert not apart.decodes and apart.of_all(8) == even_layout(8, 2)
    assert not layout(((1, 4), ()), ((5, 8), (2,))).decodes


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([([1], [])], "parallel.layout[0].layers: give the first and the last layer, such as [1, 8], not [1]"),
        ([([2, 6], [2, 4, 6])], "parallel.layout[0].layers: must start at layer 1 and not end before it, not [2, 6]"),
        ([([1, 3], [2]), ([5, 6], [6])], "parallel.layout[1].layers: must start at layer 4 and not end before"),
        ([([1, 3], [2]), ([3, 6], [4, 6])], "parallel.layout[1].layers: must start at layer 4 and not end before"),
        ([([1, 3], [2]), ([4, 2], [])], "parallel.layout[1].layers: must start at layer 4 and not end before it"),
        ([([1, 7], [2, 4, 6])], "parallel.layout[0].layers: ends at 7, but no layer beyond 6 has to run; end there"),
        ([([1, 5], [2, 4])], "parallel.layout: holds layers 1 to 5, but layers up to 6 have to run"),
        ([([1, 6], [2, 4])], "parallel.layout: no stage hosts the exits after layers 6"),
        ([([1, 6], [2, 4, 5, 6])], "parallel.layout[0].exits: there is no exit after layer 5; exits has 2, 4, 6"),
        ([([1, 6], [2, 4, 6, 4])], "parallel.layout[0].exits: the exit after layer 4 is hosted twice; name it once"),
        ([([1, 6], [4, 6, 2]), ([], [2])], "parallel.layout[1].exits: the exit after layer 2 is hosted twice"),
        ([([1, 3], [2, 4]), ([4, 6], [6])], "parallel.layout[0].exits: layer 4 runs on a later stage; host its exit"),
        ([([1, 3], []), ([4, 6], [2, 4, 6])], "parallel.layout[1].exits: layer 2 is not among this stage's; host its"),
        ([([1, 6], [2, 4, 6]), ([], [])], "parallel.layout[1]: holds neither layers nor exits; remove it and lower"),
        ([([], [2]), ([1, 6], [4, 6])], "parallel.layout[0].exits: layer 2 runs on a later stage"),
        ([([1, 6], [2, 4, 9])], "parallel.layout[0].exits"),
    ],
)
def test_layouts_that_cannot_be(stages: list[tuple[list[int], list[int | float]]], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*stages)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_owners_of_layers_and_hosts_of_exits() -> None:
    stages = layout(((1, 3), (2,)), ((4, 6), (6,)), (None, (3, 5)))
    assert (stages.layered, stages.last_layered) == ((0, 1), 1)
    assert [stages.owner(layer) for layer in range(1, 7)] == [0, 0, 0, 1, 1, 1]
    assert [stages.host(layer) for layer in (2, 3, 5, 6)] == [0, 2, 2, 1]


def test_messages_go_forward_with_the_taps_of_their_source() -> None:
    assert layout(((1, 6), (2, 4, 6))).messages == ()
    assert layout(((1, 3), (2,)), ((4, 6), (4, 6))).messages == (Message(0, 1, True, ()),)
    stages = layout(((1, 2), (2,)), ((3, 6), ()), (None, (1, 4)), (None, (3, 5)))
    assert stages.messages == (
        Message(0, 1, True, ()),
        Message(0, 2, False, (1,)),
        Message(1, 2, False, (4,)),
        Message(1, 3, False, (3, 5)),
    )
    between = layout(((1, 2), ()), (None, (2,)), ((3, 4), (4,)))
    assert between.messages == (Message(0, 1, False, (2,)), Message(0, 2, True, ()))


def test_how_far_a_microbatch_has_come() -> None:
    stages = layout(((1, 2), (2,)), ((3, 4), ()), ((5, 6), (6,)), (None, (1, 4)), (None, (5,)), (None, ()))
    assert [stages.depth(index) for index in range(6)] == [0, 1, 2, 1, 2, 0]
    # A stage without exits waits for no teacher.
    assert [stages.lag(index) for index in range(6)] == [2, 0, 0, 1, 0, 0]
