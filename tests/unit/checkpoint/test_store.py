"""Native checkpoints: any box of what was saved in any pieces, and no damage that goes unnoticed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from megatron_ee.checkpoint.atomic import LOCK_NAME, writer_lock
from megatron_ee.checkpoint.manifest import BLOCK, MANIFEST, encode, tiling_problem
from megatron_ee.checkpoint.resume import load_latest
from megatron_ee.checkpoint.store import Checkpoint, open_checkpoint
from megatron_ee.checkpoint.writing import Piece, whole, write_checkpoint
from megatron_ee.errors import CheckpointError, DamagedError

SHARD = "shard-0000.safetensors"


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """Tensors of several shapes and dtypes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "exits.4.w": torch.randn(6, 8, generator=generator),
        "exits.4.norm": torch.randn(8, generator=generator).bfloat16(),
        "optimizer.step": torch.tensor(17),
        "rng": torch.randint(0, 256, (5,), dtype=torch.uint8, generator=generator),
        "empty": torch.empty(0, 3),
    }


def save(directory: Path, content: dict[str, Tensor] | None = None, metadata: dict[str, Any] | None = None) -> Path:
    """A checkpoint by one process."""
    content = tensors() if content is None else content
    write_checkpoint(directory, [whole(key, tensor) for key, tensor in content.items()], metadata or {})
    return directory


def read_all(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    keys = checkpoint.keys()
    empty = {key: torch.empty(checkpoint.shape(key), dtype=checkpoint.dtype(key)) for key in keys}
    return {key: checkpoint.read(key, out) for key, out in empty.items()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Same keys, dtypes and values."""
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )


def test_round_trip(tmp_path: Path) -> None:
    metadata = {"step": 7, "config": {"lr": 1e-4, "exits": [1, 2.5, None, True]}, "text": "é\n"}
    checkpoint = open_checkpoint(save(tmp_path / "step-7", metadata=metadata))
    assert checkpoint.metadata == metadata
    assert checkpoint.keys() == sorted(tensors())
    assert "rng" in checkpoint and "other" not in checkpoint
    assert checkpoint.shape("exits.4.w") == (6, 8)
    assert checkpoint.dtype("exits.4.norm") == torch.bfloat16
    assert equal(read_all(checkpoint), tensors())
    assert sorted(os.listdir(tmp_path / "step-7")) == [MANIFEST, SHARD]
    assert equal(load_file(tmp_path / "step-7" / SHARD), tensors())


def test_without_any_tensor(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "step-0", {}, {"step": 0}))
    assert (checkpoint.keys(), checkpoint.metadata) == ([], {"step": 0})


def test_boxes_across_pieces(tmp_path: Path) -> None:
    source = torch.randn(7, 9)
    cuts = [((0, 0), (3, 9)), ((3, 0), (4, 2)), ((3, 2), (1, 7)), ((4, 2), (3, 7))]
    pieces = [Piece("w", (7, 9), o, source[o[0] : o[0] + n[0], o[1] : o[1] + n[1]]) for o, n in cuts]
    write_checkpoint(tmp_path / "step-1", pieces, {})
    checkpoint = open_checkpoint(tmp_path / "step-1")
    assert torch.equal(checkpoint.read("w", torch.empty(7, 9)), source)
    for first in range(7):
        for column in range(0, 9, 2):
            out = torch.empty(7 - first, 9 - column, dtype=torch.float64)
            assert torch.equal(checkpoint.read("w", out, (first, column)), source[first:, column:].double())
    out = torch.zeros(9, 7).T
    checkpoint.read("w", out[2:5, 1:8], (2, 1))
    assert torch.equal(out[2:5, 1:8], source[2:5, 1:8])
    assert out.count_nonzero() == 21


class Ranks:
    """Threads that stand for ranks: ``gather`` of each gives all ranks' objects."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=30)

    def gather(self, rank: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            self.slots[rank] = json.loads(json.dumps(value))  # nothing but plain data is passed
            self.barrier.wait()
            answers = list(self.slots)
            self.barrier.wait()
            return answers

        return gather

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What each rank's ``work`` returned or raised."""
        results: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            try:
                results[rank] = work(rank)
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def save_on(ranks: Ranks, directory: Path, pieces: list[list[Piece]]) -> list[Any]:
    """Save from several ranks; returns what each returned or raised."""
    return ranks.run(
        lambda rank: write_checkpoint(
            directory, pieces[rank], {"by": rank}, rank=rank, world_size=ranks.size, gather=ranks.gather(rank)
        )
    )


def test_several_ranks_write_one_checkpoint(tmp_path: Path) -> None:
    source = torch.randn(6, 4)
    pieces = [[Piece("w", (6, 4), (2 * rank, 0), source[2 * rank : 2 * rank + 2])] for rank in range(3)]
    pieces[1].append(whole("only", torch.ones(3)))
    pieces.append([])
    assert save_on(Ranks(4), tmp_path / "step-1", pieces) == [None] * 4
    assert sorted(os.listdir(tmp_path)) == ["step-1"]
    assert sorted(os.listdir(tmp_path / "step-1")) == [MANIFEST] + [f"shard-000{rank}.safetensors" for rank in range(3)]
    checkpoint = open_checkpoint(tmp_path / "step-1")
    assert checkpoint.metadata == {"by": 0}
    assert torch.equal(checkpoint.read("w", torch.empty(3, 4), (1, 0)), source[1:4])
    assert torch.equal(checkpoint.read("only", torch.empty(3)), torch.ones(3))


def test_where_one_rank_fails_all_do(tmp_path: Path) -> None:
    pieces = [[whole("a", torch.ones(2))], [whole("b", torch.ones(2, dtype=torch.complex128))]]
    first, second = save_on(Ranks(2), tmp_path / "step-1", pieces)
    assert "rank 1:" in str(first) and "complex128 cannot be stored" in str(second)
    assert isinstance(first, CheckpointError) and isinstance(second, CheckpointError)
    pieces[1] = [whole("a", torch.ones(2))]
    first, second = save_on(Ranks(2), tmp_path / "step-1", pieces)
    assert "'a': the pieces at [0] and [0] overlap" in str(first) and "rank 0:" in str(second)
    assert os.listdir(tmp_path) == []
    save(tmp_path / "step-1")
    first, second = save_on(Ranks(2), tmp_path / "step-1", pieces)
    assert "exists already" in str(first) and "exists already" in str(second)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([Piece("w", (4, 2), (0, 0), torch.ones(3, 2))], "'w': its pieces hold 6 of 8 elements"),
        ([Piece("w", (4, 2), (2, 0), torch.ones(3, 2))], "is not inside shape [4, 2]"),
        ([whole("w", torch.ones(2)), whole("w", torch.ones(2))], "'w' is given twice"),
        (
            [Piece("w", (4,), (0,), torch.ones(2)), Piece("w", (4,), (2,), torch.ones(2).int())],
            "different dtypes or shapes",
        ),
        (
            [Piece("w", (4,), (0,), torch.ones(3)), Piece("w", (4,), (2,), torch.ones(1))],
            "the pieces at [0] and [2] overlap",
        ),
    ],
)
def test_pieces_that_do_not_fit(tmp_path: Path, pieces: list[Piece], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(tmp_path / "step-1", pieces, {})
    assert message in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), torch.ones(1), {1, 2}])
