"""Bytes on disk and in host memory, worked out by hand, and those that a real run writes."""

from __future__ import annotations

from typing import Any

from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.load import config_from_dict
from megatron_ee.planning.parameters import layer_parameters, trained_parameters
from megatron_ee.planning.storage import HostMemory, disk_use, host_memory, saves
from megatron_ee.planning.workload import make_workload
from megatron_ee.testing.models import llama2_7b

MODEL = llama2_7b()
SPECS = [ExitSpec(8, init="fit"), ExitSpec(16, "norm", "shared")]
COUNT = sum(trained_parameters(MODEL, spec) for spec in SPECS)
VALUES: dict[str, Any] = {
    "model": {"path": "m", "dtype": "bfloat16"},
    "exits": [{"layer": 8}],
    "data": {"train": ["c"], "validation": ["v"], "sequence_length": 1024},
    "tuning": {"steps": 2500},
}


def test_disk() -> None:
    config = config_from_dict(VALUES)
    use = disk_use(config, MODEL, SPECS, make_workload(config, MODEL, 1))
    # Weights, two float32 moments, and the other half of the float32 weights.
    assert use.checkpoint == COUNT * (2 + 8 + 2)
    assert (use.adapter, use.adapters) == (2 * COUNT, 3)  # the last, the best, the fitted ones
    assert (use.checkpoints, use.cache) == (2, 256 * 1024 * 12)
    assert use.most == 3 * use.checkpoint + 4 * use.adapter + use.cache


def test_what_changes_it() -> None:
    changed = {"data": {"train": ["c"]}, "model": {"path": "m", "dtype": "float32"}}
    config = config_from_dict({**VALUES, **changed, "optimizer": {"decay_towards": "initial"}})
    gated = [ExitSpec(8, gate=True)]
    use = disk_use(config, MODEL, gated, make_workload(config, MODEL, 1))
    count = trained_parameters(MODEL, gated[0])
    assert use.checkpoint == count * (4 + 8) + (count - 4096) * 4  # norms do not decay
    assert (use.adapter, use.adapters, use.cache) == (4 * count + 4 * 4097, 1, 0)


def test_number_of_checkpoints() -> None:
    def count(steps: int, interval: int) -> int:
        return saves(config_from_dict({**VALUES, "tuning": {"steps": steps}, "checkpoint": {"interval": interval}}))

    # The last step is saved once, also where the interval ends there.
    assert [count(2500, 1000), count(2000, 1000), count(10, 1000), count(2500, 0), count(0, 1000)] == [3, 2, 1, 1, 1]


def test_host_memory() -> None:
    config = config_from_dict(VALUES)
    workload = make_workload(config, MODEL, 1)
    assert host_memory(config, MODEL, SPECS, workload) == HostMemory(checkpoint=12 * COUNT)
    waiting = config_from_dict({**VALUES, "checkpoint": {"asynchronous": False}})
    assert host_memory(waiting, MODEL, SPECS, workload) == HostMemory()
    # The tokens of gates: 16 for each of 4,096 features, for the last and the best adapter.
    gated, tokens = [ExitSpec(8, "norm", "shared", gate=True)], 16 * 4096 * 4096 * 2
    assert host_memory(waiting, MODEL, gated, workload) == HostMemory(gates=2 * tokens)
    # With distillation a checkpoint may be written meanwhile, of 4,096 weights with their optimizer state.
    distils = config_from_dict({**VALUES, "loss": {"distillation": {"kl": 1.0}}})
    found = host_memory(distils, MODEL, gated, make_workload(distils, MODEL, 1))
    assert found == HostMemory(gates=tokens, checkpoint=12 * 4096, gates_while_tuning=True)
    assert found.total == tokens + 12 * 4096
    # Streamed layers: all of each replica in host memory, or one on its way from the disk.
    layer, quick = 2 * layer_parameters(MODEL), [ExitSpec(8, "norm", "shared")]
    for residency, count in (("host", 32), ("disk", 1)):
        model = {"path": "m", "dtype": "bfloat16", "residency": residency}
        streamed = config_from_dict({**VALUES, "model": model, "checkpoint": {"asynchronous": False}})
        found = host_memory(streamed, MODEL, quick, make_workload(streamed, MODEL, 2))
        assert found == HostMemory(layers=2 * count * layer)
    host = config_from_dict({**VALUES, "optimizer": {"implementation": "deepspeed_cpu"}})
    found = host_memory(host, MODEL, SPECS, make_workload(host, MODEL, 1))
    assert found == HostMemory(optimizer=16 * COUNT, checkpoint=12 * COUNT)
    # Without distillation gates are fitted after tuning; layers are streamed all the time.
    assert HostMemory(layers=1, optimizer=4, checkpoint=3, gates=6).total == 8
