"""Hugging Face -> parallel -> Hugging Face: the same bytes for every family and layout."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ee.checkpoint.contents import Contents
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.checkpoint.store import open_checkpoint
from megatron_ee.config import untrusted
from megatron_ee.config.exits import ExitSpec
from megatron_ee.conversion.copy import write_output
from megatron_ee.conversion.edit import add_exits
from megatron_ee.conversion.formats import open_contents
from megatron_ee.conversion.to_hf import to_hf
from megatron_ee.conversion.to_parallel import even_stages, to_parallel
from megatron_ee.errors import CheckpointError, ConfigError
from megatron_ee.importers.megatron.export import to_torch_dist
from megatron_ee.testing.models import LONGROPE

# Heads enough for eight ranks; an odd vocabulary, which no number of ranks divides.
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 5,
    "head_dim": 8,
}
FAST = ("gemma3",)
FAMILIES = (
    "llama2",
    "llama3.2-tied",
    "llama-biases",
    "mistral",
    "ministral3",
    "qwen2-window",
    "qwen3",
    "granite",
    "phi3",
    "phi4-mini",
    "olmo2",
    "olmo3",
    "smollm3",
    "gemma2",
    "gemma3",
)
LONGROPE_OF_EIGHT = {**LONGROPE, "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.0, 2.0, 4.0]}
"""Six of eight features turn."""
CHANGES: dict[str, dict[str, Any]] = {
    "phi4-mini": {"hidden_size": 128, "rope_parameters": LONGROPE_OF_EIGHT},
    "gemma3": {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]},
}
"""What differs from ``SHAPE``: longrope has a number for each two features, ``layer_types`` one for each layer."""
SMALL = 20_000  # bytes per file: several files


@pytest.fixture(scope="module")
def family(saved_model: Callable[..., tuple[Path, Any]]) -> Callable[[str], Path]:
    """A model of a family, in float32, whose directory has a tokenizer and other files."""

    def make(name: str) -> Path:
        path: Path = saved_model(name, **{**SHAPE, **CHANGES.get(name, {})})[0]
        (path / "tokenizer.json").write_bytes(b'{"version":"1.0" ,"\xc3\xa9": 1}\n')
        (path / "LICENSE.txt").write_text("as it is")
        return path

    return make


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def converted(contents: Contents, path: Path, **options: Any) -> Path:
    write_output(to_parallel(contents, **options), path)
    return path


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_every_layout_gives_the_same_bytes(name: str, family: Callable[[str], Path], tmp_path: Path) -> None:
    source = family(name)
    original = tensors_of(source)
    for tensor in (1, 2, 4, 8):
        for pipeline in (1, 2, 4):
            place = tmp_path / f"{tensor}-{pipeline}"
            stages = even_stages(SHAPE["num_hidden_layers"], pipeline)
            parallel = converted(open_contents(source), place, tensor=tensor, stages=stages)
            write_output(to_hf(open_contents(parallel), shard=SMALL), tmp_path / "back")
            assert same(tensors_of(tmp_path / "back"), original), (tensor, pipeline)
            for file in ("config.json", "tokenizer.json", "LICENSE.txt", "generation_config.json"):
                assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
            assert (
                open_model(tmp_path / "back").digest() == open_model(source).digest() == open_model(parallel).digest()
            )
            (tmp_path / "back").rename(tmp_path / f"back-{tensor}-{pipeline}")


def test_a_rank_finds_what_it_holds_in_one_piece(family: Callable[[str], Path], tmp_path: Path) -> None:
    """Uneven stages: the shards of one rank hold its layers' slices, and of them nothing else."""
    source = family("llama2")
    parallel = converted(open_contents(source), tmp_path / "parallel", tensor=2, stages=[1, 4], shard=SMALL)
    manifest = json.loads((parallel / "manifest.json").read_text())
    query = manifest["tensors"]["model.layers.0.self_attn.q_proj.weight"]["pieces"]
    assert [(piece["offset"], piece["shape"]) for piece in query] == [([0, 0], [64, 64]), ([64, 0], [64, 64])]
    down = manifest["tensors"]["model.layers.1.mlp.down_proj.weight"]["pieces"]
    assert [(piece["offset"], piece["shape"]) for piece in down] == [([0, 0], [64, 48]), ([0, 48], [64, 48])]
    for key, tensor in manifest["tensors"].items():
        first_stage = key.startswith(("model.layers.0.", "model.embed_tokens"))
        for piece in tensor["pieces"]:
            assert piece["file"].startswith("shard-p00-" if first_stage else "shard-p01-"), key
    assert len(list(parallel.glob("shard-p01-t00-*.safetensors"))) > 3
    assert manifest["metadata"]["layout"] == {"tensor": 2, "stages": [1, 4]}