def test_metadata_is_json(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match="metadata is not JSON"):
        save(tmp_path / "step-1", metadata={"x": value})
    assert os.listdir(tmp_path) == []


def test_wrong_reads_are_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "step-1"))
    with pytest.raises(CheckpointError, match="no tensor 'x'"):
        checkpoint.read("x", torch.empty(1))
    for out, offset in [
        (torch.empty(6, 7), None),
        (torch.empty(6, 7), (0, 2)),
        (torch.empty(6, 8), (-1, 0)),
        (torch.empty(6), (0,)),
        (torch.empty(6, 8), (0,)),
    ]:
        with pytest.raises(CheckpointError, match=r"'exits.4.w' has shape \[6, 8\], expected a box") as caught:
            checkpoint.read("exits.4.w", out, offset)
        assert not isinstance(caught.value, DamagedError)
    with pytest.raises(CheckpointError, match="cannot be read as torch.int32") as caught:
        checkpoint.read("exits.4.w", torch.empty(6, 8, dtype=torch.int32))
    assert not isinstance(caught.value, DamagedError)


@settings(deadline=None)
@given(st.data())
def test_tiling_by_cutting(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    boxes = [((0,) * len(shape), shape)]
    for _ in range(data.draw(st.integers(0, 6))):
        offset, extent = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        dim = data.draw(st.integers(0, len(shape) - 1))
        at = data.draw(st.integers(0, extent[dim]))
        second = tuple(o + at if d == dim else o for d, o in enumerate(offset))
        boxes.append((offset, tuple(at if d == dim else n for d, n in enumerate(extent))))
        boxes.append((second, tuple(n - at if d == dim else n for d, n in enumerate(extent))))
    assert tiling_problem(shape, boxes) is None
    solid = next(box for box in boxes if all(box[1]))
    assert tiling_problem(shape, [box for box in boxes if box is not solid]) is not None
    assert tiling_problem(shape, [*boxes, solid]) is not None


def test_tiling_of_scalars_and_empty_tensors() -> None:
    assert tiling_problem((), [((), ())]) is None
    assert tiling_problem((), []) is not None
    assert tiling_problem((), [((), ()), ((), ())]) is not None
    assert tiling_problem((0, 3), [((0, 0), (0, 3))]) is None
    assert tiling_problem((0, 3), []) is not None


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def test_every_flipped_byte_of_a_shard_is_noticed(tmp_path: Path) -> None:
    directory = save(tmp_path / "step-1")
    chance = random.Random(0)
    for position in range((directory / SHARD).stat().st_size):
        bit = chance.randrange(8)
        flip(directory / SHARD, position, bit)
        with pytest.raises(DamagedError, match=SHARD):
            read_all(open_checkpoint(directory))
        flip(directory / SHARD, position, bit)
    assert equal(read_all(open_checkpoint(directory)), tensors())


def test_no_flipped_byte_of_the_manifest_changes_what_is_read(tmp_path: Path) -> None:
    directory = save(tmp_path / "step-1", metadata={"step": 1, "rate": 0.125})
    chance = random.Random(0)
    noticed = 0
    size = (directory / MANIFEST).stat().st_size
    for position in range(size):
        bit = chance.randrange(8)
        flip(directory / MANIFEST, position, bit)
        try:
            assert open_checkpoint(directory).metadata == {"step": 1, "rate": 0.125}  # a space became another
        except DamagedError as error:
            assert str(directory / MANIFEST) in str(error)
            noticed += 1
        flip(directory / MANIFEST, position, bit)
    assert noticed > size / 3


def large_checkpoint(directory: Path) -> Tensor:
    """A float32 tensor over three and a half blocks, [14, 2**20]."""
    source = torch.arange(14 * 2**20, dtype=torch.float32).view(14, 2**20)
    write_checkpoint(directory, [whole("w", source)], {})
    return source


def test_blocks_are_verified_where_they_are_read(tmp_path: Path) -> None:
    directory = tmp_path / "step-1"
    source = large_checkpoint(directory)
    path = directory / SHARD
    assert torch.equal(open_checkpoint(directory).read("w", torch.empty_like(source)), source)
    flip(path, 2 * BLOCK + 5)
    checkpoint = open_checkpoint(directory)
    rows = torch.empty(3, 2**20)
    assert torch.equal(checkpoint.read("w", rows, (4, 0)), source[4:7])
    with pytest.raises(DamagedError) as caught:
        checkpoint.read("w", torch.empty_like(source))
    assert str(caught.value) == (
        f"{path}: damaged between bytes {2 * BLOCK} and {3 * BLOCK} (SHA-256 differs), in tensor 'w'"
    )
    with pytest.raises(DamagedError):  # what failed once is not taken as verified
        checkpoint.read("w", rows, (8, 0))
    unverified = open_checkpoint(directory, verify=False).read("w", torch.empty_like(source))
    assert (unverified != source).sum() == 1


def test_a_block_is_verified_once(tmp_path: Path) -> None:
    directory = tmp_path / "step-1"
    source = large_checkpoint(directory)
    checkpoint = open_checkpoint(directory)
    row = torch.empty(1, 2**20)
    checkpoint.read("w", row, (0, 0))
    flip(directory / SHARD, BLOCK - 1)  # in the block just verified, in another row
    assert torch.equal(checkpoint.read("w", row, (1, 0))[0], source[1])


def test_missing_truncated_and_foreign_parts(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        open_checkpoint(tmp_path / "none")
    directory = save(tmp_path / "step-1")
    path = directory / SHARD
    content = path.read_bytes()
    for size in (0, 7, 100, len(content) - 1):
        os.truncate(path, size)
        with pytest.raises(DamagedError, match=f"{SHARD}: truncated or changed: expected {len(content)} bytes"):
            open_checkpoint(directory)
        path.write_bytes(content)
    checkpoint = open_checkpoint(directory)
    os.truncate(path, len(content) - 40)
    with pytest.raises(DamagedError, match="truncated"):
        read_all(checkpoint)
    path.unlink()
    with pytest.raises(DamagedError, match=f"{SHARD}: missing"):
        open_checkpoint(directory)
    (tmp_path / "elsewhere").write_bytes(content)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedError, match="not a plain safetensors file"):
        open_checkpoint(directory)
    (directory / MANIFEST).unlink()
    with pytest.raises(DamagedError, match=f"{MANIFEST} is missing"):
        open_checkpoint(directory)


def forge(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest, and its checksum with it."""
    content = json.loads((directory / MANIFEST).read_text())
    del content["sha256"]
    change(content)
    content["sha256"] = hashlib.sha256(encode(content, directory)).hexdigest()
    (directory / MANIFEST).write_text(json.dumps(content))


def rename_file(content: dict[str, Any], name: str) -> None:
    """Name another file in the manifest."""
    content["files"][name] = content["files"].pop(SHARD)


def first_piece(content: dict[str, Any]) -> dict[str, Any]:
    """The piece of ``exits.4.w``."""
    piece: dict[str, Any] = content["tensors"]["exits.4.w"]["pieces"][0]
    return piece


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "outside": (lambda c: rename_file(c, "../x.safetensors"), "is not a plain safetensors file"),
    "absolute": (lambda c: rename_file(c, "/x.safetensors"), "is not a plain safetensors file"),
    "long": (lambda c: rename_file(c, "x" * 5000 + ".safetensors"), "File name too long"),
    "kind": (lambda c: rename_file(c, "x.bin"), "is not a plain safetensors file"),
    "version": (lambda c: c.update(version=2), "version 2 is not known here"),
    "no files": (lambda c: c.pop("files"), "files: expected an object"),
    "files list": (lambda c: c.update(files=[]), "files: expected an object"),
    "tensors null": (lambda c: c.update(tensors=None), "tensors: expected an object"),
    "too few blocks": (lambda c: c["files"][SHARD].update(blocks=[]), "its blocks are not one SHA-256"),
    "shape": (lambda c: c["tensors"]["exits.4.w"].update(shape=[7, 8]), "its pieces hold 48 of 56"),
    "shape text": (lambda c: c["tensors"]["exits.4.w"].update(shape="68"), "not a list of whole numbers"),
    "dtype": (lambda c: c["tensors"]["exits.4.w"].update(dtype="I32"), "is missing or not as"),
    "unknown dtype": (lambda c: c["tensors"]["exits.4.w"].update(dtype="F4"), "its name, dtype or pieces"),
    "no pieces": (lambda c: c["tensors"]["exits.4.w"].update(pieces=[]), "its pieces hold 0 of 48"),
    "offset": (lambda c: first_piece(c).update(offset=[0, -1]), "lists of whole numbers"),
    "offset beyond": (lambda c: first_piece(c).update(offset=[0, 1]), "is not inside shape"),
    "name": (lambda c: first_piece(c).update(name="rng"), "is missing or not as"),
    "shard": (lambda c: first_piece(c).update(file="x"), "in 'x', which is not one of its files"),
    "used twice": (lambda c: c["tensors"].update(again=c["tensors"]["rng"]), "is used twice"),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_forged_manifests(tmp_path: Path, case: str) -> None:
    change, message = FORGERIES[case]
    directory = save(tmp_path / "step-1")
    forge(directory, change)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(directory)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, DamagedError) == (case not in ("version", "long"))


def test_latest(tmp_path: Path) -> None:
    lines: list[str] = []
    assert load_latest(tmp_path, read_all, lines.append) is None
    for step in (2, 10, 9):
        save(tmp_path / f"step-{step}", metadata={"step": step})
    assert load_latest(tmp_path, lambda checkpoint: checkpoint.metadata["step"], lines.append) == 10
    assert lines == []


def test_damage_falls_back_and_says_so(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path / f"step-{step}", tensors(step))
    flip(tmp_path / "step-3" / SHARD, (tmp_path / "step-3" / SHARD).stat().st_size - 1)
    (tmp_path / "step-2" / SHARD).unlink()
    lines: list[str] = []
    loaded = load_latest(tmp_path, read_all, lines.append)
    assert loaded is not None and equal(loaded, tensors(1))
    assert len(lines) == 2
    assert all(line.startswith("DAMAGED CHECKPOINT: ") and "falling back" in line for line in lines)
    assert str(tmp_path / "step-3" / SHARD) in lines[0]
    kept = sorted(name.partition(".")[0] for name in os.listdir(tmp_path))
    assert kept == ["step-1", "step-2", "step-3"]
    assert sorted(name for name in os.listdir(tmp_path) if "." not in name) == ["step-1"]
    save(tmp_path / "step-3")  # a rerun does not collide

    for step in (1, 3):
        (tmp_path / f"step-{step}" / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match="every checkpoint in it is damaged"):
        load_latest(tmp_path, read_all, lines.append)


def test_other_errors_do_not_set_checkpoints_aside(tmp_path: Path) -> None:
    save(tmp_path / "step-1")
    save(tmp_path / "step-2")
    with pytest.raises(CheckpointError, match="expected a box"):
        load_latest(tmp_path, lambda checkpoint: checkpoint.read("rng", torch.empty(9)), print)
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-2"]


def test_ranks_fall_back_together(tmp_path: Path) -> None:
    for step in (1, 2):
        pieces = [[whole(f"r{rank}", torch.full((3,), float(step)))] for rank in range(2)]
        assert save_on(Ranks(2), tmp_path / f"step-{step}", pieces) == [None, None]
    path = tmp_path / "step-2" / "shard-0001.safetensors"
    flip(path, path.stat().st_size - 1)
    ranks = Ranks(2)
    lines: list[list[str]] = [[], []]

    def load(rank: int) -> Tensor | None:
        return load_latest(
            tmp_path,
            lambda checkpoint: checkpoint.read(f"r{rank}", torch.empty(3)),
            lines[rank].append,
            rank=rank,
            gather=ranks.gather(rank),
        )

    for result in ranks.run(load):
        assert torch.equal(result, torch.ones(3))
    assert lines[0] == lines[1] and len(lines[0]) == 1 and "shard-0001" in lines[0][0]


SAVING = """
import itertools, sys, torch
from pathlib import Path
from megatron_ee.checkpoint.atomic import writer_lock
from megatron_ee.checkpoint.writing import whole, write_checkpoint
output = Path(sys.argv[1])
with writer_lock(output):
    print("ready", flush=True)
    for step in itertools.count(1):
        pieces = [whole(f"w{i}", torch.full((100, 1000), float(step))) for i in range(10)]
        write_checkpoint(output / "checkpoints" / f"step-{step}", pieces, {"step": step})
"""


@pytest.mark.slow
def test_kill_9_while_saving_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    leftovers = 0
    for attempt in range(3):
        output = tmp_path / str(attempt)
        with subprocess.Popen([sys.executable, "-c", SAVING, str(output)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            parent = output / "checkpoints"
            wait_for(lambda parent=parent: (parent / "step-1" / MANIFEST).is_file())  # type: ignore[misc]
            # In the middle of a shard, and at other points of a later save.
            wait_for(lambda parent=parent: any(parent.glob("*.tmp-*/*")))  # type: ignore[misc]
            time.sleep(0.01 * attempt)
            process.kill()
        before = sorted(os.listdir(parent))
        leftovers += sum(".tmp-" in name for name in before)
        with writer_lock(output):
            steps = [name for name in before if ".tmp-" not in name]
            assert sorted(os.listdir(parent)) == steps
            assert LOCK_NAME in os.listdir(output)
        for name in steps:
            checkpoint = open_checkpoint(parent / name)
            assert f"step-{checkpoint.metadata['step']}" == name
            for tensor in read_all(checkpoint).values():
                assert bool((tensor == checkpoint.metadata["step"]).all())
        newest = load_latest(parent, lambda checkpoint: checkpoint.metadata["step"], pytest.fail)
        assert newest == max(int(name.removeprefix("step-")) for name in steps)
    assert leftovers > 0


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Look again and again, at once where it comes true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"


def test_going_on_without_verification(tmp_path: Path) -> None:
    """A flipped bit in a tensor then goes unnoticed; a file that is cut off does not."""
    for step in (1, 2):
        save(tmp_path / f"step-{step}", metadata={"step": step})
    shard = tmp_path / "step-2" / SHARD
    flip(shard, shard.stat().st_size - 1)
    lines: list[str] = []

    def step_of(checkpoint: Checkpoint) -> int:
        read_all(checkpoint)
        return int(checkpoint.metadata["step"])

    assert load_latest(tmp_path, step_of, lines.append, verify=False) == 2 and not lines
    shard.write_bytes(shard.read_bytes()[:-1])
    assert load_latest(tmp_path, step_of, lines.append, verify=False) == 1 and "truncated" in lines[0]
