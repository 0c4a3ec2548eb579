"""Hashes of files, tensors and backbones, and the cache of the latter."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_ee.checkpoint import safetensors_file
from megatron_ee.checkpoint.digest import backbone_digest, cache_directory, file_sha256
from megatron_ee.checkpoint.safetensors_file import read_header
from megatron_ee.checkpoint.tensors import StoredTensor, stored
from megatron_ee.errors import CheckpointError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("MEGATRON_EE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tensors() -> dict[str, torch.Tensor]:
    """A few tensors, one of them larger than the buffer that is hashed through."""
    generator = torch.Generator().manual_seed(0)
    large = torch.randint(0, 256, (safetensors_file.PIECE + 12345,), dtype=torch.uint8, generator=generator)
    return {"b": large, "a": torch.arange(6.0).view(2, 3), "c": torch.tensor(1.5, dtype=torch.bfloat16)}


def of_file(path: Path) -> dict[str, StoredTensor]:
    return {name: stored(entry) for name, entry in read_header(path).items()}


def one_file(directory: Path) -> dict[str, StoredTensor]:
    """All tensors in one file."""
    save_file(tensors(), directory / "model.safetensors")
    return of_file(directory / "model.safetensors")


def test_tensor_and_file(tmp_path: Path) -> None:
    entries = one_file(tmp_path)
    for name, tensor in tensors().items():
        assert entries[name].sha256() == hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()
    assert (
        file_sha256(tmp_path / "model.safetensors")
        == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    )
    with pytest.raises(CheckpointError, match="cannot read"):
        file_sha256(tmp_path / "none")


def test_backbone_digest_is_the_documented_one(tmp_path: Path) -> None:
    entries = one_file(tmp_path)
    lines = (
        f"a F32 2x3 {entries['a'].sha256()}\n"
        f"b U8 {entries['b'].nbytes} {entries['b'].sha256()}\n"
        f"c BF16 scalar {entries['c'].sha256()}\n"
    )
    assert backbone_digest(entries) == hashlib.sha256(lines.encode()).hexdigest()


def test_equal_for_one_file_and_many(tmp_path: Path) -> None:
    entries = {}
    for name, tensor in tensors().items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
        entries |= of_file(tmp_path / f"{name}.safetensors")
    hashed: list[int] = []
    assert backbone_digest(entries, advance=hashed.append) == backbone_digest(one_file(tmp_path))
    assert sum(hashed) == sum(entry.nbytes for entry in entries.values())


def test_sensitive_to_every_part(tmp_path: Path) -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.zeros(6)}
    variants = [
        base,
        {"a": torch.zeros(3, 2), "b": torch.zeros(6)},
        {"a": torch.zeros(2, 3), "c": torch.zeros(6)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(6, dtype=torch.int32)},
        {"a": torch.zeros(2, 3), "b": torch.tensor([0.0, 0, 0, 0, 0, -0.0])},
        {"a": torch.zeros(2, 3)},
    ]
    digests = set()
    for number, variant in enumerate(variants):
        save_file(variant, tmp_path / f"{number}.safetensors")
        digests.add(backbone_digest(of_file(tmp_path / f"{number}.safetensors")))
    assert len(digests) == len(variants)


def flip_keeping_time(path: Path) -> None:
    """Change the last byte without changing size or time."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_cached_by_path_size_and_time(tmp_path: Path, cache: Path) -> None:
    entries = one_file(tmp_path)
    first = backbone_digest(entries)
    assert len(list((cache / "backbone-digests").iterdir())) == 1
    flip_keeping_time(tmp_path / "model.safetensors")
    assert backbone_digest(entries) == first
    changed = backbone_digest(entries, fresh=True)
    assert changed != first
    assert backbone_digest(entries) == changed
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    flip_keeping_time(tmp_path / "model.safetensors")
    assert backbone_digest(entries) == first


def test_a_subset_has_its_own_place_in_the_cache(tmp_path: Path) -> None:
    entries = one_file(tmp_path)
    assert backbone_digest(entries) != backbone_digest({"a": entries["a"]})


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"digest": "x"}', b"\xff"])
def test_broken_cache_is_recomputed(tmp_path: Path, cache: Path, content: bytes) -> None:
    entries = one_file(tmp_path)
    first = backbone_digest(entries)
    (file,) = (cache / "backbone-digests").iterdir()
    file.write_bytes(content)
    assert backbone_digest(entries) == first
    assert json.loads(file.read_text())["digest"] == first


def test_unwritable_cache_is_done_without(tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file where the directory should be")
    entries = one_file(tmp_path)
    assert backbone_digest(entries) == backbone_digest(entries, fresh=True)


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_directory() == tmp_path / "cache"
    monkeypatch.delenv("MEGATRON_EE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "megatron_ee"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "megatron_ee"


def test_missing_and_truncated_files(tmp_path: Path) -> None:
    entries = one_file(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 3000)
    with pytest.raises(CheckpointError, match="truncated"):
        backbone_digest(entries)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot read: No such file"):
        backbone_digest(entries)


def test_file_that_changes_meanwhile(tmp_path: Path, cache: Path) -> None:
    entries = one_file(tmp_path)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        backbone_digest(entries, advance=lambda _: os.utime(tmp_path / "model.safetensors", ns=(5, 5)))
    assert not (cache / "backbone-digests").exists()