@pytest.mark.smoke
def test_resharded_from_layout_to_layout(family: Callable[[str], Path], tmp_path: Path) -> None:
    source = family("qwen2-window")
    first = converted(open_contents(source), tmp_path / "a", tensor=8, stages=[2, 3])
    second = converted(open_contents(first), tmp_path / "b", tensor=2, stages=[1, 1, 3])
    write_output(to_hf(open_contents(second)), tmp_path / "c")
    assert same(tensors_of(tmp_path / "c"), tensors_of(source))
    assert (tmp_path / "c" / "model.safetensors").is_file()


def test_sharded_sources_and_known_non_weights(family: Callable[[str], Path], tmp_path: Path) -> None:
    """A tied model whose file repeats the head, and old releases' rotary tables: carried along, whatever dtype."""
    source = tmp_path / "source"
    source.mkdir()
    original = family("llama3.2-tied")
    (source / "config.json").write_bytes((original / "config.json").read_bytes())
    tensors = tensors_of(original)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.4.self_attn.rotary_emb.inv_freq"] = torch.arange(4, dtype=torch.float16)
    tensors["model.layers.0.self_attn.rotary_emb.cos_cached"] = torch.rand(1, 1, 64, 8)
    tensors["model.rotary_emb.sin_cached"] = torch.rand(64, 8).bfloat16()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    parallel = converted(open_contents(source), tmp_path / "parallel", tensor=4, stages=[2, 3])
    assert open_checkpoint(parallel).dtype("model.norm.weight") == torch.bfloat16
    write_output(to_hf(open_contents(parallel), shard=SMALL), tmp_path / "back")
    assert same(tensors_of(tmp_path / "back"), tensors)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"tensor": 3}, "--tensor: 3 does not divide the model's 8 key-value heads"),
        ({"tensor": 16}, "--tensor: 16 does not divide the model's 8 key-value heads"),
        ({"stages": [2, 2]}, "--stages: [2, 2] do not add up to the model's 5 layers"),
        ({"stages": [5, 0]}, "--stages: [5, 0] do not add up to the model's 5 layers"),
    ],
)
def test_impossible_cuts(options: dict[str, Any], word: str, family: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError) as caught:
        to_parallel(open_contents(family("llama2")), **options)
    assert word in str(caught.value)
    with pytest.raises(ConfigError, match="--pipeline: 6 stages are more than"):
        even_stages(5, 6)


