"""Memory of the work on one microbatch: peaks of the frozen layers, of an exit with its loss, and of a fit.

Labels and positions (a few bytes per token) are not counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.body import LayerBytes
from megatron_ee.exits.registry import body_of, trains
from megatron_ee.parallel.costs import padded_vocab
from megatron_ee.parallel.layout import Layout, StageLayout
from megatron_ee.parallel.tiles import (
    PASS_TOKENS,
    ROW_RUN,
    TOP_RUN,
    VOCAB_RUN,
    WINDOW_QUERIES,
    Tiles,
    accelerator_tiles,
)
from megatron_ee.planning.parameters import head_rows, hosted_by
from megatron_ee.planning.workload import FLOAT32, Workload


def activation_peak(
    layout: Layout, index: int, architecture: Architecture, specs: Sequence[ExitSpec], workload: Workload
) -> int:
    """The larger of two peaks, in the frozen layers and in an exit."""
    stage, hidden = layout.stages[index], hidden_bytes(architecture, workload)
    trained = [spec for spec in hosted_by(stage, specs) if trains(spec)]
    peaks = [_exit_peak(architecture, spec, _of_a_graph(architecture, spec, workload)) for spec in trained]
    if stage.layers:
        # Embedded tokens stay alive until all layers have run. Hidden states from other stages are in transfer buffers.
        embedded = hidden if 1 in stage.layers else 0
        if by_layer(layout, workload):  # the layer's input is among the hidden states of all microbatches
            embedded = -hidden
        elif any(spec.layer == stage.layers[-1] for spec in specs):  # its tap is counted, but made after the peak
            embedded -= hidden
        peaks.append(embedded + layer_peak(architecture, workload))
        if workload.top_k and index == layout.last_layered:
            peaks.append(3 * hidden + _teacher_bytes(architecture, workload))
    return _band_bytes(architecture, stage, trained, workload) + max(peaks, default=0)


def by_layer(layout: Layout, workload: Workload) -> bool:
    """Whether all microbatches of a step pass a layer before the next one, since the layers share memory."""
    return workload.slots > 0 and len(layout.stages) == 1


def _band_bytes(architecture: Architecture, stage: StageLayout, trained: Sequence[ExitSpec], workload: Workload) -> int:
    """Bytes of the masks of sliding windows shorter than a sequence. All layers and microbatches share them.

    Attention with a soft cap makes its own masks, which are small.
    """
    if architecture.attention_soft_cap is not None:
        return 0
    windows = {architecture.windows[layer - 1] for layer in stage.layers}
    windows |= {window for spec in trained for window in body_of(spec).windows(architecture)}
    shared, size = architecture.num_heads // architecture.num_kv_heads, 0
    for window in windows:
        if window is not None and window < workload.sequence_length:
            queries = min(WINDOW_QUERIES, workload.sequence_length - window)
            size += queries * shared * (queries + window) * workload.itemsize
    return size


def _of_a_graph(architecture: Architecture, spec: ExitSpec, workload: Workload) -> Workload:
    """The workload with the tokens that the exit processes at a time; see ``Exit.pieces``."""
    tiles = _tiles(architecture, workload)
    tokens = max(tiles.graph_tokens, min(workload.chunk_tokens, tiles.logit_tokens))
    if body_of(spec).windows(architecture) or workload.sequence_parallel or tokens >= workload.tokens:
        return workload
    return dataclasses.replace(workload, micro_batch_size=1, sequence_length=tokens)


def layer_peak(architecture: Architecture, workload: Workload) -> int:
    """Peak bytes of one layer without gradients: in a norm, in attention, or in the MLP before the down projection.

    - A norm that copies its input has the residual beside it, and its result in float32.
    - In attention and in the MLP, the layer's input and the output of a norm before them are alive. During RoPE, so are
      the fused projection and four times the queries. With a soft cap, the fused projection, the turned queries and
      keys, the context, and a block's scores: capped, masked and in float32 before and after the softmax. A norm over
      whole projections has a copy of its input, and three times this in float32; the norm of keys comes second.
    - In the MLP, the residual and the fused gate and up are alive too. The activated gate and the product reuse the
      memory of gate and up with SiLU, or take as much as the gate.
    """
    sizes = _layer_bytes(architecture, workload)
    attention = 5 * sizes.query + 2 * sizes.key
    if sizes.scores:
        factor = architecture.attention_multiplier
        scaled = factor is not None and factor * architecture.head_dim**0.5 != 1
        attention = max(attention, (3 + scaled) * sizes.query + 3 * sizes.key + 3 * sizes.scores)
    if architecture.qk_norm_whole:
        copied, wide = workload.itemsize < FLOAT32, FLOAT32 / workload.itemsize
        queries, keys = (int(size * (copied + 3 * wide)) for size in (sizes.query, sizes.key))
        attention = max(attention, sizes.query + 2 * sizes.key + max(queries, sizes.query + keys))
    activated = 2 if architecture.activation == "silu" else 3
    inputs = sizes.gathered + sizes.hidden * (1 + architecture.norms_before)
    return max(
        2 * sizes.hidden + 2 * sizes.wide,
        inputs + attention,
        inputs + sizes.hidden + activated * sizes.ffn,
    )


def _exit_peak(architecture: Architecture, spec: ExitSpec, workload: Workload) -> int:
    """Peak bytes of one exit's graph: in the loss with its scratch memory, in the backward of the norm before the head,
    which copies gradients too if it copies its input, or in the body's backward."""
    sizes = _layer_bytes(architecture, workload)
    graph = body_of(spec).graph_bytes(sizes)
    first = max(_loss_bytes(architecture, spec, workload), sizes.whole + 2 * sizes.wide)
    return max(graph.kept + first, graph.backward)


