"""What is built before a stage runs: once, kept for the next process, and not missed where it cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ee import platform
from megatron_ee.inference.loading import build_operations
from megatron_ee.model import bfloat16, kernels

BUILD = "from megatron_ee.model import bfloat16; bfloat16.build()"
FIND = "from megatron_ee.model import bfloat16; print(bfloat16.find(), bfloat16.built)"


def python(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(platform.has_accelerator() or shutil.which("g++") is None, reason="for CPUs with a C++ compiler")
def test_what_was_built_is_found(tmp_path: Path) -> None:
    assert python(FIND, TORCH_EXTENSIONS_DIR=str(tmp_path)) == "False False"
    python(BUILD, TORCH_EXTENSIONS_DIR=str(tmp_path))
    (kept,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert python(FIND, TORCH_EXTENSIONS_DIR=str(tmp_path), CXX="/nowhere/c++") == "True True"
    kept.write_bytes(b"of another system")
    assert python(FIND, TORCH_EXTENSIONS_DIR=str(tmp_path)) == "False False"
    # Where nothing can be kept, it works all the same.
    (tmp_path / "file").touch()
    python(f"{BUILD}; assert bfloat16.built", TORCH_EXTENSIONS_DIR=str(tmp_path / "file"))


def test_built_where_it_gains(
    saved_model: Any, load_stage: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = {dtype: load_stage(saved_model("qwen2")[0], [], dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    monkeypatch.setattr(bfloat16, "built", False)
    monkeypatch.setattr(bfloat16, "find", lambda: False)
    monkeypatch.setattr(bfloat16, "_is_loaded", lambda: False)
    monkeypatch.setattr(kernels, "gains_from_ours", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    capsys.readouterr()
    build_operations(stages[torch.float32].setup)
    assert not capsys.readouterr().err
    build_operations(stages[torch.bfloat16].setup)
    assert not bfloat16.built
    assert "there is no C++ compiler (/nowhere/c++); install one, or set CXX" in capsys.readouterr().err
    monkeypatch.setattr(bfloat16, "_compile", lambda: None)
    monkeypatch.setattr(bfloat16, "_begin", lambda: setattr(bfloat16, "built", True))
    build_operations(stages[torch.bfloat16].setup)
    assert bfloat16.built
