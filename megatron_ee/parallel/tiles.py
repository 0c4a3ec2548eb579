"""Tile sizes: how much is computed at a time, per kind of device. They are chosen when a stage is built.

Pure: ``plan`` needs an accelerator's sizes on machines without one.
"""

from __future__ import annotations

from dataclasses import dataclass

LOGITS = 2**26
"""Logits that an accelerator computes at a time: 256 MiB in float32, far more than full utilisation needs."""
WINDOW_QUERIES = 512
"""Queries of sliding-window attention that are computed together. Smaller blocks waste fewer masked scores and need a
smaller mask, but launch more kernels."""
VOCAB_RUN = 128
"""Block of columns in the first step of a maximum over logits. It divides the padded vocabulary."""
ROW_RUN = 2048
"""Rows of a head whose gradient is computed at a time, if it is computed in the model's dtype."""
TOP_RUN = 64
"""Block of columns of the teacher's logits: a block is sorted only if its maximum is large enough. It divides the
padded vocabulary."""
PASS_TOKENS = 512
"""Maximum prompt tokens per pass: enough for fast matrix products, few enough for a short delay of other sequences."""
PACKED_SLOTS = 1
"""Layers of a packed backbone that are expanded at a time."""
STREAMED_SLOTS = 2
"""Layers of a streamed backbone that are on the device: the one that computes and the one that comes next."""
UPDATE_RUN = 2**24
"""Maximum number of main weights that the split optimizer joins in float32 at a time."""


@dataclass(frozen=True)
class Tiles:
    """Tile sizes. The defaults are for a CPU.

    Attributes:
        logit_tokens: maximum number of tokens whose logits exist at a time. On a CPU, twice as many need twice the
            memory; they take as long in float32 and save 10% of a head's time in bfloat16 (two cores).
        graph_tokens: minimum number of tokens that an exit computes at a time, because each piece adds to the weight
            gradients. On an accelerator, adding takes as long as computing gradients of about 500 tokens.
        head_rows: rows of a head ``[vocab, hidden]`` that are multiplied at a time. MKL copies its operands first; with
            2048 rows this takes a third of the memory, and the product 5% less time.
        cached_bytes: size of pieces that several operations process in turn, so that they stay in a CPU cache.
        sums_products: whether the device can add a product of bfloat16 matrices to a float32 matrix (``addmm`` with
            ``out_dtype``). Otherwise the product is rounded to bfloat16, in blocks of rows, and then added.
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
