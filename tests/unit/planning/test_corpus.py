"""The notice about too little text for what is trained."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import DataConfig, ExitConfig, ModelConfig, OptimizerConfig, RunConfig, TuningConfig
from megatron_ee.families.registry import parse_architecture
from megatron_ee.planning.corpus import little_data

SPECS = (ExitSpec(1, "norm"), ExitSpec(2, "mlp"))
HEAD, MLP = 2048 * 64, 3 * 64 * 128 + 64


@pytest.fixture
def architecture() -> Architecture:
    return parse_architecture(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "vocab_size": 2048,
        }
    )


def config(patience: int = 0, decay_towards: Any = "zero") -> RunConfig:
    return RunConfig(
        ModelConfig(""),
        [ExitConfig(1)],
        DataConfig([""]),
        optimizer=OptimizerConfig(decay_towards=decay_towards),
        tuning=TuningConfig(patience=patience),
    )


def test_the_notice_names_numbers_and_what_helps(architecture: Architecture) -> None:
    (line,) = little_data(config(), architecture, SPECS, [1000, 500], [10.0, 40.0])
    assert line == (
        "data.train: 1,500 tokens to learn from, read 20.0 times, are few for the "
        f"{HEAD + MLP:,} trained parameters of the exit after layer 2, which may memorise them; consider "
        "head: shared (24,640 parameters), tuning.patience, optimizer.decay_towards: initial, fewer steps or more text"
    )


@pytest.mark.parametrize(
    "labels, passes",
    [
        (HEAD + MLP, 100.0),  # a label for each parameter
        (1000, 4.0),  # hardly any text is read often
    ],
)
def test_enough_text_or_few_passes_are_fine(labels: int, passes: float, architecture: Architecture) -> None:
    assert little_data(config(), architecture, SPECS, [labels], [passes]) == []
    assert little_data(config(), architecture, SPECS, [labels - 1], [passes + 1])


def test_only_what_is_not_in_use_is_named(architecture: Architecture) -> None:
    shared = [ExitSpec(2, "mlp", "shared")]
    (line,) = little_data(config(patience=2), architecture, shared, [1000], [10.0])
    assert line.endswith("; consider optimizer.decay_towards: initial, fewer steps or more text")
    assert little_data(config(2, "initial"), architecture, shared, [1000], [10.0]) == []
    (line,) = little_data(config(2), architecture, [ExitSpec(2, "embedding")], [1000], [10.0])
    assert "shared" not in line