def _loss_bytes(architecture: Architecture, spec: ExitSpec, workload: Workload) -> int:
    """Bytes of the exit loss: the features' gradient, a chunk's logits, and some rows of a head's gradient."""
    rows, tiles = _vocabulary_rows(architecture, workload), _tiles(architecture, workload)
    size = _gathered_bytes(architecture, workload) if body_of(spec).saved else 0
    size += _logit_bytes(architecture, workload, (architecture.logit_soft_cap is not None) + workload.tempered)
    if spec.head == "low_rank":
        size += 2 * workload.tokens * spec.rank * workload.itemsize
        size += max(_piece_tokens(architecture, workload), spec.rank) * rows * workload.itemsize
    if spec.head == "own" and workload.itemsize < FLOAT32 and not tiles.sums_products:
        size += min(ROW_RUN, rows) * architecture.hidden_size * (workload.itemsize + FLOAT32)
    return size


def statistics_bytes(architecture: Architecture, workload: Workload) -> int:
    """Bytes of loss, confidence and top-1 token without gradients."""
    return _logit_bytes(architecture, workload, architecture.logit_soft_cap is not None)


def _logit_bytes(architecture: Architecture, workload: Workload, copies: int) -> int:
    """Bytes of a chunk's logits, and of a piece of it: in float32 if the logits are not, ``copies`` more of that size,
    and what the search for the maximum takes."""
    rows, wide = _vocabulary_rows(architecture, workload), copies + (workload.itemsize < FLOAT32)
    piece = _piece_tokens(architecture, workload) * FLOAT32 * (wide * rows + VOCAB_RUN)
    return _chunk_tokens(architecture, workload) * rows * workload.itemsize + piece


def _teacher_bytes(architecture: Architecture, workload: Workload) -> int:
    """Bytes of the teacher's top-k: a chunk's logits twice, and the columns that are sorted."""
    rows, tokens = _vocabulary_rows(architecture, workload), _chunk_tokens(architecture, workload)
    logits, sorted_columns = tokens * rows, tokens * min(rows, TOP_RUN * workload.top_k)
    candidates, values, order = FLOAT32, FLOAT32, 8
    return logits * FLOAT32 + max(logits * workload.itemsize, sorted_columns * (candidates + values + order))


def _tiles(architecture: Architecture, workload: Workload) -> Tiles:
    return workload.tiles or accelerator_tiles(_vocabulary_rows(architecture, workload))


def _vocabulary_rows(architecture: Architecture, workload: Workload) -> int:
    """Rows of a head on one rank."""
    return padded_vocab(architecture.vocab_size, workload.tensor) // workload.tensor


def _chunk_tokens(architecture: Architecture, workload: Workload) -> int:
    """Tokens whose logits exist at a time."""
    return min(workload.chunk_tokens, _tiles(architecture, workload).logit_tokens, workload.tokens)


def _piece_tokens(architecture: Architecture, workload: Workload) -> int:
    """Tokens of a chunk whose logits are processed at a time between the products."""
    fitting = _tiles(architecture, workload).cached_bytes // (FLOAT32 * _vocabulary_rows(architecture, workload))
    return max(1, min(_chunk_tokens(architecture, workload), fitting))


