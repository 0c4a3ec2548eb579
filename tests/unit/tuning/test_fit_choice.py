"""Which solution a fitted exit keeps, and which exits are fitted together."""

from __future__ import annotations

import math
from typing import Any

from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.fit import fit_bytes
from megatron_ee.tuning.fit import choose, split_turns


def test_the_lowest_loss_is_taken_if_it_agrees_more() -> None:
    assert choose([(0.2, 5.0), (0.3, 4.0), (0.4, 3.5), (0.1, 4.5)]) == (2, True)
    assert choose([(0.4, 5.0), (0.3, 4.0), (0.4, 3.5)]) == (2, False)
    assert choose([(0.0, 5.0), (0.3, math.nan), (0.2, 6.0)]) == (2, True)


def test_exits_share_a_turn_while_their_sums_fit(saved_model: Any, load_stage: Any) -> None:
    setup = load_stage(saved_model("llama2")[0]).setup
    specs = [ExitSpec(layer) for layer in (1, 2, 3)] + [ExitSpec(4, "norm")]
    sums, solving = fit_bytes(setup.architecture.ffn_size, setup.architecture.hidden_size, 1)
    assert split_turns(specs, setup, 2 * sums + solving) == [{1, 2}, {3, 4}]
    assert split_turns(specs, setup, 3 * sums + solving) == [{1, 2, 3, 4}]
    assert split_turns(specs, setup, 0) == [{1}, {2}, {3}, {4}]
    assert split_turns([], setup, 0) == []
