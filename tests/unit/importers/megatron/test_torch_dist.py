"""Megatron's distributed checkpoints, exchanged with megatron-core's own code and with ourselves."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.planner import WriteItemType
from torch_dist_helpers import FAMILIES, Exported, Model, assert_equal, rewrite

from megatron_ee.checkpoint.contents import Contents
from megatron_ee.checkpoint.failpoints import VARIABLE
from megatron_ee.config.schema import ExitConfig
from megatron_ee.conversion.convert import Conversion, Target, prepare, write
from megatron_ee.conversion.copy import write_output
from megatron_ee.conversion.formats import open_contents
from megatron_ee.conversion.to_hf import to_hf
from megatron_ee.errors import CheckpointError, ConfigError
from megatron_ee.families.registry import read_architecture
from megatron_ee.importers.megatron import export
from megatron_ee.importers.megatron.export import to_torch_dist
from megatron_ee.importers.megatron.metadata import ENUMS
from megatron_ee.importers.megatron.settings import to_args
from megatron_ee.importers.megatron.torch_dist import open_torch_dist
from megatron_ee.parallel.groups import Groups
from megatron_ee.testing.gpt import gpt_logits, gpt_model, load_gpt, save_gpt
from megatron_ee.testing.ranks import Ranks

LAYOUTS: dict[str, dict[str, Any] | None] = {
    "stacked": None,
    "layers apart": {"non_homogeneous_layers": True},
    "gate and up apart": {"singleton_local_shards": True},
}


class EarlyPickler(pickle.Pickler):
    """Pickles members of enums as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def test_metadata_of_early_python_3_11_are_read(exported: Exported, copied: Path) -> None:
    file = copied / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.all_local_plans = [WriteItemType.SHARD]  # Megatron keeps whole plans there
    with file.open("wb") as written:
        EarlyPickler(written, protocol=4).dump(metadata)
    assert b"getattr" in file.read_bytes() and pickle.loads(file.read_bytes()) == metadata
    assert_equal(open_torch_dist(copied, trust=True, config=None), exported("llama2")[0])


def test_known_enums_are_those_of_torch() -> None:
    enums = (torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING, WriteItemType)
    assert {f"{each.__module__}.{each.__qualname__}": tuple(each.__members__) for each in enums} == ENUMS


