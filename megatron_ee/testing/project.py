"""A tiny model with a tokenizer and prepared corpora, and functions that run commands as a user does."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import shutil
import subprocess
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron_ee.checkpoint.store import open_checkpoint
from megatron_ee.testing.command import Command

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Project:
    """Files that a run needs."""

    model: Path
    train: Path
    held_out: Path
    cache: Path

    def environment(self) -> dict[str, str]:
        """Environment of child processes: this checkout's package, and a separate cache."""
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        return {**os.environ, "PYTHONPATH": path, "MEGATRON_EE_CACHE": str(self.cache), "OMP_NUM_THREADS": "1"}

    def run(self, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``megatron-ee`` with these arguments in a separate process, and wait for it."""
        with self.start(*arguments) as command:
            done = command.wait(240)
        assert not check or done.returncode == 0, done.stderr
        return done

    def start(self, *arguments: object) -> Command:
        """As ``run``, without waiting."""
        return Command(list(map(str, arguments)), self.environment())

    def config(self, path: Path, **changes: Any) -> Path:
        """Write the configuration of a short run, with changed sections or keys."""
        values: dict[str, Any] = {
            "model": {"path": str(self.model), "dtype": "float32"},
            "exits": [
                {"layer": 1, "init": "copy"},
                {"layer": 2, "body": "layer", "head": "shared", "init": "copy"},
                {"layer": 3, "body": "norm"},
            ],
            "data": {"train": [str(self.train)], "validation": [str(self.held_out)], "sequence_length": 32},
            "optimizer": {"lr": 5.0e-3, "min_lr": 1.0e-3},
            "tuning": {"steps": 12, "global_batch_size": 4, "micro_batch_size": 2},
            "validation": {"interval": 5, "sequences": 16},
            "checkpoint": {"interval": 4},
            "logging": {"interval": 1},
        }
        for key, value in changes.items():
            values[key] = {**values[key], **value} if isinstance(value, dict) and key in values else value
        path.write_text(yaml.safe_dump(values))
        return path


def make_project(root: Path) -> Project:
    """Create model, tokenizer and corpora under ``root``. The text is the source of a few standard modules."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from megatron_ee.testing.models import save_tiny_model

    model = root / "model"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    save_tiny_model("llama3.1", model, vocab_size=len(alphabet) + 3, eos_token_id=1, bos_token_id=0)
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>").save_pretrained(model)
    for name, modules in (("train", (argparse, json)), ("held_out", (textwrap,))):
        sources = [inspect.getsource(module)[:20_000] for module in modules]
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sources))
    result = Project(model, root / "corpus" / "train", root / "corpus" / "held_out", root / "cache")
    for prefix in (result.train, result.held_out):
        result.run(
            *("prepare-data", "--input", root / f"{prefix.name}.jsonl", "--tokenizer", model, "--output", prefix)
        )
    return result


def changed_model(project: Project, path: Path, *, settings: dict[str, Any] | None = None, bias: float = 0.0) -> str:
    """A copy of the project's model with other settings, and ``bias`` added to its final norm."""
    shutil.copytree(project.model, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **(settings or {})}))
    weights = load_file(path / "model.safetensors")
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] + bias}, path / "model.safetensors")
    return str(path)


def read_log(output: Path) -> list[Any]:
    """The lines of a run's log, without speed, saves and sessions."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "save" not in line and "session" not in line]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in steps]


def all_tensors(output: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of the training checkpoint of a step of a run."""
    return saved_tensors(output / "checkpoints" / f"step-{step}")


def saved_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a training checkpoint."""
    checkpoint = open_checkpoint(path)
    return {
        key: checkpoint.read(key, torch.empty(checkpoint.shape(key), dtype=checkpoint.dtype(key)))
        for key in checkpoint.keys()  # noqa: SIM118 - no mapping
    }
