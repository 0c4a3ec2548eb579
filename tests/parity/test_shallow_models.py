"""An exit exported as a plain model says in transformers what it says here, and drafts there for its own backbone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.checkpoint.adapter_writing import save_adapter
from megatron_ee.checkpoint.contents import Contents
from megatron_ee.config.exits import ExitSpec
from megatron_ee.conversion.copy import write_output
from megatron_ee.conversion.formats import open_contents
from megatron_ee.conversion.shallow import shallow_model
from megatron_ee.conversion.to_hf import to_hf
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.loading import make_engine
from megatron_ee.inference.requests import Request
from megatron_ee.testing.models import FAMILIES, sharpen, tiny_model

TOLERANCE = 1e-4
LENGTH = 48  # past the windows (16) and past Llama 3's original positions (32)
NEW = 40
NEVER = 10_000  # no such token: transformers takes None as the configuration's

SavedModel = Callable[..., tuple[Path, Any]]
LoadStage = Callable[..., Stage]

# Every body with every head, each body below, at and above the place where qwen2-window's windows begin (layer 3).
RUNS = [
    (ExitSpec(1, "norm", "own"), ExitSpec(2, "mlp", "own"), ExitSpec(4, "layer", "own")),
    (ExitSpec(1, "layer", "shared"), ExitSpec(2, "norm", "shared"), ExitSpec(4, "mlp", "shared")),
    (
        ExitSpec(1, "mlp", "low_rank", rank=8),
        ExitSpec(3, "layer", "low_rank", rank=8),
        ExitSpec(4, "norm", "low_rank", rank=8),
    ),
]


def scramble(stage: Stage) -> None:
    """Every trained value becomes random, of the size that the model's own have."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for exit_ in stage.exits:
            for name, parameter in exit_.named_parameters():
                if parameter.requires_grad:
                    centre, spread = (1.0, 0.2) if "norm" in name else (0.0, 0.2 if parameter.ndim == 1 else 0.08)
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(centre + spread * noise)


def with_exits(model: Path, stage: Stage, adapter: Path) -> Contents:
    """The contents of a model directory and of the adapter that the stage's exits are saved as."""
    specs = [exit_.spec for exit_ in stage.exits]
    save_adapter(
        adapter,
        stage.exits,
        specs,
        stage.setup.groups,
        base_model=str(model),
        backbone_sha256="ab" * 32,
        steps=7,
        extra={},
    )
    exits = open_contents(adapter)
    return dataclasses.replace(open_contents(model), exits=exits.exits, exit_tensors=exits.exit_tensors)


def exported(contents: Contents, layer: int, path: Path) -> Any:
    """The exit as transformers loads it from a plain directory."""
    from transformers import AutoModelForCausalLM

    write_output(to_hf(shallow_model(contents, layer)), path)
    # Eager attention: the only one that is the same arithmetic on every platform.
    model, loading = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), loading
    return model.eval()


@torch.no_grad()
def exit_logits(stage: Stage, tokens: Tensor) -> Iterator[tuple[ExitSpec, Tensor]]:
    """Each exit's ``[batch, seq, vocab]``."""
    device = platform.device()
    positions = stage.backbone.positions(tokens.shape[1])
    _, taps = stage.run_layers(stage.backbone.embed(tokens.to(device)), positions, to_end=True)
    for exit_ in stage.exits:
        z = exit_.features(taps[exit_.spec.layer], positions)
        yield exit_.spec, exit_.head.logits(z).transpose(0, 1).cpu()


def check(stage: Stage, contents: Contents, directory: Path) -> None:
    tokens = torch.randint(0, 131, (2, LENGTH), generator=torch.Generator().manual_seed(7))
    for spec, ours in exit_logits(stage, tokens):
        model = exported(contents, spec.layer, directory / f"exit-{spec.layer}")
        assert model.config.num_hidden_layers == spec.layer + (spec.body == "layer")
        with torch.no_grad():
            theirs = model(tokens, use_cache=False).logits
        assert ours.shape == theirs.shape and float(theirs.abs().max()) > 0.5
        assert float((ours - theirs).abs().max()) <= TOLERANCE, spec


