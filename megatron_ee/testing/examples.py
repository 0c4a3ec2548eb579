"""The example configurations of a checkout, and the architectures of their models, without weights."""

from __future__ import annotations

import json
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

RECIPE_MODELS: dict[str, dict[str, Any]] = {
    path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(EXAMPLES.glob("*/config.json"))
}
"""Each directory's ``config.json``: the settings of its model, as released."""
MODELS = {name: values for name, values in RECIPE_MODELS.items() if (EXAMPLES / name / "config.yaml").exists()}
"""Of the directories with the paper's exits."""
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
    "olmo2_7b": {
        "architectures": ["Olmo2ForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 100352,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
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
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    settings = RECIPE_MODELS[name.split("/")[0]] if model is None else OTHER_MODELS[model]
    return parse_architecture(settings if window is None else {**settings, **mistral})


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
