"""FLOPs of a tuning step, for balancing stages and for the plan.

A matrix product of ``[m, k]`` and ``[k, n]`` counts as ``2 m k n``. Norms, activations, softmax and the optimizer are
not counted. Each number is for one sequence, summed over the tensor-parallel ranks. In the formulas T is the sequence
length, h the hidden size, f the MLP size, q and k the total size of the query and key heads, V the padded vocabulary,
and P the number of attended pairs of positions.

Pure: neither torch nor a process group is needed.
"""

from __future__ import annotations

from megatron_ee.config.architecture import Architecture

VOCAB_MULTIPLE = 128


def padded_vocab(vocab_size: int, tensor: int = 1) -> int:
    """The vocabulary size, rounded up so that each of ``tensor`` ranks holds the same multiple of 128 rows."""
    multiple = VOCAB_MULTIPLE * tensor
    return -(-vocab_size // multiple) * multiple


def attended_pairs(tokens: int, window: int | None) -> int:
    """P: position t attends to ``min(t, window)`` positions including itself; ``T (T + 1) / 2`` without a window."""
    seen = tokens if window is None else min(window, tokens)
    return seen * (seen + 1) // 2 + (tokens - seen) * seen


def attention_flops(architecture: Architecture, layer: int, tokens: int) -> int:
    """FLOPs of a forward of the attention half of ``layer`` (from 1): ``2 T h (q + 2 k) + 2 T q h + 4 P q``."""
    arch = architecture
    query, key = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    projections = 2 * tokens * arch.hidden_size * (2 * query + 2 * key)
    return projections + 4 * attended_pairs(tokens, arch.windows[layer - 1]) * query


def mlp_flops(architecture: Architecture, tokens: int) -> int:
    """FLOPs of a forward of a gated MLP: ``6 T h f``."""
    return 6 * tokens * architecture.hidden_size * architecture.ffn_size


def final_exit_flops(architecture: Architecture, tokens: int, tensor: int = 1) -> int:
    """FLOPs of the final exit as a teacher, which computes only logits: ``2 T h V``."""
    return 2 * tokens * architecture.hidden_size * padded_vocab(architecture.vocab_size, tensor)
