"""Sizes of the pieces that are computed at a time, per kind of device. They are chosen when a stage is built.

Pure: the plan asks for an accelerator's numbers on machines without one.
"""

from __future__ import annotations

from dataclasses import dataclass

LOGITS = 2**26
"""Logits that an accelerator computes at a time: 256 MiB in float32, far more than it needs to be busy."""
WINDOW_QUERIES = 512
"""Queries of a sliding window that are computed together. Smaller blocks compute fewer scores that the window hides and
need a smaller mask, but launch more kernels."""
TOP_RUN = 64
"""Columns of the teacher's logits that are sorted only if their maximum is large enough. Divides the padded
vocabulary."""
UPDATE_RUN = 2**24
"""Largest number of elements whose main weights the split optimizer joins in float32 at a time."""


@dataclass(frozen=True)
class Tiles:
    """Sizes of the pieces that are computed at a time. The defaults are for a CPU.

    Attributes:
        logit_tokens: tokens whose logits exist at a time, at most. On a CPU more take as long (float32) or spare a
            tenth of a head's time (bfloat16, two cores), for twice the memory.
        graph_tokens: tokens that an exit works on at a time, at least, for its weights' gradients to be worth adding
            up. On an accelerator adding them takes as long as computing them from some 500 tokens.
        head_rows: rows of a head ``[vocab, hidden]`` that features are multiplied with at a time. MKL first copies its
            operands: of 2048 rows that takes a third of the memory, and the product 5% less time.
        cached_bytes: bytes that operations one after another work on, so that the next finds them in a cache.
        sums_products: the device adds products of bfloat16 matrices to a float32 matrix (``addmm`` with ``out_dtype``).
            Otherwise a product is rounded to bfloat16, some rows of it at a time, and then added.
    """

    logit_tokens: int = 256
    graph_tokens: int = 512
    head_rows: int = 2048
    cached_bytes: int = 4 * 2**20
    sums_products: bool = False


def accelerator_tiles(vocabulary_rows: int) -> Tiles:
    """Sizes for an accelerator. They are large, since each piece costs kernel launches.

    Args:
        vocabulary_rows: rows of a head on one tensor-parallel rank.
    """
    return Tiles(
        logit_tokens=max(512, LOGITS // vocabulary_rows // 256 * 256),
        graph_tokens=2048,
        head_rows=vocabulary_rows,
        cached_bytes=2**62,
        sums_products=True,
    )
