"""Headers by the letter, boxes of tensors into any memory, and files that the safetensors library reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ee.checkpoint import safetensors_file
from megatron_ee.checkpoint.safetensors_file import (
    DTYPES,
    read_box,
    read_header,
    read_into,
    read_metadata,
    write_safetensors,
)
from megatron_ee.errors import CheckpointError


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file with this header (an object, or its bytes) and these tensor bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def same(left: Tensor, right: Tensor) -> bool:
    """Equal dtype, shape and bytes."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return bytes(safetensors_file.tensor_bytes(left.contiguous())) == bytes(
        safetensors_file.tensor_bytes(right.contiguous())
    )


BAD_HEADERS = {
    "array": ([1], "expected a JSON object"),
    "not json": (b"{nonsense", "not valid JSON"),
    "not utf-8": (b'{"\xff": 1}', "not valid JSON"),
    "nan": (b'{"a": NaN}', "NaN is not JSON"),
    "deep": (b"[" * 100_000, "not valid JSON"),
    "key twice": (
        b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}',
        "'a' appears twice",
    ),
    "no object": ({"a": 1}, "'a': expected dtype, shape and data_offsets"),
    "extra field": ({"a": entry() | {"x": 1}}, "expected dtype, shape and data_offsets"),
    "unknown dtype": ({"a": entry("F4")}, "dtype 'F4' is not known"),
    "dtype list": ({"a": entry(["F32"])}, "is not known"),
    "negative shape": ({"a": entry(shape=[-2])}, "not a list of whole numbers"),
    "float shape": ({"a": entry(shape=[2.0])}, "not a list of whole numbers"),
    "bool shape": ({"a": entry(shape=[True, 2])}, "not a list of whole numbers"),
    "huge shape": ({"a": entry(shape=[2**64])}, "not a list of whole numbers"),
    "product": ({"a": entry(shape=[2**40, 2**40])}, "does not fit the 8 bytes"),
    "too small": ({"a": entry(shape=[1])}, "does not fit the 8 bytes"),
    "backwards": ({"a": entry(offsets=[8, 0])}, "are not [begin, end]"),
    "three offsets": ({"a": entry(offsets=[0, 4, 8])}, "are not [begin, end]"),
    "negative offset": ({"a": entry(offsets=[-8, 0])}, "are not [begin, end]"),
    "overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, "'b' overlaps another tensor"),
    "hole": ({"a": entry(offsets=[4, 12])}, "'a' leaves unused bytes before it"),
    "beyond the end": ({"a": entry(shape=[4], offsets=[0, 16])}, "truncated: expected"),
    "trailing": ({"a": entry(shape=[1], offsets=[0, 4])}, "more than the header describes"),
    "unprintable name": ({"a\n": entry()}, "unprintable"),
    "surrogate name": (b'{"\\ud800":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}', "unprintable"),
    "metadata": ({"__metadata__": {"a": 1}, "a": entry()}, "must map strings to strings"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header_is_one_line_that_names_the_file(tmp_path: Path, case: str) -> None:
    header, message = BAD_HEADERS[case]
    path = raw_file(tmp_path / "bad.safetensors", header, bytes(12))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated: expected at least 8 bytes, found 0"),
        (b"1234567", "found 7"),
        ((2**63).to_bytes(8, "little"), "not a safetensors file"),
        ((1000).to_bytes(8, "little") + b"{}", "truncated: expected at least 1008 bytes, found 10"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_not_a_safetensors_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


def test_no_file_directory_or_pipe_is_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none: cannot read: No such file"):
        read_header(tmp_path / "none")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path / "pipe")


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=rf"truncated: expected .*found {length}\b"):
            read_header(path)


def test_file_that_shrinks_after_the_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": torch.ones(1000)})
    tensors = read_header(path)
    os.truncate(path, 2000)
    with pytest.raises(CheckpointError, match="truncated: expected .* found 2000"):
        read_into(tensors["a"], torch.empty(1000))


@settings(deadline=None)
@given(st.binary(max_size=200), st.binary(max_size=32), st.integers(0, 2**64 - 1) | st.none())
def test_fuzz_bytes(tmp_path_factory: pytest.TempPathFactory, header: bytes, data: bytes, length: int | None) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    accept_or_refuse(path)


_anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_fields = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(DTYPES)) | _anything,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | _anything,
        "data_offsets": st.lists(st.integers(-1, 24), min_size=2, max_size=2) | _anything,
    }
)


@pytest.mark.slow
@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from("abc") | st.text(max_size=3), _fields | _anything, max_size=3), st.integers(0, 24)
)
def test_fuzz_headers(tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], size: int) -> None:
    accept_or_refuse(raw_file(tmp_path_factory.getbasetemp() / "fuzz.safetensors", header, bytes(size)))


