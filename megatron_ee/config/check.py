"""Checks of a configuration beyond its types: ranges, contradicting keys, and the fit to the model."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, inf
from pathlib import Path

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec, resolve_exits
from megatron_ee.config.schema import (
    CorpusConfig,
    DataConfig,
    DistillationConfig,
    FitConfig,
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    Residency,
    RunConfig,
    ScheduleConfig,
    TuningConfig,
    WandbConfig,
)
from megatron_ee.errors import ConfigError

MAX_SEED = 2**32 - 1  # numpy's largest seed
_HOLD_OUT = "name corpora in data.validation, or set data.validation_fraction"


def check_run(config: RunConfig, architecture: Architecture, world_size: int = 1) -> tuple[ExitSpec, ...]:
    """Check ``config`` against itself, the model and the number of processes, before anything is loaded.

    Returns:
        The exits in the order of their layers, positions resolved to layer numbers.

    Raises:
        ConfigError: one line that names the key, its value and the possible values.
    """
    check_model_path(config.model.path)
    exits = resolve_exits(config.exits, architecture.num_layers)
    _check_data(config.data, architecture.max_positions)
    _check_optimizer(config.optimizer, config.schedule)
    _check_loss(config.loss)
    _check_fit(config.fit)
    _check_distillation(config.loss.distillation, architecture.vocab_size)
    _check_intervals(config)
    _check_patience(config)
    _check_wandb(config.logging.wandb)
    _check_parallel(config.parallel, architecture, config.data.sequence_length)
    check_residency(config.model.residency, config.parallel.pipeline, "model.residency")
    _check_batch(config.tuning, data_parallel_size(config.parallel, world_size))
    return exits


def check_model_path(path: str) -> None:
    """ConfigError unless ``path`` is a directory."""
    if not path:
        raise ConfigError("model.path: is empty; give the directory of a Hugging Face model")
    if not Path(path).is_dir():
        raise ConfigError(f"model.path: no such directory: {path}")


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Number of model replicas among ``world_size`` processes.

    Raises:
        ConfigError: tensor x pipeline does not divide ``world_size``.
    """
    model_size = parallel.tensor * parallel.pipeline
    if world_size % model_size:
        raise ConfigError(
            f"parallel.tensor: {parallel.tensor} x parallel.pipeline {parallel.pipeline} = {model_size} processes hold "
            f"one model, which does not divide the {world_size} running; start a multiple of {model_size}, such as "
            f"with torchrun --nproc-per-node {model_size}"
        )
    return world_size // model_size


def check_tensor(architecture: Architecture, tensor: int, key: str) -> None:
    """Refuse a tensor-parallel size that does not divide the model.

    Raises:
        ConfigError: naming ``key``.
    """
    for what, count in _cut_counts(architecture).items():
        if count % tensor:
            most = largest_tensor(architecture)
            possible = ", ".join(str(size) for size in range(1, most + 1) if most % size == 0)
            raise ConfigError(f"{key}: {tensor} does not divide the model's {count} {what}; possible: {possible}")


def largest_tensor(architecture: Architecture) -> int:
    """The largest tensor-parallel size. The possible sizes are those that divide it."""
    return gcd(*_cut_counts(architecture).values())


def _cut_counts(architecture: Architecture) -> dict[str, int]:
    """What tensor parallelism cuts evenly."""
    return {
        "attention heads": architecture.num_heads,
        "key-value heads": architecture.num_kv_heads,
        "MLP features": architecture.ffn_size,
    }


def check_pipeline(num_layers: int, pipeline: int, key: str) -> None:
    """Refuse more pipeline stages than there are layers to spread over them.

    Raises:
        ConfigError: naming ``key``.
    """
    if pipeline > num_layers:
        raise ConfigError(f"{key}: {pipeline} stages are more than the model's {num_layers} layers")


def check_ranks(architecture: Architecture, tensor: int, pipeline: int, processes: int) -> None:
    """Refuse parallel sizes of a command line that do not fit the model or the number of processes.

    Raises:
        ConfigError: naming the option.
    """
    check_tensor(architecture, tensor, "--tensor")
    check_pipeline(architecture.num_layers, pipeline, "--pipeline")
    if processes % (tensor * pipeline):
        raise ConfigError(
            f"--tensor: {tensor} x --pipeline {pipeline} = {tensor * pipeline} processes hold one model, which does "
            f"not divide the {processes} running; start a multiple with torchrun, or change the options"
        )


