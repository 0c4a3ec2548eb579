"""Adapters: there and back bit for bit, refused for another model or kind of exit, and where damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_ee.checkpoint.adapter import Adapter, check_backbone, find_exits, open_adapter
from megatron_ee.checkpoint.adapter_writing import save_adapter
from megatron_ee.checkpoint.loading import load_exits
from megatron_ee.checkpoint.saved_model import open_model, quantise_layers
from megatron_ee.config.architecture import output_settings
from megatron_ee.config.exits import ExitSpec
from megatron_ee.errors import CheckpointError
from megatron_ee.exits.stage import Stage

HASH = "ab" * 32
SPECS = [
    ExitSpec(1, "embedding", "own", 0.5),
    ExitSpec(2, "norm", "low_rank", rank=8),
    ExitSpec(3, "mlp", "own", init="random"),
    ExitSpec(4, "layer", "shared"),
]


def save(stage: Stage, path: Path, **changes: Any) -> Path:
    arguments: dict[str, Any] = {"base_model": "models/base", "backbone_sha256": HASH, "steps": 7, "extra": {"note": 1}}
    specs = [exit_.spec for exit_ in stage.exits]
    save_adapter(path, stage.exits, specs, stage.setup.groups, **{**arguments, **changes})
    return path


def scramble(stage: Stage) -> Stage:
    """Every trained value becomes random."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for exit_ in stage.exits:
            for parameter in exit_.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return stage


@pytest.fixture
def saved(tmp_path: Path, saved_model: Any, load_stage: Any) -> Path:
    stage = scramble(load_stage(saved_model("llama3.1")[0], SPECS))
    return save(stage, tmp_path / "adapter")