@pytest.mark.parametrize("family", FAMILIES)
def test_megatron_computes_what_transformers_does_with_an_export(
    family: str, exported: Exported, groups: Groups
) -> None:
    path, output, reference = exported(family)
    assert (output / "latest_checkpointed_iteration.txt").read_text() == "release"
    stored = pickle.loads((output / "release" / ".metadata").read_bytes()).state_dict_metadata
    assert stored["embedding.word_embeddings.weight"].size[0] == 256, "a multiple of 128"
    arch = read_architecture(path)
    tokens = torch.randint(arch.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(tokens).logits
    # A model of another tensor-parallel size has more rows, or fewer.
    for vocabulary in (256, 384, 132):
        model = gpt_model(arch, groups, vocabulary)
        load_gpt(model, output / "release")
        logits = gpt_logits(model, tokens)[..., : arch.vocab_size]
        assert (logits - expected).abs().max() <= 1e-4
        assert not model.embedding.word_embeddings.weight[arch.vocab_size :].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama2", "llama3.2-tied", "llama-biases", "qwen3"])
def test_what_megatron_saves_is_the_released_model(
    family: str,
    layout: str,
    exported: Exported,
    groups: Groups,
    tmp_path: Path,
) -> None:
    path, output, _ = exported(family)
    arch = read_architecture(path)
    model = gpt_model(arch, groups, 384)
    load_gpt(model, output / "release")
    # What a training run saves besides; the first is a tensor, the others are in common.pt.
    moments = {"optimizer": sharded("optimizer.state.exp_avg.decoder.final_layernorm.weight")}
    args = argparse.Namespace(**to_args(arch, 384), dtype=torch.bfloat16, path=tmp_path)
    save_gpt(model, tmp_path / "iter_0000012", LAYOUTS[layout], args=args, iteration=12, **moments)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12\n")
    assert_equal(open_torch_dist(tmp_path, trust=True, config=path), path)
    assert_equal(open_torch_dist(tmp_path / "iter_0000012", trust=True, config=path / "config.json"), path)
    derived = open_torch_dist(tmp_path, trust=True, config=None)
    assert derived.architecture == arch and derived.backbone.keys() == open_contents(path).backbone.keys()


def test_settings_that_newer_releases_keep_among_the_tensors(
    exported: Exported, groups: Groups, tmp_path: Path
) -> None:
    """As megatron-core 0.19 writes them, whatever release is installed."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    path, output, _ = exported("qwen3")
    arch = read_architecture(path)
    model = gpt_model(arch, groups, 384)
    load_gpt(model, output / "release")
    common = {"args": argparse.Namespace(**to_args(arch, 384), dtype=torch.bfloat16), "iteration": 12}
    state = ShardedObject("common_state", common, (1,), (0,), replica_id=0)
    save_gpt(model, tmp_path / "iter_0000012", common_state=state, **common)
    (tmp_path / "iter_0000012" / "common.pt").unlink(missing_ok=True)
    derived = open_torch_dist(tmp_path / "iter_0000012", trust=True, config=None)
    assert derived.architecture == arch and derived.backbone.keys() == open_contents(path).backbone.keys()
    other = dataclasses.replace(arch, norm_eps=0.5)
    common["args"] = argparse.Namespace(**to_args(other, 384))
    state = ShardedObject("common_state", common, (1,), (0,), replica_id=0)
    save_gpt(model, tmp_path / "other", common_state=state, **common)
    (tmp_path / "other" / "common.pt").unlink(missing_ok=True)
    assert open_torch_dist(tmp_path / "other", trust=True, config=None).architecture.norm_eps == 0.5


def sharded(key: str) -> Any:
    from megatron.core.dist_checkpointing import ShardedTensor

    return ShardedTensor.from_rank_offsets(key, torch.ones(3))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_and_import_give_the_same_bits(
    family: str, dtype: torch.dtype, saved_model: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "ITEM", 1500)  # several items per tensor, of uneven numbers of rows
    path, model = saved_model(family, **FAMILIES[family], seed=3)
    if dtype != torch.float32:
        path = tmp_path / "hf"
        model.to(dtype).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    done: list[int] = []
    source = open_contents(path)
    output = to_torch_dist(source, shard=60_000)  # several files
    write_output(output, tmp_path / "out", advance=done.append)
    assert len(output.files) > 2 and sum(done) == output.nbytes
    padding = sum(tensor.nbytes // tensor.shape[0] for tensor in source.backbone.values() if tensor.shape[0] == 131)
    assert output.nbytes == sum(tensor.nbytes for tensor in source.backbone.values()) + (256 - 131) * padding
    found = open_contents(tmp_path / "out", trust=True)
    assert_equal(found, path)
    for name in ("config.json", "tokenizer.json"):
        asset = found.assets[name]
        assert isinstance(asset, Path) and asset.read_bytes() == (path / name).read_bytes()
    # Boxes that begin and end in the middle of items, heads and groups.
    for name, tensor in source.backbone.items():
        if len(tensor.shape) == 2:
            box = [torch.empty(tensor.shape[0] - 12, 9, dtype=dtype) for _ in range(2)]
            tensor.read(box[0], (7, 5))
            found.backbone[name].read(box[1], (7, 5))
            assert torch.equal(*box), name


@pytest.mark.parametrize("family", ["llama2", "llama3.2-tied", "mistral", "qwen2", "qwen2-window", "qwen3"])
def test_an_export_without_its_config_is_the_same_model_in_transformers(
    family: str, saved_model: Callable[..., Model], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    changes = {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0}}
    path, reference = saved_model(family, **changes)
    write_output(to_torch_dist(open_contents(path)), tmp_path / "megatron")
    shutil.rmtree(tmp_path / "megatron" / "release" / "huggingface")
    write_output(to_hf(open_contents(tmp_path / "megatron", trust=True)), tmp_path / "hf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    tokens = torch.randint(131, (1, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(again(tokens, use_cache=False).logits, reference(tokens, use_cache=False).logits)
    assert read_architecture(tmp_path / "hf").max_positions == read_architecture(path).max_positions


def test_prefixes_of_wrappers_are_taken_off(exported: Exported, tmp_path: Path) -> None:
    path, output, _ = exported("llama2")
    directory = Path(shutil.copytree(output, tmp_path / "out")) / "release"
    rewrite(directory, lambda key: f"module.model.{key}")
    assert_equal(open_torch_dist(directory, trust=True, config=None), path)


def test_norms_of_their_own_are_known(exported: Exported, tmp_path: Path) -> None:
    path, output, _ = exported("llama2")
    directory = Path(shutil.copytree(output, tmp_path / "out")) / "release"
    names = {
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.input_layernorm.weight",
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": "decoder.layers.pre_mlp_layernorm.weight",
    }
    rewrite(directory, lambda key: names.get(key, key))
    assert_equal(open_torch_dist(directory, trust=True, config=None), path)


def test_an_export_that_fails_leaves_nothing(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = open_contents(exported("llama2")[0])

    def full(fd: int, data: memoryview) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_all", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_output(to_torch_dist(contents), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(ConfigError, match="exists already"):
        write_output(to_torch_dist(contents), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_exits_on_a_megatron_checkpoint(exported: Exported, tmp_path: Path) -> None:
    """Its adapter names it, which takes trust to be read; beside its backbone it names that, and stays the same."""
    path, output, _ = exported("llama2")

    def convert(source: Path, to: Target, name: str, **options: Any) -> Path:
        request = Conversion(source, to, **options)
        write(prepare(request)[1], request, tmp_path / name)
        return tmp_path / name

    adapter = convert(output, "adapter", "adapter", trust=True, add=[ExitConfig(layer=1, body="mlp", init="copy")])
    assert json.loads((adapter / "exits.json").read_text())["base_model"] == str(output / "release")
    with pytest.raises(CheckpointError, match="--trust-checkpoint"):
        prepare(Conversion(adapter, "parallel"))
    parallel = convert(adapter, "parallel", "parallel", trust=True, config=path, tensor=2)
    assert_equal(dataclasses.replace(open_contents(parallel), exits=(), exit_tensors={}), path)
    again = convert(parallel, "adapter", "again")
    assert (again / "exits.safetensors").read_bytes() == (adapter / "exits.safetensors").read_bytes()
    assert json.loads((again / "exits.json").read_text())["base_model"] == str(parallel)
    convert(again, "hf", "hf")


def export_until(path: str, output: str, failpoint: str) -> None:
    os.environ[VARIABLE] = failpoint
    write_output(to_torch_dist(open_contents(Path(path)), shard=60_000), Path(output))


@pytest.mark.slow
@pytest.mark.parametrize("failpoint", ["convert.file-done:2", "convert.rename"])
def test_killed_it_goes_on(failpoint: str, exported: Exported, tmp_path: Path) -> None:
    path, target = exported("llama2")[0], tmp_path / "out"
    plan = to_torch_dist(open_contents(path), shard=60_000)
    write_output(plan, tmp_path / "whole")
    with Ranks(1, export_until, str(path), str(target), failpoint) as ranks:
        ranks.processes[0].join(60)
        assert ranks.processes[0].exitcode == -signal.SIGKILL
    assert not target.exists()
    finished = {path.name: path.stat().st_ino for path in (tmp_path / "out.converting").glob("release/*.distcp")}
    lines: list[str] = []
    write_output(plan, target, report=lines.append)
    if failpoint == "convert.file-done:2":
        kept = [name for name, inode in finished.items() if (target / "release" / name).stat().st_ino == inode]
        assert len(lines) >= 2 and len(kept) >= 2
    whole = {file.relative_to(tmp_path / "whole"): file for file in (tmp_path / "whole").rglob("*") if file.is_file()}
    assert {file.relative_to(target) for file in target.rglob("*") if file.is_file()} == whole.keys()
    assert all((target / name).read_bytes() == file.read_bytes() for name, file in whole.items())
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


def test_a_full_disk_is_noticed_before_anything_is_written(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=1000))
    with pytest.raises(CheckpointError, match="0.0 GB are free"):
        write_output(to_torch_dist(open_contents(exported("llama2")[0])), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_exits_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no backbone"):
        write_output(to_torch_dist(Contents(tmp_path, "adapter", None)), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [("model.layers.1.self_attn.k_proj.weight", "Megatron fuses"), ("model.layers.1.input_layernorm.weight", "stacks")],
)
def test_dtypes_that_megatron_cannot_hold_together_are_refused(
    name: str, message: str, exported: Exported, tmp_path: Path
) -> None:
    contents = open_contents(exported("llama2")[0])
    half = dataclasses.replace(contents.backbone[name], dtype=torch.bfloat16)
    mixed = dataclasses.replace(contents, backbone={**contents.backbone, name: half})
    with pytest.raises(CheckpointError, match=f"{name} is torch.bfloat16.*{message}"):
        write_output(to_torch_dist(mixed), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_equal_models_give_equal_files(exported: Exported, tmp_path: Path) -> None:
    path, output, _ = exported("qwen2")
    write_output(to_torch_dist(open_contents(path)), tmp_path / "again")
    for file in output.rglob("*"):
        if file.is_file():
            assert (tmp_path / "again" / file.relative_to(output)).read_bytes() == file.read_bytes(), file


MEMORY = """
import json, sys
from pathlib import Path
from megatron_ee import platform
from megatron_ee.checkpoint.contents import Contents
from megatron_ee.conversion.copy import write_output
from megatron_ee.checkpoint.derived import constant
from megatron_ee.importers.megatron.export import to_torch_dist
from megatron_ee.importers.megatron.torch_dist import open_torch_dist
from megatron_ee.families.weights import expected_tensors
from megatron_ee.families.registry import parse_architecture
import torch, torch.distributed.checkpoint

output = Path(sys.argv[1])
config = json.loads(sys.argv[2])
arch = parse_architecture(config)
backbone = {name: constant(1, shape, torch.bfloat16) for name, shape in expected_tensors(arch).items()}
assets = {"config.json": sys.argv[2].encode()}
before = platform.peak_memory()
write_output(to_torch_dist(Contents(output, "", arch, backbone, assets=assets)), output)
exported = platform.peak_memory()
for tensor in open_torch_dist(output, trust=True, config=None).backbone.values():
    for slab in tensor.slabs():
        assert (slab == 1).all()
print(json.dumps([sum(t.nbytes for t in backbone.values()), exported - before, platform.peak_memory() - exported]))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 16,
        "vocab_size": 32_000,
    }
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "out"), json.dumps(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    total, exporting, importing = json.loads(done.stdout)
    assert total > 500e6 and exporting < 200e6 and importing < 50e6, (total, exporting, importing)