def check_residency(residency: Residency, pipeline: int, key: str) -> None:
    """Refuse to stream layers to several stages.

    Raises:
        ConfigError: naming ``key``.
    """
    if residency != "device" and pipeline > 1:
        raise ConfigError(
            f"{key}: {residency} reads each layer once for all microbatches, but pipeline stages take one by one; "
            "use one stage, with tensor and data parallelism, or device"
        )


def _check_parallel(parallel: ParallelConfig, architecture: Architecture, sequence_length: int) -> None:
    _at_least(1, "parallel.tensor", parallel.tensor)
    _at_least(1, "parallel.pipeline", parallel.pipeline)
    _positive("parallel.timeout_seconds", parallel.timeout_seconds)
    check_tensor(architecture, parallel.tensor, "parallel.tensor")
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError("parallel.sequence: needs parallel.tensor above 1")
    if parallel.sequence and sequence_length % parallel.tensor:
        raise ConfigError(
            f"data.sequence_length: {sequence_length} is not a multiple of parallel.tensor {parallel.tensor}, over "
            "which parallel.sequence spreads it"
        )
    if parallel.layout != "auto" and len(parallel.layout) != parallel.pipeline:
        raise ConfigError(
            f"parallel.layout: the stages listed are {len(parallel.layout)}, but parallel.pipeline is "
            f"{parallel.pipeline}; make them equal"
        )


def _check_data(data: DataConfig, max_positions: int) -> None:
    if not data.train:
        raise ConfigError("data.train: is empty; give at least one corpus, the --output of prepare-data")
    _check_corpora("data.train", data.train)
    _check_corpora("data.validation", data.validation)
    _fraction("data.validation_fraction", data.validation_fraction)
    if data.validation and data.validation_fraction:
        raise ConfigError(
            "data.validation_fraction: contradicts data.validation, which names corpora; give only one of the two"
        )
    _at_least(1, "data.sequence_length", data.sequence_length)
    if data.sequence_length > max_positions:
        raise ConfigError(
            f"data.sequence_length: {data.sequence_length} is longer than the model's {max_positions} positions"
        )
    _seed("data.seed", data.seed)


def _check_corpora(key: str, corpora: Sequence[str | CorpusConfig]) -> None:
    for index, corpus in enumerate(corpora):
        if isinstance(corpus, CorpusConfig):
            _positive(f"{key}[{index}].weight", corpus.weight)
        if not (corpus.path if isinstance(corpus, CorpusConfig) else corpus):
            raise ConfigError(f"{key}[{index}]: the path is empty; give the prefix of a corpus")


def _check_optimizer(optimizer: OptimizerConfig, schedule: ScheduleConfig) -> None:
    _positive("optimizer.lr", optimizer.lr)
    _not_negative("optimizer.min_lr", optimizer.min_lr)
    # A constant schedule does not use min_lr, whose default may be above a small lr.
    if schedule.decay != "constant" and optimizer.min_lr > optimizer.lr:
        raise ConfigError(
            f"optimizer.min_lr: {optimizer.min_lr:g} is above optimizer.lr {optimizer.lr:g}, from which it decays"
        )
    _fraction("optimizer.beta1", optimizer.beta1)
    _fraction("optimizer.beta2", optimizer.beta2)
    _positive("optimizer.eps", optimizer.eps)
    _not_negative("optimizer.weight_decay", optimizer.weight_decay)
    if optimizer.decay_towards != "zero" and optimizer.weight_decay == 0:
        raise ConfigError(
            f"optimizer.decay_towards: {optimizer.decay_towards} has no effect while optimizer.weight_decay is 0; "
            "raise that, or leave decay_towards out"
        )
    _not_negative("optimizer.clip_grad", optimizer.clip_grad)
    _fraction("schedule.warmup_fraction", schedule.warmup_fraction)


def _check_loss(loss: LossConfig) -> None:
    _fraction("loss.weight_warmup_fraction", loss.weight_warmup_fraction)
    _at_least(1, "loss.chunk_tokens", loss.chunk_tokens)


def _check_distillation(distillation: DistillationConfig, vocab_size: int) -> None:
    key = "loss.distillation"
    _not_negative(f"{key}.kl", distillation.kl)
    _not_negative(f"{key}.cross_entropy", distillation.cross_entropy)
    if distillation.kl == distillation.cross_entropy == 0:
        raise ConfigError(f"{key}.cross_entropy: 0, and {key}.kl is 0 too: nothing would be trained; raise one of them")
    if distillation.kl == 0 and distillation.cross_entropy != 1:
        raise ConfigError(
            f"{key}.cross_entropy: {distillation.cross_entropy:g} has no effect without {key}.kl; set that above 0, "
            "or give exits their weight"
        )
    _positive(f"{key}.temperature", distillation.temperature)
    _at_least(1, f"{key}.top_k", distillation.top_k)
    if distillation.top_k > vocab_size:
        raise ConfigError(f"{key}.top_k: {distillation.top_k} is above the model's {vocab_size} tokens")


