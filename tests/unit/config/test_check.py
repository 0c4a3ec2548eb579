"""Values that types cannot refuse: each refusal names its key."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.check import check_run, data_parallel_size
from megatron_ee.config.load import config_from_dict
from megatron_ee.config.schema import ParallelConfig, RunConfig
from megatron_ee.errors import ConfigError
from megatron_ee.families.registry import parse_architecture


@pytest.fixture
def architecture() -> Architecture:
    return parse_architecture(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 100,
            "max_position_embeddings": 128,
        }
    )


def configuration(path: Path, **blocks: dict[str, Any] | list[Any]) -> RunConfig:
    values: dict[str, Any] = {
        "model": {"path": str(path)},
        "exits": [{"layer": 6, "body": "norm"}, {"layer": 0.25}],
        "data": {"train": ["corpus"], "sequence_length": 128},
    }
    for name, block in blocks.items():
        values[name] = values[name] | block if isinstance(block, dict) and name in values else block
    return config_from_dict(values)


def distilled(**values: float) -> dict[str, Any]:
    return {"distillation": values}


@pytest.mark.smoke
def test_good_configurations(tmp_path: Path, architecture: Architecture) -> None:
    exits = check_run(configuration(tmp_path), architecture)
    assert [(exit_.layer, exit_.body) for exit_ in exits] == [(2, "mlp"), (6, "norm")]
    for blocks in (
        {"data": {"validation_fraction": 0.1, "sequence_length": 1}},
        {"data": {"validation": ["held_out"]}},
        {"optimizer": {"lr": 1e-6}, "schedule": {"decay": "constant"}},
        {"optimizer": {"lr": 1e-4, "min_lr": 1e-4, "clip_grad": 0, "weight_decay": 0}},
        {"tuning": {"global_batch_size": 12, "micro_batch_size": 4}},
        {"validation": {"interval": 0, "sequences": 0, "thresholds": [1.0]}},
        {"loss": distilled(kl=1, cross_entropy=0, top_k=100)},
        {"tuning": {"skip_limit": 0}},
        {"tuning": {"patience": 3}, "data": {"validation": ["v"]}},
        {"tuning": {"patience": 1}, "data": {"validation_fraction": 0.1}},
        {"optimizer": {"decay_towards": "initial"}},
        {"validation": {"free_running": True, "free_running_threshold": 1.0}, "data": {"validation": ["v"]}},
    ):
        check_run(configuration(tmp_path, **blocks), architecture)


@pytest.mark.parametrize(
    ("block", "values", "message"),
    [
        ("exits", [], "exits: at least one exit is needed"),
        *(
            ("exits", [{"layer": layer}], f"exits[0].layer: {layer} is neither a layer (a whole number, 1 to 8) nor")
            for layer in (1.0, 4.0, 0.0, -0.5, 1.5)
        ),
        ("exits", [{"layer": 9}], "exits[0].layer: 9 is outside the model, which has layers 1 to 8"),
        ("exits", [{"layer": 4}, {"layer": 0.5}], "exits[1].layer: there is already an exit after layer 4"),
        ("exits", [{"layer": 4, "weight": 0}], "exits[0].weight: must be a positive number, not 0.0"),
        ("model", {"path": ""}, "model.path: is empty"),
        ("model", {"path": "/nowhere/at/all"}, "model.path: no such directory: /nowhere/at/all"),
        ("data", {"train": []}, "data.train: is empty"),
        ("data", {"train": ["a", ""]}, "data.train[1]: the path is empty"),
        ("data", {"train": [{"path": "a", "weight": 0}]}, "data.train[0].weight: must be a positive number, not 0.0"),
        ("data", {"validation": [{"path": ""}]}, "data.validation[0]: the path is empty"),
        ("data", {"validation": ["v"], "validation_fraction": 0.1}, "data.validation_fraction: contradicts"),
        ("data", {"validation_fraction": 1.0}, "data.validation_fraction: must be at least 0 and below 1, not 1.0"),
        ("data", {"sequence_length": 129}, "data.sequence_length: 129 is longer than the model's 128 positions"),
        ("data", {"sequence_length": 0}, "data.sequence_length: must be at least 1, not 0"),
        ("data", {"seed": -1}, "data.seed: must lie between 0 and 4294967295, not -1"),
        ("tuning", {"seed": 2**32}, "tuning.seed: must lie between 0 and 4294967295, not 4294967296"),
        ("tuning", {"steps": -1}, "tuning.steps: must be at least 0, not -1"),
        ("tuning", {"global_batch_size": 0}, "tuning.global_batch_size: must be at least 1, not 0"),
        ("tuning", {"micro_batch_size": 0}, "tuning.micro_batch_size: must be at least 1, not 0"),
        ("tuning", {"micro_batch_size": 3}, "tuning.global_batch_size: 16 is not a multiple of tuning.micro_batch_siz"),
        ("tuning", {"micro_batch_size": 32}, "tuning.global_batch_size: 16 is not a multiple of tuning.micro_batch_s"),
        ("optimizer", {"lr": 0}, "optimizer.lr: must be a positive number, not 0.0"),
        ("optimizer", {"min_lr": -1e-5}, "optimizer.min_lr: must be a number of at least 0, not -1e-05"),
        ("optimizer", {"lr": 1e-6}, "optimizer.min_lr: 1e-05 is above optimizer.lr 1e-06"),
        ("optimizer", {"beta1": 1.0}, "optimizer.beta1: must be at least 0 and below 1, not 1.0"),
        ("optimizer", {"beta2": -0.1}, "optimizer.beta2: must be at least 0 and below 1, not -0.1"),
        ("optimizer", {"eps": 0}, "optimizer.eps: must be a positive number, not 0.0"),
        ("optimizer", {"weight_decay": -1}, "optimizer.weight_decay: must be a number of at least 0, not -1.0"),
        ("optimizer", {"clip_grad": -1}, "optimizer.clip_grad: must be a number of at least 0, not -1.0"),
        ("schedule", {"warmup_fraction": 1}, "schedule.warmup_fraction: must be at least 0 and below 1, not 1.0"),
        ("loss", {"weight_warmup_fraction": 1}, "loss.weight_warmup_fraction: must be at least 0 and below 1, not 1"),
        (
            "logging",
            {"wandb": {"mode": "online"}},
            "logging.wandb.project: is empty, so logging.wandb.mode",
        ),
        ("logging", {"wandb": {"name": "a"}}, "logging.wandb.project: is empty, so logging.wandb.name"),
        ("loss", {"chunk_tokens": 0}, "loss.chunk_tokens: must be at least 1, not 0"),
        ("validation", {"interval": -1}, "validation.interval: must be at least 0, not -1"),
        ("validation", {"sequences": -1}, "validation.sequences: must be at least 0, not -1"),
        ("validation", {"thresholds": [0.5, 0]}, "validation.thresholds[1]: must be above 0 and at most 1, not 0.0"),
        ("validation", {"acceptance": {"prompts": -1}}, "validation.acceptance.prompts: must be at least 0, not -1"),
        ("validation", {"acceptance": {"tokens": 1}}, "validation.acceptance.tokens: must be at least 2, not 1"),
        (
            "validation",
            {"acceptance": {"draft_length": 0}},
            "validation.acceptance.draft_length: must be at least 1, not 0",
        ),
        ("validation", {"thresholds": [1.5]}, "validation.thresholds[0]: must be above 0 and at most 1, not 1.5"),
        ("checkpoint", {"interval": -1}, "checkpoint.interval: must be at least 0, not -1"),
        ("checkpoint", {"keep": 1}, "checkpoint.keep: must be at least 2, not 1"),
        ("logging", {"interval": 0}, "logging.interval: must be at least 1, not 0"),
        ("parallel", {"tensor": 0}, "parallel.tensor: must be at least 1, not 0"),
        ("parallel", {"pipeline": -2}, "parallel.pipeline: must be at least 1, not -2"),
        ("parallel", {"sequence": True}, "parallel.sequence: needs parallel.tensor above 1"),
        ("parallel", {"tensor": 3}, "parallel.tensor: 3 does not divide the model's 4 attention heads; possible: 1, 2"),
        ("parallel", {"tensor": 4}, "parallel.tensor: 4 does not divide the model's 2 key-value heads; possible: 1, 2"),
        ("parallel", {"timeout_seconds": 0}, "parallel.timeout_seconds: must be a positive number, not 0.0"),
        (
            "parallel",
            {"layout": []},
            "parallel.layout: the stages listed are 0, but parallel.pipeline is 1; make them equal",
        ),
        (
            "parallel",
            {"layout": [{"layers": [1, 6]}] * 2},
            "parallel.layout: the stages listed are 2, but parallel.pipeline is 1;",
        ),
        (
            "parallel",
            {"pipeline": 2, "layout": [{"exits": [2]}]},
            "parallel.layout: the stages listed are 1, but parallel.pipeline is 2;",
        ),
        ("tuning", {"skip_limit": -1}, "tuning.skip_limit: must be at least 0, not -1"),
        ("tuning", {"patience": -1}, "tuning.patience: must be at least 0, not -1"),
        ("tuning", {"patience": 2}, "tuning.patience: 2 needs a validation loss; name corpora in data.validation, or"),
        (
            "validation",
            {"free_running_threshold": 0.0},
            "validation.free_running_threshold: must be above 0 and at most 1, not 0.0",
        ),
        (
            "validation",
            {"free_running": True, "acceptance": {"prompts": 0}},
            "validation.free_running: true needs prompts; raise validation.acceptance.prompts above 0",
        ),
        ("validation", {"free_running": True}, "validation.free_running: true needs held-out documents; name corpora"),
        (
            "optimizer",
            {"decay_towards": "initial", "weight_decay": 0.0},
            "optimizer.decay_towards: initial has no effect while optimizer.weight_decay is 0",
        ),
        ("loss", distilled(kl=-1), "loss.distillation.kl: must be a number of at least 0, not -1.0"),
        ("loss", distilled(cross_entropy=-1), "loss.distillation.cross_entropy: must be a number of at least 0, not"),
        ("loss", distilled(cross_entropy=0), "loss.distillation.cross_entropy: 0, and loss.distillation.kl is 0 too"),
        ("loss", distilled(temperature=0), "loss.distillation.temperature: must be a positive number, not 0.0"),
        ("loss", distilled(top_k=0), "loss.distillation.top_k: must be at least 1, not 0"),
        ("loss", distilled(top_k=101), "loss.distillation.top_k: 101 is above the model's 100 tokens"),
    ],
)
def test_refusals(tmp_path: Path, architecture: Architecture, block: str, values: Any, message: str) -> None:
    config = configuration(tmp_path, **{block: values})
    with pytest.raises(ConfigError) as caught:
        check_run(config, architecture)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_patience_needs_validations_during_the_run(tmp_path: Path, architecture: Architecture) -> None:
    blocks: dict[str, Any] = {"tuning": {"patience": 2}, "data": {"validation": ["v"]}, "validation": {"interval": 0}}
    with pytest.raises(ConfigError, match=r"^tuning\.patience: 2 needs validations during the run, .*interval is 0"):
        check_run(configuration(tmp_path, **blocks), architecture)


def test_several_processes(tmp_path: Path, architecture: Architecture) -> None:
    stages = [{"layers": [1, 4], "exits": [2]}, {"layers": [5, 6], "exits": [6]}]
    for parallel, sizes in (
        ({}, (1, 2, 16)),
        ({"tensor": 2, "sequence": True}, (2, 8)),
        ({"pipeline": 3}, (3,)),
        ({"tensor": 2, "pipeline": 2, "layout": stages}, (4, 16)),
    ):
        blocks: dict[str, Any] = {"parallel": parallel, "tuning": {"global_batch_size": 16}}
        for size in sizes:
            check_run(configuration(tmp_path, **blocks), architecture, world_size=size)
        with pytest.raises(ConfigError, match=r"^tuning\.global_batch_size: 16 is not a multiple"):
            check_run(configuration(tmp_path, **blocks), architecture, world_size=32 * sizes[0])
    with pytest.raises(ConfigError, match=r"^parallel\.tensor: 2 x parallel\.pipeline 1 = 2 processes hold one model"):
        check_run(configuration(tmp_path, parallel={"tensor": 2}), architecture)


def test_what_tensor_parallelism_must_divide(tmp_path: Path, architecture: Architecture) -> None:
    config = configuration(tmp_path, parallel={"tensor": 2}, data={"sequence_length": 127})
    check_run(config, architecture, world_size=2)
    config.parallel.sequence = True
    with pytest.raises(ConfigError, match=r"^data\.sequence_length: 127 is not a multiple of parallel\.tensor 2"):
        check_run(config, architecture, world_size=2)
    config.parallel.sequence = False
    odd = dataclasses.replace(architecture, ffn_size=129)
    with pytest.raises(ConfigError, match=r"^parallel\.tensor: 2 does not divide the model's 129 MLP features; .*: 1$"):
        check_run(config, odd, world_size=2)


def test_nan_in_a_configuration_made_in_code(tmp_path: Path, architecture: Architecture) -> None:
    config = configuration(tmp_path)
    config.optimizer.lr = float("nan")
    with pytest.raises(ConfigError, match=r"^optimizer\.lr: must be a positive number"):
        check_run(config, architecture)


def test_data_parallel_size() -> None:
    assert data_parallel_size(ParallelConfig(tensor=2, pipeline=2), 8) == 2
    with pytest.raises(ConfigError, match=r"^parallel\.tensor: 4 x parallel\.pipeline 1 = 4 processes .* the 6 "):
        data_parallel_size(ParallelConfig(tensor=4), 6)
