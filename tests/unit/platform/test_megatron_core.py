"""What stands in for CUDA is there while it is needed and gone afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_ee import platform

cpu_only = pytest.mark.skipif(platform.has_accelerator(), reason="the stand-in does nothing on a GPU")

NAMES = ("current_device", "current_stream", "synchronize", "empty_cache")


def cuda_functions() -> list[object]:
    return [getattr(torch.cuda, name) for name in NAMES]


def open_modes() -> int:
    return torch._C._len_torch_function_stack()


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


@pytest.mark.slow
@pytest.mark.parametrize("spared", [True, False])
def test_an_optimizer_does_not_load_torchs_compiler(spared: bool) -> None:
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = ", ".join(f"Optimizer.{name}" for name in names)
    code = OPTIMIZER.replace("CALL", f"platform.without_compiler({methods})" if spared else "")
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert child.stdout.split() == ["0.5", str(not spared)]


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