def _check_fit(fit: FitConfig) -> None:
    if fit.tokens != "auto":
        _at_least(1, "fit.tokens", fit.tokens)
    _not_negative("fit.ridge", fit.ridge)


def _check_batch(tuning: TuningConfig, replicas: int) -> None:
    _at_least(0, "tuning.steps", tuning.steps)
    _at_least(1, "tuning.global_batch_size", tuning.global_batch_size)
    _at_least(1, "tuning.micro_batch_size", tuning.micro_batch_size)
    _at_least(0, "tuning.skip_limit", tuning.skip_limit)
    _seed("tuning.seed", tuning.seed)
    if tuning.global_batch_size % (tuning.micro_batch_size * replicas):
        share = f" x {replicas} data-parallel replicas" if replicas > 1 else ""
        raise ConfigError(
            f"tuning.global_batch_size: {tuning.global_batch_size} is not a multiple of "
            f"tuning.micro_batch_size {tuning.micro_batch_size}{share}"
        )


def _check_intervals(config: RunConfig) -> None:
    _at_least(0, "validation.interval", config.validation.interval)
    _at_least(0, "validation.sequences", config.validation.sequences)
    for index, threshold in enumerate(config.validation.thresholds):
        if not 0 < threshold <= 1:
            raise ConfigError(f"validation.thresholds[{index}]: must be above 0 and at most 1, not {threshold}")
    acceptance = config.validation.acceptance
    _at_least(0, "validation.acceptance.prompts", acceptance.prompts)
    _at_least(1, "validation.acceptance.prompt_tokens", acceptance.prompt_tokens)
    _at_least(2, "validation.acceptance.tokens", acceptance.tokens)
    _at_least(1, "validation.acceptance.draft_length", acceptance.draft_length)
    threshold = config.validation.free_running_threshold
    if not 0 < threshold <= 1:
        raise ConfigError(f"validation.free_running_threshold: must be above 0 and at most 1, not {threshold}")
    if config.validation.free_running and not acceptance.prompts:
        raise ConfigError("validation.free_running: true needs prompts; raise validation.acceptance.prompts above 0")
    if config.validation.free_running and not _validates(config):
        raise ConfigError(f"validation.free_running: true needs held-out documents; {_HOLD_OUT}")
    _at_least(0, "checkpoint.interval", config.checkpoint.interval)
    _at_least(2, "checkpoint.keep", config.checkpoint.keep)
    _at_least(1, "logging.interval", config.logging.interval)


def _validates(config: RunConfig) -> bool:
    return bool(config.data.validation or config.data.validation_fraction)


def _check_patience(config: RunConfig) -> None:
    patience = config.tuning.patience
    _at_least(0, "tuning.patience", patience)
    if not patience:
        return
    if not _validates(config):
        raise ConfigError(f"tuning.patience: {patience} needs a validation loss; {_HOLD_OUT}")
    if config.validation.interval == 0:
        raise ConfigError(
            f"tuning.patience: {patience} needs validations during the run, but validation.interval is 0; raise it"
        )


def _check_wandb(wandb: WandbConfig) -> None:
    given = "name" if wandb.name else "mode" if wandb.mode != "offline" else ""
    if given and not wandb.project:
        raise ConfigError(f"logging.wandb.project: is empty, so logging.wandb.{given} has no effect; name a project")


# NaN fails these comparisons.


def _at_least(least: int, key: str, value: int) -> None:
    if not value >= least:
        raise ConfigError(f"{key}: must be at least {least}, not {value}")


def _positive(key: str, value: float) -> None:
    if not 0 < value < inf:
        raise ConfigError(f"{key}: must be a positive number, not {value}")


def _not_negative(key: str, value: float) -> None:
    if not 0 <= value < inf:
        raise ConfigError(f"{key}: must be a number of at least 0, not {value}")


def _fraction(key: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{key}: must be at least 0 and below 1, not {value}")


def _seed(key: str, value: int) -> None:
    if not 0 <= value <= MAX_SEED:
        raise ConfigError(f"{key}: must lie between 0 and {MAX_SEED}, not {value}")
