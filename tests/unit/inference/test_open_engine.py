"""Opening a model for an engine: its dtype, and exits that an engine does without."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from megatron_ee.checkpoint.saved_model import choose_dtype, open_model
from megatron_ee.errors import ConfigError
from megatron_ee.inference import EngineOptions, Request, ThresholdPolicy, open_engine, open_released
from megatron_ee.platform import accelerator


def test_an_engine_without_some_exits(byte_model: Path, adapter: Path) -> None:
    released = open_released(byte_model, adapter)  # exits after layers 1 and 2, the second with a layer of its own
    ids, needed = {}, {}
    for exits in (None, [1], []):
        with open_engine(released, EngineOptions(dtype="float32", exits=exits)) as engine:
            assert engine is not None
            [[full]] = engine.generate([Request(prompt="Once", max_tokens=5, ignore_eos=True, exits=[2])])
            ids[str(exits)] = [token.id for token in full.tokens]
            assert full.statistics["layers_per_token"] == 4
            needed[str(exits)] = engine._scheduler.kv_caches.budget.needed(60, 60)
            early = Request(
                prompt="Once", mode="threshold", policy=ThresholdPolicy(threshold=1e-9), max_tokens=5, ignore_eos=True
            )
            if exits != []:
                [[found]] = engine.generate([early])
                assert {token.layer for token in found.tokens} == {1, 4}
            if exits == [1]:
                assert engine.off == (2,)
                with pytest.raises(ConfigError, match="exits: the exit after layer 2 is switched off; there are: 1"):
                    engine.submit(Request(prompt="Once", mode="threshold", exits=[2]))
            if exits == []:
                with pytest.raises(ConfigError, match="needs exits; those after layers 1, 2 are switched off"):
                    engine.submit(early)
    assert ids["None"] == ids["[1]"] == ids["[]"]
    assert needed["None"] * 4 == needed["[1]"] * 5 and needed["[1]"] == needed["[]"]  # a layer's keys and values less


def test_unknown_exits_are_refused(byte_model: Path, adapter: Path) -> None:
    with (
        pytest.raises(ConfigError, match="exits: there is no exit after layer 3"),
        open_engine(open_released(byte_model, adapter), EngineOptions(exits=[3])),
    ):
        pass


def test_options_by_name_are_those_of_the_options_with_their_checks(byte_model: Path) -> None:
    released = open_released(byte_model)
    with open_engine(released, EngineOptions(max_num_seqs=3, dtype="bfloat16"), dtype="float32") as engine:
        assert engine is not None
        scheduler = engine._scheduler
        assert scheduler.max_num_seqs == 3
        assert scheduler.stages[0].stage.setup.dtype == torch.float32
    for wrong in ({"dtyp": "float32"}, {"max_num_seqs": 0}):
        with pytest.raises(ValidationError, match=next(iter(wrong))), open_engine(released, **wrong):
            pass


def test_a_prompt_may_be_given_by_position() -> None:
    assert Request("Once", max_tokens=3) == Request(prompt="Once", max_tokens=3)
    assert Request.model_validate({"prompt": [1, 2]}).prompt == (1, 2)
    with pytest.raises(ValidationError, match="prompt"):
        Request(max_tokens=3)


def test_a_model_needs_no_adapter(byte_model: Path) -> None:
    assert open_released(byte_model).exits == ()


@pytest.mark.parametrize(
    ("stored", "chosen"), [(torch.float32, "float32"), (torch.bfloat16, "bfloat16"), (torch.float16, "bfloat16")]
)
def test_auto_is_the_dtype_of_most_weights(stored: torch.dtype, chosen: str, byte_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(byte_model, model)
    tensors = load_file(model / "model.safetensors")
    # Norms are often kept in float32, and config.json is wrong at times.
    cast = {name: tensor if "norm" in name else tensor.to(stored) for name, tensor in tensors.items()}
    save_file(cast, model / "model.safetensors", {"format": "pt"})
    opened = open_model(model)
    assert choose_dtype("auto", opened, "dtype") == chosen
    assert choose_dtype("float32", opened, "dtype") == "float32"


def test_a_slow_dtype_is_reported_and_an_unknown_one_refused(
    byte_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = open_model(byte_model)
    monkeypatch.setattr(accelerator, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(accelerator, "has_accelerator", lambda: False)
    assert choose_dtype("bfloat16", model, "--dtype") == "bfloat16"
    assert (
        capsys.readouterr().err
        == "--dtype: bfloat16 is slow on this CPU; for long prompts float32 is several times as fast, "
        "with twice the memory\n"
    )
    choose_dtype("auto", model, "--dtype")
    assert capsys.readouterr().err == ""
    with pytest.raises(ConfigError, match="dtype: 'float16' is unknown; possible: auto, float32, bfloat16"):
        choose_dtype("float16", model, "dtype")
