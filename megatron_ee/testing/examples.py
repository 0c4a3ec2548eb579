"""The example configurations of a checkout, and the architectures of their models, without weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.check import check_run
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.load import load_config
from megatron_ee.config.schema import RunConfig
from megatron_ee.exits.registry import resolve_init
from megatron_ee.families.registry import parse_architecture

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

# From the released config.json files.
LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5}
LLAMA2 = {**LLAMA, "vocab_size": 32000, "max_position_embeddings": 4096}
MODELS: dict[str, dict[str, Any]] = {
    "llama2_7b": {
        **LLAMA2,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama2_13b": {
        **LLAMA2,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
    "llama2_70b": {
        **LLAMA2,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "llama3.1_8b": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
}
RECIPE_MODELS: dict[str, dict[str, Any]] = {
    **MODELS,
    "qwen3_32b": {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1000000,
    },
}
OTHER_MODELS: dict[str, dict[str, Any]] = {
    "gemma2_2b": {
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
}
"""Models without an example configuration, whose options the examples' models lack."""
RECIPES = {
    path.relative_to(EXAMPLES).as_posix(): 24 if path.stem.endswith("24gb") else 80
    for path in sorted(EXAMPLES.glob("*/one_gpu*.yaml"))
}
"""The configurations for one GPU, with its memory in GB."""


def example_architecture(name: str, window: int | None = None, model: str | None = None) -> Architecture:
    """Architecture of the model of an example or a recipe.

    Args:
        name: directory under ``examples``, or a recipe.
        window: of a Mistral with the same shape.
        model: one of ``OTHER_MODELS`` in its place.
    """
    changes = {} if window is None else {"architectures": ["MistralForCausalLM"], "sliding_window": window}
    settings = RECIPE_MODELS[name.split("/")[0]] if model is None else OTHER_MODELS[model]
    return parse_architecture({**settings, **changes})


def open_example(
    name: str, overrides: Sequence[str] = (), processes: int | None = None, model: str | None = None
) -> tuple[RunConfig, tuple[ExitSpec, ...], int]:
    """Load and check an example configuration.

    Args:
        name: directory under ``examples``, or a recipe.
        overrides: as on the command line.
        processes: number of processes; None for the number in the file's comments.
        model: see ``example_architecture``.

    Returns:
        The configuration, its exits, and the number of processes.
    """
    path = EXAMPLES / name if name in RECIPES else EXAMPLES / name / "config.yaml"
    config = load_config(path, ["--model.path", str(path.parent), *overrides])
    processes = int(written(name, r"--nproc-per-node (\d+)")) if processes is None else processes
    architecture = example_architecture(name, model=model)
    return config, resolve_init(check_run(config, architecture, processes), architecture), processes


def written(name: str, pattern: str) -> str:
    """The first group of ``pattern`` in the text of an example configuration."""
    found = re.search(pattern, (EXAMPLES / name / "config.yaml").read_text(encoding="utf-8"))
    assert found is not None, pattern
    return found[1]
