"""What stands in for CUDA is there while it is needed and gone afterwards."""

from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.nn import attention

from megatron_ee import platform
from megatron_ee.errors import UserError
from megatron_ee.inference.loading import free_memory

cpu_only = pytest.mark.skipif(platform.has_accelerator(), reason="the stand-in does nothing on a GPU")
NAMES = ("current_device", "current_stream", "synchronize", "empty_cache")


def cuda_functions() -> list[object]:
    return [getattr(torch.cuda, name) for name in NAMES]


def open_modes() -> int:
    return torch._C._len_torch_function_stack()


def test_what_this_machine_has() -> None:
    accelerator = torch.cuda.is_available()
    assert platform.has_accelerator() == accelerator
    assert platform.device().type == ("cuda" if accelerator else "cpu")
    assert platform.communication_backend() == ("nccl" if accelerator else "gloo")
    assert platform.DTYPES == {"float32": torch.float32, "bfloat16": torch.bfloat16}
    platform.synchronize()


def test_peak_memory_grows_with_what_is_held() -> None:
    before = platform.peak_memory()
    held = torch.ones(2**20, device=platform.device())
    assert before > 0 and platform.peak_memory() >= before
    assert held.numel() * 4 < platform.peak_memory() < 2**40


@pytest.mark.parametrize(
    "name, kernels",
    [("tuning_attention", "flash cudnn efficient math"), ("inference_attention", "flash efficient math")],
)
def test_attention_kernels_and_their_order_on_an_accelerator(
    name: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def enabled() -> list[str]:
        backends = attention._cur_sdpa_kernel_backends(with_priority=True)
        return [backend.name.removesuffix("_ATTENTION").lower() for backend in backends]

    before = enabled()
    with getattr(platform, name)():
        assert enabled() == before or platform.has_accelerator(), "a CPU keeps torch's choice"
    monkeypatch.setattr(platform, "has_accelerator", lambda: True)
    with getattr(platform, name)():
        assert " ".join(enabled()) == kernels
    assert enabled() == before


@cpu_only
def test_peak_memory_is_this_process_alone() -> None:
    held = torch.ones(500 * 2**20, dtype=torch.uint8)
    assert platform.peak_memory() > len(held)
    code = "from megatron_ee.platform import peak_memory; print(peak_memory())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert int(child.stdout) < platform.peak_memory() - 200 * 2**20


def test_megatron_core_is_imported_without_torchs_compiler() -> None:
    code = "import sys, megatron_ee.tuning.run, torch; assert torch.compile.__module__ == 'torch'; print(*sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    loaded = child.stdout.split()
    assert "megatron.core.distributed" in loaded and "torch._inductor.lowering" not in loaded


OPTIMIZER = """
import sys
import torch
from torch.optim import Optimizer
from megatron_ee import platform
CALL
optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
optimizer.load_state_dict(optimizer.state_dict())
optimizer.zero_grad()
print(optimizer.param_groups[0]["lr"], "torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize("spared", [True, False])
def test_an_optimizer_does_not_load_torchs_compiler(spared: bool) -> None:
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = ", ".join(f"Optimizer.{name}" for name in names)
    code = OPTIMIZER.replace("CALL", f"platform.without_compiler({methods})" if spared else "")
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert child.stdout.split() == ["0.5", str(not spared)]


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
@pytest.mark.parametrize(("hidden", "elements"), [(64, 2**21), (4096, 3 * 2**17)])  # of 8 and 1.5 MB
def test_freed_tensors_go_back_to_the_system(hidden: int, elements: int) -> None:
    code = RETAINED.replace("CALL", f"platform.return_freed_memory({hidden})").replace("2**21", str(elements))
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert int(child.stdout) < 20 * elements


@cpu_only
def test_stand_in_is_undone() -> None:
    before = cuda_functions()
    with platform.stand_in():
        assert torch.cuda.current_device() == torch.device("cpu")
        torch.cuda.synchronize()
        torch.cuda.synchronize(0)
        torch.cuda.empty_cache()
        assert all(now is not then for now, then in zip(cuda_functions(), before, strict=True))
        assert open_modes() == 0, "a function mode would slow every operation"
    assert cuda_functions() == before
    with pytest.raises(ZeroDivisionError), platform.stand_in():
        raise ZeroDivisionError
    assert cuda_functions() == before


@cpu_only
def test_translated_is_undone() -> None:
    with platform.translated():
        assert open_modes() == 1
        for device in ("cuda", "cuda:0", torch.device("cuda", 0)):
            assert torch.empty(3, device=device).device.type == "cpu"
        assert torch.zeros(3, device="cpu").device.type == "cpu"
        assert torch.ones(2).type() == "torch.cuda.FloatTensor"
        assert torch.ones(2, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.ones(2).type(torch.float64).dtype == torch.float64  # only the question is answered differently
    assert open_modes() == 0
    assert torch.ones(2).type() == "torch.FloatTensor"
    with pytest.raises(ZeroDivisionError), platform.translated():
        raise ZeroDivisionError
    assert open_modes() == 0
    with pytest.raises((AssertionError, RuntimeError)):
        torch.empty(3, device="cuda")


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
    monkeypatch.setattr(platform, "has_accelerator", lambda: True)
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
    monkeypatch.setattr(platform, "has_accelerator", lambda: True)
    monkeypatch.setattr(platform, "device", lambda: torch.device("cuda", 0))
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


@pytest.mark.parametrize(
    ("threads", "load", "busy", "advice"),
    [(2, 1.2, 50.0, "OMP_NUM_THREADS=1"), (2, 9.0, 100.0, "OMP_NUM_THREADS=1"), (1, 1.2, 50.0, ""), (2, 1.2, 3.0, "")],
)
def test_a_busy_machine_is_told_once(
    threads: int,
    load: float,
    busy: float,
    advice: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(platform.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(platform.os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: busy)
    monkeypatch.setattr(platform, "has_accelerator", lambda: False)
    platform.warn_if_busy.cache_clear()
    platform.warn_if_busy()
    platform.warn_if_busy()
    said = capsys.readouterr().err
    assert said.count("\n") == bool(advice) and advice in said


def test_a_timer_measures_what_lies_between() -> None:
    timer = platform.DeviceTimer()
    time.sleep(0.05)
    timer.stop()
    time.sleep(0.05)
    assert 0.05 <= timer.seconds() < 0.1 or platform.has_accelerator()


def test_a_timer_waits_for_its_events_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, other: Event) -> float:
            return 250.0

    monkeypatch.setattr(platform, "has_accelerator", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = platform.DeviceTimer()
    timer.stop()
    assert log == ["record", "record"]
    assert timer.seconds() == 0.25 and log[2:] == ["wait"]
