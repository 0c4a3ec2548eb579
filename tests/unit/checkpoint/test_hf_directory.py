"""Which directories of a released model are accepted, and what is said of the others."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_ee.checkpoint.hf_directory import INDEX, SINGLE, HFDirectory
from megatron_ee.errors import CheckpointError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def sharded(directory: Path) -> dict[str, str]:
    """Two shards with three tensors; returns the index's weight map."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4)}, directory / FIRST)
    save_file({"c": torch.ones(5, dtype=torch.bfloat16)}, directory / SECOND)
    placed = {"a": FIRST, "b": FIRST, "c": SECOND}
    write_index(directory, placed)
    return placed


def write_index(directory: Path, placed: object) -> None:
    """An index file with this weight map."""
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))


def refusal(directory: Path) -> str:
    """The one line that ``open`` ends with."""
    with pytest.raises(CheckpointError) as caught:
        HFDirectory.open(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_single_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / SINGLE)
    opened = HFDirectory.open(str(tmp_path))
    assert opened.files == (tmp_path / SINGLE,)
    assert set(opened.tensors) == {"a", "b"}


def test_shards_and_tensors_that_the_index_does_not_mention(tmp_path: Path) -> None:
    sharded(tmp_path)
    write_index(tmp_path, {"a": FIRST, "c": SECOND})
    opened = HFDirectory.open(tmp_path)
    assert opened.files == (tmp_path / FIRST, tmp_path / SECOND)
    assert {name: entry.path.name for name, entry in opened.tensors.items()} == {"a": FIRST, "b": FIRST, "c": SECOND}


def test_nothing_to_read(tmp_path: Path) -> None:
    assert "no such directory" in refusal(tmp_path / "none")
    (tmp_path / "file").touch()
    assert "is a file" in refusal(tmp_path / "file")
    assert f"neither {SINGLE} nor {INDEX} found" in refusal(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / FIRST)
    assert "add the index" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt"])
def test_pickle_only_names_the_way_out(tmp_path: Path, name: str) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / name)
    assert f"only as pickle ({name})" in refusal(tmp_path)
    assert "convert it to safetensors" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret.safetensors", "leads outside the model directory"),
        ("x/../../secret.safetensors", "leads outside the model directory"),
        ("/etc/secret.safetensors", "leads outside the model directory"),
        ("..\\secret.safetensors", "is not a file name"),
        ("a\0.safetensors", "is not a file name"),
        (7, "is not a file name"),
        ("model.bin", "is not a safetensors file"),
        ("none.safetensors", "'none.safetensors' is missing"),
        ("n" * 5000 + ".safetensors", "cannot read: File name too long"),
    ],
)
def test_index_with_a_bad_file_name(tmp_path: Path, name: object, message: str) -> None:
    directory = tmp_path / "model"
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    write_index(directory, sharded(directory) | {"a": name})
    assert message in refusal(directory)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_index_without_a_weight_map(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    assert "expected an object with a weight_map" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["", "{", '{"weight_map": {"a": "x", "a": "y"}}'])
