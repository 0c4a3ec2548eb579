"""What stands in for CUDA is there while it is needed and gone afterwards."""

from __future__ import annotations

import pytest
import torch

from megatron_ee import platform

cpu_only = pytest.mark.skipif(platform.has_accelerator(), reason="the stand-in does nothing on a GPU")
NAMES = ("current_device", "synchronize", "empty_cache")


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
