"""The product of a few bfloat16 rows that ``bfloat16_product.cpp`` makes, once it is built on this machine.

For CPUs that multiply bfloat16 by tiles (AMX), and for those without any instructions of that type. Measured on two
cores, weights of 2 to 25 MB one after another:

- with AMX it reads up to 16 rows' weight 1.05 to 1.2 times as fast as oneDNN one that was packed for it, and takes 7 us
  for a small one, oneDNN 19;
- with AVX2 it is 1.2 times as fast as torch with one row; four rows take 1.4 times as long as one, which take torch
  four times as long.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

FLAGS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mfma"],
    "AMX": ["-mavx512f", "-mfma", "-mamx-tile", "-mamx-bf16"],
}
"""Of the compiler, by the kind of processor; others take what it does by itself."""
built = False
"""Whether ``product`` may be called."""


@functools.cache
def has_tiles() -> bool:
    """Whether this processor multiplies bfloat16 by tiles (AMX), and the system lets it."""
    return bool(torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx())


def build() -> None:
    """Compile it and load it. It takes ten seconds; what was made lies on disk for the next time.

    Raises:
        RuntimeError: torch cannot build it.
        OSError: there is no compiler.
        subprocess.CalledProcessError: the compiler does not work.
    """
    global built
    if not hasattr(torch.ops.megatron_ee, "bfloat16_product"):
        _load()
    built = True


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x weight^T + bias``, summed in float32: ``[rows, in]`` -> ``[rows, out]``. No gradient goes through it."""
    result: Tensor = torch.ops.megatron_ee.bfloat16_product(x, weight, bias)
    return result


def _load() -> None:
    import ninja
    from torch.utils import cpp_extension  # takes long to import

    # By its instructions: processors of several kinds may share the directory that keeps it.
    kind = "AMX" if has_tiles() else torch.backends.cpu.get_cpu_capability()
    flags = FLAGS.get(kind, [])
    # A Python that runs without its environment's PATH has ninja all the same; and torch.compile takes g++ too.
    path = os.pathsep.join((ninja.BIN_DIR, os.environ.get("PATH", "")))
    with _environment(PATH=path, CXX=os.environ.get("CXX", "g++")):
        cpp_extension.load(
            f"megatron_ee_bfloat16_product_{kind.lower()}",
            [str(Path(__file__).with_suffix(".cpp"))],
            extra_cflags=["-O3", "-fopenmp", *flags],
            is_python_module=False,
        )
    torch.library.register_fake(
        "megatron_ee::bfloat16_product", lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0])
    )


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
