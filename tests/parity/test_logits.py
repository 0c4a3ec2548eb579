"""Logits of every family equal transformers' own, through files as released models have them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.exits.stage import Stage
from megatron_ee.testing.models import FAMILIES, LLAMA3_ROPE, YARN, YARN_WITH_MSCALE

TOLERANCE = 1e-4
LENGTH = 48  # past the windows (16) and past Llama 3's original positions (32)
WINDOW = 16
YARN_ALONE = {key: YARN[key] for key in ("rope_type", "rope_theta", "factor", "original_max_position_embeddings")}
"""Without the settings that have defaults."""

SavedModel = Callable[..., tuple[Path, Any]]
LoadStage = Callable[..., Stage]


def make_tokens(rows: int = 2, length: int = LENGTH, vocab: int = 131) -> Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(7))


def stage_logits(stage: Stage, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
    """``[batch, seq, vocab]`` of the final exit."""
    device = platform.device()
    positions = stage.backbone.positions(tokens.shape[1], None if valid is None else valid.to(device))
    with torch.no_grad():
        h, _ = stage.run_layers(stage.backbone.embed(tokens.to(device)), positions, to_end=True)
        return stage.final_logits(stage.final_features(h)).transpose(0, 1).cpu()


@torch.no_grad()
def reference_logits(model: Any, tokens: Tensor, **kwargs: Any) -> Tensor:
    return model(tokens, use_cache=False, **kwargs).logits.float()


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float(theirs.abs().max()) > 0.5, "the reference says nothing"
    assert float((ours - theirs).abs().max()) <= TOLERANCE


def edited_copy(source: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a model directory with ``edit`` applied to its ``config.json``."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    edit(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    "family", [pytest.param(each, marks=pytest.mark.smoke) if each == "llama3.1" else each for each in FAMILIES]
)
def test_logits(family: str, saved_model: SavedModel, load_stage: LoadStage) -> None:
    path, reference = saved_model(family)
    stage, tokens = load_stage(path), make_tokens()
    assert_close(stage_logits(stage, tokens), reference_logits(reference, tokens))
    # One more than fits the padding of the vocabulary, and only the real ones come out.
    assert stage.setup.padded_vocab == 256 and len(stage.backbone.head.weight) == 256  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama3.1", {"num_key_value_heads": 1, "vocab_size": 128}),
        ("llama2", {"hidden_size": 48, "head_dim": 20, "vocab_size": 257}),
        ("mistral", {"tie_word_embeddings": True, "num_attention_heads": 8, "num_key_value_heads": 4}),
        ("qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
        ("llama2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}}),
        ("llama2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 3.0}}),
        ("llama2", {"rope_parameters": {**YARN_ALONE, "truncate": False}}),
        ("mistral", {"rope_parameters": YARN_WITH_MSCALE}),
        ("qwen2", {"rope_parameters": YARN_ALONE}),
        ("qwen3", {"rope_parameters": YARN}),
        ("llama2", {"attention_bias": True}),
        ("llama2", {"mlp_bias": True, "hidden_act": "swish"}),
    ],
)
def test_logits_of_other_shapes(
    family: str, changes: dict[str, Any], saved_model: SavedModel, load_stage: LoadStage
) -> None:
    path, reference = saved_model(family, **changes)
    tokens = make_tokens(vocab=reference.config.vocab_size)
    assert_close(stage_logits(load_stage(path), tokens), reference_logits(reference, tokens))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches(family: str, side: str, saved_model: SavedModel, load_stage: LoadStage) -> None:
    path, reference = saved_model(family)
    tokens, lengths = make_tokens(rows=3), (LENGTH, 30, 9)
    steps = torch.arange(LENGTH)
    valid = torch.stack([steps >= LENGTH - n if side == "left" else steps < n for n in lengths])
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    ours = stage_logits(load_stage(path), tokens, valid)
    theirs = reference_logits(reference, tokens, attention_mask=valid.long(), position_ids=positions)
    assert_close(ours[valid], theirs[valid])
    assert ours.isfinite().all()
    for row in range(3):  # and each row as it is without padding
        alone = reference_logits(reference, tokens[row, valid[row]][None])[0]
        assert_close(ours[row, valid[row]], alone)


@pytest.mark.parametrize("family", ["mistral", "qwen2-window"])
def test_the_window_matters(family: str, tmp_path: Path, saved_model: SavedModel, load_stage: LoadStage) -> None:
    path, _ = saved_model(family)
    off = {"sliding_window": None, "use_sliding_window": False, "layer_types": ["full_attention"] * 4}
    unlimited = edited_copy(path, tmp_path / "unlimited", lambda config: config.update(off))
    tokens = make_tokens()
    difference = (stage_logits(load_stage(path), tokens) - stage_logits(load_stage(unlimited), tokens)).abs()
    assert float(difference[:, :WINDOW].max()) <= TOLERANCE
    assert float(difference[:, WINDOW:].amax(-1).min()) > 100 * TOLERANCE


def older_rope(config: dict[str, Any]) -> None:
    """The spelling of released files: ``rope_theta`` and ``rope_scaling`` in place of ``rope_parameters``."""
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"rope_type": kind, **parameters}


def oldest_rope(config: dict[str, Any]) -> None:
    older_rope(config)
    if config["rope_scaling"] is not None:
        config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")


@pytest.mark.parametrize("spelling", [older_rope, oldest_rope])
@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama3.1", {}),
        ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ("llama2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}}),
        ("qwen2", {"rope_parameters": YARN_ALONE}),
    ],
)
def test_older_rope_spellings(
    family: str,
    changes: dict[str, Any],
    spelling: Callable[[dict[str, Any]], None],
    tmp_path: Path,
    saved_model: SavedModel,
    load_stage: LoadStage,
) -> None:
    path, _ = saved_model(family, **changes)
    assert "rope_parameters" in json.loads((path / "config.json").read_text())
    rewritten = edited_copy(path, tmp_path / "older", spelling)
    tokens = make_tokens()
    assert torch.equal(stage_logits(load_stage(rewritten), tokens), stage_logits(load_stage(path), tokens))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_TYPE = {"type": "llama3", **{key: LLAMA3[key] for key in LLAMA3 if key != "rope_type"}}
INSIDE, BESIDE = {"original_max_position_embeddings": 16}, {"original_max_position_embeddings": 40}
LINEAR = {"type": "linear", "factor": 3.0}


@pytest.mark.parametrize(
    "settings",
    [
        *({"rope_scaling": {**kind, **INSIDE}, "rope_theta": 5000.0} for kind in (LLAMA3, LLAMA3_TYPE)),
        *(
            {key: {**LLAMA3_TYPE, **INSIDE}, **BESIDE, "rope_theta": 5000}
            for key in ("rope_scaling", "rope_parameters")
        ),
        *({key: LLAMA3, **BESIDE, "rope_theta": 5000.0} for key in ("rope_scaling", "rope_parameters")),
        *({key: LLAMA3, "rope_theta": 5000.0} for key in ("rope_scaling", "rope_parameters")),
        {"rope_parameters": {**LLAMA3, **INSIDE, "rope_theta": 5000.0}, "rope_theta": 70.0},
        {"rope_scaling": {**LLAMA3, **INSIDE, "rope_theta": 5000.0}, "rope_theta": 70.0},
        {"rope_scaling": {**LLAMA3, **INSIDE}, "rope_parameters": {**LINEAR, "rope_theta": 70.0}},
        {"rope_scaling": {**LLAMA3, **INSIDE}, "rope_parameters": {**LINEAR, "rope_theta": 70.0}, "rope_theta": 5000.0},
        {"rope_scaling": LINEAR, "rope_parameters": {**LLAMA3, **INSIDE, "rope_theta": 70.0}, **BESIDE},
        *({"rope_scaling": empty, "rope_parameters": {**LINEAR, "rope_theta": 70.0}} for empty in (None, {})),
        {"rope_scaling": LINEAR, **BESIDE},
        {"rope_scaling": {"rope_type": "linear", "type": "llama3", "factor": 2}},
        {"rope_scaling": {"rope_theta": 70.0}, "rope_theta": 5000.0},
        {"rope_scaling": {"factor": 3.0}},
        {},
    ],
    ids=str,
)
def test_rope_settings_in_several_places(
    settings: dict[str, Any], tmp_path: Path, saved_model: SavedModel, load_stage: LoadStage
) -> None:
    import transformers

    def edit(config: dict[str, Any]) -> None:
        del config["rope_parameters"]
        config.update(settings)

    path = edited_copy(saved_model("llama3.1")[0], tmp_path / "edited", edit)
    reference = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    tokens = make_tokens(rows=1, length=100)
    assert_close(stage_logits(load_stage(path), tokens), reference_logits(reference, tokens))


def test_llama3_scaling_beyond_the_original_positions(
    tmp_path: Path, saved_model: SavedModel, load_stage: LoadStage
) -> None:
    path, reference = saved_model("llama3.1")
    tokens = make_tokens(rows=1, length=120)
    assert tokens.shape[1] > 3 * LLAMA3_ROPE["original_max_position_embeddings"]
    ours = stage_logits(load_stage(path), tokens)
    assert_close(ours, reference_logits(reference, tokens))
    unscaled = edited_copy(
        path,
        tmp_path / "unscaled",
        lambda c: c.update(rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}),
    )
    assert (stage_logits(load_stage(unscaled), tokens) - ours).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("family", ["llama3.1", "llama3.2-tied"])
def test_sharded_files(family: str, saved_model: SavedModel, load_stage: LoadStage) -> None:
    path, _ = saved_model(family)
    sharded, _ = saved_model(family, shard="50KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 3 and (sharded / "model.safetensors.index.json").is_file()
    tokens = make_tokens()
    assert torch.equal(stage_logits(load_stage(sharded), tokens), stage_logits(load_stage(path), tokens))


@pytest.mark.parametrize("family", ["llama3.2-tied", "llama-biases", "qwen3"])
def test_bfloat16_is_float32_rounded(family: str, saved_model: SavedModel, load_stage: LoadStage) -> None:
    path, reference = saved_model(family)
    exact, rounded = load_stage(path), load_stage(path, dtype=torch.bfloat16)
    pairs = zip(exact.named_parameters(), rounded.named_parameters(), strict=True)
    for (name, wide), (same_name, narrow) in pairs:
        assert name == same_name and narrow.dtype == torch.bfloat16
        assert torch.equal(narrow, wide.to(torch.bfloat16)), name
    tokens = make_tokens()
    ours, theirs = stage_logits(rounded, tokens), reference_logits(reference, tokens)
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


def test_a_bfloat16_file_read_as_float32(tmp_path: Path, saved_model: SavedModel, load_stage: LoadStage) -> None:
    reference = copy.deepcopy(saved_model("llama3.1")[1])
    with torch.no_grad():
        for parameter in reference.parameters():  # not .bfloat16(), which would round the rotary frequencies too
            parameter.copy_(parameter.bfloat16())
    copy.deepcopy(reference).bfloat16().save_pretrained(tmp_path)
    tokens = make_tokens()
    assert_close(stage_logits(load_stage(tmp_path), tokens), reference_logits(reference, tokens))
