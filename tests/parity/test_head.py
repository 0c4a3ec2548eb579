"""The head is the one that the checkpoint holds, whatever ``config.json`` says of tying: here as in transformers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ee import platform
from megatron_ee.checkpoint.adapter_writing import save_adapter
from megatron_ee.checkpoint.contents import Contents
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.config.exits import ExitSpec
from megatron_ee.conversion.copy import write_output
from megatron_ee.conversion.formats import open_contents
from megatron_ee.conversion.shallow import shallow_model
from megatron_ee.conversion.to_hf import to_hf
from megatron_ee.conversion.to_parallel import to_parallel
from megatron_ee.exits.stage import Stage
from megatron_ee.importers.megatron.export import to_torch_dist

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FILE = "model.safetensors"
TOKENS = torch.randint(0, 131, (2, 24), generator=torch.Generator().manual_seed(7))
EXITS = (
    ExitSpec(1, "norm", "shared"),
    ExitSpec(2, "mlp", "own"),
    ExitSpec(3, "layer", "low_rank", rank=8),
    ExitSpec(4, "layer", "shared"),
)

SavedModel = Callable[..., tuple[Path, Any]]
LoadStage = Callable[..., Stage]
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, saved_model: SavedModel) -> Make:
    """A copy of a tied model whose file holds, by keyword, these tensors instead; None removes one."""

    def make(family: str = "llama3.2-tied", **changes: Any) -> Path:
        path = Path(shutil.copytree(saved_model(family, tie_word_embeddings=True)[0], tmp_path / "model"))
        assert json.loads((path / "config.json").read_text())["tie_word_embeddings"]
        tensors = load_file(path / FILE)
        names = {"head": HEAD, "embedding": EMBEDDING}
        tensors |= {names[key]: value(tensors[EMBEDDING]) for key, value in changes.items()}
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path / FILE)
        return path

    return make


def other(embedding: Tensor) -> Tensor:
    return 0.1 * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1))


def last_value_apart(embedding: Tensor) -> Tensor:
    head = embedding.clone()
    head[-1, -1] += 1.0
    return head


def nothing(embedding: Tensor) -> None:
    return None


@torch.no_grad()
def transformers_logits(path: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    logits: Tensor = model(TOKENS, use_cache=False).logits
    return logits


@torch.no_grad()
def our_logits(stage: Stage) -> Iterator[Tensor]:
    """Those of the exits, then of the final exit."""
    positions = stage.backbone.positions(TOKENS.shape[1])
    h, taps = stage.run_layers(stage.backbone.embed(TOKENS.to(platform.device())), positions, to_end=True)
    for exit_ in stage.exits:
        yield exit_.head.logits(exit_.features(taps[exit_.spec.layer], positions)).transpose(0, 1).cpu()
    yield stage.final_logits(stage.final_features(h)).transpose(0, 1).cpu()


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert float(theirs.abs().max()) > 0.5 and float((ours - theirs).abs().max()) <= 1e-4


@pytest.mark.parametrize(
    ("changes", "tied"),
    [
        ({"head": other}, False),
        ({"head": last_value_apart}, False),
        ({"head": torch.clone}, True),
        ({"head": lambda embedding: embedding.double()}, True),
        ({"head": lambda embedding: embedding.bfloat16()}, False),
        ({"head": other, "embedding": nothing}, True),
        ({}, True),
    ],
    ids=["other", "one value apart", "equal", "wider", "narrower", "head alone", "embedding alone"],
)
@pytest.mark.parametrize("family", ["llama3.2-tied", "qwen3"])
def test_logits(family: str, changes: Mapping[str, Any], tied: bool, make: Make, load_stage: LoadStage) -> None:
    path = make(family, **changes)
    assert open_model(path).architecture.tied == tied
    stage = load_stage(path)
    assert (stage.backbone.head.weight is stage.backbone.embedding.weight) == tied  # type: ignore[union-attr]
    assert_close(next(our_logits(stage)), transformers_logits(path))


def test_exits_start_from_this_head_and_are_exported_with_it(make: Make, tmp_path: Path, load_stage: LoadStage) -> None:
    path = make(head=other)
    stage = load_stage(path, EXITS)
    assert torch.equal(stage.exits[1].head.matrix.weight[:131].cpu(), load_file(path / FILE)[HEAD])  # type: ignore[union-attr]
    digest = open_model(path).digest()
    save_adapter(
        tmp_path / "adapter",
        stage.exits,
        EXITS,
        stage.setup.groups,
        base_model=str(path),
        backbone_sha256=digest,
        steps=1,
        extra={},
    )
    exits = open_contents(tmp_path / "adapter")
    contents = dataclasses.replace(open_contents(path), exits=exits.exits, exit_tensors=exits.exit_tensors)
    for spec, ours in zip(EXITS, our_logits(stage), strict=False):
        output = tmp_path / f"exit-{spec.layer}"
        write_output(to_hf(shallow_model(contents, spec.layer)), output)
        assert_close(ours, transformers_logits(output))
        assert not json.loads((output / "config.json").read_text())["tie_word_embeddings"]


def test_conversions_keep_it(make: Make, tmp_path: Path) -> None:
    path = make("llama2", head=other)
    source = open_contents(path)
    (note,) = source.notes
    assert str(path / "config.json") in note and "tie_word_embeddings" in note
    write_output(to_parallel(source, tensor=2, stages=[1, 3]), tmp_path / "parallel")
    write_output(to_torch_dist(open_contents(tmp_path / "parallel")), tmp_path / "megatron")
    shutil.rmtree(tmp_path / "megatron" / "release" / "huggingface")  # Megatron goes by its own arguments
    digests = set()
    for name in ("model", "parallel", "megatron"):
        found = open_contents(tmp_path / name, trust=True)
        assert not found.architecture.tied  # type: ignore[union-attr]
        write_output(to_hf(found), tmp_path / f"hf-{name}")
        assert same_tensors(tmp_path / f"hf-{name}", path)
        assert not json.loads((tmp_path / f"hf-{name}" / "config.json").read_text())["tie_word_embeddings"]
        assert (
            torch.equal(transformers_logits(tmp_path / f"hf-{name}"), transformers_logits(path)) or name == "megatron"
        )
        digests.add(open_model(tmp_path / f"hf-{name}").digest())
    assert digests == {open_model(path).digest(), open_model(tmp_path / "parallel").digest()} and len(digests) == 1
    config = json.loads((path / "config.json").read_text())
    assert json.loads((tmp_path / "hf-model" / "config.json").read_text()) == {**config, "tie_word_embeddings": False}


def same_tensors(first: Path, second: Path) -> bool:
    ours, theirs = load_file(first / FILE), load_file(second / FILE)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_hash_is_of_this_head_too(make: Make, saved_model: SavedModel) -> None:
    tied = open_model(saved_model("llama3.2-tied", tie_word_embeddings=True)[0])
    path = make(head=torch.clone)
    assert open_model(path).digest() == tied.digest()
    tensors = load_file(path / FILE)
    save_file({**tensors, HEAD: last_value_apart(tensors[EMBEDDING])}, path / FILE)
    assert open_model(path).digest() != tied.digest()


def test_a_repeated_head_is_carried_along(make: Make, tmp_path: Path) -> None:
    path = make(head=torch.clone)
    source: Contents = open_contents(path)
    assert not source.notes
    write_output(to_parallel(source), tmp_path / "parallel")
    write_output(to_hf(open_contents(tmp_path / "parallel")), tmp_path / "hf")
    assert same_tensors(tmp_path / "hf", path)
    assert (tmp_path / "hf" / "config.json").read_bytes() == (path / "config.json").read_bytes()
