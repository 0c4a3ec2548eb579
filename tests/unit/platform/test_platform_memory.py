"""Memory of the device and of the machine: what is used, free, locked and given back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_ee import platform
from megatron_ee.errors import UserError
from megatron_ee.inference.loading import free_memory
from megatron_ee.platform import memory

cpu_only = pytest.mark.skipif(platform.has_accelerator(), reason="the stand-in does nothing on a GPU")


def test_peak_memory_grows_with_what_is_held() -> None:
    before = platform.peak_memory()
    held = torch.ones(2**20, device=platform.device())
    assert before > 0 and platform.peak_memory() >= before
    assert held.numel() * 4 < platform.peak_memory() < 2**40


@cpu_only
def test_peak_memory_is_this_process_alone() -> None:
    held = torch.ones(500 * 2**20, dtype=torch.uint8)
    assert platform.peak_memory() > len(held)
    code = "from megatron_ee.platform import peak_memory; print(peak_memory())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert int(child.stdout) < platform.peak_memory() - 200 * 2**20


RETAINED = """
import torch
from megatron_ee import platform
def held(): return int(open("/proc/self/statm").read().split()[1]) * 4096
CALL
first = torch.ones(2**21)  # freed, it teaches glibc to keep such
del first
before = held()
tensors = [torch.ones(2**21) for _ in range(20)]
small = [torch.ones(2**12) for _ in range(100)]  # lie above them
del tensors
print(held() - before)
"""


@cpu_only
@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
@pytest.mark.parametrize(
    ("hidden", "elements"),
    [(64, 2**21), pytest.param(4096, 3 * 2**17, marks=pytest.mark.slow)],  # of 8 and 1.5 MB
)
def test_freed_tensors_go_back_to_the_system(hidden: int, elements: int) -> None:
    code = RETAINED.replace("CALL", f"platform.return_freed_memory({hidden})").replace("2**21", str(elements))
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert int(child.stdout) < 20 * elements


class Runtime:
    """Stands for the CUDA runtime's page-locking; ``status``: what it answers."""

    def __init__(self, status: int) -> None:
        self.status, self.locked = status, dict[int, int]()

    def cudaHostRegister(self, pointer: int, nbytes: int, flags: int) -> int:  # noqa: N802 - its name
        self.locked |= {} if self.status else {pointer: nbytes}
        return self.status

    def cudaHostUnregister(self, pointer: int) -> None:  # noqa: N802
        del self.locked[pointer]


@cpu_only
def test_host_buffers_are_locked_as_long_as_they_live(monkeypatch: pytest.MonkeyPatch) -> None:
    assert platform.host_buffer(10).numel() == 10  # without an accelerator, plain memory
    runtime = Runtime(0)
    monkeypatch.setattr(memory, "has_accelerator", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    buffer = platform.host_buffer(4096)
    assert runtime.locked == {buffer.data_ptr(): 4096}
    assert platform.host_buffer(0).numel() == 0 and len(runtime.locked) == 1
    del buffer
    assert runtime.locked == {}
    runtime.status = 2
    with pytest.raises(UserError, match="checkpoint.asynchronous"):
        platform.host_buffer(4096)


def test_processes_with_one_visible_device_each_do_not_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert platform.memory_name() == platform.memory_name()
    monkeypatch.setattr(memory, "has_accelerator", lambda: True)
    monkeypatch.setattr(memory, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 12)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5)
    names = []
    for uuid in ("GPU-1", "GPU-2", "GPU-1"):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, uuid=uuid: SimpleNamespace(uuid=uuid))
        names.append(platform.memory_name())
    groups = SimpleNamespace(gather=lambda own: names)
    assert names[0] == names[2] != names[1]
    assert free_memory(groups) == 40 + 7  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-2"))
    assert free_memory(groups) == 80 + 7  # type: ignore[arg-type]


def test_processes_share_the_memory() -> None:
    whole, part = platform.free_memory(), platform.free_memory(4)
    assert 0.2 * whole < part < 0.3 * whole


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("count", [1, 5_000, 300_000])
def test_zeros(offset: int, count: int) -> None:
    """Whole pages and what is left over at both ends; the neighbours stay."""
    around = torch.ones(count + 6, device=platform.device())
    inside = around[offset : offset + count]
    platform.zero_(inside)
    assert not inside.any() and around.sum() == 6
    inside += 2
    assert around.sum() == 6 + 2 * count


@cpu_only
@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_zeros_take_no_memory() -> None:
    import psutil

    process, tensor = psutil.Process(), torch.ones(2**24)
    before = process.memory_info().rss
    platform.zero_(tensor)
    assert before - process.memory_info().rss > 0.9 * tensor.nbytes


def control_groups(directory: Path, groups: dict[str, str], files: dict[str, str]) -> list[tuple[int, int]]:
    """``control_group_limits`` of a process in ``groups``, by controllers, where the file system has ``files``."""
    listed = directory / "cgroup"
    listed.write_text("".join(f"{number}:{name}:{path}\n" for number, (name, path) in enumerate(groups.items())))
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return memory.control_group_limits(listed, directory)


def test_limits_of_a_batch_job_and_of_the_groups_above_it(tmp_path: Path) -> None:
    files = {
        "slurm/job/memory.max": "100\n",
        "slurm/job/memory.current": "60\n",
        "slurm/job/memory.stat": "anon 20\ninactive_file 30\n",
        "slurm/memory.max": "max\n",
        "slurm/memory.current": "70\n",
        "slurm/memory.stat": "inactive_file 0\n",
    }
    assert control_groups(tmp_path, {"": "/slurm/job"}, files) == [(100, 30)]


def test_limits_of_a_container_that_sees_itself_as_the_root(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": "100\n",
        "memory/memory.usage_in_bytes": "60\n",
        "memory/memory.stat": "total_inactive_file 10\n",
    }
    assert control_groups(tmp_path, {"cpu": "/", "memory": "/docker/0123"}, files) == [(100, 50)]
    assert control_groups(tmp_path, {"cpu": "/"}, {}) == []
    assert memory.control_group_limits(tmp_path / "none", tmp_path) == []


def test_a_limit_is_less_than_what_the_machine_has_free(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = platform.free_host_memory()
    for limits, expected in (([(2**60, 0)], whole), ([(1000, 300), (900, 100)], 700), ([(1000, 2000)], 0)):
        monkeypatch.setattr(memory, "control_group_limits", lambda limits=limits: limits)
        assert platform.free_host_memory() == pytest.approx(expected, rel=0.2)
