"""Hostile and damaged distributed checkpoints: nothing of them is run, and one line says what is wrong."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_dist_helpers import read_all, rewrite

from megatron_ee.errors import CheckpointError, DamagedError
from megatron_ee.importers.megatron.torch_dist import open_torch_dist


def test_without_trust_nothing_is_unpickled(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ee.importers.megatron.metadata.unpickle", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(CheckpointError, match="pickles.*--trust-checkpoint"):
        open_torch_dist(copied, trust=False, config=None)


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("inside", [False, True])
def test_a_hostile_metadata_runs_nothing(inside: bool, copied: Path, tmp_path: Path) -> None:
    bad = Hostile(tmp_path / "ran")
    if inside:
        rewrite(copied, lambda key: key, lambda metadata: setattr(metadata, "planner_data", bad))
    else:
        (copied / ".metadata").write_bytes(pickle.dumps(bad))
    with pytest.raises(CheckpointError, match=r"\.metadata: .*posix\.system") as caught:
        open_torch_dist(copied, trust=True, config=None)
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


def test_a_hostile_item_or_common_file_runs_nothing(copied: Path, tmp_path: Path) -> None:
    bad = Hostile(tmp_path / "ran")
    torch.save({"args": bad}, copied / "common.pt")
    found = open_torch_dist(copied, trust=True, config=None)
    torch.save(bad, copied / "__0_0.distcp")
    size = (copied / "__0_0.distcp").stat().st_size

    def shorten(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.offset, place.length = 0, size

    rewrite(copied, lambda key: key, shorten)
    found = open_torch_dist(copied, trust=True, config=None)
    with pytest.raises(CheckpointError, match=r"distcp.*posix\.system"):
        read_all(found)
    assert not (tmp_path / "ran").exists()


def test_a_file_name_does_not_lead_outside(copied: Path, tmp_path: Path) -> None:
    shutil.copy(copied / "__0_0.distcp", tmp_path / "outside.distcp")

    def lead_outside(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = "../outside.distcp"

    rewrite(copied, lambda key: key, lead_outside)
    with pytest.raises(CheckpointError, match="leads outside"):
        open_torch_dist(copied, trust=True, config=None)


def test_a_link_does_not_lead_outside(copied: Path, tmp_path: Path) -> None:
    (copied / "__0_0.distcp").rename(tmp_path / "outside.distcp")
    (copied / "__0_0.distcp").symlink_to(tmp_path / "outside.distcp")
    with pytest.raises(CheckpointError, match="leads outside"):
        open_torch_dist(copied, trust=True, config=None)


def drop_chunk(metadata: Any) -> None:
    metadata.state_dict_metadata["output_layer.weight"].chunks.pop()


def compress(metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).transform_descriptors = ("zstd",)


def hold_twice(metadata: Any) -> None:
    key = "decoder.final_layernorm.weight"
    metadata.state_dict_metadata[f"module.{key}"] = metadata.state_dict_metadata[key]
    for index, place in list(metadata.storage_data.items()):
        metadata.storage_data[type(index)(f"module.{index.fqn}", index.offset)] = place


def move_chunk(metadata: Any) -> None:
    for index, place in list(metadata.storage_data.items()):
        if index.fqn == "decoder.layers.mlp.linear_fc2.weight" and index.offset[0] == 1:
            del metadata.storage_data[index]
            metadata.storage_data[type(index)("elsewhere", index.offset)] = place


def enlarge(metadata: Any) -> None:
    tensor = metadata.state_dict_metadata["decoder.final_layernorm.weight"]
    tensor.size = torch.Size((2**60,))
    tensor.chunks[0].sizes = torch.Size((2**60,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_chunk, "output_layer.weight.*do not fill"),
        (compress, "compressed"),
        (hold_twice, "module.decoder.final_layernorm.weight' holds model.norm.weight, and so does"),
        (move_chunk, "linear_fc2.weight.*no file is named"),
        (enlarge, r"final_layernorm.weight' has shape \[1152921504606846976\]"),
        (lambda metadata: metadata.state_dict_metadata.clear(), "embedding.word_embeddings.weight"),
        (lambda metadata: metadata.state_dict_metadata.pop("output_layer.weight"), "no tensor.*lm_head.weight"),
        (lambda metadata: setattr(metadata, "storage_data", 3), "not the metadata"),
    ],
)
def test_metadata_that_contradict_themselves_are_refused(
    change: Callable[[Any], None], message: str, copied: Path
) -> None:
    rewrite(copied, lambda key: key, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_torch_dist(copied, trust=True, config=None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["decoder.layers.mlp.router.weight", "decoder.layers.0.mlp.linear_fc1.bias", "embedding.position.weight"]
)
def test_an_unknown_tensor_is_named(key: str, copied: Path) -> None:
    rewrite(copied, lambda old: key if old == "decoder.final_layernorm.weight" else old)
    with pytest.raises(CheckpointError, match=f"unknown tensor '{key}'"):
        open_torch_dist(copied, trust=True, config=None)


@pytest.mark.parametrize("name", [".metadata", "metadata.json", "__0_0.distcp"])
def test_a_missing_file_is_named(name: str, copied: Path) -> None:
    (copied / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: is missing"):
        open_torch_dist(copied, trust=True, config=None)


@pytest.mark.parametrize("name", [".metadata", "metadata.json", "__0_0.distcp", "common.pt"])
def test_a_truncated_file_is_named(name: str, copied: Path) -> None:
    data = (copied / name).read_bytes()
    (copied / name).write_bytes(data[:-60])
    with pytest.raises(CheckpointError, match=name) as caught:
        open_torch_dist(copied, trust=True, config=None)
    assert "\n" not in str(caught.value)


def test_another_backend_is_refused(copied: Path) -> None:
    (copied / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(CheckpointError, match="zarr"):
        open_torch_dist(copied, trust=True, config=None)


def test_any_flipped_byte_of_an_item_is_noticed(copied: Path) -> None:
    file = copied / "__0_0.distcp"
    good = file.read_bytes()
    expected = read_all(open_torch_dist(copied, trust=True, config=None))
    noticed = 0
    for position in range(0, len(good), len(good) // 60):
        bad = bytearray(good)
        bad[position] ^= 0x10
        file.write_bytes(bad)
        try:
            found = read_all(open_torch_dist(copied, trust=True, config=None))
        except CheckpointError as error:
            noticed += 1
            assert "__0_0.distcp" in str(error) and "\n" not in str(error)
        else:  # padding of the archive
            assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert noticed > 30


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=3))
def test_mangled_metadata_give_one_kind_of_error(changes: list[tuple[float, bytes, int]], copied: Path) -> None:
    data = good = (copied / ".metadata").read_bytes()
    for place, inserted, removed in changes:
        position = int(place * len(data))
        data = data[:position] + inserted + data[position + removed :]
    (copied / ".metadata").write_bytes(data)
    try:
        read_all(open_torch_dist(copied, trust=True, config=None))
    except CheckpointError as error:
        assert "\n" not in str(error)
    finally:
        (copied / ".metadata").write_bytes(good)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_mangled_item_gives_one_kind_of_error(changes: list[tuple[float, int]], copied: Path) -> None:
    metadata = pickle.loads((copied / ".metadata").read_bytes())
    (place,) = (info for index, info in metadata.storage_data.items() if index.fqn == "decoder.final_layernorm.weight")
    file = copied / place.relative_path
    good = file.read_bytes()
    bad = bytearray(good)
    for where, value in changes:
        bad[place.offset + int(where * place.length)] = value
    tensor = open_torch_dist(copied, trust=True, config=None).backbone["model.norm.weight"]
    expected, found = torch.empty(64), torch.empty(64)
    tensor.read(expected, (0,))
    file.write_bytes(bad)
    tensor = open_torch_dist(copied, trust=True, config=None).backbone["model.norm.weight"]
    try:
        tensor.read(found, (0,))
    except CheckpointError as error:
        assert file.name in str(error) and "\n" not in str(error)
    else:
        assert torch.equal(found, expected)
    finally:
        file.write_bytes(good)


def test_checksums_are_not_looked_at_where_there_are_none_or_none_are_wanted(copied: Path) -> None:
    file = copied / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    position = data.index(b"data/0") + 400  # in the first storage
    data[position] ^= 0x01
    file.write_bytes(data)
    with pytest.raises(DamagedError, match="CRC-32"):
        read_all(open_torch_dist(copied, trust=True, config=None))
    read_all(open_torch_dist(copied, trust=True, config=None, verify=False))


def test_opening_reads_no_tensor(copied: Path) -> None:
    for file in copied.glob("*.distcp"):
        size = file.stat().st_size
        file.write_bytes(b"")
        os.truncate(file, size)
    contents = open_torch_dist(copied, trust=True, config=None)
    with pytest.raises(DamagedError, match="distcp.*damaged"):
        read_all(contents)
