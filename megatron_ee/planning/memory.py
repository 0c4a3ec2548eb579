"""Parameters and memory of one rank of a stage.

Weights, gradients and optimizer state are counted exactly, except for megatron-core's alignment of each tensor.
Activations are counted at their peak; see ``_activations``. Labels and positions (a few bytes per token) and the memory
of CUDA, the communication library and allocator fragmentation are not counted. Pure: no process group is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.body import LayerBytes
from megatron_ee.exits.fit import fit_bytes
from megatron_ee.exits.registry import body_of, trains
from megatron_ee.exits.tensors import parameter_sizes
from megatron_ee.parallel.costs import VOCAB_MULTIPLE, padded_vocab
from megatron_ee.parallel.layout import Layout, StageLayout, even_layout
from megatron_ee.parallel.tiles import TOP_RUN, UPDATE_RUN, WINDOW_QUERIES, Tiles, accelerator_tiles

FLOAT32 = 4


@dataclass(frozen=True)
class Workload:
    """Settings of a run, in addition to model, exits and layout, that affect the memory and work of a rank.

    Attributes:
        itemsize: bytes of a weight: 2 for bfloat16, 4 for float32.
        tensor: tensor-parallel size.
        data: data-parallel size, over which the optimizer state is sharded (ZeRO-1).
        sequence_parallel: whether hidden states outside attention and MLP are sharded over the tensor-parallel ranks.
        micro_batch_size: sequences per forward pass.
        sequence_length: tokens per sequence.
        microbatches: microbatches of one data-parallel rank per step.
        chunk_tokens: maximum number of tokens whose logits exist at a time; see also ``tiles``.
        graph_tokens: minimum number of tokens that an exit processes at a time, if its body allows pieces. The default
            is an accelerator's.
        top_k: tokens of the final exit's distribution that are kept for distillation; 0 without distillation.
        tempered: whether the temperature of distillation is not 1.
        remainder: additional bytes of a float32 main weight: 2, or 4 for optimizers that keep it whole.
        host_optimizer: whether the optimizer state is in host memory.
        keeps_initial: whether weight decay goes towards the initial values, which are then kept.
    """

    itemsize: int
    tensor: int = 1
    data: int = 1
    sequence_parallel: bool = False
    micro_batch_size: int = 1
    sequence_length: int = 2048
    microbatches: int = 1
    chunk_tokens: int = 4096
    graph_tokens: int | None = None
    top_k: int = 0
    tempered: bool = False
    remainder: int = 2
    host_optimizer: bool = False
    keeps_initial: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch."""
        return self.micro_batch_size * self.sequence_length


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        frozen: backbone, and the frozen norms and LM head that exits use.
        trained: weights of the exits.
        gradients: float32 gradients of the exits.
        optimizer: two moments, the additional bytes of float32 main weights if the weights are bfloat16, and the
            initial values if weight decay goes towards them; 0 if they are in host memory.
        activations: the largest of three: peak of one microbatch in the frozen layers, one exit's graph with the loss's
            scratch memory, and the optimizer's scratch memory.
        transfer: buffers of messages from and to other stages.
        fit: all of the closed-form fit before tuning, whose stage is freed again; 0 if no exit is fitted.
    """

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    transfer: int
    fit: int = 0

    @property
    def tuning(self) -> int:
        """While tuning: the sum of all parts but ``fit``."""
        return self.frozen + self.trained + self.gradients + self.optimizer + self.activations + self.transfer

    @property
    def total(self) -> int:
        """The larger of the two phases, ``tuning`` and ``fit``."""
        return max(self.tuning, self.fit)


def stage_memory(
    layout: Layout, index: int, architecture: Architecture, specs: Sequence[ExitSpec], workload: Workload
) -> Memory:
    """Memory of each rank of stage ``index``; ``specs``: the exits of all stages."""
    frozen, trained = stage_parameters(layout, index, architecture, specs, workload.tensor, workload.top_k > 0)
    hosted = _hosted(layout.stages[index], specs)
    return Memory(
        frozen=frozen * workload.itemsize,
        trained=trained * workload.itemsize,
        gradients=trained * FLOAT32,
        optimizer=_optimizer_bytes(architecture, hosted, trained, workload),
        activations=max(
            _activations(layout, index, architecture, specs, workload),
            _update_bytes(architecture, hosted, trained, workload),
        ),
        transfer=_transfer(layout, index, architecture, workload),
        fit=fit_memory(len(layout.stages), index, architecture, specs, workload),
    )


def fit_memory(
    stages: int, index: int, architecture: Architecture, specs: Sequence[ExitSpec], workload: Workload
) -> int:
    """Bytes of the closed-form fit on each rank of stage ``index``; 0 if no exit is fitted.

    All layers are spread evenly, with the final exit. One fit at a time is counted: if there is more memory, several
    exits are fitted together.
    """
    if not any(spec.init == "fit" for spec in specs):
        return 0
    layout = even_layout(architecture.num_layers, stages, [spec.layer for spec in specs])
    frozen, trained = stage_parameters(layout, index, architecture, specs, workload.tensor, distillation=True)
    stage, hidden = layout.stages[index], _hidden_bytes(architecture, workload)
    solving, running = 0, _layer_peak(architecture, workload) if stage.layers else 0
    for spec in _hosted(stage, specs):
        rows = body_of(spec).fitted_rows(architecture) or 0
        if spec.init == "fit":
            solving = max(solving, sum(fit_bytes(rows, architecture.hidden_size, workload.tensor)))
            running = max(running, _fit_peak(architecture, rows, workload))
    taught = len(stage.exits) * (1 + layout.depth(layout.last_layered) - layout.depth(index))
    buffers = 4 * hidden  # of messages to and from a neighbour, two each way
    return (frozen + trained) * workload.itemsize + solving + running + taught * hidden + buffers


def _fit_peak(architecture: Architecture, rows: int, workload: Workload) -> int:
    """Of adding a microbatch to a fit: gate and up, the features of two ranks in float32, their product, and the
    residual, the last hidden state and their difference in float32."""
    own, wide = -(-rows // workload.tensor), FLOAT32 * workload.tokens
    features = 2 * own * workload.tokens * workload.itemsize + 2 * own * wide
    return features + FLOAT32 * own * max(own, architecture.hidden_size) + 3 * architecture.hidden_size * wide


def stage_parameters(
    layout: Layout,
    index: int,
    architecture: Architecture,
    specs: Sequence[ExitSpec],
    tensor: int = 1,
    distillation: bool = False,
) -> tuple[int, int]:
    """Frozen and trained parameters of each rank of stage ``index``. A tensor that two modules share counts once.

    The first stage has the embedding. With ``distillation`` the last stage with layers has the final norm and the LM
    head. A stage that hosts a ``shared`` or ``low_rank`` head has a copy of the LM head, unless it already holds it for
    the final exit or as a tied embedding.
    """
    stage, hidden = layout.stages[index], architecture.hidden_size
    vocabulary = padded_vocab(architecture.vocab_size, tensor) // tensor * hidden
    hosted = _hosted(stage, specs)
    first, last = 1 in stage.layers, distillation and index == layout.last_layered
    frozen = len(stage.layers) * layer_parameters(architecture, tensor)
    frozen += first * vocabulary + last * hidden
    if (last or any(spec.head != "own" for spec in hosted)) and not (first and architecture.tied):
        frozen += vocabulary
    frozen += hidden * sum(len(body_of(spec).frozen(architecture, spec.layer)) for spec in hosted)  # norms
    return frozen, sum(trained_parameters(architecture, spec, tensor) for spec in hosted)


def layer_parameters(architecture: Architecture, tensor: int = 1) -> int:
    """Parameters of one decoder layer on one tensor-parallel rank."""
    arch, hidden = architecture, architecture.hidden_size
    query, key = _head_rows(arch, tensor)
    attention = (query + 2 * key) * (hidden + arch.qkv_bias) + hidden * (query + arch.output_bias)
    qk_norms = query + key if arch.qk_norm_whole else 2 * arch.head_dim * arch.qk_norm
    norms = 2 * hidden * (arch.norms_before + arch.norms_after)
    return attention + qk_norms + norms + mlp_parameters(arch, tensor)


def mlp_parameters(architecture: Architecture, tensor: int = 1) -> int:
    """Parameters of one gated MLP on one tensor-parallel rank."""
    arch, hidden, ffn = architecture, architecture.hidden_size, architecture.ffn_size // tensor
    return 2 * ffn * (hidden + arch.mlp_bias) + hidden * (ffn + arch.mlp_bias)


def trained_parameters(architecture: Architecture, spec: ExitSpec, tensor: int = 1) -> int:
    """Trained parameters of one exit on one tensor-parallel rank."""
    return sum(parameter_sizes(spec, architecture, tensor))


def _hosted(stage: StageLayout, specs: Sequence[ExitSpec]) -> list[ExitSpec]:
    return [spec for spec in specs if spec.layer in stage.exits]


def _head_rows(architecture: Architecture, tensor: int) -> tuple[int, int]:
    """Total size of the query heads and of the key heads of one tensor-parallel rank."""
    arch = architecture
    return arch.num_heads * arch.head_dim // tensor, arch.num_kv_heads * arch.head_dim // tensor


def _activations(
    layout: Layout, index: int, architecture: Architecture, specs: Sequence[ExitSpec], workload: Workload
) -> int:
    """The larger of two peaks, in the frozen layers and in an exit. Taps are alive in both."""
    stage = layout.stages[index]
    hidden = _hidden_bytes(architecture, workload)
    held = len([spec for spec in specs if spec.layer in stage.layers])
    if workload.top_k:
        held += layout.lag(index) * len([layer for layer in stage.exits if layer in stage.layers])
    trained = [spec for spec in _hosted(stage, specs) if trains(spec)]
    peaks = [_exit_peak(architecture, spec, _of_a_graph(architecture, spec, workload)) for spec in trained]
    if stage.layers:
        # Embedded tokens stay alive until all layers have run. Hidden states from other stages are in transfer buffers.
        embedded = hidden if 1 in stage.layers else 0
        peaks.append(embedded + _layer_peak(architecture, workload))
        if workload.top_k and index == layout.last_layered:
            peaks.append(3 * hidden + _teacher_bytes(architecture, workload))
    return held * hidden + _band_bytes(architecture, stage, trained, workload) + max(peaks, default=0)


def _band_bytes(architecture: Architecture, stage: StageLayout, trained: Sequence[ExitSpec], workload: Workload) -> int:
    """Bytes of the masks of sliding windows shorter than a sequence. All layers and microbatches share them."""
    windows = {architecture.windows[layer - 1] for layer in stage.layers}
    windows |= {window for spec in trained for window in body_of(spec).windows(architecture)}
    shared, size = architecture.num_heads // architecture.num_kv_heads, 0
    for window in windows:
        if window is not None and window < workload.sequence_length:
            queries = min(WINDOW_QUERIES, workload.sequence_length - window)
            size += queries * shared * (queries + window) * workload.itemsize
    return size


def _optimizer_bytes(architecture: Architecture, hosted: Sequence[ExitSpec], trained: int, workload: Workload) -> int:
    if workload.host_optimizer:
        return 0
    per_weight = 2 * FLOAT32 + (workload.remainder if workload.itemsize < FLOAT32 else 0)
    size = -(-trained // workload.data) * per_weight
    if workload.keeps_initial:
        decaying = (parameter_sizes(spec, architecture, workload.tensor, matrices=True) for spec in hosted)
        size += -(-sum(map(sum, decaying)) // workload.data) * workload.itemsize
    return size


def _update_bytes(architecture: Architecture, hosted: Sequence[ExitSpec], trained: int, workload: Workload) -> int:
    """Scratch bytes of the split optimizer: a piece of float32 main weights, twice while it is split or while weights
    decay towards initial values. With whole main weights, only the initial values of a piece."""
    whole = workload.remainder == FLOAT32
    if workload.itemsize == FLOAT32 or workload.host_optimizer or (whole and not workload.keeps_initial):
        return 0
    largest = max((size for spec in hosted for size in parameter_sizes(spec, architecture, workload.tensor)), default=0)
    return (1 if whole else 2) * FLOAT32 * min(UPDATE_RUN, largest, -(-trained // workload.data))


def _of_a_graph(architecture: Architecture, spec: ExitSpec, workload: Workload) -> Workload:
    """The workload with the tokens that the exit processes at a time; see ``Exit.pieces``."""
    tiles = _tiles(architecture, workload)
    graph = tiles.graph_tokens if workload.graph_tokens is None else workload.graph_tokens
    tokens = max(graph, min(workload.chunk_tokens, tiles.logit_tokens))
    if body_of(spec).windows(architecture) or workload.sequence_parallel or tokens >= workload.tokens:
        return workload
    return dataclasses.replace(workload, micro_batch_size=1, sequence_length=tokens)


def _layer_peak(architecture: Architecture, workload: Workload) -> int:
    """Peak bytes of one layer without gradients: in attention during RoPE, or in the MLP before the down projection.

    In both, the layer's input and its norm's output are alive. In attention, the fused projection and four times the
    queries are alive too. In the MLP, the residual and the fused gate and up are alive too; the activated gate and the
    product reuse the memory of gate and up.
    """
    sizes = _layer_bytes(architecture, workload)
    attention = 2 * sizes.hidden + sizes.gathered + 5 * sizes.query + 2 * sizes.key
    return max(attention, 3 * sizes.hidden + sizes.gathered + 2 * sizes.ffn)


def _exit_peak(architecture: Architecture, spec: ExitSpec, workload: Workload) -> int:
    """Peak bytes of one exit's graph: the larger of the loss, with its scratch memory, and the body's backward."""
    graph = body_of(spec).graph_bytes(_layer_bytes(architecture, workload))
    return max(graph.kept + _loss_bytes(architecture, spec, workload), graph.backward)


def _loss_bytes(architecture: Architecture, spec: ExitSpec, workload: Workload) -> int:
    """Bytes of the exit loss: the features' gradient, a chunk's logits, and some rows of a head's gradient.

    The numbers are an accelerator's. On a CPU chunks are smaller, and the gradient of a bfloat16 head takes additional
    memory; see ``tiles``.
    """
    rows = padded_vocab(architecture.vocab_size, workload.tensor) // workload.tensor
    narrow = workload.itemsize if workload.itemsize < FLOAT32 else 0
    logits = _chunk_logits(architecture, workload)
    size = _gathered_bytes(architecture, workload) if body_of(spec).saved else 0
    capped = architecture.logit_soft_cap is not None
    size += logits * (FLOAT32 * (1 + workload.tempered + capped) + narrow)
    size += logits // rows * VOCAB_MULTIPLE * FLOAT32  # of the search for the maximum
    if spec.head == "low_rank":
        size += 2 * workload.tokens * spec.rank * workload.itemsize
        size += max(logits, rows * spec.rank) * workload.itemsize
    return size


def _transfer(layout: Layout, index: int, architecture: Architecture, workload: Workload) -> int:
    """Buffers of the messages to and from a stage. A teacher message is two tensors of four bytes per kept token."""
    size, hidden = 0, _hidden_bytes(architecture, workload)
    for message in layout.messages():
        ahead = max(1, layout.depth(message.target) - layout.depth(message.source) + 1)
        tensors = message.hidden + len(message.taps)
        if index == message.source:
            size += (ahead + 1) * tensors * hidden
        if index == message.target:
            size += (ahead + 1 + (layout.lag(index) if workload.top_k else 0)) * tensors * hidden
    students = [place for place, stage in enumerate(layout.stages) if stage.exits and place != layout.last_layered]
    messages = len(students) if index == layout.last_layered else int(index in students)
    return size + 2 * messages * 2 * workload.tokens * workload.top_k * FLOAT32


def _teacher_bytes(architecture: Architecture, workload: Workload) -> int:
    """Bytes of the teacher's top-k: a chunk's logits twice, and the columns that are sorted."""
    rows = padded_vocab(architecture.vocab_size, workload.tensor) // workload.tensor
    logits = _chunk_logits(architecture, workload)
    sorted_columns = logits // rows * min(rows, TOP_RUN * workload.top_k)
    candidates, values, order = FLOAT32, FLOAT32, 8
    return logits * FLOAT32 + max(logits * workload.itemsize, sorted_columns * (candidates + values + order))


def _tiles(architecture: Architecture, workload: Workload) -> Tiles:
    return accelerator_tiles(padded_vocab(architecture.vocab_size, workload.tensor) // workload.tensor)


def _chunk_logits(architecture: Architecture, workload: Workload) -> int:
    """Number of logits of a chunk on one rank."""
    rows = padded_vocab(architecture.vocab_size, workload.tensor) // workload.tensor
    return min(workload.chunk_tokens, _tiles(architecture, workload).logit_tokens, workload.tokens) * rows


def _gathered_bytes(architecture: Architecture, workload: Workload) -> int:
    """Bytes of the hidden states of a whole microbatch."""
    return workload.tokens * architecture.hidden_size * workload.itemsize


def _hidden_bytes(architecture: Architecture, workload: Workload) -> int:
    """Bytes of this rank's share of the hidden states of a microbatch."""
    return _gathered_bytes(architecture, workload) // (workload.tensor if workload.sequence_parallel else 1)


def _layer_bytes(architecture: Architecture, workload: Workload) -> LayerBytes:
    per_feature = workload.tokens * workload.itemsize
    query, key = _head_rows(architecture, workload.tensor)
    whole, ffn = _gathered_bytes(architecture, workload), architecture.ffn_size // workload.tensor
    return LayerBytes(
        hidden=_hidden_bytes(architecture, workload),
        whole=whole,
        gathered=whole if workload.sequence_parallel else 0,
        query=query * per_feature,
        key=key * per_feature,
        ffn=ffn * per_feature,
        matrix=ffn * architecture.hidden_size * workload.itemsize,
    )
