"""Process groups: alone, and undone after an error; several processes over gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch.distributed as dist

from megatron_ee.parallel.groups import Groups, world_size


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


def run(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_leaving_the_groups_leaves_torch_as_it_was() -> None:
    code = """
import torch
import torch.distributed as dist

def cuda():
    return [getattr(torch.cuda, name) for name in ("current_device", "synchronize", "empty_cache")]

before = cuda()
import megatron_ee.model.stage
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


def test_two_processes_find_each_other() -> None:
    code = """
import torch, torch.distributed as dist
from megatron_ee.parallel.groups import process_groups
with process_groups(tensor=2) as groups:
    total = torch.tensor(groups.rank + 1)
    dist.all_reduce(total, group=groups.tensor)
    print(groups.rank, groups.is_main, groups.tensor.size(), groups.data.size(), int(total))
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    processes = [run(code, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)]
    outcomes = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outcomes
    assert [out.split() for out, _ in outcomes] == [["0", "True", "2", "1", "3"], ["1", "False", "2", "1", "3"]]
