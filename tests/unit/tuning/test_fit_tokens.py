"""Which tokens exits are fitted on, and which are held out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_ee.config.schema import DataConfig, FitConfig, ModelConfig, RunConfig, TuningConfig
from megatron_ee.data.loader import Sample
from megatron_ee.errors import DataError
from megatron_ee.tuning.fit_tokens import Tokens, read_tokens
from megatron_ee.tuning.interrupt import Interrupt

LENGTH = 16


class Blend:
    """Sequences with a number of unmasked tokens each."""

    def __init__(self, *counts: int) -> None:
        self.counts, self.samples_per_epoch = counts, (len(counts),)

    def __getitem__(self, index: int) -> Sample:
        tokens = np.full(LENGTH, index)
        return tokens, tokens, np.arange(LENGTH) >= LENGTH - self.counts[index % len(self.counts)]


def read(groups: Any, blend: Any, batch: int, micro: int, fit: FitConfig | None = None, start: int = 0) -> Tokens:
    config = RunConfig(
        ModelConfig(""),
        [],
        DataConfig([], sequence_length=LENGTH),
        tuning=TuningConfig(global_batch_size=batch, micro_batch_size=micro),
        fit=fit or FitConfig(),
    )
    return read_tokens(config, blend, 2, groups, Interrupt(), start)


def unmasked(steps: Any) -> list[tuple[int, int]]:
    """Sequence and position of every unmasked token."""
    return [
        (int(number), int(place))
        for step in steps
        for batch in step
        for row, number in zip(batch.mask, batch.sequences, strict=True)
        for place in row.nonzero()[:, 0]
    ]


@pytest.mark.parametrize("batch, micro", [(1, 1), (4, 2), (4, 4)])
def test_the_last_sequences_are_held_out(batch: int, micro: int, groups: Any) -> None:
    blend = Blend(3, 16, 0, 8, 16, 5, 9, 0)
    tokens = read(groups, blend, batch, micro, FitConfig(tokens=1000))
    fitted, held_out = unmasked(tokens.fitted), unmasked(tokens.held_out)
    assert {number for number, _ in held_out} == {5, 6}  # at most a quarter of 57 tokens, rounded up to sequences
    assert {number for number, _ in fitted} == {0, 1, 3, 4}
    assert len(fitted) == tokens.num_fitted == 43 and len(held_out) == tokens.num_held_out == 14
    assert all(batch.num_tokens == int(batch.mask.sum()) for step in tokens.fitted for batch in step)


def test_as_many_as_asked_by_whole_batches(groups: Any) -> None:
    blend = Blend(*[16] * 40)
    tokens = read(groups, blend, 2, 2, FitConfig(tokens=100))
    assert tokens.num_fitted + tokens.num_held_out == 128  # four batches of 32
    automatic = read(groups, blend, 1, 1)
    assert automatic.num_fitted + automatic.num_held_out == 32  # 16 for each of two features


def test_later_tokens(groups: Any) -> None:
    tokens = read(groups, Blend(*[16] * 40), 2, 2, FitConfig(tokens=100), start=36)
    assert {number for number, _ in unmasked(tokens.fitted)} == set(range(36, 42))  # on into the next epoch
    assert {number for number, _ in unmasked(tokens.held_out)} == {42, 43}
    most = read(groups, Blend(*[16] * 6), 2, 2, FitConfig(tokens=1000), start=4)
    assert most.num_fitted + most.num_held_out == 96  # one epoch


def test_a_single_sequence_is_cut(groups: Any) -> None:
    tokens = read(groups, Blend(16), 1, 1)
    assert unmasked(tokens.fitted) == [(0, place) for place in range(12)]
    assert unmasked(tokens.held_out) == [(0, place) for place in range(12, 16)]
    with pytest.raises(DataError, match="too few unmasked tokens to fit exits on"):
        read(groups, Blend(0), 1, 1)
