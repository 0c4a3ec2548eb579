"""Streaming conversion: killed anywhere it goes on, what it keeps is whole, and it takes little memory."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ee.checkpoint.contents import Contents
from megatron_ee.checkpoint.failpoints import NAMES, VARIABLE
from megatron_ee.checkpoint.outputs import OutputDirectory, OutputFile, whole_part
from megatron_ee.checkpoint.safetensors_file import PIECE, read_header
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.checkpoint.tensors import StoredTensor
from megatron_ee.conversion.copy import write_output
from megatron_ee.conversion.formats import open_contents
from megatron_ee.conversion.to_hf import to_hf
from megatron_ee.conversion.to_parallel import to_parallel
from megatron_ee.errors import CheckpointError, ConfigError
from megatron_ee.testing.ranks import Ranks, run_ranks

SMALL = 100_000  # bytes per file: several of them


@pytest.fixture
def model(saved_model: Callable[..., tuple[Path, Any]], tmp_path: Path) -> Path:
    """A model of the test's own, which it may damage."""
    path = tmp_path / "model"
    shutil.copytree(saved_model("llama2", shard="200KB")[0], path)
    return path


def convert(source: str, target: str, limit: int = 0) -> list[str]:
    """In a process of its own: to a parallel checkpoint of small files; the lines it reports."""
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    lines: list[str] = []
    contents = open_contents(Path(source))
    write_output(to_parallel(contents, tensor=2, shard=SMALL), Path(target), report=lines.append)
    return lines


def killed(source: Path, target: Path, failpoint: str) -> bool:
    """Convert in a process that kills itself at ``failpoint``; whether it did."""
    with Ranks(1, _convert_until, str(source), str(target), failpoint) as ranks:
        ranks.processes[0].join(60)
        return ranks.processes[0].exitcode == -signal.SIGKILL


def _convert_until(source: str, target: str, failpoint: str) -> None:
    os.environ[VARIABLE] = failpoint
    convert(source, target)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


POINTS = [name for name in NAMES if name.startswith("convert.")]


@pytest.mark.parametrize("failpoint", [*POINTS, "convert.file:40", "convert.file-done:3"])
def test_killed_anywhere_it_goes_on(failpoint: str, model: Path, tmp_path: Path) -> None:
    target, whole = tmp_path / "parallel", tmp_path / "whole"
    convert(str(model), str(whole))
    assert killed(model, target, failpoint)
    assert not target.exists()
    finished = len(list((tmp_path / "parallel.converting" / ".progress").glob("*.json")))
    lines = convert(str(model), str(target))
    assert len(lines) == finished
    assert {n for n, v in content(target).items() if content(whole)[n] != v} == set()
    assert not (tmp_path / "parallel.converting").exists()
    if failpoint == "convert.finish":
        assert finished == len(list(target.glob("*.safetensors"))) > 3


def test_kept_files_of_an_interrupted_conversion_are_checked(model: Path, tmp_path: Path) -> None:
    """A flipped bit, a truncated file, another source: written anew; the rest is kept."""
    target, whole = tmp_path / "parallel", tmp_path / "whole"
    convert(str(model), str(whole))
    assert killed(model, target, "convert.finish")
    files = sorted((tmp_path / "parallel.converting").glob("*.safetensors"))
    data = bytearray(files[0].read_bytes())
    data[-5] ^= 4
    files[0].write_bytes(data)
    files[1].write_bytes(files[1].read_bytes()[:-1])
    name = hashlib.sha256(files[2].name.encode()).hexdigest()[:16]
    (tmp_path / "parallel.converting" / ".progress" / f"{name}.json").write_text("{")
    lines = convert(str(model), str(target))
    assert len(lines) == len(files) - 3
    assert {n for n, v in content(target).items() if content(whole)[n] != v} == set()


def test_a_source_that_changed_is_read_again(model: Path, tmp_path: Path) -> None:
    assert killed(model, tmp_path / "parallel", "convert.finish")
    changed = next(iter(sorted(model.glob("*.safetensors"))))
    entry = next(iter(read_header(changed).values()))
    data = bytearray(changed.read_bytes())
    data[entry.offset] ^= 1
    changed.write_bytes(data)
    lines = convert(str(model), str(tmp_path / "parallel"))
    assert 0 < len(lines) < len(list((tmp_path / "parallel").glob("*.safetensors")))
    write_output(to_hf(open_contents(tmp_path / "parallel")), tmp_path / "back")
    assert open_model(tmp_path / "back").digest() == open_model(model).digest()


