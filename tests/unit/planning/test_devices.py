"""The table of GPUs, and what a plan needs of one."""

from __future__ import annotations

import pytest

from megatron_ee.errors import ConfigError
from megatron_ee.planning.devices import DEVICES, find_device, memory_needed


def test_figures_are_those_of_the_data_sheets() -> None:
    """Per direction and without sparsity, in plain units."""
    h100, card = find_device("h100"), find_device("rtx4090")
    assert (h100.memory, h100.bandwidth, h100.bfloat16, h100.watts, h100.link) == (80e9, 3350e9, 989e12, 700, 450e9)
    assert (card.memory, card.bandwidth, card.bfloat16, card.watts) == (24e9, 1008e9, 165.2e12, 450)
    for device in DEVICES.values():
        assert device.float64 <= device.float32 < device.bfloat16
        assert device.host_link <= 64e9 < device.bandwidth


def test_an_unknown_name_is_refused_with_the_list() -> None:
    with pytest.raises(ConfigError, match="^--gpu: 'h1000' is unknown; possible: h100, h200, a100, a100-40gb, b200"):
        find_device("h1000")


def test_a_gpu_needs_more_than_the_tensors() -> None:
    assert memory_needed(20e9) == 22e9
