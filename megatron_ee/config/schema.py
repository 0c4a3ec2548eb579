"""The run configuration: plain dataclasses, one per block of the YAML file.

Defaults are those of the EE-Tuning paper (arXiv 2402.00518, section 4.1) where it states one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Body = Literal["embedding", "norm", "mlp", "layer"]
Head = Literal["own", "shared", "low_rank"]
Init = Literal["copy", "random"]


@dataclass
class ModelConfig:
    """The frozen backbone.

    Attributes:
        path: Hugging Face directory with ``config.json`` and safetensors.
        dtype: dtype that backbone and exits are held in; trained ones are updated in float32. ``auto`` is the dtype of
            the checkpoint's weights (bfloat16 for float16).
    """

    path: str
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


@dataclass
class ExitConfig:
    """One exit.

    Attributes:
        layer: the layer it reads after: a number from 1, or a fraction of the depth between 0 and 1.
        body: what stands before the head: ``embedding`` (nothing), ``norm``, ``mlp`` or ``layer``.
        head: ``own`` (trained), ``shared`` (the backbone's, frozen) or ``low_rank`` (the backbone's plus B A).
        weight: factor of this exit's loss.
        rank: rank of a ``low_rank`` head.
        init: ``copy`` takes the model's own weights, ``random`` draws normal(0, 0.02).
    """

    layer: int | float
    body: Body = "mlp"
    head: Head = "own"
    weight: float = 1.0
    rank: int = 64
    init: Init = "copy"


@dataclass
class CorpusConfig:
    """One corpus of a blend.

    Attributes:
        path: prefix of the indexed dataset, as given to ``prepare-data --output``.
        weight: relative share of the blend's sequences.
    """

    path: str
    weight: float = 1.0


@dataclass
class DataConfig:
    """Corpora that tuning and validation read.

    Attributes:
        train: corpora to tune on: prefixes, or ``{path, weight}``.
        validation: corpora to validate on. Empty: see ``validation_fraction``.
        validation_fraction: share of each training corpus's documents, from its end, that is held out instead.
        sequence_length: tokens per training sequence.
        seed: seed of the order of documents and sequences.
    """

    train: list[str | CorpusConfig]
    validation: list[str | CorpusConfig] = field(default_factory=list)
    validation_fraction: float = 0.0
    sequence_length: int = 2048
    seed: int = 1234


@dataclass
class StageConfig:
    """One pipeline stage of an explicit layout.

    Attributes:
        layers: its first and last layer, such as ``[1, 8]``; empty for a stage that only hosts exits.
        exits: positions of the exits that it hosts.
    """

    layers: list[int] = field(default_factory=list)
    exits: list[int | float] = field(default_factory=list)


@dataclass
class ParallelConfig:
    """How the model is spread over processes; data parallelism takes what is left.

    Attributes:
        tensor: tensor-parallel size.
        pipeline: number of pipeline stages.
        sequence: sequence parallelism on top of tensor parallelism.
        layout: which stage holds which layers and exits: a list of stages; ``auto`` balances by counted FLOPs.
        timeout_seconds: time without a sign of life after which a process counts as lost and the run ends.
    """

    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    layout: Literal["auto"] | list[StageConfig] = "auto"
    timeout_seconds: float = 60.0


@dataclass
class OptimizerConfig:
    """AdamW.

    Attributes:
        lr: peak learning rate.
        min_lr: learning rate at the end of the decay.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: term added to the denominator.
        weight_decay: decoupled weight decay; not applied to norms and biases.
        clip_grad: largest gradient norm over all exits; 0 turns clipping off.
        implementation: ``auto`` takes NVIDIA apex's fused AdamW where it is installed and works, else torch's;
            ``deepspeed_cpu`` keeps the optimizer's state in host memory (extra ``deepspeed``).
    """

    lr: float = 1.0e-4
    min_lr: float = 1.0e-5
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1.0e-5
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    implementation: Literal["auto", "torch", "apex", "deepspeed_cpu"] = "auto"


@dataclass
class ScheduleConfig:
    """Learning-rate schedule.

    Attributes:
        decay: shape of the fall from ``lr`` to ``min_lr``; ``constant`` stays at ``lr``.
        warmup_fraction: share of the steps over which the rate rises linearly from 0.
    """

    decay: Literal["linear", "cosine", "constant"] = "linear"
    warmup_fraction: float = 0.01


@dataclass
class DistillationConfig:
    """Learning from the final exit beside the labels: all layers run then.

    The loss of a token becomes ``cross_entropy * CE + kl * temperature^2 * KL(teacher || exit)``, both at
    ``temperature``, over the teacher's ``top_k`` most probable tokens and all others as one.

    Attributes:
        kl: weight of the divergence from the final exit; 0 turns distillation off.
        cross_entropy: weight of the cross-entropy with the label.
        temperature: divides both sides' logits.
        top_k: tokens of the final exit's distribution that are kept.
    """

    kl: float = 0.0
    cross_entropy: float = 1.0
    temperature: float = 1.0
    top_k: int = 32


@dataclass
class LossConfig:
    """The exits' loss.

    Attributes:
        dynamic_token_weights: weight each token by the exit's own detached maximum probability.
        weight_warmup: shape of the rise of the exits' loss weights from 0, or ``none``.
        weight_warmup_fraction: share of the steps that this rise takes.
        chunk_tokens: tokens whose logits exist at one time, at most. A CPU takes 256, a GPU as many as have 256 MiB of
            logits in float32, but at least 512.
        distillation: learning from the final exit.
    """

    dynamic_token_weights: bool = False
    weight_warmup: Literal["none", "linear", "cosine"] = "none"
    weight_warmup_fraction: float = 0.1
    chunk_tokens: int = 4096
    distillation: DistillationConfig = field(default_factory=DistillationConfig)


@dataclass
class TuningConfig:
    """Length and batch of the run.

    Attributes:
        steps: optimizer steps.
        global_batch_size: sequences per step over all processes.
        micro_batch_size: sequences per forward pass.
        seed: seed of random exit initialisation.
        skip_limit: steps in a row whose loss or gradients are not finite that are skipped; one more ends the run.
    """

    steps: int = 40_000
    global_batch_size: int = 16
    micro_batch_size: int = 1
    seed: int = 1234
    skip_limit: int = 2


@dataclass
class ValidationConfig:
    """Validation during and after the run.

    Attributes:
        interval: steps between validations; 0 validates only before the first step and at the end.
        sequences: largest number of sequences validated; 0 takes the whole corpus.
        thresholds: confidences of the early-exit sweep; empty for no sweep.
    """

    interval: int = 1000
    sequences: int = 256
    thresholds: list[float] = field(default_factory=lambda: [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99])


@dataclass
class CheckpointConfig:
    """Training checkpoints.

    Attributes:
        interval: steps between saves; 0 saves only at the end and on SIGTERM or SIGINT.
        keep: newest checkpoints that stay on disk, at least 2.
        asynchronous: write them while tuning goes on, from a copy of this process's share of exits and optimizer in
            host memory; otherwise tuning stands still until they are on disk.
        verify: check what is read against its checksums, where there are any: checkpoints to go on from, adapters and
            parallel checkpoints.
    """

    interval: int = 1000
    keep: int = 2
    asynchronous: bool = True
    verify: bool = True


@dataclass
class WandbConfig:
    """Weights & Biases (extra ``wandb``): the same figures as in TensorBoard. Off without a project.

    Attributes:
        project: the project that the run belongs to; empty turns it off.
        name: of the run; empty takes the name of the output directory.
        mode: ``offline`` writes to ``OUTPUT/wandb`` and sends nothing (``wandb sync`` uploads it later); ``online``
            also sends while tuning.
    """

    project: str = ""
    name: str = ""
    mode: Literal["offline", "online"] = "offline"


@dataclass
class LoggingConfig:
    """What is written while tuning.

    Attributes:
        interval: steps between lines of the JSONL log and points in TensorBoard and wandb.
        tensorboard: write TensorBoard event files to ``OUTPUT/tensorboard``.
        wandb: Weights & Biases.
    """

    interval: int = 1
    tensorboard: bool = True
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass
class RunConfig:
    """Everything that ``megatron-ee tune`` is told.

    Attributes:
        model: the frozen backbone.
        exits: what is attached to it.
        data: corpora.
        parallel: processes.
        optimizer: AdamW.
        schedule: learning rate.
        loss: the exits' loss.
        tuning: length and batch.
        validation: quality per exit while tuning.
        checkpoint: saves for resuming.
        logging: progress.
    """

    model: ModelConfig
    exits: list[ExitConfig]
    data: DataConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
