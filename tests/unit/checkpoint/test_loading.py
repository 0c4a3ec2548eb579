"""Loading a released model: what is accepted, what is refused in one line, and how much memory it takes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ee.checkpoint.loading import load_backbone
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.checkpoint.tensors import StoredTensor
from megatron_ee.config.exits import ExitSpec
from megatron_ee.errors import CheckpointError

Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def copied(tmp_path: Path, saved_model: Any) -> Callable[..., Path]:
    """A copy of a tiny model's directory, to be spoilt."""

    def copy(family: str = "llama3.1", **changes: Any) -> Path:
        return Path(shutil.copytree(saved_model(family, **changes)[0], tmp_path / "model"))

    return copy


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], Any]) -> Path:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    return directory


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def refusal(directory: Path) -> str:
    """The one line that ``open_model`` refuses ``directory`` with."""
    with pytest.raises(CheckpointError) as caught:
        open_model(directory)
    text = str(caught.value)
    assert "\n" not in text and str(directory) in text
    return text


def test_values_are_read_in_place(saved_model: Any, load_stage: Any) -> None:
    path, reference = saved_model("llama3.1")
    counts: list[int] = []
    stage = load_stage(path)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.fill_(torch.nan)
    load_backbone(stage, open_model(path), counts.append)
    weights = reference.state_dict()
    backbone = stage.backbone
    assert torch.equal(backbone.embedding.weight[:131].cpu(), weights["model.embed_tokens.weight"])
    assert torch.equal(backbone.final_norm.weight.cpu(), weights["model.norm.weight"])
    assert torch.equal(backbone.layers["3"].mlp.down.weight.cpu(), weights["model.layers.2.mlp.down_proj.weight"])
    assert not backbone.embedding.weight[131:].any() and not backbone.head.weight[131:].any()
    assert sum(counts) == sum(tensor.numel() * 4 for tensor in weights.values())


def test_exits_get_their_values_too(saved_model: Any, load_stage: Any) -> None:
    exits = [ExitSpec(2, "mlp"), ExitSpec(3, "layer", "low_rank", init="random"), ExitSpec(4, "norm", "shared")]
    stage = load_stage(saved_model("qwen3")[0], exits, final_exit=False)
    assert all(parameter.isfinite().all() for parameter in stage.parameters())


# ------------------------------------------------------------------------------------------- what is accepted


ROTARY = {
    **{f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(4)},
    **{
        f"model.layers.3.self_attn.rotary_emb.{name}": torch.ones(1, 1, 128, 16)
        for name in ("cos_cached", "sin_cached")
    },
    "model.rotary_emb.inv_freq": torch.ones(8, dtype=torch.float16),
    "model.rotary_emb.original_inv_freq": torch.ones(8),
    "rotary_emb._cos_cached": torch.ones(128, 16),
    "model.rotary_pos_emb.sin_cached": torch.ones(128, 16, dtype=torch.bfloat16),
}


def test_rotary_tables_of_old_releases(copied: Any) -> None:
    model = open_model(edit_tensors(copied(), lambda t: t.update(ROTARY)))
    assert len(model.weights) == 3 + 4 * 9 and model.non_weights.keys() == ROTARY.keys()


def test_an_index_may_list_tensors_without_weights_that_are_nowhere(copied: Any) -> None:
    directory = copied("llama3.2-tied", shard="50KB")
    shard = min(directory.glob("model-*.safetensors")).name
    absent = dict.fromkeys(["lm_head.weight", *ROTARY], shard)
    edit_json(directory / "model.safetensors.index.json", lambda c: c["weight_map"].update(absent))
    model = open_model(directory)
    assert model.architecture.tied and "lm_head.weight" not in model.weights and not model.non_weights


@pytest.mark.parametrize("name", ["model.norm.bias", "lm_head.weight"])
def test_an_index_that_lists_weights_that_are_nowhere(name: str, copied: Any) -> None:
    directory = copied(shard="50KB")
    shard = min(directory.glob("model-*.safetensors"))
    if name == "lm_head.weight":
        (place,) = (file for file in directory.glob("model-*.safetensors") if name in load_file(file))
        tensors = load_file(place)
        save_file({key: value for key, value in tensors.items() if key != name} or {"x.inv_freq": torch.ones(1)}, place)
    edit_json(directory / "model.safetensors.index.json", lambda c: c["weight_map"].update({name: shard.name}))
    assert refusal(directory) == f"{shard}: tensor {name!r} is missing, which model.safetensors.index.json places there"