def test_assets_are_checked(family: Callable[[str], Path], tmp_path: Path) -> None:
    parallel = converted(open_contents(family("llama2")), tmp_path / "parallel")
    assets = json.loads((parallel / "manifest.json").read_text())["metadata"]["assets"]
    assert assets["tokenizer.json"] == hashlib.sha256((parallel / "tokenizer.json").read_bytes()).hexdigest()
    (parallel / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: damaged"):
        open_contents(parallel)
    assert open_contents(parallel, verify=False).architecture is not None
    (parallel / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        open_contents(parallel, verify=False)


def test_a_parallel_checkpoint_with_exits_is_opened_once(
    family: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = add_exits(open_contents(family("llama2")), [ExitSpec(2, "norm", "own")], seed=1)
    contents = dataclasses.replace(contents, backbone_sha256="0" * 64)
    parallel = converted(contents, tmp_path / "parallel")
    read: list[Path] = []

    def read_json(path: Path) -> Any:
        read.append(path)
        return untrusted.read_json(path)

    monkeypatch.setattr("megatron_ee.checkpoint.store.read_json", read_json)
    opened = open_contents(parallel)
    assert opened.format == "parallel checkpoint with exits" and [spec.layer for spec in opened.exits] == [2]
    assert read == [parallel / "manifest.json"]


def test_code_and_links_are_not_carried(family: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in family("llama2").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "modeling_own.py").write_text("raise SystemExit")
    (source / ".gitattributes").write_text("x")
    parallel = converted(open_contents(source), tmp_path / "parallel")
    names = {path.name for path in parallel.iterdir()}
    assert names == {path.name for path in source.iterdir()} - {
        "modeling_own.py",
        ".gitattributes",
        "model.safetensors",
    } | {
        "manifest.json",
        "shard-p00-t00-000.safetensors",
    }
    (source / "notes.txt").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match=r"notes\.txt: not a plain file inside the model directory"):
        open_contents(source)


def test_a_known_auto_map_stays_in_the_configuration(family: Callable[[str], Path], tmp_path: Path) -> None:
    source = shutil.copytree(family("phi3"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    (source / "config.json").write_text(json.dumps(config))
    parallel = converted(open_contents(source), tmp_path / "parallel")
    write_output(to_hf(open_contents(parallel)), tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()


TEMPLATE = "additional_chat_templates/tool_use.jinja"


def test_chat_templates_survive_every_conversion(family: Callable[[str], Path], tmp_path: Path) -> None:
    source, template = tmp_path / "source", b"{{ tools }}\n\xc3\xa9"
    shutil.copytree(family("llama2"), source)
    (source / TEMPLATE).parent.mkdir()
    (source / TEMPLATE).write_bytes(template)
    (source / "additional_chat_templates" / ".cache").write_text("x")
    (source / "original").mkdir()
    (source / "original" / "params.json").write_text("{}")
    write_output(to_hf(open_contents(source)), tmp_path / "hf")
    parallel = converted(open_contents(tmp_path / "hf"), tmp_path / "parallel", tensor=2)
    write_output(to_torch_dist(open_contents(parallel)), tmp_path / "megatron")
    write_output(to_hf(open_contents(tmp_path / "megatron", trust=True)), tmp_path / "back")
    for directory in (tmp_path / "hf", parallel, tmp_path / "back"):
        assert (directory / TEMPLATE).read_bytes() == template
        assert os.listdir((directory / TEMPLATE).parent) == ["tool_use.jinja"]
        assert not (directory / "original").exists()


def test_chat_templates_are_files_of_the_directory(family: Callable[[str], Path], tmp_path: Path) -> None:
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    shutil.copytree(family("llama2"), source)
    (source / TEMPLATE).parent.mkdir()
    (source / TEMPLATE).write_text("{{ tools }}")
    parallel = converted(open_contents(source), tmp_path / "parallel")
    open_contents(parallel)
    (parallel / TEMPLATE).write_text("{{ x }}")
    with pytest.raises(CheckpointError, match=r"tool_use.jinja: damaged"):
        open_contents(parallel)
    (source / TEMPLATE).parent.rename(elsewhere)
    shutil.rmtree((parallel / TEMPLATE).parent)
    for directory in (source, parallel):
        (directory / TEMPLATE).parent.symlink_to(elsewhere)
        with pytest.raises(CheckpointError, match=r"tool_use.jinja: .*not a plain file"):
            open_contents(directory)


def test_nothing_known(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        open_contents(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        open_contents(tmp_path / "file")
    with pytest.raises(CheckpointError, match="no checkpoint of a known format"):
        open_contents(tmp_path)
