"""Valid files with something changed at random: read as what they were, or refused in one line by our own error.

``MEGATRON_EE_FUZZ=20`` tries 20 times as many changes.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ee.checkpoint.adapter import DESCRIPTION, WEIGHTS, Adapter, open_adapter
from megatron_ee.checkpoint.hf_directory import INDEX, SINGLE, HFDirectory
from megatron_ee.checkpoint.manifest import MANIFEST, encode
from megatron_ee.checkpoint.safetensors_file import read_header, read_metadata
from megatron_ee.checkpoint.saved_model import SavedModel, open_model
from megatron_ee.checkpoint.store import Checkpoint, open_checkpoint
from megatron_ee.checkpoint.tensors import StoredTensor, stored
from megatron_ee.errors import CheckpointError
from megatron_ee.families.registry import read_architecture
from megatron_ee.testing.hostile import SHARD, SHARDS, make_adapter, make_checkpoint, make_model, make_parallel

TIMES = int(os.environ.get("MEGATRON_EE_FUZZ", "1"))


def fuzz(examples: int) -> settings:
    """The same changes in every run."""
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        derandomize=True, database=None, deadline=None, max_examples=examples * TIMES, suppress_health_check=health
    )


# ---------------------------------------------------------------------------------------------------- what is changed

ODD = st.sampled_from(
    [
        *(
            None,
            True,
            False,
            0,
            1,
            -1,
            2,
            3,
            8,
            2**31,
            2**62,
            2**63,
            2**64,
            10**30,
            -(2**63),
            0.0,
            1.0,
            -0.5,
            1e30,
            1e308,
        ),
        *(
            "",
            "a",
            ".",
            "..",
            "/",
            "../x.safetensors",
            "\0",
            "\n",
            "\x1b[31m",
            "\ud800",
            "\u202e",
            "F32",
            "BF16",
            "mlp",
        ),
        *([], [0], [1, 1], [2, 4], [-1], [[]], ["a"], {}, {"a": 1}, {"layer": 1}, {"dtype": "F32"}, [None], "ab" * 32),
    ]
)
JUNK = st.binary(min_size=1, max_size=12) | st.sampled_from(
    [
        b"null",
        b"-1",
        b"[]",
        b"{}",
        b'"',
        b"NaN",
        b"1e999",
        b"9" * 30,
        b"true",
        b",",
        b"}",
        b"]",
        b"\xff",
        b"\x00",
        b"\\u0000",
    ]
)


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Overwritten, cut, extended, with parts doubled or taken out."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 40)))
        kind = draw(st.sampled_from(["set", "flip", "insert", "delete", "double", "truncate", "append", "move"]))
        if kind == "set":
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "insert":
            data[at:at] = draw(JUNK)
        elif kind == "delete":
            del data[at:end]
        elif kind == "double":
            data[at:at] = data[at:end]
        elif kind == "truncate":
            del data[at:]
        elif kind == "append":
            data += draw(JUNK)
        elif kind == "move":
            part = bytes(data[at:end])
            del data[at:end]
            to = draw(st.integers(0, len(data)))
            data[to:to] = part
    return bytes(data)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value within a JSON value, itself included."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


@st.composite
def changed_json(draw: st.DrawFn, text: str) -> Any:
    """With values replaced, by odd ones or by others of it, taken out, added or given other names."""
    content = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        ways = [path for path in places(content) if path]
        if not ways:
            break
        *way, key = draw(st.sampled_from(ways))
        parent = at(content, tuple(way))
        kind = draw(st.sampled_from(["odd", "odd", "nudge", "other", "delete", "rename", "double"]))
        if kind == "nudge" and type(parent[key]) is int:
            parent[key] += draw(st.sampled_from([-1, 1, 2, 2**32]))
        elif kind == "other":
            parent[key] = copy.deepcopy(at(content, draw(st.sampled_from(ways))))
        elif kind == "delete":
            del parent[key]
        elif kind == "rename" and isinstance(parent, dict):
            parent[draw(st.text(max_size=4))] = parent.pop(key)
        elif kind == "double" and isinstance(parent, list):
            parent.append(parent[key])
        else:
            parent[key] = copy.deepcopy(draw(ODD))
    return content


# ------------------------------------------------------------------------------------------------ what may come of it


@contextlib.contextmanager
def content_of(path: Path, content: bytes) -> Iterator[None]:
    """A file holds something else for a while."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def attempt(read: Callable[[], Any]) -> Any:
    """What ``read`` gives, or None where it refuses as it should; any other exception fails the test."""
    try:
        return read()
    except CheckpointError as error:
        assert str(error).isprintable() and len(str(error)) < 2500
        return None


def values(tensors: dict[str, StoredTensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], str]]:
    """Name to dtype, shape and digest of the bytes; all of them are read."""
    return {name: (each.dtype, each.shape, each.sha256()) for name, each in tensors.items()}


def read_model(directory: Path) -> tuple[SavedModel, Any]:
    model = open_model(directory)
    return model, values(model.weights)


def read_checkpoint(directory: Path) -> tuple[Checkpoint, Any]:
    checkpoint = open_checkpoint(directory)
    return checkpoint, values(checkpoint.tensors())


