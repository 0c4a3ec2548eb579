"""What differs between CPU and GPU in how they compute."""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn import attention

from megatron_ee import platform
from megatron_ee.platform import accelerator


def test_what_this_machine_has() -> None:
    there = torch.cuda.is_available()
    assert platform.has_accelerator() == there
    assert platform.device().type == ("cuda" if there else "cpu")
    assert platform.communication_backend() == ("nccl" if there else "gloo")
    assert platform.DTYPES == {"float32": torch.float32, "bfloat16": torch.bfloat16}
    platform.synchronize()


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
    monkeypatch.setattr(accelerator, "has_accelerator", lambda: True)
    with getattr(platform, name)():
        assert " ".join(enabled()) == kernels
    assert enabled() == before


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
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: busy)
    monkeypatch.setattr(accelerator, "has_accelerator", lambda: False)
    platform.warn_if_busy.cache_clear()
    platform.warn_if_busy()
    platform.warn_if_busy()
    said = capsys.readouterr().err
    assert said.count("\n") == bool(advice) and advice in said
