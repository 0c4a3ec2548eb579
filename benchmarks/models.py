"""The models that are measured: random ones of a few sizes, with a tokenizer, text, and exits in the usual places.

Parents import this module, and a parent stays small: only ``main``, in a process of its own, imports torch.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import megatron_ee
from benchmarks.processes import megatron_ee_command, run_processes
from megatron_ee.errors import UserError

if TYPE_CHECKING:
    import torch

SIZES = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 512},
    "46m": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "vocab_size": 16000},
    "235m": {"hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16, "vocab_size": 32000},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 32, "vocab_size": 32000},
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000},
    "13b": {
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "vocab_size": 32000,
        "intermediate_size": 13824,
        "tie_word_embeddings": False,
    },
}
"""Llama-shaped, without grouped queries. Unless stated, the head is tied to the embedding, and the MLP is 8/3 of the
hidden size."""
POSITIONS = 4096
SHARD, RUN = 4 * 10**9, 2**24
"""Bytes of a file, and numbers that are drawn at a time."""


def model_directory(options: argparse.Namespace, directory: Path, dtype: str) -> Path:
    """The model that the options name, or a random one made below ``directory``."""
    if options.model is not None:
        return Path(options.model)
    path = directory / "model"
    run_processes([sys.executable, "-m", "benchmarks.models", str(path), options.size, dtype])
    return path


def describe_model(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """What stands beside the figures."""
    config = json.loads((path / "config.json").read_text())
    name = str(path) if options.model is not None else f"random {options.size}"
    return {"model": name, "layers": config["num_hidden_layers"], "hidden": config["hidden_size"]}


def exit_layers(count: int, num_layers: int) -> list[int]:
    """Layers of at most ``count`` exits, evenly from the bottom to 3/4 of the depth."""
    deepest = max(1, round(0.75 * num_layers))
    count = min(count, deepest)
    return [max(1, round(number * deepest / count)) for number in range(1, count + 1)]


def untuned_adapter(model: Path, layers: list[int], directory: Path) -> Path:
    """``mlp`` exits copied from the model, as before any tuning: they take the same time and know little."""
    path = directory / "adapter"
    exits = json.dumps([{"layer": layer} for layer in layers])
    arguments = ["--input", str(model), "--to", "adapter", "--exits", exits, "--output", str(path)]
    run_processes(megatron_ee_command("convert", *arguments))
    return path


def sample_text() -> str:
    """Some text that is at hand everywhere: this package's own sources."""
    sources = sorted(Path(megatron_ee.__file__).parent.rglob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8") for path in sources)


def save_model(path: Path, size: str, dtype: str) -> None:
    """Save a random model with a tokenizer of bytes, in the released format. It is never whole in memory."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    shape = SIZES[size]
    hidden = shape["hidden_size"]
    defaults = {"intermediate_size": max(64, round(hidden * 8 / 3 / 64) * 64), "tie_word_embeddings": True}
    config = transformers.LlamaConfig(
        **(defaults | shape),
        architectures=["LlamaForCausalLM"],
        dtype=getattr(torch, dtype),
        max_position_embeddings=POSITIONS,
        bos_token_id=0,
        eos_token_id=1,
    )
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(path)
    # Products keep the size of what goes in, so that a wrong layer or tap would show in a loss.
    save_weights(path, getattr(torch, dtype), hidden**-0.5)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(path)


def save_weights(path: Path, dtype: torch.dtype, std: float) -> None:
    """Save the weights that ``config.json`` describes, drawn from normal(0, std); norms are 1.

    Raises:
        UserError: they do not fit on the disk.
    """
    import torch

    from megatron_ee.checkpoint.safetensors_file import write_safetensors
    from megatron_ee.families.registry import read_architecture
    from megatron_ee.families.weights import expected_tensors

    shapes = expected_tensors(read_architecture(path))
    total, free = sum(map(math.prod, shapes.values())) * dtype.itemsize, shutil.disk_usage(path).free
    if total > free:
        raise UserError(f"{path}: the model takes {total / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; set TMPDIR")
    generator = torch.Generator().manual_seed(1234)

    def values(name: str) -> Iterator[torch.Tensor]:
        left = math.prod(shapes[name])
        if len(shapes[name]) == 1:
            yield torch.ones(left, dtype=dtype)
            return
        while left > 0:
            yield (std * torch.randn(min(left, RUN), generator=generator)).to(dtype)
            left -= RUN

    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and sum(each.nbytes for each in shards[-1].values()) > SHARD:
            shards.append({})
        shards[-1][name] = torch.empty(shape, dtype=dtype, device="meta")
    if len(shards) == 1:
        write_safetensors(path / "model.safetensors", shards[0], {"format": "pt"}, content=values)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(path / file, shard, {"format": "pt"}, content=values)
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    save_model(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