def test_index_that_is_not_json(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    assert refusal(tmp_path).startswith(f"{tmp_path / INDEX}: not valid JSON")


def test_shards_that_contradict_the_index(tmp_path: Path) -> None:
    placed = sharded(tmp_path)
    write_index(tmp_path, placed | {"b": SECOND})
    assert f"tensor 'b' is in {FIRST}, not in {SECOND}" in refusal(tmp_path)
    save_file({"c": torch.ones(5), "a": torch.ones(2, 3)}, tmp_path / SECOND)
    write_index(tmp_path, {"b": FIRST, "c": SECOND})
    assert f"tensor 'a' is in both {FIRST} and {SECOND}, and the index names neither" in refusal(tmp_path)


@pytest.mark.parametrize("place", [FIRST, SECOND])
def test_a_tensor_of_two_files_is_the_one_that_the_index_names(place: str, tmp_path: Path) -> None:
    placed = sharded(tmp_path)
    save_file({"c": torch.ones(5), "a": torch.zeros(7)}, tmp_path / SECOND)
    write_index(tmp_path, placed | {"a": place})
    opened = HFDirectory.open(tmp_path)
    assert opened.tensors["a"].path == tmp_path / place
    assert opened.tensors["a"].shape == {FIRST: (2, 3), SECOND: (7,)}[place]


def test_what_the_index_lists_and_no_file_holds(tmp_path: Path) -> None:
    write_index(tmp_path, sharded(tmp_path) | {"d": SECOND})
    opened = HFDirectory.open(tmp_path)
    assert opened.absent == {"d": tmp_path / SECOND} and set(opened.tensors) == {"a", "b", "c"}


def test_other_entries_and_orders_of_an_index(tmp_path: Path) -> None:
    """Shards in folders and of names that sort otherwise than they were written, and an index that says more."""
    files = ("z.safetensors", "part/b.safetensors", "model-10-of-9.safetensors")
    (tmp_path / "part").mkdir()
    for number, name in enumerate(files):
        save_file({str(number): torch.ones(number + 1)}, tmp_path / name)
    placed = {str(number): name for number, name in enumerate(files)}
    more = {"total_size": "24", "mergekit_version": "0.0.4", "parameters": None}
    for content in ({"metadata": more, "weight_map": placed, "extra": []}, {"metadata": None, "weight_map": placed}):
        (tmp_path / INDEX).write_text(json.dumps(content))
        opened = HFDirectory.open(tmp_path)
        assert {name: entry.path for name, entry in opened.tensors.items()} == {
            name: tmp_path / file for name, file in placed.items()
        }


def test_missing_and_truncated_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    os.truncate(tmp_path / SECOND, (tmp_path / SECOND).stat().st_size - 1)
    assert f"{tmp_path / SECOND}: truncated" in refusal(tmp_path)
    (tmp_path / SECOND).unlink()
    assert f"'{SECOND}' is missing" in refusal(tmp_path)


def test_symbolic_links_stay_inside(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    sharded(directory)
    (directory / SECOND).rename(directory / "real")
    (directory / SECOND).symlink_to("real")
    assert set(HFDirectory.open(directory).tensors) == {"a", "b", "c"}
    (directory / "real").rename(tmp_path / "real")
    (directory / SECOND).unlink()
    (directory / SECOND).symlink_to("../real")
    assert "leads outside the model directory" in refusal(directory)
    (directory / SECOND).unlink()
    (directory / SECOND).symlink_to(SECOND)
    assert f"'{SECOND}' is missing" in refusal(directory)


@pytest.mark.parametrize("name", [SINGLE, INDEX])
def test_the_first_file_is_confined_too(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (tmp_path / "outside").write_text("{}")
    (directory / name).symlink_to(tmp_path / "outside")
    assert "leads outside the model directory" in refusal(directory)


def hub_cache(cache: Path) -> Path:
    """A snapshot as the hub's client lays it out: links into ``blobs``."""
    repository = cache / "models--org--name"
    snapshot = repository / "snapshots" / "0123abc"
    sharded(snapshot)
    (repository / "blobs").mkdir()
    for number, name in enumerate((FIRST, SECOND, INDEX)):
        (snapshot / name).rename(repository / "blobs" / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_hub_cache_links_are_followed_inside_their_repository(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    assert set(HFDirectory.open(snapshot).tensors) == {"a", "b", "c"}
    (tmp_path / "link").symlink_to(snapshot)
    assert set(HFDirectory.open(tmp_path / "link").tensors) == {"a", "b", "c"}

    (snapshot / SECOND).unlink()
    save_file({"c": torch.ones(5)}, tmp_path / "outside.safetensors")
    (snapshot / SECOND).symlink_to("../../../outside.safetensors")
    assert "leads outside the model directory" in refusal(snapshot)


def test_a_missing_blob_is_named(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    (tmp_path / "models--org--name" / "blobs" / "0").unlink()
    assert f"'{FIRST}' is missing" in refusal(snapshot)
