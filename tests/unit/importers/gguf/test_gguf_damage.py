"""GGUF files that are damaged, hostile or not supported: one line, and nothing is written."""

from __future__ import annotations

import importlib.util
import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from megatron_ee.commands.main import main
from megatron_ee.errors import CheckpointError
from megatron_ee.importers.gguf.header import read_header
from megatron_ee.testing.gguf_files import write_model
from megatron_ee.testing.models import tiny_model

HUGE = 2**60


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama2", num_hidden_layers=1)


@pytest.fixture(scope="module")
def whole(model: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file without faults."""
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    write_model(path, model, "llama")
    return path.read_bytes()


def refused(path: Path, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Converting ``path`` fails with one line that has ``named``, and leaves nothing."""
    output = path.parent / "output"
    assert main(["convert", "--input", str(path), "--output", str(output), "--to", "hf"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and str(path) in lines[0] and named in lines[0], lines
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def header(tensors: int = 0, values: int = 0, body: bytes = b"", *, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + body


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def entry(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


ARRAY, STRING, UINT8, UINT32 = 9, 8, 0, 4
FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a GGUF file"),
    "truncated": (header()[:20], "truncated or damaged: a number needs 8 bytes at byte 16, but the file has 20 bytes"),
    "magic": (b"GGML" + bytes(60), "is not a GGUF file"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version": (header(version=1), "is GGUF version 1"),
    "many tensors": (header(tensors=HUGE), f"{HUGE} tensors"),
    "many values": (header(values=HUGE), f"{HUGE} values"),
    "long key": (header(values=1, body=struct.pack("<Q", HUGE) + bytes(40)), f"needs {HUGE} bytes"),
    "many items": (
        header(values=1, body=text(b"key") + struct.pack("<IIQ", ARRAY, UINT8, HUGE) + bytes(40)),
        f"key 'key' claims {HUGE} values",
    ),
    "many texts": (
        header(values=1, body=text(b"key") + struct.pack("<IIQ", ARRAY, STRING, 2**20) + bytes(40)),
        "truncated or damaged: key 'key' needs",
    ),
    "nested": (
        header(values=1, body=text(b"key") + struct.pack("<IIQ", ARRAY, ARRAY, 1) + bytes(40)),
        "is a list of the type 9",
    ),
    "type of a value": (header(values=1, body=text(b"key") + struct.pack("<I", 77)), "unknown type 77"),
    "not UTF-8": (header(values=1, body=text(b"\xff\xfe") + struct.pack("<II", UINT32, 1)), "is not UTF-8"),
    "twice": (header(values=2, body=(text(b"key") + struct.pack("<II", UINT32, 1)) * 2), "'key' appears twice"),
    "alignment": (
        header(values=1, body=text(b"general.alignment") + struct.pack("<II", UINT32, 3)),
        "general.alignment must be a power of two, not 3",
    ),
    "part": (header(values=1, body=text(b"split.count") + struct.pack("<II", UINT32, 4)), "split.no must be a number"),
    "dimensions": (header(tensors=1, body=entry(b"w", (2,) * 9, 0, 0)), "'w' has 9 dimensions"),
    "absurd shape": (header(tensors=1, body=entry(b"w", (2**62, 2**62), 0, 0)), "'w': truncated or damaged"),
    "no columns": (header(tensors=1, body=entry(b"w", (0, 4), 0, 0)), "shape [4, 0] is impossible"),
    "half a block": (header(tensors=1, body=entry(b"w", (33, 4), 3, 0)), "shape [4, 33] is impossible for Q4_1"),
    "outside": (header(tensors=1, body=entry(b"w", (2,), 0, 2**40) + bytes(99)), f"at byte {2**40 + 64}"),
    "far outside": (header(tensors=1, body=entry(b"w", (2,), 0, 2**64 - 32) + bytes(99)), "'w': truncated or damaged"),
    "unknown type": (header(tensors=1, body=entry(b"w", (2,), 999, 0) + bytes(99)), "has the type 999"),
    "same name": (header(tensors=2, body=entry(b"w", (2,), 0, 0) * 2 + bytes(99)), "'w' appears twice"),
    "no architecture": (header(), "architecture None is not supported"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_header(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, named = FAULTS[name]
    (tmp_path / "model.gguf").write_bytes(content)
    refused(tmp_path / "model.gguf", named, capsys)


def test_a_truncated_file(whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.gguf"
    for size in (len(whole) - 1, len(whole) // 2):
        path.write_bytes(whole[:size])
        refused(path, "truncated", capsys)
    for size in range(0, 6000, 23):  # anywhere in the header
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_header(path)


def test_random_bytes_in_the_header(whole: bytes, tmp_path: Path) -> None:
    """Either an error of one kind, or a header."""
    random, path = np.random.default_rng(0), tmp_path / "model.gguf"
    for _ in range(300):
        content = bytearray(whole[:6000] + bytes(len(whole) - 6000))
        for place in random.integers(4, 6000, 3):
            content[place] = random.integers(0, 256)
        path.write_bytes(content)
        try:
            read_header(path)
        except CheckpointError as error:
            assert "\n" not in str(error) and str(path) in str(error)


def test_a_pipe_is_not_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    refused(tmp_path / "model.gguf", "give a checkpoint's directory", capsys)


def renamed(model: Any, path: Path, old: str, new: str) -> None:
    """Write the model with other bytes for a tensor's name."""
    write_model(path, model, "llama")
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"block_count": None}, "llama: block_count is missing"),
    "wrong type": ({"embedding_length": "large"}, "embedding_length must be a positive whole number, not 'large'"),
    "no number": ({"attention__layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon must be a positive"),
    "many layers": ({"block_count": 2**31 - 1}, "block_count 2147483647 is beyond any model"),
    "more layers": ({"block_count": 2}, "tensor 'blk.1.attn_norm.weight' is missing"),
    "unknown key": ({"attention__scale": 0.5}, "attention.scale 0.5 is not supported"),
    "experts": ({"expert_count": 8}, "expert_count 8 is not supported"),
    "by layer": ({"attention__head_count_kv": [4, 2]}, "attention.head_count_kv differs by layer"),
    "half a head": ({"rope__dimension_count": 8}, "rope.dimension_count 8 is not the size of a head, 16"),
    "values": ({"attention__value_length": 32}, "attention.value_length differs"),
    "scaling": ({"rope__scaling__type": "longrope"}, "rope.scaling.type 'longrope' is not supported"),
    "factor": ({"rope__scaling__type": "linear"}, "rope.scale_linear must be a positive number"),
    "heads": ({"attention__head_count_kv": 3}, "not a multiple of num_key_value_heads 3"),
    "width": (
        {"feed_forward_length": 96},
        "'blk.0.ffn_gate.weight' has shape [112, 64], but the metadata make it [96, 64]",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_metadata_that_do_not_fit(name: str, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, named = CHANGES[name]
    write_model(tmp_path / "model.gguf", model, "llama", **changes)
    refused(tmp_path / "model.gguf", named, capsys)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("blk.0.attn_v.weight", "blk.0.attn_x.weight", "unknown tensor 'blk.0.attn_x.weight'"),
        ("token_embd.weight", "token_embe.weight", "tensor 'token_embd.weight' is missing"),
    ],
)
def test_a_tensor_of_another_name(
    old: str, new: str, named: str, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    renamed(model, tmp_path / "model.gguf", old, new)
    refused(tmp_path / "model.gguf", named, capsys)


def test_an_architecture_that_is_not_supported(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "model.gguf", model, "qwen2")
    (tmp_path / "model.gguf").write_bytes((tmp_path / "model.gguf").read_bytes().replace(b"qwen2", b"mamba"))
    refused(tmp_path / "model.gguf", "architecture 'mamba' is not supported; supported: llama, ", capsys)


@pytest.mark.parametrize(
    "factors", [[1.0, 2.0], [0.0] * 8, [float("nan")] * 8, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]]
)
def test_other_factors_than_llama_3s(
    factors: list[float], model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = {"rope_freqs.weight": np.array(factors, np.float32)}
    write_model(tmp_path / "model.gguf", model, "llama", extra=extra)
    refused(tmp_path / "model.gguf", "rope_freqs.weight", capsys)


def test_a_type_that_the_package_cannot_dequantise(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "model.gguf", model, "llama", quantised=gguf.GGMLQuantizationType.F16)
    path = tmp_path / "model.gguf"
    content = path.read_bytes()
    place = content.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 2 * 8
    assert content[place : place + 4] == struct.pack("<I", gguf.GGMLQuantizationType.F16)
    path.write_bytes(content[:place] + struct.pack("<I", gguf.GGMLQuantizationType.I16) + content[place + 4 :])
    refused(path, "'blk.0.attn_q.weight' is stored as I16", capsys)


def test_the_file_changes_after_it_was_opened(
    whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written so far does not appear as the output."""
    from megatron_ee.commands import convert
    from megatron_ee.conversion import convert as conversion

    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    prepare = conversion.prepare

    def shorten(request: Any) -> Any:
        prepared = prepare(request)
        os.truncate(path, len(whole) // 2)
        return prepared

    monkeypatch.setattr(conversion, "prepare", shorten)
    arguments = convert.parser().parse_args(["--input", str(path), "--output", str(tmp_path / "output"), "--to", "hf"])
    with pytest.raises(CheckpointError, match="truncated"):
        convert.run(arguments)
    assert not (tmp_path / "output").exists()


def test_the_package_is_missing(
    whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else find(name, *more))
    (tmp_path / "model.gguf").write_bytes(whole)
    refused(tmp_path / "model.gguf", "pip install 'megatron-ee[gguf]'", capsys)