def read_adapter(directory: Path) -> tuple[Adapter, Any]:
    adapter = open_adapter(directory)
    return adapter, values(adapter.weights)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Valid ones of each kind."""
    root = tmp_path_factory.mktemp("valid")
    return {
        "model": make_model(root / "model"),
        "single": make_model(root / "single", sharded=False),
        "checkpoint": make_checkpoint(root / "checkpoint"),
        "parallel": make_parallel(root / "parallel"),
        "adapter": make_adapter(root / "adapter"),
    }


# -------------------------------------------------------------------------------------------------------------- tests


@fuzz(250)
@given(st.data())
def test_one_safetensors_file(directories: dict[str, Path], data: st.DataObject) -> None:
    path = directories["single"] / SINGLE
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    # Mostly the header: what is done to the tensors' bytes is up to who wrote them.
    if data.draw(st.booleans()):
        header = json.dumps(data.draw(changed_json(whole[8:start].decode()))).encode()
        content = len(header).to_bytes(8, "little") + header + whole[start:]
    else:
        content = data.draw(changed_bytes(whole[: start + 40])) + whole[start + 40 :]
    with content_of(path, content):
        tensors = attempt(lambda: values({name: stored(entry) for name, entry in read_header(path).items()}))
        metadata = attempt(lambda: read_metadata(path))
        attempt(lambda: HFDirectory.open(path.parent))
    if tensors is not None:
        assert metadata is not None and all(name.isprintable() for name in tensors)


@fuzz(200)
@given(st.data())
def test_configuration(directories: dict[str, Path], data: st.DataObject) -> None:
    path = directories["model"] / "config.json"
    change = data.draw(changed_json(path.read_text()) | changed_bytes(path.read_bytes()))
    with content_of(path, change if isinstance(change, bytes) else json.dumps(change).encode()):
        architecture = attempt(lambda: read_architecture(path.parent))
        found = attempt(lambda: read_model(path.parent))
    assert found is None or found[0].architecture == architecture


@fuzz(120)
@given(st.data(), st.sampled_from([INDEX, *SHARDS]))
def test_model(directories: dict[str, Path], data: st.DataObject, name: str) -> None:
    directory = directories["model"]
    expected = read_model(directory)[1]
    path = directory / name
    text = path.read_bytes()
    change = data.draw(
        changed_json(text.decode()) if name == INDEX and data.draw(st.booleans()) else changed_bytes(text)
    )
    with content_of(path, change if isinstance(change, bytes) else json.dumps(change).encode()):
        found = attempt(lambda: read_model(directory))
    if found is not None:
        assert {key: each[:2] for key, each in found[1].items()} == {key: each[:2] for key, each in expected.items()}
        assert name != INDEX or found[1] == expected


@fuzz(200)
@given(st.data(), st.sampled_from([MANIFEST, SHARD]))
def test_checkpoint(directories: dict[str, Path], data: st.DataObject, name: str) -> None:
    unchanged_or_refused(directories["checkpoint"], name, data, read_checkpoint, lambda found: found.metadata)


@pytest.mark.slow
@fuzz(100)
@given(st.data(), st.sampled_from([MANIFEST, SHARD, "config.json"]))
def test_parallel_checkpoint(directories: dict[str, Path], data: st.DataObject, name: str) -> None:
    unchanged_or_refused(directories["parallel"], name, data, read_model, lambda found: found.architecture)


@fuzz(200)
@given(st.data(), st.sampled_from([DESCRIPTION, DESCRIPTION, WEIGHTS]))
def test_adapter(directories: dict[str, Path], data: st.DataObject, name: str) -> None:
    def kinds(found: Adapter) -> list[Any]:
        return [(each.layer, each.body, each.head, each.head == "low_rank" and each.rank) for each in found.exits]

    unchanged_or_refused(directories["adapter"], name, data, read_adapter, kinds)


def unchanged_or_refused(
    directory: Path,
    name: str,
    data: st.DataObject,
    read: Callable[[Path], tuple[Any, Any]],
    known: Callable[[Any], Any],
) -> None:
    """Where checksums protect, a change is seen, or none of what they protect."""
    before, expected = read(directory)
    path = directory / name
    text = path.read_bytes()
    splice = name.endswith(".json") and data.draw(st.booleans())
    change = data.draw(changed_json(text.decode()) if splice else changed_bytes(text))
    with content_of(path, change if isinstance(change, bytes) else json.dumps(change).encode()):
        found = attempt(lambda: read(directory))
    if found is not None:
        assert found[1] == expected
        assert known(found[0]) == known(before)


@pytest.mark.slow
@fuzz(300)
@given(st.data(), st.sampled_from(["checkpoint", "parallel"]))
def test_manifest_with_a_checksum_that_fits(directories: dict[str, Path], data: st.DataObject, kind: str) -> None:
    path = directories[kind] / MANIFEST
    content = data.draw(changed_json(path.read_text()))
    if isinstance(content, dict):
        content.pop("sha256", None)
        content["sha256"] = hashlib.sha256(encode(content, path)).hexdigest()
    with content_of(path, json.dumps(content).encode()):
        found = attempt(lambda: read_checkpoint(path.parent))
        attempt(lambda: read_model(path.parent))
        attempt(lambda: read_adapter(path.parent))
    if found is not None:
        assert isinstance(found[0].metadata, dict) and all(key.isprintable() for key in found[0].keys())  # noqa: SIM118