def test_an_index_decides_which_file_a_tensor_is_from(copied: Any) -> None:
    directory = copied(shard="50KB")
    index = directory / "model.safetensors.index.json"
    place = json.loads(index.read_text())["weight_map"][Q0]
    wanted = load_file(directory / place)[Q0]
    for name in ("a.safetensors", "z.safetensors"):  # before and after it
        save_file({Q0: torch.zeros_like(wanted), f"{name}.inv_freq": torch.ones(1)}, directory / name)
        edit_json(index, lambda c, name=name: c["weight_map"].update({f"{name}.inv_freq": name}))
    out = torch.empty_like(wanted)
    open_model(directory).weights[Q0].read(out, (0, 0))
    assert torch.equal(out, wanted)


def test_a_tied_duplicate_of_the_head(copied: Any, load_stage: Any) -> None:
    directory = copied("llama3.2-tied")
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = open_model(directory)
    assert "lm_head.weight" not in model.weights
    stage = load_stage(directory)
    assert stage.backbone.head.weight is stage.backbone.embedding.weight


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (torch.ones(130, 64), "has shape [130, 64], but config.json makes it [131, 64]"),
        (torch.ones(131, 64, dtype=torch.int32), "is I32 and cannot be read as"),
        (torch.ones(131, 64, dtype=torch.float8_e4m3fn), None),
    ],
)
def test_a_tied_model_with_another_head(head: Tensor, words: str | None, copied: Any) -> None:
    directory = edit_tensors(copied("llama3.2-tied"), lambda t: t.update({"lm_head.weight": head}))
    if words is None:
        assert not open_model(directory).architecture.tied
    else:
        text = refusal(directory)
        assert "'lm_head.weight'" in text and words in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype(dtype: torch.dtype, copied: Any, saved_model: Any, load_stage: Any) -> None:
    directory = edit_tensors(copied(), lambda t: t.update({name: v.to(dtype) for name, v in t.items()}))
    stage = load_stage(directory)
    expected = saved_model("llama3.1")[1].model.layers[0].mlp.down_proj.weight
    assert torch.equal(stage.backbone.layers["1"].mlp.down.weight.cpu(), expected.to(dtype).float())


# -------------------------------------------------------------------------------------------- what is refused


def test_missing_tensor(copied: Any) -> None:
    text = refusal(edit_tensors(copied(), lambda t: t.pop(Q0)))
    assert Q0 in text and "missing" in text and "model.safetensors" in text


@pytest.mark.parametrize("tied", [True, False])
def test_a_repeated_head_is_compared_once(
    tied: bool, copied: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_EE_CACHE", str(tmp_path / "cache"))
    directory = edit_tensors(
        copied("llama3.2-tied"),
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * (1 if tied else 2)}),
    )
    assert open_model(directory).architecture.tied == tied
    monkeypatch.setattr(StoredTensor, "slabs", lambda *_: pytest.fail("read again"))
    assert open_model(directory).architecture.tied == tied


def test_missing_head_of_an_untied_model(copied: Any) -> None:
    text = refusal(edit_tensors(copied(), lambda t: t.pop("lm_head.weight")))
    assert "'lm_head.weight' is missing" in text


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.4.mlp.up_proj.weight", "transformer.wte.weight"]
)
def test_unknown_tensor(name: str, copied: Any) -> None:
    text = refusal(edit_tensors(copied(), lambda t: t.update({name: torch.ones(64)})))
    assert f"unknown tensor {name!r}" in text and "model.safetensors" in text


def test_mis_shaped_tensor(copied: Any) -> None:
    text = refusal(edit_tensors(copied(), lambda t: t.update({Q0: t[Q0][:, :60]})))
    assert Q0 in text and "[64, 60]" in text and "[64, 64]" in text


def test_integer_tensor(copied: Any) -> None:
    text = refusal(edit_tensors(copied(), lambda t: t.update({Q0: t[Q0].to(torch.int8)})))
    assert Q0 in text and "torch.int8" in text


def test_config_of_another_shape(copied: Any) -> None:
    directory = copied()
    edit_json(directory / "config.json", lambda c: c.update(vocab_size=132))
    text = refusal(directory)
    assert "model.embed_tokens.weight" in text and "[131, 64]" in text and "[132, 64]" in text


@pytest.mark.parametrize("left", [0, 5, 1000, -1])
def test_truncated_file(left: int, copied: Any) -> None:
    directory = copied()
    path = directory / "model.safetensors"
    os.truncate(path, left if left >= 0 else path.stat().st_size - 1)
    text = refusal(directory)
    assert "truncated" in text and "model.safetensors" in text


@pytest.mark.parametrize("target", ["../evil.safetensors", "/etc/evil.safetensors", "a/../../evil.safetensors"])
def test_index_that_points_outside(target: str, copied: Any) -> None:
    directory = copied(shard="50KB")
    shutil.copy(next(directory.glob("model-00001*")), directory.parent / "evil.safetensors")
    edit_json(directory / "model.safetensors.index.json", lambda c: c["weight_map"].update({Q0: target}))
    text = refusal(directory)
    assert "outside" in text and target in text


