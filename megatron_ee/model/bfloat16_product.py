"""The product of a few bfloat16 rows that ``bfloat16_product.cpp`` makes, once it is built on this machine.

For CPUs without instructions of bfloat16. With AVX2 on two cores, and weights of 2 to 11 MB one after another, it is
1.2 times as fast as torch with one row; four rows take 1.4 times as long as one, which take torch four times as long.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

built = False
"""Whether ``product`` may be called."""


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
    kind = torch.backends.cpu.get_cpu_capability()
    flags = {"AVX2": ["-mavx2", "-mfma"], "AVX512": ["-mavx512f", "-mfma"]}.get(kind, [])
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
