"""The cache of the final exit's validation: everything that decides the result is in its key."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.evaluation import final_exit as module
from megatron_ee.evaluation.final_exit import FinalExit, final_exit
from megatron_ee.model.setup import build_setup
from megatron_ee.tuning.full_model import FullModel
from megatron_ee.tuning.interrupt import Interrupt


@dataclasses.dataclass
class Windows:
    """What ``final_exit`` asks of validation windows."""

    fingerprint: str = "data"
    sequence_length: int = 3

    def __len__(self) -> int:
        return 2


@pytest.fixture
def computed(
    saved_model: Any, groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[bool, FinalExit]]:
    """Whether the final exit was computed rather than taken from the cache, and the result; each one is another."""
    monkeypatch.setenv("MEGATRON_EE_CACHE", str(tmp_path))
    calls = 0

    def compute(full: FullModel, windows: Windows, *_: Any) -> FinalExit:
        nonlocal calls
        calls += 1
        shape = len(windows), windows.sequence_length
        return FinalExit(torch.full(shape, float(calls)), torch.full(shape, calls))

    monkeypatch.setattr(module, "_compute", compute)

    def run(
        digest: str = "weights", windows: Windows | None = None, dtype: torch.dtype = torch.float32, **changes: Any
    ) -> tuple[bool, FinalExit]:
        before, model = calls, open_model(saved_model("llama2", **changes)[0])
        full = FullModel(build_setup(model.architecture, dtype, groups), model, Interrupt())
        result = final_exit(full, digest, windows or Windows(), 1, 512)  # type: ignore[arg-type]
        return calls > before, result

    return run


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "other weights"},
        {"windows": Windows("other data")},
        {"dtype": torch.bfloat16},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0}},
        {"rms_norm_eps": 1e-6},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_decides_the_result_is_computed_anew(change: Any, computed: Callable[..., tuple[bool, FinalExit]]) -> None:
    first, expected = computed()
    again, cached = computed()
    assert first and not again and cached.loss.equal(expected.loss) and cached.top1.equal(expected.top1)
    new, other = computed(**change)
    assert new and not other.loss.equal(expected.loss)
    assert not computed()[0] and not computed(**change)[0], "both are kept"


def test_what_does_not_decide_it_is_left_out(computed: Callable[..., tuple[bool, FinalExit]]) -> None:
    assert computed()[0]
    assert not computed(max_position_embeddings=256)[0]
