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
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.errors import first_line

NAME = "megatron_ee_bfloat16"
SOURCES = Path(__file__).parent
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


def find() -> bool:
    """Load what was built before, by this version of it and of torch and for such a processor; whether there is any."""
    if not _is_loaded():
        try:
            torch.ops.load_library(_kept())
        except OSError:  # there is none, or it was made on another system
            return False
    _begin()
    return True


def build() -> None:
    """Compile it, in ten seconds, and load it. What was made lies on disk for ``find``.

    Raises:
        RuntimeError: it cannot be built; in one line, why.
    """
    if not _is_loaded():
        _compile()
    _begin()


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x weight^T + bias``, summed in float32: ``[rows, in]`` -> ``[rows, out]``. No gradient goes through it."""
    result: Tensor = torch.ops.megatron_ee.bfloat16_product(x, weight, bias)
    return result


def attend(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Attention of rows' newest tokens to what is kept up to them; scores and sums in float32. No gradient.

    Args:
        query: ``[rows * tokens, kv_heads, queries per key-value head, head_dim]``, as many tokens of each row;
            ``head_dim`` is a multiple of ``HEAD_FEATURES``.
        keys: of each row, ``[1, kv_heads, kept, head_dim]``, its tokens' at the end; ``values`` too.

    Returns:
        ``[rows * tokens, heads * head_dim]``.
    """
    result: Tensor = torch.ops.megatron_ee.bfloat16_attention(query, keys, values)
    return result


def _compile() -> None:
    import ninja
    from torch.utils import cpp_extension  # takes long to import

    # A Python that runs without its environment's PATH has ninja all the same; and torch.compile takes g++ too.
    path = os.pathsep.join((ninja.BIN_DIR, os.environ.get("PATH", "")))
    compiler, there = platform.cpp_compiler()
    if not there:
        raise RuntimeError(f"there is no C++ compiler ({compiler}); install one, or set CXX")
    # In a directory of its own: torch locks the usual one, for ever where a process is killed.
    with tempfile.TemporaryDirectory() as directory, _environment(PATH=path, CXX=compiler):
        try:
            cpp_extension.load(
                NAME,
                [str(SOURCES / "operations.cpp")],
                extra_cflags=["-O3", "-fopenmp", *_flags()],
                build_directory=directory,
                is_python_module=False,
            )
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"its operations cannot be compiled here ({first_line(error)})") from error
        with contextlib.suppress(OSError):  # where it cannot be kept, it is built each time
            _keep(Path(directory) / f"{NAME}.so")


def _is_loaded() -> bool:
    return hasattr(torch.ops.megatron_ee, "bfloat16_product")


def _begin() -> None:
    """Say what the compiler has to know; from now on it is called."""
    global built
    # A length is a plain number, which the compiler would take for the only one.
    torch.library.register_fake(
        "megatron_ee::bfloat16_product", lambda x, weight, _: x.new_empty(x.shape[0], weight.shape[0])
    )
    torch.library.register_fake(
        "megatron_ee::bfloat16_attention", lambda query, *_: query.new_empty(query.shape[0], query[0].numel())
    )
    built = True


def _flags() -> list[str]:
    kind = torch.backends.cpu.get_cpu_capability()
    return [*FLAGS.get(kind, []), *(PAIRS if has_pairs() else []), *(TILES if has_tiles() else [])]


def _kept() -> Path:
    """Where it lies, under a name of all that it is made of: processors of several kinds may share the directory."""
    made_of = [path.read_bytes() for path in sorted((*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")))]
    made_of.append(" ".join((torch.__version__, os.uname().machine, *_flags())).encode())
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(root) / NAME / f"{hashlib.sha256(b'|'.join(made_of)).hexdigest()[:16]}.so"


def _keep(library: Path) -> None:
    """Copy it to where it is looked for, at once: others may be looking, or making it too."""
    kept = _kept()
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as directory:
        Path(shutil.copy(library, directory)).replace(kept)


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