def refusal(function: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama3.2-tied", "llama-biases", "qwen2", "qwen3"])
def test_round_trip(family: str, dtype: torch.dtype, tmp_path: Path, saved_model: Any, load_stage: Any) -> None:
    path, _ = saved_model(family)
    before = scramble(load_stage(path, SPECS, dtype=dtype))
    adapter = open_adapter(save(before, tmp_path / "adapter"))
    assert adapter.exits == tuple(SPECS)
    assert (adapter.backbone_sha256, adapter.base_model, adapter.steps) == (HASH, "models/base", 7)

    after = load_stage(path, SPECS, dtype=dtype, seed=3)
    with torch.no_grad():
        for exit_ in after.exits:
            for parameter in exit_.parameters():
                if parameter is not exit_.head.matrix.weight or parameter.requires_grad:
                    parameter.fill_(torch.nan)
    load_exits(after.exits, adapter, open_model(path))
    for ours, theirs in zip(after.exits, before.exits, strict=True):
        for (name, new), (_, old) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            if new.requires_grad and name in ("head.matrix.weight", "head.up"):
                assert not new[131:].any(), f"{name}: padding must be zero"
                new, old = new[:131], old[:131]
            assert torch.equal(new, old), name  # the frozen input norm included


def test_a_file_holds_what_was_trained_in_released_names_and_shapes(saved: Path) -> None:
    tensors = load_file(saved / "exits.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes["exits.1.lm_head.weight"] == (131, 64)
    assert {name: shapes[f"exits.2.{name}"] for name in ("norm.weight", "lm_head.a", "lm_head.b")} == {
        "norm.weight": (64,),
        "lm_head.a": (8, 64),
        "lm_head.b": (131, 8),
    }
    assert shapes["exits.3.mlp.gate_proj.weight"] == (112, 64) and shapes["exits.3.mlp.down_proj.weight"] == (64, 112)
    assert shapes["exits.4.self_attn.q_proj.weight"] == (64, 64)
    assert shapes["exits.4.self_attn.k_proj.weight"] == (32, 64)
    assert "exits.4.input_layernorm.weight" in shapes and "exits.4.post_attention_layernorm.weight" in shapes
    # Nothing frozen: neither the norm that an mlp exit reads through nor a shared head.
    frozen = {"exits.2.lm_head.weight", "exits.4.lm_head.weight", "exits.3.post_attention_layernorm.weight"}
    assert not frozen & shapes.keys()
    description = json.loads((saved / "exits.json").read_text())
    assert description["note"] == 1 and description["exits"][0]["weight"] == 0.5


@pytest.mark.smoke
def test_some_of_the_exits_can_be_loaded(saved: Path, saved_model: Any, load_stage: Any) -> None:
    path, _ = saved_model("llama3.1")
    stage = load_stage(path, [SPECS[2]], layers=[1, 2, 3], final_exit=False)
    load_exits(stage.exits, open_adapter(saved), open_model(path))
    expected = load_file(saved / "exits.safetensors")["exits.3.mlp.down_proj.weight"]
    assert torch.equal(stage.exits[0].body.mlp.down.weight.cpu(), expected)


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_adapters_from_before_the_norm_after_an_mlp_was_trained(
    family: str, tmp_path: Path, saved_model: Any, load_stage: Any
) -> None:
    """They lack it: it is the model's own."""
    from safetensors.torch import save_file

    model, specs = saved_model(family)[0], [ExitSpec(2, "mlp", "shared")]
    scrambled = scramble(load_stage(model, specs))
    path = save(scrambled, tmp_path / "old")
    tensors = load_file(path / "exits.safetensors")
    del tensors["exits.2.post_feedforward_layernorm.weight"]
    save_file(tensors, path / "exits.safetensors", {"format": "pt"})
    adapter = find_exits(open_model(model), path, verify=False)
    assert adapter is not None
    fresh, stage = load_stage(model, specs), scramble(load_stage(model, specs))
    load_exits(stage.exits, adapter, open_model(model))
    norm, other = (each.exits[0].body.mlp_post_norm.weight for each in (fresh, scrambled))
    assert torch.equal(stage.exits[0].body.mlp_post_norm.weight, norm) and not torch.equal(other, norm)
    down, same = (each.exits[0].body.mlp.down.weight for each in (stage, scrambled))
    assert torch.equal(down, same)


def test_saved_twice_is_replaced(saved: Path, saved_model: Any, load_stage: Any) -> None:
    stage = load_stage(saved_model("llama3.1")[0], [ExitSpec(2, "mlp")])
    save(stage, saved, steps=8)
    adapter = open_adapter(saved)
    assert adapter.steps == 8 and adapter.exits == (ExitSpec(2, "mlp"),)
    assert {name.split(".")[1] for name in adapter.weights} == {"2"}
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]


@pytest.mark.smoke
def test_another_backbone_is_refused(saved: Path) -> None:
    adapter = open_adapter(saved)
    check_backbone(adapter, HASH, "models/base")
    other = "cd" * 32
    text = refusal(check_backbone, adapter, other, "models/other")
    assert HASH[:16] in text and other[:16] in text and str(saved) in text
    assert "models/base" in text and "models/other" in text


def test_a_model_with_other_settings_is_refused_by_their_names(saved: Path, saved_model: Any, load_stage: Any) -> None:
    path, _ = saved_model("llama2")
    stage, model = load_stage(path, [ExitSpec(2, "norm", "shared")]), open_model(path)
    save(stage, saved, settings=output_settings(model.architecture))
    assert find_exits(model, saved) is not None
    theta = {"rope_type": "default", "rope_theta": 20_000.0}
    other = open_model(saved_model("llama2", rms_norm_eps=1e-6, rope_parameters=theta)[0])
    text = refusal(find_exits, other, saved)
    assert "norm_eps (1e-05 against 1e-06), rope.theta (10000.0 against 20000.0);" in text
    assert str(saved) in text and str(other.path) in text and "hidden_size" not in text
    longer = open_model(saved_model("llama2", max_position_embeddings=256)[0])
    assert find_exits(longer, saved) is not None, "this changes no output"
    save(stage, saved)
    assert find_exits(other, saved) is not None, "an adapter that does not record them is accepted"


def test_other_quantisation_than_exits_were_tuned_with_is_said(
    saved: Path, saved_model: Any, load_stage: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = saved_model("llama2")
    stage, plain = load_stage(path, [ExitSpec(2, "norm", "shared")]), open_model(path)
    models = {"none": plain, "int8": quantise_layers(plain, "int8", "model.quantise")}
    for tuned, recorded in models.items():
        save(stage, saved, settings=recorded.settings)
        for used, model in models.items():
            assert find_exits(model, saved) is not None
            line = (
                f"--quantise: {used}, but the exits in {saved} were tuned with '{tuned}'; they work, but their "
                "agreement with the final exit may be lower\n"
            )
            assert capsys.readouterr().err == ("" if used == tuned else line)
    save(stage, saved, settings=output_settings(plain.architecture))
    assert find_exits(models["int8"], saved) is not None
    assert capsys.readouterr().err == "", "an adapter that does not record it"
    save(stage, saved, settings=plain.settings)
    monkeypatch.setenv("RANK", "1")
    assert find_exits(models["int8"], saved) is not None
    assert capsys.readouterr().err == "", "the first rank says it"


def test_what_does_not_fit_the_model_is_refused(saved: Path, saved_model: Any, load_stage: Any) -> None:
    model = open_model(saved_model("llama3.1", intermediate_size=96)[0])
    text = refusal(find_exits, model, saved)
    assert "exits.3.mlp" in text and "shape" in text


@pytest.mark.parametrize(
    "spec, words",
    [
        (ExitSpec(3, "norm"), ["layer 3", "body 'mlp'", "'norm'"]),
        (ExitSpec(3, "mlp", "shared"), ["layer 3", "head 'own'", "'shared'"]),
        (ExitSpec(2, "norm", "low_rank", rank=4), ["layer 2", "rank 8", "4"]),
        (ExitSpec(4, "mlp"), ["layer 4", "body 'layer'", "'mlp'"]),
    ],
)
def test_another_kind_of_exit_is_refused(
    spec: ExitSpec, words: list[str], saved: Path, saved_model: Any, load_stage: Any
) -> None:
    path, _ = saved_model("llama3.1")
    stage = load_stage(path, [spec])
    text = refusal(load_exits, stage.exits, open_adapter(saved), open_model(path))
    assert all(word in text for word in [*words, "exits.json"])


def test_an_exit_that_is_not_there(saved: Path, saved_model: Any, load_stage: Any) -> None:
    path, _ = saved_model("llama3.1")
    save(load_stage(path, [ExitSpec(1), ExitSpec(3)]), saved)
    text = refusal(load_exits, load_stage(path, [ExitSpec(2)]).exits, open_adapter(saved), open_model(path))
    assert "no exit after layer 2" in text and "1, 3" in text


def test_a_model_of_another_size_is_refused(saved: Path, saved_model: Any, load_stage: Any) -> None:
    path, _ = saved_model("llama3.1", intermediate_size=96)
    text = refusal(load_exits, load_stage(path, SPECS).exits, open_adapter(saved), open_model(path))
    assert "exits.3.mlp.gate_proj.weight" in text and "[112, 64]" in text and "[96, 64]" in text


def test_damaged_weights_are_refused(saved: Path) -> None:
    path = saved / "exits.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    text = refusal(open_adapter, saved)
    assert "exits.safetensors" in text and "SHA-256" in text
    assert isinstance(open_adapter(saved, verify=False), Adapter)
    path.write_bytes(content[:-8])
    assert "truncated" in refusal(open_adapter, saved)
    path.unlink()
    assert "exits.safetensors" in refusal(open_adapter, saved)


def test_a_tensor_that_is_missing_from_the_file(saved: Path, saved_model: Any, load_stage: Any) -> None:
    from safetensors.torch import save_file

    path, weights = saved_model("llama3.1")[0], saved / "exits.safetensors"
    tensors = load_file(weights)
    tensors.pop("exits.3.mlp.up_proj.weight")
    save_file(tensors, weights)
    stage = load_stage(path, SPECS)
    text = refusal(load_exits, stage.exits, open_adapter(saved, verify=False), open_model(path))
    assert "'exits.3.mlp.up_proj.weight' is missing" in text


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c.update(version=2),
        lambda c: c.pop("exits"),
        lambda c: c.pop("files"),
        lambda c: c.update(files={}),
        lambda c: c.pop("backbone_sha256"),
        lambda c: c.update(model_settings=[1]),
        lambda c: c.update(steps="many"),
        lambda c: c.update(exits=[]),
        lambda c: c.update(exits=5),
        lambda c: c["exits"].reverse(),
        lambda c: c["exits"].append(c["exits"][-1]),
        lambda c: c["exits"][0].update(body="attention"),
        lambda c: c["exits"][0].update(head=None),
        lambda c: c["exits"][0].update(layer=0),
        lambda c: c["exits"][0].update(layer="1"),
        lambda c: c["exits"][0].update(layer=True),
        lambda c: c["exits"][0].update(rank=0),
        lambda c: c["exits"][0].update(unknown=1),
        lambda c: c["exits"][0].pop("layer"),
        lambda c: c["exits"].append(None),
    ],
)
def test_a_bad_description_is_refused(edit: Callable[[dict[str, Any]], Any], saved: Path) -> None:
    path = saved / "exits.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    assert "exits.json" in refusal(open_adapter, saved)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"version": 1, "version": 1}', "\udcff"])
def test_what_is_no_description_is_refused(text: str, saved: Path) -> None:
    (saved / "exits.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "exits.json" in refusal(open_adapter, saved)


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    assert "exits.json" in refusal(open_adapter, tmp_path)
    assert "absent" in refusal(open_adapter, tmp_path / "absent")


def test_a_description_that_was_changed_is_refused(saved: Path) -> None:
    path = saved / "exits.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "steps": content["steps"] + 1}))
    assert "exits.json: damaged: its SHA-256 is not the one it states" in refusal(open_adapter, saved)
    assert open_adapter(saved, verify=False).steps == content["steps"] + 1
    path.write_text(json.dumps({key: value for key, value in content.items() if key != "sha256"}))
    assert open_adapter(saved).steps == content["steps"], "the first adapters had no digest of their own"
