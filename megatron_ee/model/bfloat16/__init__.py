"""Products and attention of a few bfloat16 rows on CPUs, in C++ that is built on the machine it runs on.

By tiles (AMX), by vectors of pairs (AVX-512 with bfloat16), or in float32, whichever the processor has. Measured on two
cores, weights of 2 to 25 MB one after another:

- with tiles it reads up to 16 rows' weight 1.05 to 1.2 times as fast as oneDNN one that was packed for it, and takes
  7 us for a small one, oneDNN 19;
- with pairs it is 1.5 to 1.8 times as fast as oneDNN, packed, with one row, 1.1 to 1.5 times with two to eight, 0.9
  times with 16 and 0.8 times with 63, there as fast as oneDNN with the weight as it is;
- with AVX2 it is 1.2 times as fast as torch with one row; four rows take 1.4 times as long as one, which take torch
  four times as long.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

HEAD_FEATURES = 16
"""``attend`` takes heads of a multiple of it."""
FLAGS = {
    "AVX2": ["-mavx2", "-mfma", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"],
    "AVX512": [
        *("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"),
        *("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
    ],
}
"""Of the compiler, by what torch takes of the processor; others take what it does by itself."""
PAIRS = ["-mavx512bf16"]
TILES = ["-mamx-tile", "-mamx-bf16"]
built = False
"""Whether ``product`` and ``attend`` may be called."""


@functools.cache
def has_tiles() -> bool:
    """Whether this processor multiplies bfloat16 by tiles (AMX), and the system lets it."""
    return bool(torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx())


def has_pairs() -> bool:
    """Whether this processor multiplies bfloat16 by vectors of pairs (AVX-512), and torch takes that part of it."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and bool(torch.cpu._is_avx512_bf16_supported())


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


def attend(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Attention of one token of each row to what is kept of the row; scores and sums in float32. No gradient.

    Args:
        query: ``[rows, kv_heads, queries per key-value head, head_dim]``; ``head_dim`` is a multiple of
            ``HEAD_FEATURES``.
        keys: of each row, ``[1, kv_heads, kept, head_dim]``; ``values`` too.

    Returns:
        ``[rows, heads * head_dim]``.
    """
    result: Tensor = torch.ops.megatron_ee.bfloat16_attention(query, keys, values)
    return result


def _load() -> None:
    import ninja
    from torch.utils import cpp_extension  # takes long to import

    # By its instructions: processors of several kinds may share the directory that keeps it.
    kind = torch.backends.cpu.get_cpu_capability()
    name = f"megatron_ee_bfloat16_{kind.lower()}{'_pairs' if has_pairs() else ''}{'_tiles' if has_tiles() else ''}"
    flags = [*FLAGS.get(kind, []), *(PAIRS if has_pairs() else []), *(TILES if has_tiles() else [])]
    # A Python that runs without its environment's PATH has ninja all the same; and torch.compile takes g++ too.
    path = os.pathsep.join((ninja.BIN_DIR, os.environ.get("PATH", "")))
    with _environment(PATH=path, CXX=os.environ.get("CXX", "g++")):
        cpp_extension.load(
            name,
            [str(Path(__file__).with_name("operations.cpp"))],
            extra_cflags=["-O3", "-fopenmp", *flags],
            is_python_module=False,
        )
    # For the compiler. A length is a plain number, which it would take for the only one.
    torch.library.register_fake(
        "megatron_ee::bfloat16_product", lambda x, weight, _: x.new_empty(x.shape[0], weight.shape[0])
    )
    torch.library.register_fake(
        "megatron_ee::bfloat16_attention", lambda query, *_: query.new_empty(query.shape[0], query[0].numel())
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
