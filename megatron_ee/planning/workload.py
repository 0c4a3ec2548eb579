"""The settings of a run, besides model, exits and layout, that its memory, work and traffic follow from."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.check import data_parallel_size
from megatron_ee.config.schema import ModelConfig, RunConfig
from megatron_ee.families.quantisation import rounded_bits
from megatron_ee.parallel.tiles import PACKED_SLOTS, STREAMED_SLOTS, Tiles

FLOAT32 = 4
ITEMSIZES = {"float32": FLOAT32, "bfloat16": 2}


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
        chunk_tokens: maximum number of tokens whose logits exist at a time; ``tiles`` limits it too.
        tiles: how much is computed at a time; None for an accelerator's.
        top_k: tokens of the final exit's distribution that are kept for distillation; 0 without distillation.
        tempered: whether the temperature of distillation is not 1.
        remainder: additional bytes of a float32 main weight: 2, or 4 for optimizers that keep it whole.
        host_optimizer: whether the optimizer state is in host memory.
        keeps_initial: whether weight decay goes towards the initial values, which are then kept.
        validates: whether validation runs all layers once before tuning.
        decodes: whether the full model continues prompts then, and threshold mode is measured on them.
        free_running: whether threshold mode is measured in every validation, for which all layers stay loaded.
        residency: where the layers' weights are: on the ``device``, or streamed from ``host`` memory or ``disk``.
        slots: layers of a stage whose weights are on the device at a time; 0 for all. With one stage all microbatches
            of a step then pass a layer before the next one.
        packed_bits: bits of a weight of a layer's matrices, if they stay packed beside the slot; else 0.
    """

    itemsize: int
    tensor: int = 1
    data: int = 1
    sequence_parallel: bool = False
    micro_batch_size: int = 1
    sequence_length: int = 2048
    microbatches: int = 1
    chunk_tokens: int = 4096
    tiles: Tiles | None = None
    top_k: int = 0
    tempered: bool = False
    remainder: int = 2
    host_optimizer: bool = False
    keeps_initial: bool = False
    validates: bool = False
    decodes: bool = False
    free_running: bool = False
    residency: str = "device"
    slots: int = 0
    packed_bits: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch."""
        return self.micro_batch_size * self.sequence_length

    @property
    def adapters(self) -> int:
        """Number of adapters after tuning: the last, and with validation the best."""
        return 1 + self.validates

    @property
    def final_exit(self) -> bool:
        """Whether the final exit is loaded while tuning."""
        return self.top_k > 0 or self.free_running


def make_workload(
    config: RunConfig, architecture: Architecture, world_size: int, *, accelerator: bool = True
) -> Workload:
    """The workload of a checked configuration on ``world_size`` processes, its ``model.dtype`` resolved.

    ``accelerator``: whether the processes have one, or run on a CPU.
    """
    packed, slots = 0.0, STREAMED_SLOTS
    if config.model.residency == "device":
        packed = _packed_bits(config.model, architecture)
        slots = PACKED_SLOTS if packed else 0
    tuning, parallel, distillation = config.tuning, config.parallel, config.loss.distillation
    data = data_parallel_size(parallel, world_size)
    validates = bool(config.data.validation or config.data.validation_fraction)
    return Workload(
        itemsize=ITEMSIZES[config.model.dtype],
        tensor=parallel.tensor,
        data=data,
        sequence_parallel=parallel.sequence,
        micro_batch_size=tuning.micro_batch_size,
        sequence_length=config.data.sequence_length,
        microbatches=tuning.global_batch_size // (tuning.micro_batch_size * data),
        chunk_tokens=config.loss.chunk_tokens,
        tiles=None if accelerator else Tiles(),
        top_k=distillation.top_k if distillation.kl > 0 else 0,
        tempered=distillation.temperature != 1,
        remainder=4 if _has_whole_main_weights(config.optimizer.implementation) else 2,
        host_optimizer=config.optimizer.implementation == "deepspeed_cpu",
        keeps_initial=config.optimizer.decay_towards == "initial",
        validates=validates,
        decodes=validates and config.validation.acceptance.prompts > 0,
        free_running=config.validation.free_running,
        residency=config.model.residency,
        slots=slots,
        packed_bits=packed,
    )


def _packed_bits(model: ModelConfig, architecture: Architecture) -> float:
    if model.weights != "packed":
        return 0.0
    if model.quantise != "none":
        return rounded_bits(model.quantise, architecture.hidden_size)
    return architecture.packed_bits


def _has_whole_main_weights(implementation: str) -> bool:
    """Whether AdamW keeps whole float32 main weights for bfloat16 weights: apex does; ``auto`` uses apex if found."""
    return implementation == "apex" or (implementation == "auto" and find_spec("apex") is not None)
