"""The run configuration: plain dataclasses, one per block of the YAML file.

Defaults are those of the EE-Tuning paper (arXiv 2402.00518, section 4.1) where it states one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Body = Literal["embedding", "norm", "mlp", "layer"]
Head = Literal["own", "shared", "low_rank"]
Init = Literal["auto", "fit", "copy", "random"]
Weights = Literal["packed", "expanded"]
Residency = Literal["device", "host", "disk"]
Quantise = Literal["none", "int8", "int4"]


@dataclass
class ModelConfig:
    """The frozen backbone.

    Attributes:
        path: Hugging Face directory with ``config.json`` and safetensors.
        dtype: dtype of the backbone and the exits. ``auto`` is the checkpoint's own dtype (bfloat16 for float16).
            Trained weights are updated in float32 in any case.
        weights: how a quantised model's weights are held. ``packed`` keeps them as small as in the files, and expands a
            layer when it is reached; ``expanded`` expands them as they are loaded. Results are the same.
        residency: where the layers' weights are. ``device``: all in the device's memory. ``host`` and ``disk`` stream
            them, from host memory or from the model's files, two layers at a time; all microbatches of a step then pass
            a layer before the next one.
        quantise: quantise the layers of a plain model as they are loaded (extra ``quantised``): ``int8`` with one scale
            per output, ``int4`` with one per group of 128 input features, or of 64 or 32 if 128 does not divide them.
    """

    path: str
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    weights: Weights = "packed"
    residency: Residency = "device"
    quantise: Quantise = "none"


@dataclass
class ExitConfig:
    """One exit.

    Attributes:
        layer: the layer whose output the exit reads: a number from 1, or a fraction of the depth between 0 and 1.
        body: what is computed before the head: ``embedding`` (nothing), ``norm``, ``mlp`` (MLP and norm) or ``layer``
            (decoder layer and norm).
        head: the LM head: ``own`` (a trained copy), ``shared`` (the backbone's, frozen) or ``low_rank`` (the backbone's
            plus a trained product of two matrices of ``rank``).
        weight: factor of this exit's loss.
        rank: rank of a ``low_rank`` head.
        init: first values: ``copy`` copies the model's own weights, ``random`` draws from normal(0, 0.02). ``fit``
            copies, then fits the body's last matrix (of a ``norm`` body its scale) in closed form to the final exit's
            features, see ``fit``. ``auto`` is ``fit`` for bodies with a matrix (``mlp``, ``layer``), else ``copy``.
        gate: fit a gate: a linear probe before the head that predicts whether the exit's top-1 token is the final
            exit's. At inference it decides before the head runs, see policy ``gate``.
    """

    layer: int | float
    body: Body = "mlp"
    head: Head = "own"
    weight: float = 1.0
    rank: int = 64
    init: Init = "auto"
    gate: bool = False


@dataclass
class CorpusConfig:
    """One corpus of a blend.

    Attributes:
        path: prefix of the indexed dataset, as given to ``prepare-data --output``.
        weight: share of the sequences that this corpus gives, relative to the other corpora.
    """

    path: str
    weight: float = 1.0


@dataclass
class DataConfig:
    """Corpora that tuning and validation read.

    Attributes:
        train: training corpora: a list of prefixes or of ``{path, weight}``.
        validation: validation corpora, in the same form. If the list is empty, ``validation_fraction`` decides.
        validation_fraction: share of each training corpus that is held out for validation: its last documents.
        sequence_length: tokens per training sequence.
        seed: seed of the order in which documents and sequences are read.
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
        layers: the first and the last layer of the stage, such as ``[1, 8]``. Empty for a stage that only hosts exits.
        exits: positions of the exits that the stage hosts, written as in ``exits``.
    """

    layers: list[int] = field(default_factory=list)
    exits: list[int | float] = field(default_factory=list)


@dataclass
class ParallelConfig:
    """How the model is split over processes; data parallelism takes the processes that are left.

    Attributes:
        tensor: tensor-parallel size.
        pipeline: number of pipeline stages.
        sequence: sequence parallelism on top of tensor parallelism.
        layout: the layers and exits of each pipeline stage. ``auto`` balances the stages by their FLOPs.
        timeout_seconds: seconds without a report from a process after which it counts as lost and the run ends.
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
        min_lr: learning rate at the last step.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        eps: constant added to the denominator of the update.
        weight_decay: decoupled weight decay; not applied to norms and biases.
        decay_towards: what weight decay pulls weights towards: ``zero``, or their ``initial`` values, which keeps exits
            close to what they were copied from and suits a small corpus.
        clip_grad: gradients are scaled down to this norm, taken over all exits; 0 turns clipping off.
        implementation: ``auto`` uses NVIDIA apex's fused AdamW if it is installed and works, else torch's.
            ``deepspeed_cpu`` keeps the optimizer state in host memory, where each exit's gradients go when it is done
            (extra ``deepspeed``).
    """

    lr: float = 1.0e-4
    min_lr: float = 1.0e-5
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1.0e-5
    weight_decay: float = 0.01
    decay_towards: Literal["zero", "initial"] = "zero"
    clip_grad: float = 1.0
    implementation: Literal["auto", "torch", "apex", "deepspeed_cpu"] = "auto"


@dataclass
class ScheduleConfig:
    """Learning-rate schedule.

    Attributes:
        decay: how the rate falls from ``lr`` to ``min_lr``; ``constant`` stays at ``lr``.
        warmup_fraction: share of the steps in which the rate rises linearly from 0 to ``lr``.
    """

    decay: Literal["linear", "cosine", "constant"] = "linear"
    warmup_fraction: float = 0.01


@dataclass
class DistillationConfig:
    """Distillation from the final exit, besides the labels. All layers run in every step then.

    The loss of a token becomes ``cross_entropy * CE + kl * temperature^2 * KL(teacher || exit)``, both at
    ``temperature``, over the teacher's ``top_k`` most probable tokens and all others as one.

    Attributes:
        kl: weight of the KL divergence from the final exit; 0 turns distillation off.
        cross_entropy: weight of the cross-entropy with the label.
        temperature: divides the logits of the final exit and of the exit.
        top_k: number of the final exit's most probable tokens that are used; all others count as one token.
    """

    kl: float = 0.0
    cross_entropy: float = 1.0
    temperature: float = 1.0
    top_k: int = 32


@dataclass
class LossConfig:
    """The exits' loss.

    Attributes:
        dynamic_token_weights: weight each token's loss by the exit's maximum probability, without a gradient through
            the weight.
        weight_warmup: how the loss weights of all exits rise from 0 at the start; ``none`` starts at the full weights.
        weight_warmup_fraction: share of the steps in which they rise.
        chunk_tokens: largest number of tokens whose logits are in memory at a time. The number used may be lower: 256
            on a CPU; on a GPU the number whose float32 logits fill 256 MiB, but at least 512.
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
        steps: optimizer steps. 0 trains nothing: exits are as initialised, such as by ``init: fit``.
        global_batch_size: sequences per optimizer step, over all processes.
        micro_batch_size: sequences per forward pass of one process. It affects speed and memory, not the result.
        seed: seed of exits with ``init: random`` and of ``low_rank`` heads.
        skip_limit: a step with a loss or gradient that is not finite is skipped. More than this number in a row end the
            run.
        patience: validations in a row without a new lowest validation loss after which the run stops early; 0 never
            stops early.
    """

    steps: int = 40_000
    global_batch_size: int = 16
    micro_batch_size: int = 1
    seed: int = 1234
    skip_limit: int = 2
    patience: int = 0


@dataclass
class FitConfig:
    """The closed-form fit of exits with ``init: fit``, before tuning. All layers run for it, once.

    Attributes:
        tokens: unmasked tokens of the training data to fit on, at most one epoch of it. ``auto``: 16 for each feature
            of the model's MLP.
        ridge: strength of the regularisation, relative to the mean square of the MLP's activations. Ten and a hundred
            times this value are tried too, on tokens that are held out.
    """

    tokens: Literal["auto"] | int = "auto"
    ridge: float = 0.01


@dataclass
class AcceptanceConfig:
    """How many tokens each exit's drafts give per round of speculative decoding, measured in every validation.

    Before tuning the full model continues some prompts, the beginnings of held-out documents, greedily. In chat corpora
    the prompt is what comes before the first answer.

    Attributes:
        prompts: number of prompts; 0 turns the measurement off.
        prompt_tokens: tokens per prompt in plain text, if the document has twice as many.
        tokens: largest number of tokens of a continuation, and at most half of ``data.sequence_length``.
        draft_length: proposals per round.
    """

    prompts: int = 16
    prompt_tokens: int = 64
    tokens: int = 64
    draft_length: int = 4


@dataclass
class ValidationConfig:
    """Validation during and after the run.

    Attributes:
        interval: steps between validations. 0 validates only before the first step and after the last.
        sequences: largest number of validation sequences; 0 uses all.
        thresholds: confidence thresholds of the early-exit sweep; an empty list turns the sweep off.
        acceptance: draft acceptance of each exit.
        free_running: measure in every validation what threshold mode writes after the prompts of ``acceptance``, beside
            the full model. All layers then stay loaded while tuning. ``false`` measures it once, at the end of the run.
        free_running_threshold: confidence at which a token leaves there.
    """

    interval: int = 1000
    sequences: int = 256
    thresholds: list[float] = field(default_factory=lambda: [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99])
    acceptance: AcceptanceConfig = field(default_factory=AcceptanceConfig)
    free_running: bool = False
    free_running_threshold: float = 0.9


@dataclass
class CheckpointConfig:
    """Training checkpoints.

    Attributes:
        interval: steps between checkpoints. 0 saves only at the end and after a signal.
        keep: number of newest checkpoints to keep on disk, at least 2.
        asynchronous: write checkpoints in the background. Each process first copies its share of exits and optimizer
            state to host memory. ``false``: tuning waits until a checkpoint is on disk.
        verify: check the checksums of training checkpoints, adapters and parallel checkpoints when they are read.
    """

    interval: int = 1000
    keep: int = 2
    asynchronous: bool = True
    verify: bool = True


@dataclass
class WandbConfig:
    """Weights & Biases (extra ``wandb``): the same figures as in TensorBoard. Off without a project.

    Attributes:
        project: name of the project; empty turns wandb off.
        name: name of the run; empty uses the name of the output directory.
        mode: ``offline`` writes to ``OUTPUT/wandb`` and sends nothing; ``wandb sync`` uploads it later. ``online`` also
            sends while tuning.
    """

    project: str = ""
    name: str = ""
    mode: Literal["offline", "online"] = "offline"


@dataclass
class LoggingConfig:
    """What is written while tuning.

    Attributes:
        interval: steps between two entries in ``log.jsonl``, TensorBoard and wandb.
        tensorboard: write TensorBoard event files to ``OUTPUT/tensorboard``.
        wandb: Weights & Biases.
    """

    interval: int = 1
    tensorboard: bool = True
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass
class RunConfig:
    """The configuration of ``megatron-ee tune``.

    Attributes:
        model: the frozen backbone.
        exits: the exits to attach.
        data: corpora.
        parallel: parallelism.
        optimizer: AdamW.
        schedule: learning rate.
        loss: the exits' loss.
        tuning: length and batch.
        fit: first values of exits with ``init: fit``.
        validation: validation.
        checkpoint: training checkpoints.
        logging: logs.
    """

    model: ModelConfig
    exits: list[ExitConfig]
    data: DataConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
