"""Counted work: multiplications and additions of a tuning step, for balancing stages and for the plan.

A product of ``[m, k]`` and ``[k, n]`` is ``2 m k n``. Norms, activations, softmax and the optimizer are not counted.
Every figure is of one sequence, over all tensor-parallel ranks together. In the formulas T is the sequence length, h
the hidden size, f the MLP's, q and k the rows of all query and of all key heads, V the padded vocabulary, and P the
pairs of positions that attend to each other.

Pure: neither torch nor a process group is needed.
"""

from __future__ import annotations

from megatron_ee.config.architecture import Architecture

VOCAB_MULTIPLE = 128


def padded_vocab(vocab_size: int, tensor: int = 1) -> int:
    """The vocabulary rounded up so that each of ``tensor`` ranks holds the same number of rows, a multiple of 128."""
    multiple = VOCAB_MULTIPLE * tensor
    return -(-vocab_size // multiple) * multiple


def attended_pairs(tokens: int, window: int | None) -> int:
    """P: position t sees ``min(t, window)`` positions, its own included, so ``T (T + 1) / 2`` without a window."""
    seen = tokens if window is None else min(window, tokens)
    return seen * (seen + 1) // 2 + (tokens - seen) * seen


def attention_flops(architecture: Architecture, layer: int, tokens: int) -> int:
    """Forward of the attention half of ``layer`` (from 1): ``2 T h (q + 2 k) + 2 T q h + 4 P q``."""
    arch = architecture
    query, key = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    projections = 2 * tokens * arch.hidden_size * (2 * query + 2 * key)
    return projections + 4 * attended_pairs(tokens, arch.windows[layer - 1]) * query


def mlp_flops(architecture: Architecture, tokens: int) -> int:
    """Forward of a gated MLP: ``6 T h f``."""
    return 6 * tokens * architecture.hidden_size * architecture.ffn_size


def final_exit_flops(architecture: Architecture, tokens: int, tensor: int = 1) -> int:
    """The final exit as a teacher: logits only, ``2 T h V``."""
    return 2 * tokens * architecture.hidden_size * padded_vocab(architecture.vocab_size, tensor)
