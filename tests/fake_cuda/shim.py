"""Builds ``device_guard.cpp`` once per version of torch, and loads it. Imports no torch: the shim must come first."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import zlib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("device_guard.cpp")
DEVICES = 8
"""Of one machine, as ``device_guard.cpp`` has it."""


def unavailable() -> str | None:
    """Why the shim cannot be built here, or None."""
    if sys.platform != "linux":
        return "fake CUDA devices are built for Linux alone"
    if shutil.which(_compiler()) is None:
        return f"fake CUDA devices need a C++ compiler, and there is no {_compiler()}: install g++ or set CXX"
    if any((_torch() / "lib").glob("libtorch_cuda*")):
        return "fake CUDA devices need a CPU build of torch; this one has CUDA"
    return None


@functools.cache
def load() -> ctypes.CDLL:
    """The shim, in this process from now on. Call it before torch is imported, which looks for CUDA's hooks once.

    Raises:
        RuntimeError: torch is there already.
        subprocess.CalledProcessError: the compiler failed.
    """
    if "torch" in sys.modules:
        raise RuntimeError("the shim must be loaded before torch")
    return ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)


def build() -> Path:
    """Compile the shim where that was not done yet, for this environment; its path."""
    key = zlib.crc32(SOURCE.read_bytes() + f"{_compiler()} {_torch()}".encode())  # it names torch's directory
    caches = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    library = caches / "megatron_ee" / f"fake_cuda-torch-{version('torch')}-{key:08x}" / "libdevice_guard.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_name(f"{os.getpid()}.so")  # another process may build it too
        _compile(unfinished)
        unfinished.replace(library)
    return library


def _compile(library: Path) -> None:
    torch = _torch()
    command = [
        *(_compiler(), "-std=c++20", "-O1", "-fPIC", "-shared", str(SOURCE), "-o", str(library)),
        *(f"-I{torch}/include", f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib"),
        *("-Wl,--no-as-needed", "-lc10", "-ltorch_cpu"),
    ]
    subprocess.run(command, check=True)


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _torch() -> Path:
    spec = find_spec("torch")  # finds it without importing it
    assert spec is not None and spec.origin is not None, "torch is not installed"
    return Path(spec.origin).parent
