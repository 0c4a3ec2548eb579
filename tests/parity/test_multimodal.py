"""The text model of multimodal releases: its logits, its conversions and its exits as plain models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_ee.checkpoint.contents import Contents
from megatron_ee.checkpoint.saved_model import open_model, say_limits
from megatron_ee.config.schema import ExitConfig
from megatron_ee.conversion.convert import Conversion, plan_output, prepare
from megatron_ee.conversion.copy import write_output
from megatron_ee.data.tokenizer_files import read_tokenizer_files
from megatron_ee.errors import CheckpointError
from megatron_ee.exits.stage import Stage
from megatron_ee.testing.models import save_tiny_model, save_tiny_multimodal

TOLERANCE = 1e-4
LoadStage = Callable[..., Stage]
CASES = {
    "gemma3": ("gemma3", True, False),
    "gemma3-renamed": ("gemma3", True, True),
    "ministral3": ("ministral3", False, False),
    "ministral3-renamed": ("ministral3", False, True),
}
"""Family, tied, renamed."""
TOKENS = torch.randint(0, 131, (2, 48), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module", params=CASES)
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, str]:
    """A multimodal directory, its model, and the case."""
    family, tied, renamed = CASES[request.param]
    directory = tmp_path_factory.mktemp("release")
    model = save_tiny_multimodal(family, directory, tied=tied, renamed=renamed)
    (directory / "preprocessor_config.json").write_text('{"do_resize":  true}\n')
    (directory / "tokenizer.json").write_text("{}")
    return directory, model, request.param


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def convert(source: Path, target: Path, **options: Any) -> Contents:
    request = Conversion(source, **options)
    contents = prepare(request)[1]
    write_output(plan_output(contents, request), target)
    return contents


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(TOKENS, use_cache=False).logits


@torch.no_grad()
def our_logits(stage: Stage) -> torch.Tensor:
    h, _ = stage.run_layers(stage.backbone.embed(TOKENS), stage.backbone.positions(TOKENS.shape[1], None), to_end=True)
    return stage.final_logits(stage.final_features(h)).transpose(0, 1)


def test_logits(release: tuple[Path, Any, str], load_stage: LoadStage, capsys: pytest.CaptureFixture[str]) -> None:
    directory, model, _ = release
    theirs = logits_of(model)
    assert float(theirs.abs().max()) > 0.5
    assert float((our_logits(load_stage(directory)) - theirs).abs().max()) <= TOLERANCE
    capsys.readouterr()
    opened = open_model(directory)
    say_limits(opened)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"{directory}: only its text model is loaded, not its {len(opened.vision)} vision tensors"]
    assert read_tokenizer_files(directory).vocab_size == 131


def test_hash_of_the_text_model(release: tuple[Path, Any, str], tmp_path: Path) -> None:
    """An adapter fits the text-only release of the same weights too."""
    directory, _, case = release
    family, tied, _ = CASES[case]
    save_tiny_model(family, tmp_path, tie_word_embeddings=tied)
    multimodal, text = open_model(directory), open_model(tmp_path)
    assert multimodal.digest() == text.digest() and multimodal.architecture == text.architecture
    assert multimodal.vision and not text.vision


def test_copied_with_its_vision(release: tuple[Path, Any, str], tmp_path: Path) -> None:
    directory = release[0]
    contents = convert(directory, tmp_path / "copy", to="hf", add=[ExitConfig(layer=2)])
    assert same(tensors_of(tmp_path / "copy"), tensors_of(directory))
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (directory / name).read_bytes()
    assert contents.notes == (f"{directory}: its {len(contents.vision)} vision tensors are copied unchanged",)
    copied = open_model(tmp_path / "copy")
    assert copied.digest() == open_model(directory).digest()
    assert json.loads((tmp_path / "copy" / "adapter" / "exits.json").read_text())["backbone_sha256"] == copied.digest()


def test_a_parallel_checkpoint_holds_the_text_model(release: tuple[Path, Any, str], tmp_path: Path) -> None:
    directory, model, _ = release
    contents = convert(directory, tmp_path / "parallel", to="parallel", tensor=2)
    vision = len(open_model(directory).vision)
    assert contents.notes == (f"{directory}: only its text model is written, not its {vision} vision tensors",)
    assert convert(tmp_path / "parallel", tmp_path / "text", to="hf").notes == ()
    assert not (tmp_path / "text" / "preprocessor_config.json").exists()
    weights, back = open_model(directory).weights, tensors_of(tmp_path / "text")
    assert back.keys() == weights.keys()
    assert all(weights[name].sha256() == open_model(tmp_path / "text").weights[name].sha256() for name in weights)
    assert open_model(tmp_path / "parallel").digest() == open_model(directory).digest()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text", attn_implementation="eager")
    assert type(loaded).__name__ in ("Gemma3ForCausalLM", "Ministral3ForCausalLM")
    assert float((logits_of(loaded) - logits_of(model)).abs().max()) <= TOLERANCE


def test_an_exit_as_a_plain_model(release: tuple[Path, Any, str], tmp_path: Path) -> None:
    """A copied exit after the last layer says what the whole model says."""
    directory, model, _ = release
    add = [ExitConfig(layer=2), ExitConfig(layer=4)]
    contents = convert(directory, tmp_path / "exit", to="hf", add=add, exit=4)
    assert len(contents.notes) == 1 and "only its text model is written" in contents.notes[0]
    convert(directory, tmp_path / "shallow", to="hf", add=add, exit=2)
    for name, layers in (("exit", 4), ("shallow", 2)):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, attn_implementation="eager")
        assert type(loaded).__name__ in ("Gemma3ForCausalLM", "Ministral3ForCausalLM")
        assert loaded.config.num_hidden_layers == layers
        assert not any("vision" in key for key in tensors_of(tmp_path / name))
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exit", attn_implementation="eager")
    assert float((logits_of(whole) - logits_of(model)).abs().max()) <= TOLERANCE


def test_unknown_tensors_are_errors(release: tuple[Path, Any, str], tmp_path: Path) -> None:
    directory = release[0]
    for name in ("audio_tower.weight", "model.layers.0.mlp.up_proj.weight", "vision_towers.weight"):
        shutil.copytree(directory, tmp_path / name)
        save_file({**tensors_of(directory), name: torch.zeros(2)}, tmp_path / name / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"unknown tensor '{name}'"):
            open_model(tmp_path / name)


def test_a_head_that_differs_unties_both_keys(tmp_path: Path) -> None:
    directory = tmp_path / "source"
    save_tiny_multimodal("ministral3", directory, tied=False)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    contents = convert(directory, tmp_path / "copy", to="hf")
    assert any("ties a head that differs" in note for note in contents.notes)
    written = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert not written["tie_word_embeddings"] and not written["text_config"]["tie_word_embeddings"]
    assert same(tensors_of(tmp_path / "copy"), tensors_of(directory))