def test_link_that_leads_outside(copied: Any) -> None:
    directory = copied()
    (directory / "model.safetensors").rename(directory.parent / "elsewhere.safetensors")
    (directory / "model.safetensors").symlink_to(directory.parent / "elsewhere.safetensors")
    assert "outside" in refusal(directory)


def test_missing_shard(copied: Any) -> None:
    directory = copied(shard="50KB")
    shard = sorted(directory.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(directory)


def test_pickle_only(copied: Any) -> None:
    directory = copied()
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    text = refusal(directory)
    assert "pickle" in text and "pytorch_model.bin" in text and "safetensors" in text


def test_no_weights_no_config_no_directory(copied: Any, tmp_path: Path) -> None:
    directory = copied()
    (directory / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(directory)
    (directory / "config.json").unlink()
    assert "config.json" in refusal(directory)
    assert "config.json" in refusal(tmp_path / "absent")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["'GPT2LMHeadModel'", "LlamaForCausalLM"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "quant_method"]),
        ({"auto_map": {"AutoModel": "code.Model"}}, ["auto_map"]),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, ["rope type", "'longrope'"]),
    ],
)
def test_unsupported_models(changes: dict[str, Any], words: list[str], copied: Any) -> None:
    directory = copied()
    edit_json(directory / "config.json", lambda c: c.update(changes))
    text = refusal(directory)
    assert all(word in text for word in ["config.json", *words])


def test_a_file_that_shrinks_after_the_check_is_noticed(copied: Any, load_stage: Any) -> None:
    directory = copied()
    stage, model = load_stage(directory), open_model(directory)
    os.truncate(directory / "model.safetensors", (directory / "model.safetensors").stat().st_size - 4)
    with pytest.raises(CheckpointError, match="truncated"):
        load_backbone(stage, model)


# -------------------------------------------------------------------------------------------------- the hash


def test_the_hash_is_of_the_weights_not_of_the_files(
    copied: Any, saved_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_EE_CACHE", str(tmp_path / "cache"))
    single = open_model(saved_model("llama3.1")[0]).digest()
    assert open_model(saved_model("llama3.1", shard="50KB")[0]).digest() == single
    directory = copied()
    edit_tensors(directory, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert open_model(directory).digest() == single
    edit_tensors(directory, lambda t: t[Q0].view(-1)[7:8].add_(1e-3))
    assert open_model(directory).digest() != single


# ------------------------------------------------------------------------------------------------- peak memory

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 5,
    "num_attention_heads": 16,
    "vocab_size": 32_000,
}
PEAK = """
import sys, torch
from megatron_ee.checkpoint.loading import load_backbone
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.model.setup import build_setup
from megatron_ee.exits.stage import Stage
from megatron_ee.parallel.groups import process_groups
from megatron_ee.platform import peak_memory

model = open_model(sys.argv[1])
with process_groups() as groups:
    setup = build_setup(model.architecture, getattr(torch, sys.argv[2]), groups)
    before = peak_memory()
    stage = Stage(setup, range(1, 6), [], final_exit=True)
    load_backbone(stage, model)
    size = sum(p.numel() * p.element_size() for p in stage.parameters())
    print(size, peak_memory() - before, float(stage.backbone.layers["5"].mlp.down.weight[3, 5]))
"""


def write_large_model(directory: Path) -> None:
    """About 300 MB of bfloat16, one repeated block of random values, streamed to disk."""
    from megatron_ee.families.registry import parse_architecture
    from megatron_ee.families.weights import expected_tensors

    (directory / "config.json").write_text(json.dumps(CONFIG))
    header, end = {}, 0
    for name, shape in expected_tensors(parse_architecture(CONFIG)).items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    assert end > 280e6
    text = json.dumps(header).encode()
    block = torch.randn(2**19, generator=torch.Generator().manual_seed(1)).bfloat16().view(torch.uint8).numpy().data
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(block)):
            file.write(block[: end - start])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the memory of the host")
def test_loading_takes_a_few_tensors_beside_the_model(tmp_path: Path) -> None:
    write_large_model(tmp_path)
    entry, value = open_model(tmp_path).weights["model.layers.4.mlp.down_proj.weight"], torch.empty(1, 1)
    entry.read(value, (3, 5))
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), "bfloat16"], capture_output=True, text=True, check=True
    )
    size, grown, read = result.stdout.split()
    assert float(read) == float(value)
    assert int(size) > 280e6
    assert int(grown) - int(size) < 32 * 2**20