def _gathered_bytes(architecture: Architecture, workload: Workload) -> int:
    """Bytes of the hidden states of a whole microbatch."""
    return workload.tokens * architecture.hidden_size * workload.itemsize


def hidden_bytes(architecture: Architecture, workload: Workload) -> int:
    """Bytes of this rank's share of the hidden states of a microbatch."""
    return _gathered_bytes(architecture, workload) // (workload.tensor if workload.sequence_parallel else 1)


def _layer_bytes(architecture: Architecture, workload: Workload) -> LayerBytes:
    per_feature = workload.tokens * workload.itemsize
    query, key = head_rows(architecture, workload.tensor)
    whole, ffn = _gathered_bytes(architecture, workload), architecture.ffn_size // workload.tensor
    return LayerBytes(
        hidden=hidden_bytes(architecture, workload),
        whole=whole,
        gathered=whole if workload.sequence_parallel else 0,
        query=query * per_feature,
        key=key * per_feature,
        ffn=ffn * per_feature,
        matrix=ffn * architecture.hidden_size * workload.itemsize,
        wide=_wide_bytes(architecture, workload),
        scores=_score_bytes(architecture, workload),
        wide_heads=(query + key) * workload.tokens * FLOAT32 if architecture.qk_norm_whole else 0,
        norms_before=architecture.norms_before,
        both_norms=architecture.norms_before and architecture.norms_after,
    )


def decode_bytes(
    architecture: Architecture, layers: Sequence[int], exits: Sequence[ExitSpec], workload: Workload
) -> int:
    """Bytes of decoding on a stage: the KV cache of one sequence, a pass of prompt tokens, and a row of logits.

    More sequences run at a time only if there is more memory.

    Args:
        layers: numbers of the stage's layers.
        exits: on the stage.
    """
    arch, length = architecture, min(workload.sequence_length, architecture.max_positions)
    windows = [arch.windows[layer - 1] for layer in layers]
    windows += [window for spec in exits for window in body_of(spec).windows(arch)]
    position = 2 * -(-arch.num_kv_heads // workload.tensor) * arch.head_dim * workload.itemsize
    tokens = min(length, PASS_TOKENS)
    one = dataclasses.replace(workload, micro_batch_size=1, sequence_length=tokens, sequence_parallel=False)
    # A pass of prompt tokens attends to all keys of the cache.
    scores = _score_bytes(arch, dataclasses.replace(one, sequence_length=length)) - _score_bytes(arch, one)
    running = layer_peak(arch, one) + 3 * scores
    return position * length * len(windows) + running + 3 * FLOAT32 * arch.vocab_size


def _wide_bytes(architecture: Architecture, workload: Workload) -> int:
    """Bytes of the float32 copy that a (1 + w) norm makes of this rank's hidden states."""
    if not architecture.norm_plus_one or workload.itemsize == FLOAT32:
        return 0
    return hidden_bytes(architecture, workload) // workload.itemsize * FLOAT32


def _score_bytes(architecture: Architecture, workload: Workload) -> int:
    """Bytes, in float32, of the attention scores of a block of queries with a soft cap, in the widest layer."""
    if architecture.attention_soft_cap is None:
        return 0
    length = workload.sequence_length
    queries = min(WINDOW_QUERIES, length)
    keys = max(length if window is None else min(length, window + queries - 1) for window in architecture.windows)
    heads = architecture.num_heads // workload.tensor
    return workload.micro_batch_size * heads * queries * keys * FLOAT32


def fit_peak(architecture: Architecture, rows: int, workload: Workload) -> int:
    """Peak bytes of adding a microbatch to a fit.

    The last hidden state, the residual and the target in float32, gate and up, of which the activations are a part, and
    the activations in float32, are alive. So is the larger of two: the float32 activations before they are scaled, or
    another rank's with their product.
    """
    own, wide = -(-rows // workload.tensor), FLOAT32 * workload.tokens
    product = FLOAT32 * own * max(own, architecture.hidden_size) + (workload.tensor > 1) * own * wide
    last, gate_up = hidden_bytes(architecture, workload), 2 * own * workload.tokens * workload.itemsize
    return last + 2 * architecture.hidden_size * wide + gate_up + own * wide + max(own * wide, product)
