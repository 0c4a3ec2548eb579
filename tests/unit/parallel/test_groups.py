"""Process groups: alone, and undone after an error; several processes over gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from megatron_ee import platform
from megatron_ee.errors import ConfigError
from megatron_ee.parallel.groups import Groups, collective_minutes, joined_processes, world_size
from megatron_ee.testing.ranks import free_port


def test_a_world_of_one(groups: Groups) -> None:
    assert (groups.tensor.size(), groups.pipeline.size(), groups.data.size()) == (1, 1, 1)
    assert groups.rank == 0 and groups.is_main
    assert groups.collection.tp is groups.tensor and groups.collection.pp is groups.pipeline
    assert dist.get_world_size() == 1


def test_world_size_is_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert world_size() == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "x"}, "RANK: must be a whole number in the environment, not 'x'; start with torchrun"),
        ({"RANK": "-1"}, "RANK: must be a whole number"),
        ({"RANK": "2"}, "RANK: must be below WORLD_SIZE 2, not 2"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: must be a whole number"),
        ({"MASTER_PORT": "y"}, "MASTER_PORT: must be a whole number"),
        ({"MASTER_PORT": None}, "MASTER_PORT: not in the environment, but RANK and MASTER_ADDR are"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT: must be from 1 to 65535, not 99999"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE: not in the environment"),
    ],
)
def test_what_launchers_set_is_checked(
    changes: dict[str, str | None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**whole, **changes}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"^{message}"), joined_processes():
        pass


def test_a_port_that_is_taken_is_named() -> None:
    code = """
from megatron_ee.errors import ConfigError
from megatron_ee.parallel.groups import joined_processes
try:
    with joined_processes():
        pass
except ConfigError as error:
    print(error)
"""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        process = run(code, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        out, err = process.communicate(timeout=120)
    assert out.startswith(f"MASTER_ADDR, MASTER_PORT: the processes cannot meet at 127.0.0.1:{port}: "), err
    assert "address already in use" in out and out.endswith("choose another one\n")


def test_collectives_end_after_the_watchdog_has_named_a_lost_rank() -> None:
    assert collective_minutes(60) == 10
    assert collective_minutes(1200) == 40


@pytest.mark.parametrize("visible, taken", [(8, 3), (2, 1), (1, 0)])
def test_a_process_takes_one_of_the_devices_that_it_sees(
    visible: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of its machine's, or its own alone."""
    found: list[int] = []
    monkeypatch.setattr(platform, "has_accelerator", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    for name in ("init_process_group", "new_group", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *_, **__: None)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with joined_processes():
        assert found == [taken]


def run(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_leaving_the_groups_leaves_torch_as_it_was() -> None:
    code = """
import torch
import torch.distributed as dist

def cuda():
    return [getattr(torch.cuda, name) for name in ("current_device", "synchronize", "empty_cache")]

before = cuda()
import megatron_ee.exits.stage
import megatron_ee.parallel.optimizer
from megatron_ee.parallel.groups import process_groups

for tensor in (1, 1, 3):  # three do not fit one process
    try:
        with process_groups(tensor) as groups:
            assert torch._C._len_torch_function_stack() == 0
            print(groups.tensor.size())
            raise KeyError("inside")
    except (KeyError, RuntimeError) as error:
        print(type(error).__name__)
    assert not dist.is_initialized()
    assert cuda() == before and torch._C._len_torch_function_stack() == 0
"""
    process = run(code)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.split() == ["1", "KeyError", "1", "KeyError", "RuntimeError"]
    assert "Warning" not in err, err


@pytest.mark.slow
def test_two_processes_find_each_other() -> None:
    code = """
import torch, torch.distributed as dist
from megatron_ee.parallel.groups import process_groups
new_group, limits = dist.new_group, set()
def recorded(*args, timeout=None, **kwargs):
    limits.add(str(timeout))
    return new_group(*args, timeout=timeout, **kwargs)
dist.new_group = recorded
with process_groups(tensor=2, timeout_minutes=7) as groups:
    total = torch.tensor(groups.rank + 1)
    dist.all_reduce(total, group=groups.tensor)
    print(groups.rank, groups.is_main, groups.tensor.size(), groups.data.size(), int(total), *sorted(limits))
"""
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "CUDA_VISIBLE_DEVICES": "",
    }
    processes = [run(code, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)]
    outcomes = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outcomes
    # Each group has the run's time limit, but for those on the host.
    limits = ["0:07:00", "12:00:00"]
    expected = [["0", "True", "2", "1", "3", *limits], ["1", "False", "2", "1", "3", *limits]]
    assert [out.split() for out, _ in outcomes] == expected