def test_a_full_disk_names_the_file_and_loses_nothing(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "parallel"
    with pytest.raises(AssertionError, match=r"shard-\S+: cannot write: File too large; free some space"):
        run_ranks(1, convert, str(model), str(target), 60_000)
    assert not target.exists()
    convert(str(model), str(target))
    assert open_model(target).digest() == open_model(model).digest()


def test_too_small_a_disk_is_refused_first(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    with pytest.raises(CheckpointError, match=r"needs 0\.1 GB, but 0\.0 GB are free; free some space"):
        convert(str(model), str(tmp_path / "parallel"))
    assert not list(tmp_path.glob("parallel*"))


def test_nothing_of_an_interrupted_command_gets_into_another(model: Path, tmp_path: Path) -> None:
    """The same output, other options: neither weights, nor exits, nor records of the first command are left."""
    target = tmp_path / "parallel"
    work = tmp_path / "parallel.converting"
    assert killed(model, target, "convert.rename")
    (work / "adapter").mkdir()
    (work / "adapter" / "exits.safetensors").write_bytes(b"of a command that added exits")
    (work / ".progress").mkdir()
    (work / ".progress" / "0123456789abcdef.json").write_text("{}")
    write_output(to_hf(open_contents(model)), target)
    assert {path.name for path in target.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    assert not work.exists()


def test_two_conversions_cannot_write_to_one_directory(model: Path, tmp_path: Path) -> None:
    (tmp_path / "parallel.converting").mkdir()
    (tmp_path / "parallel.converting" / "someone's file").touch()
    with pytest.raises(CheckpointError, match=r"converting: exists already and is not from an interrupted conversion"):
        convert(str(model), str(tmp_path / "parallel"))
    assert (tmp_path / "parallel.converting" / "someone's file").is_file()
    with (tmp_path / "parallel.converting" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another conversion is writing here"):
            convert(str(model), str(tmp_path / "parallel"))
    convert(str(model), str(tmp_path / "parallel"))
    with pytest.raises(ConfigError, match=r"parallel exists already; nothing is overwritten"):
        convert(str(model), str(tmp_path / "parallel"))


def test_a_damaged_source_stops_all_files(model: Path, tmp_path: Path) -> None:
    convert(str(model), str(tmp_path / "parallel"))
    shard = sorted((tmp_path / "parallel").glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: damaged between bytes"):
        write_output(to_hf(open_contents(tmp_path / "parallel"), shard=SMALL), tmp_path / "back")
    assert not (tmp_path / "back").exists()
    unverified = open_contents(tmp_path / "parallel", verify=False)
    write_output(to_hf(unverified, shard=SMALL), tmp_path / "back")
    assert open_model(tmp_path / "back").digest() != open_model(model).digest()


def test_bytes_are_counted(model: Path, tmp_path: Path) -> None:
    output = to_parallel(open_contents(model), tensor=2, shard=SMALL)
    counted: list[int] = []
    write_output(output, tmp_path / "a", advance=counted.append)
    assert sum(counted) == output.nbytes == sum(tensor.nbytes for tensor in open_model(model).weights.values())


def test_slabs_cover_every_shape() -> None:
    values = torch.arange(60).view(3, 4, 5)

    def read(out: torch.Tensor, offset: Any) -> None:
        out.copy_(values[tuple(slice(o, o + n) for o, n in zip(offset, out.shape, strict=True))])

    tensor = StoredTensor(values.dtype, tuple(values.shape), read, ())
    assert torch.equal(torch.cat([slab.clone() for slab in tensor.slabs()]), values)
    box = torch.cat([slab.clone() for slab in tensor.slabs((1, 2, 0), (2, 2, 5))])
    assert torch.equal(box, values[1:, 2:])
    scalar = StoredTensor(torch.float32, (), lambda out, offset: out.fill_(2.5) and None, ())
    assert [slab.tolist() for slab in scalar.slabs()] == [[2.5]]
    empty = StoredTensor(torch.float32, (0, 4), read, ())
    assert list(empty.slabs()) == []


PEAK = """
import sys
from pathlib import Path
from megatron_ee.conversion.copy import write_output
from megatron_ee.conversion.formats import open_contents
from megatron_ee.conversion.to_hf import to_hf
from megatron_ee.conversion.to_parallel import to_parallel
from megatron_ee.platform import peak_memory
source, small, target = map(Path, sys.argv[1:])
write_output(to_parallel(open_contents(small), tensor=2), target / "warm")
before = peak_memory()
write_output(to_parallel(open_contents(source), tensor=2, stages=[1, 2]), target / "parallel")
write_output(to_hf(open_contents(target / "parallel")), target / "back")
print(peak_memory() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_is_a_constant(model: Path, tmp_path: Path) -> None:
    """250 MB of weights, the largest tensor 66 MB: both ways take a few buffers."""
    source = tmp_path / "large"
    source.mkdir()
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 32_000, "num_hidden_layers": 3}
    (source / "config.json").write_text(json.dumps(config))
    write_output(OutputDirectory("", (OutputFile("model.safetensors", _zeros(source)),)), source / "weights")
    (source / "weights" / "model.safetensors").rename(source / "model.safetensors")
    (tmp_path / "out").mkdir()
    arguments = [sys.executable, "-c", PEAK, str(source), str(model), str(tmp_path / "out")]
    # What glibc would keep of freed buffers varies with the threads' timing: it gives buffers back at once here.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}
    result = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment)
    assert sum(path.stat().st_size for path in (tmp_path / "out" / "back").iterdir()) > 200e6
    assert int(result.stdout) < 10 * PIECE


def _zeros(directory: Path) -> tuple[Any, ...]:
    from megatron_ee.families.registry import read_architecture
    from megatron_ee.families.weights import expected_tensors

    def read(out: torch.Tensor, offset: Any) -> None:
        out.zero_()

    shapes = expected_tensors(read_architecture(directory))
    return tuple(whole_part(name, StoredTensor(torch.bfloat16, shape, read, ())) for name, shape in shapes.items())


def test_output_needs_a_backbone(model: Path) -> None:
    alone = Contents(model, "adapter", None)
    for writer in (to_hf, to_parallel):
        with pytest.raises(CheckpointError, match="holds exits but no backbone; give the model with --model"):
            writer(alone)