@settings(deadline=None)
@given(st.data())
def test_fuzz_valid_file_with_one_byte_changed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    write_safetensors(path, {"a": torch.ones(2, 2), "b": torch.zeros(3, dtype=torch.int8)}, {"k": "v"})
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    accept_or_refuse(path)


def accept_or_refuse(path: Path) -> None:
    """Either a CheckpointError, or entries that can be read and lie in the file."""
    try:
        tensors = read_header(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    for found in tensors.values():
        assert found.offset + found.nbytes <= path.stat().st_size
        out = torch.empty(found.shape, dtype=found.dtype)
        assert out.nbytes == found.nbytes
        read_into(found, out)


@pytest.fixture(params=[64, safetensors_file.PIECE], ids=["small buffer", "usual buffer"])
def buffer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run with a buffer of 64 bytes too, so that small tensors take many pieces."""
    monkeypatch.setattr(safetensors_file, "_scratch", threading.local())
    monkeypatch.setattr(safetensors_file, "PIECE", request.param)
    monkeypatch.setattr(safetensors_file, "SMALL_GAP", min(request.param // 4, safetensors_file.SMALL_GAP))
    return int(request.param)


DESTINATIONS = {
    "same": lambda shape: torch.empty(shape, dtype=torch.bfloat16),
    "other dtype": lambda shape: torch.empty(shape, dtype=torch.float32),
    "strided": lambda shape: torch.empty([n * 2 for n in shape], dtype=torch.bfloat16)[
        tuple(slice(None, None, 2) for _ in shape)
    ],
    "transposed": lambda shape: torch.empty(shape[::-1], dtype=torch.float64).permute(*reversed(range(len(shape)))),
    "parameter": lambda shape: torch.nn.Parameter(torch.empty(shape)),
}


def every_dtype() -> dict[str, Tensor]:
    """A small tensor of each dtype, a scalar and empty ones."""
    generator = torch.Generator().manual_seed(0)
    content = torch.randint(0, 2, (24 * 8,), generator=generator, dtype=torch.uint8)
    tensors = {name: content[: 24 * dtype.itemsize].view(dtype).view(2, 3, 4) for name, dtype in DTYPES.items()}
    return tensors | {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 7), "transposed": torch.rand(3, 5).T}


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    path, tensors = tmp_path / "ours.safetensors", every_dtype()
    written = write_safetensors(path, tensors, {"format": "pt"})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"} == read_metadata(path)
    assert written == read_header(path)
    assert os.listdir(tmp_path) == ["ours.safetensors"]


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "library.safetensors"
    tensors = {name: tensor.clone().contiguous() for name, tensor in every_dtype().items()}
    save_file(tensors, path, {"a": "b"})
    assert read_metadata(path) == {"a": "b"}
    entries = read_header(path)
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        out = torch.empty(tensor.shape, dtype=tensor.dtype)
        read_into(entries[name], out)
        assert same(out, tensor), name


def test_writes_pairs_parameters_and_views_and_reports_all_bytes(tmp_path: Path) -> None:
    path, seen = tmp_path / "a.safetensors", bytearray()
    base = torch.rand(6, 8)
    pairs = [("view", base[1:4, ::2]), ("parameter", torch.nn.Parameter(base)), ("bf16", base.bfloat16())]
    write_safetensors(path, iter(pairs), on_bytes=seen.extend)
    assert bytes(seen) == path.read_bytes()
    loaded = load_file(path)
    assert all(same(loaded[name], tensor.detach()) for name, tensor in pairs)


@pytest.mark.parametrize("kind", DESTINATIONS)
def test_writes_any_memory_layout(tmp_path: Path, kind: str, buffer: int) -> None:
    path, tensor = tmp_path / "a.safetensors", DESTINATIONS[kind]((5, 7, 6)).detach()
    tensor.copy_(torch.randn(5, 7, 6))
    write_safetensors(path, {"a": tensor})
    assert same(load_file(path)["a"], tensor)


def test_unusable_tensors_and_places_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="complex128 cannot be stored"):
        write_safetensors(path, {"a": torch.zeros(2, dtype=torch.complex128)})
    with pytest.raises(CheckpointError, match="'a' appears twice"):
        write_safetensors(path, [("a", torch.zeros(1)), ("a", torch.zeros(1))])
    with pytest.raises(CheckpointError, match="cannot be used"):
        write_safetensors(path, {"__metadata__": torch.zeros(1)})
    assert os.listdir(tmp_path) == []
    with pytest.raises(CheckpointError, match="cannot write: No such file"):
        write_safetensors(tmp_path / "no" / "a.safetensors", {"a": torch.zeros(1)})


FULL_DISK = """
import resource, signal, sys, torch
from megatron_ee.checkpoint.safetensors_file import write_safetensors
from megatron_ee.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_safetensors(sys.argv[1], {"a": torch.zeros(100_000)})
except CheckpointError as error:
    print(error)
"""


def test_no_space_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": torch.ones(3)})
    result = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True)
    assert result.stdout == f"{path}: cannot write: File too large; free some space or choose another place\n"
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert torch.equal(load_file(path)["a"], torch.ones(3))


@pytest.mark.parametrize("kind", DESTINATIONS)
def test_boxes_into_any_destination(tmp_path: Path, kind: str, buffer: int) -> None:
    source = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(1)).bfloat16()
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"before": torch.ones(3, dtype=torch.int8), "a": source})
    found = read_header(path)["a"]
    boxes = [
        ((0, 0, 0), (5, 7, 6)),
        ((1, 0, 0), (3, 7, 6)),
        ((0, 2, 0), (5, 4, 6)),
        ((1, 2, 3), (3, 4, 2)),
        ((4, 6, 5), (1, 1, 1)),
        ((2, 3, 0), (0, 4, 6)),
    ]
    for offset, extent in boxes:
        out = DESTINATIONS[kind](extent)
        read_box(found, out, offset)
        expected = source[tuple(slice(o, o + n) for o, n in zip(offset, extent, strict=True))]
        assert torch.equal(out.detach(), expected.to(out.dtype)), (offset, extent)


@pytest.mark.parametrize("width", [64, 40_000])
def test_rows_and_columns(tmp_path: Path, width: int) -> None:
    source = torch.randn(12, width)
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": source})
    found = read_header(path)["a"]
    rows, columns = torch.empty(5, width), torch.empty(12, width // 4)
    read_box(found, rows, (3, 0))
    read_box(found, columns, (0, width // 2))
    assert torch.equal(rows, source[3:8])
    assert torch.equal(columns, source[:, width // 2 : width // 2 + width // 4])


def test_large_inner_blocks_of_a_strided_destination(tmp_path: Path) -> None:
    source = torch.randn(4, 20_000)
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": source})
    out = torch.zeros(4, 2, 20_000)
    read_into(read_header(path)["a"], out[:, 1])
    assert torch.equal(out[:, 1], source)
    assert not out[:, 0].any()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": torch.zeros(4, 6), "i": torch.zeros(2, dtype=torch.int64)})
    found = read_header(path)
    with pytest.raises(CheckpointError, match=r"'a' has shape \[4, 6\], expected \[6, 4\]"):
        read_into(found["a"], torch.empty(6, 4))
    with pytest.raises(CheckpointError, match="not inside shape"):
        read_box(found["a"], torch.empty(2, 6), (3, 0))
    with pytest.raises(CheckpointError, match="not inside shape"):
        read_box(found["a"], torch.empty(2, 6), (0,))
    with pytest.raises(CheckpointError, match="'i' is I64 and cannot be read as torch.float32"):
        read_into(found["i"], torch.empty(2))


PEAK = """
import sys, torch
from megatron_ee.checkpoint.safetensors_file import read_box, read_header, read_into
from megatron_ee.platform import peak_memory
entry = read_header(sys.argv[1])["a"]
read_into(read_header(sys.argv[1])["small"], torch.empty(4, 4))
if sys.argv[2] == "columns":
    out = torch.zeros(entry.shape[0], entry.shape[1] // 4, dtype=torch.float32)
else:
    out = torch.zeros(entry.shape, dtype=getattr(torch, sys.argv[2]))
before = peak_memory()
read_box(entry, out, (0, 5)) if sys.argv[2] == "columns" else read_into(entry, out)
print(peak_memory() - before)
"""


@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("bfloat16", "float32")), "columns"]
)
def test_reading_takes_a_constant_over_the_tensor(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.ones(16_000, 2000, dtype=torch.bfloat16), "small": torch.ones(4, 4)}
    write_safetensors(path, tensors)  # 64 MB
    result = subprocess.run([sys.executable, "-c", PEAK, str(path), kind], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 12 * 2**20


WRITE_PEAK = """
import sys, torch
from megatron_ee.checkpoint.safetensors_file import write_safetensors
from megatron_ee.platform import peak_memory
tensors = {str(i): torch.ones(2000, 2000).T for i in range(8)}
write_safetensors(sys.argv[1], {"warm": torch.ones(2000, 2000).T})
before = peak_memory()
write_safetensors(sys.argv[1], tensors)
print(peak_memory() - before)
"""


def test_writing_takes_a_constant_over_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    result = subprocess.run([sys.executable, "-c", WRITE_PEAK, str(path)], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 12 * 2**20  # eight transposed tensors of 16 MB