@pytest.mark.parametrize("specs", RUNS, ids=["own", "shared", "low_rank"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(
    family: str, specs: Sequence[ExitSpec], tmp_path: Path, saved_model: SavedModel, load_stage: LoadStage
) -> None:
    path, _ = saved_model(family)
    stage = load_stage(path, specs)
    scramble(stage)
    check(stage, with_exits(path, stage, tmp_path / "adapter"), tmp_path)


@pytest.mark.parametrize("specs", RUNS, ids=["own", "shared", "low_rank"])
def test_replays(specs: Sequence[ExitSpec], tmp_path: Path, saved_model: SavedModel, load_stage: LoadStage) -> None:
    """What the engine's replay of a text says of each exit is what the exported model says in transformers."""
    path, whole = saved_model("qwen2-window")
    stage = load_stage(path, specs)
    scramble(stage)
    contents = with_exits(path, stage, tmp_path / "adapter")
    ids = torch.randint(0, 131, (LENGTH,), generator=torch.Generator().manual_seed(7)).tolist()
    prompt, text = ids[:5], ids[5:]
    [[found]] = make_engine(stage).generate([Request(prompt=prompt, replay_ids=text)])
    models = [exported(contents, spec.layer, tmp_path / f"exit-{spec.layer}") for spec in specs]
    for replay, model in zip(found.replay, [*models, whole], strict=True):
        with torch.no_grad():
            shares = model(torch.tensor([ids]), use_cache=False).logits[0, len(prompt) - 1 : -1].softmax(-1)
        own = shares[range(len(text)), text]
        assert list(replay.tokens) == shares.argmax(-1).tolist()
        assert list(replay.text_ranks) == ((shares > own[:, None]).sum(-1) + 1).tolist()
        for ours, theirs in ((replay.probabilities, shares.amax(-1)), (replay.text_probabilities, own)):
            assert list(ours) == pytest.approx(theirs.tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("family", ["llama-biases", "gemma2"])
def test_fitted_exits(family: str, tmp_path: Path, saved_model: SavedModel, load_stage: LoadStage) -> None:
    """With a bias of the projection, and with a norm after it."""
    path, _ = saved_model(family)
    stage = load_stage(path, (ExitSpec(1, "norm", "shared"), ExitSpec(2, "mlp", "own"), ExitSpec(3, "layer", "shared")))
    tokens = torch.randint(0, 131, (8, LENGTH), generator=torch.Generator().manual_seed(3))
    positions, mask = stage.backbone.positions(LENGTH), torch.ones(tokens.numel())
    last, taps = stage.run_layers(stage.backbone.embed(tokens), positions, to_end=True)
    for exit_ in stage.exits:
        x = exit_.attention_half(taps[exit_.spec.layer], positions)
        fit = exit_.body.fit(exit_.setup)
        while fit is not None:
            fit.add(x, last, mask)
            fit.reduce()
            (solution,) = fit.solve([0.1])
            assert all(not torch.equal(value, parameter) for parameter, value in solution.values.items())
            solution.place()
            fit = fit.then(solution)
    check(stage, with_exits(path, stage, tmp_path / "adapter"), tmp_path)


@pytest.mark.parametrize("first", [0, 2, 4])
def test_windows_without_layer_types(
    first: int, tmp_path: Path, saved_model: SavedModel, load_stage: LoadStage
) -> None:
    """As released Qwen2 files have them; from layer ``first + 1`` on there is a window."""
    released, _ = saved_model("qwen2-window")
    path = tmp_path / "model"
    shutil.copytree(released, path)
    config = json.loads((path / "config.json").read_text())
    del config["layer_types"]
    config["max_window_layers"] = first
    (path / "config.json").write_text(json.dumps(config))
    stage = load_stage(path, [ExitSpec(1, "layer"), ExitSpec(2, "mlp"), ExitSpec(3, "layer"), ExitSpec(4, "layer")])
    scramble(stage)
    check(stage, with_exits(path, stage, tmp_path / "adapter"), tmp_path)


def test_auto_map_needs_no_code(tmp_path: Path, saved_model: SavedModel, load_stage: LoadStage) -> None:
    """As Phi-3-mini is released: with code of its own, which is neither run nor carried."""
    path = tmp_path / "model"
    shutil.copytree(saved_model("phi3")[0], path)
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    }
    (path / "config.json").write_text(json.dumps(config))
    for name in ("configuration_phi3.py", "modeling_phi3.py"):
        (path / name).write_text("raise SystemExit")
    stage = load_stage(path, RUNS[0])
    scramble(stage)
    check(stage, with_exits(path, stage, tmp_path / "adapter"), tmp_path)
    assert not list(tmp_path.glob("exit-*/*.py"))


def test_exits_narrower_than_their_backbone(tmp_path: Path, saved_model: SavedModel, load_stage: LoadStage) -> None:
    """Exits tuned in bfloat16 on a model that is released in float32: what was tuned is what is exported."""
    path, _ = saved_model("llama3.1")
    narrow = load_stage(path, RUNS[2], dtype=torch.bfloat16)
    scramble(narrow)
    contents = with_exits(path, narrow, tmp_path / "adapter")
    assert {tensor.dtype for tensor in contents.exit_tensors.values()} == {torch.bfloat16}
    wide = load_stage(path, RUNS[2])
    with torch.no_grad():
        for ours, theirs in zip(wide.exits, narrow.exits, strict=True):
            for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
                if mine.requires_grad:
                    mine.copy_(its)
    check(wide, contents, tmp_path)


@pytest.mark.parametrize("family", ["llama3.1", pytest.param("qwen2-window", marks=pytest.mark.slow)])
def test_assisted_generation(family: str, tmp_path: Path, load_stage: LoadStage) -> None:
    model = tiny_model(family, seed=2)
    sharpen(model)  # or it would say one token over and over
    model.save_pretrained(tmp_path / "model")
    specs = [ExitSpec(2, "mlp", "shared"), ExitSpec(3, "layer", "low_rank", rank=4), ExitSpec(4, "norm")]
    stage = load_stage(tmp_path / "model", specs)
    contents = with_exits(tmp_path / "model", stage, tmp_path / "adapter")
    prompt = torch.randint(3, 131, (1, 12), generator=torch.Generator().manual_seed(12))
    passes = []

    def generate(**kwargs: Any) -> list[int]:
        passes.clear()
        ids: Tensor = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=NEVER,
            pad_token_id=0,
            **kwargs,
        )
        result: list[int] = ids[0, prompt.shape[1] :].tolist()
        return result

    model.register_forward_pre_hook(lambda *_: passes.append(1))
    plain = generate()
    assert len(plain) == len(passes) == NEW and len(set(plain)) > 5, "a model that repeats itself shows little"
    for spec in specs:
        draft = exported(contents, spec.layer, tmp_path / f"exit-{spec.layer}")
        draft.generation_config.assistant_confidence_threshold = 0.0
        assert generate(assistant_model=draft) == plain, spec
    # The last one is the whole model under another name: its drafts are right.
    assert len(passes) < NEW / 2
