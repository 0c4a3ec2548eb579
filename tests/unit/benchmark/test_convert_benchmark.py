"""``benchmark convert``: what it compares does the same work, what it checks is noticed, what it shows is measured."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from megatron_ee.benchmark import convert as parent
from megatron_ee.benchmark import files
from megatron_ee.benchmark.conversion import check_same
from megatron_ee.benchmark.convert import benchmark_convert, model_bytes
from megatron_ee.benchmark.converting import PERIOD, Converting
from megatron_ee.benchmark.reading import join_runs, needed_runs, read_runs
from megatron_ee.benchmark.report import print_convert
from megatron_ee.benchmark.results import Conversion, ConvertBenchmark, Direction, ShardedLoad, ShardedLoads
from megatron_ee.benchmark.saving import SavingBenchmark
from megatron_ee.benchmark.shape import Shape
from megatron_ee.checkpoint.loading import load_backbone, open_model
from megatron_ee.checkpoint.names import backbone_sources, blocks
from megatron_ee.checkpoint.slices import rank_box
from megatron_ee.commands.main import main
from megatron_ee.model.setup import build_setup
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.groups import Groups

SHAPE = Shape(hidden=64, layers=3, ffn=96, heads=4, vocab=300)
TINY = ["--hidden", "64", "--layers", "3", "--ffn", "96", "--heads", "4", "--vocab", "300", "--repeats", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random") / "model"
    Converting().make_model(str(path), SHAPE)
    return path


@pytest.fixture(scope="module")
def parallel(model: Path) -> Path:
    path = model.with_name("parallel")
    Converting().convert(str(model), str(path), "parallel", 2, 2)
    return path


# ------------------------------------------------------------------------------------------------------ plain work


@pytest.fixture
def some_files(tmp_path: Path) -> Path:
    """Two blocks and a bit, one byte in a directory below, nothing at all."""
    directory = tmp_path / "files"
    (directory / "below").mkdir(parents=True)
    (directory / "a").write_bytes(os.urandom(2 * files.BLOCK + 12345))
    (directory / "below" / "b").write_bytes(b"x")
    (directory / "c").write_bytes(b"")
    return directory


def test_a_copy_and_its_hashes(some_files: Path, tmp_path: Path) -> None:
    files.copy_directory(some_files, tmp_path / "copy")
    data = (some_files / "a").read_bytes()
    parts = [data[start : start + files.BLOCK] for start in range(0, len(data), files.BLOCK)] + [b"x"]
    assert files.hash_directory(tmp_path / "copy") == [hashlib.sha256(part).hexdigest() for part in parts]


def test_the_page_cache_is_seen_and_dropped(some_files: Path) -> None:
    (some_files / "a").read_bytes()
    assert files.resident_share(some_files) == 1.0
    left = files.drop_cache(some_files)
    assert left == files.resident_share(some_files)
    if os.uname().sysname == "Linux" and not _in_memory(some_files):
        assert left < 0.1
        with (some_files / "a").open("rb") as file:
            file.seek(files.BLOCK)
            file.read(1)
        assert 0 < files.resident_share(some_files) < 1


def _in_memory(path: Path) -> bool:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [fields for fields in mounts if path.resolve().is_relative_to(fields[1])]
    return max(inside, key=lambda fields: len(fields[1]))[2] in ("tmpfs", "ramfs", "overlay")


# ------------------------------------------------------------------------------------------------------ conversion


def test_the_model_is_what_it_should_be(model: Path) -> None:
    opened = open_model(model)
    architecture = opened.architecture
    assert (architecture.hidden_size, architecture.num_layers, architecture.tied) == (64, 3, False)
    assert sum(tensor.nbytes for tensor in opened.weights.values()) == model_bytes(SHAPE)
    values = torch.empty(300, 64, dtype=torch.bfloat16)
    opened.weights["lm_head.weight"].read(values, (0, 0))
    assert 0.95 < values.float().std() < 1.05


def test_no_part_of_the_model_is_like_another(model: Path, tmp_path: Path) -> None:
    """Otherwise a misplaced row or tensor would come back unnoticed. The period is crossed too."""
    hashes = [text.split()[-1] for text in Converting().digests(str(model)).values()]
    assert len(set(hashes)) == len(hashes) == 3 * 9 + 3 + 1
    wide = Shape(hidden=1024, layers=1, ffn=2, heads=2, vocab=3000)
    Converting().make_model(str(tmp_path / "wide"), wide)
    embedding = open_model(tmp_path / "wide").weights["model.embed_tokens.weight"]
    values = torch.empty(embedding.shape, dtype=torch.bfloat16)
    embedding.read(values, (0, 0))
    assert values.numel() > PERIOD
    assert len({row.view(torch.int16).numpy().tobytes() for row in values}) == 3000
    assert torch.equal(values.view(-1)[PERIOD:], values.view(-1)[: values.numel() - PERIOD])


def test_there_and_back(model: Path, parallel: Path, tmp_path: Path) -> None:
    result = Converting().convert(str(parallel), str(tmp_path / "back"), "hf")
    assert result["seconds"] > 0
    assert result["libraries"] > 50e6 > result["memory"] >= 0
    before = Converting().digests(str(model))
    after = Converting().digests(str(tmp_path / "back"))
    check_same(before, after)
    assert json.loads((parallel / "manifest.json").read_text())["metadata"]["layout"] == {"tensor": 2, "stages": [1, 2]}


def test_a_changed_byte_is_noticed(model: Path, tmp_path: Path) -> None:
    before = Converting().digests(str(model))
    (tmp_path / "back").mkdir()
    for path in model.iterdir():
        data = bytearray(path.read_bytes())
        data[-1] ^= path.suffix == ".safetensors"
        (tmp_path / "back" / path.name).write_bytes(data)
    with pytest.raises(RuntimeError, match="1 tensors differ, such as"):
        check_same(before, Converting().digests(str(tmp_path / "back")))
    with pytest.raises(RuntimeError, match="1 tensors differ, such as lm_head.weight"):
        check_same(before, {name: text for name, text in before.items() if name != "lm_head.weight"})


# --------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("cut", [True, False])
def test_plain_reading_reads_what_a_rank_holds(model: Path, parallel: Path, rank: int, cut: bool) -> None:
    """From both formats, in the order of the files: each box's bytes, all of them and no others."""
    directory = parallel if cut else model
    opened = open_model(model)
    boxes, expected = set(), []
    for name, tensor in opened.weights.items():
        box = rank_box(name, tensor.shape, opened.architecture, rank, 2)
        if box is not None:
            boxes.add((name, tuple(box[0]), tuple(box[1])))
            expected.append(torch.empty(tuple(box[1]), dtype=tensor.dtype))
            tensor.read(expected[-1], box[0])
    runs = join_runs(needed_runs(directory, boxes))
    wanted = sum(tensor.nbytes for tensor in expected)
    assert sum(count for _, _, count in runs) == wanted
    ends = [(path, start + count) for path, start, count in runs]
    assert all(end < (path, start) for end, (path, start, _) in zip(ends, runs[1:], strict=False))
    kept: list[torch.Tensor] = []
    read_runs(runs, keep=True, hashed=True, kept=kept)
    everything = b"".join(path.read_bytes()[start : start + count] for path, start, count in runs)
    assert kept[0].numpy().tobytes() == everything
    histogram = sum(torch.bincount(tensor.flatten().view(torch.uint8).int(), minlength=256) for tensor in expected)
    assert torch.equal(torch.bincount(kept[0].int(), minlength=256), histogram)
    if cut:  # a rank's part is a file per stage
        assert len(runs) <= 2 + 2 * rank * len(boxes)


def test_runs_that_touch_are_one() -> None:
    a, b = Path("a"), Path("b")
    runs = [(b, 31, 5), (a, 20, 5), (a, 0, 10), (a, 10, 10), (a, 30, 1)]
    assert join_runs(iter(runs)) == [(a, 0, 25), (a, 30, 1), (b, 31, 5)]


def test_large_and_many_small_runs(tmp_path: Path) -> None:
    """Longer than what is read at a time, and gaps in between; kept in order, or dropped."""
    data = os.urandom(9_000_000)
    (tmp_path / "a").write_bytes(data)
    other = data[::-1]
    (tmp_path / "b").write_bytes(other)
    runs = [(tmp_path / "a", 17, 8_900_000)]
    runs += [(tmp_path / "b", start, 700) for start in range(0, 8_000_000, 1000)]
    kept: list[torch.Tensor] = []
    read_runs(runs, keep=True, hashed=False, kept=kept)
    expected = data[17 : 17 + 8_900_000] + b"".join(other[start : start + 700] for _, start, _ in runs[1:])
    assert kept[0].numpy().tobytes() == expected
    dropped: list[torch.Tensor] = []
    read_runs(runs, keep=False, hashed=True, kept=dropped)
    assert dropped == []


def test_loading_wants_the_boxes_that_are_read(model: Path, parallel: Path, groups: Groups) -> None:
    """``describe`` takes them from the stage that ``load`` fills: on one rank, every byte of the model."""
    opened = open_model(parallel)
    setup = build_setup(opened.architecture, torch.bfloat16, groups)
    stage = Stage(setup, range(1, 4), [], final_exit=True)
    load_backbone(stage, opened)
    sources = backbone_sources(stage.backbone)
    pairs = (blocks(parameter, source, opened.architecture, 0, 1) for parameter, source in sources)
    boxes = {(block.name, block.offset, tuple(block.tensor.shape)) for block in itertools.chain.from_iterable(pairs)}
    for directory in (model, parallel):
        assert sum(count for _, _, count in needed_runs(directory, boxes)) == model_bytes(SHAPE)


# --------------------------------------------------------------------------------------------------------- command


@pytest.mark.slow
def test_all_of_it_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every part, in real processes; nothing is left on the disk."""
    assert main(["benchmark", "convert", *TINY, "--save-mb", "2", "--directory", str(tmp_path), "--json"]) == 0
    out, err = capsys.readouterr()
    data: dict[str, Any] = json.loads(out)
    assert set(data) == {"machine", "convert", "load", "save"}
    assert list(tmp_path.iterdir()) == []
    assert "benchmark convert: 7/7 steps" in err
    conversion = data["convert"]
    assert conversion["identical"] == 3 * 9 + 3 + 1
    assert conversion["model"]["bytes"] == model_bytes(SHAPE)
    assert conversion["memory_target"] == 300 * 64 * 2 + 2**30
    assert [direction["to"] for direction in conversion["directions"]] == ["parallel", "hf"]
    peer = 0.0
    for direction in conversion["directions"]:
        ours, theirs = direction["seconds"][0], direction["copy_seconds"][0] + direction["hash_seconds"][0]
        assert direction["ratio"] == pytest.approx(ours / theirs)
        assert direction["rate"] == pytest.approx(model_bytes(SHAPE) / ours)
        assert 0 <= direction["memory"] < 100e6 < direction["libraries"]
        peer += theirs
    total = sum(direction["seconds"][0] for direction in conversion["directions"])
    assert conversion["ratio"] == pytest.approx(total / peer)
    cases = [(load["format"], load["verified"], load["cold"]) for load in data["load"]["loads"]]
    assert cases == [(kind, check, cold) for kind, check in _KINDS for cold in (True, False)]
    for load in data["load"]["loads"]:
        assert load["ratio"] == pytest.approx(load["load_seconds"][0] / load["read_seconds"][0])
        assert load["reuse_ratio"] == pytest.approx(load["load_seconds"][0] / load["reuse_seconds"][0])
        # Each rank holds half of the rows and columns, and all norms.
        assert load["needed"][0] > load["needed"][1] > model_bytes(SHAPE) * 0.4
        assert sum(load["needed"]) == model_bytes(SHAPE) + 7 * 64 * 2
        assert min(load["read"]) >= min(load["needed"])
        shares = [count / needed for count, needed in zip(load["read"], load["needed"], strict=True)]
        assert load["read_ratio"] == pytest.approx(max(shares))
    assert data["save"]["state"]["bytes"] == pytest.approx(2e6, rel=0.2)


_KINDS = (("hf", False), ("parallel", False), ("parallel", True))


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--heads", "5"], 2, "--heads: 5 heads do not share a hidden size"),
        (["--heads", "1"], 2, "--heads, --ffn: 1 and 96 must be multiples of 2"),
        (["--layers", "1"], 2, "--layers: 1 layers are less than 2 stages"),
        (["--load-layers", "4"], 2, "--load-layers: 4 are more than the model's 3 layers"),
        (["--parts", "all"], 2, "argument --parts: invalid choice: 'all'"),
        (["--shape", "7b", "--hidden", "65536"], 1, "/tmp: needs "),
        (["--directory", "no/such"], 1, "no/such: cannot measure the free space: No such file or directory"),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parent, "tempfile", SimpleNamespace(gettempdir=lambda: "/tmp"))
    monkeypatch.setattr(files, "available_memory", lambda: 10**15)
    assert main(["benchmark", "convert", *TINY, *arguments]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith(f"megatron-ee benchmark: error: {message}")


def test_a_model_too_large_for_the_memory_is_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """To the layers that fit twice; asked for fewer, to those; where not even two fit, it says so."""
    loaded: list[Shape] = []
    started: Callable[..., Any] = lambda shape, *rest: loaded.append(shape)  # noqa: E731
    monkeypatch.setattr(parent, "measure_loads", started)
    converter = SimpleNamespace(call=lambda what: {"device": "cpu"})
    monkeypatch.setattr(parent, "start_converter", lambda: contextlib.nullcontext(converter))
    shape = dataclasses.replace(SHAPE, layers=9)
    fits = dataclasses.replace(SHAPE, layers=5)

    def measure(available: int, layers: int | None) -> None:
        monkeypatch.setattr(files, "available_memory", lambda: available)
        options: dict[str, Any] = {"directory": tmp_path, "save_megabytes": 1, "repeats": 1}
        benchmark_convert(shape, parts=["load"], load_layers=layers, **options)

    measure(2 * model_bytes(fits) + parent.OTHERS, None)
    measure(10**15, None)
    measure(0, 2)
    assert [shape.layers for shape in loaded] == [5, 9, 2]
    with pytest.raises(ValueError, match=r"not even 2 layers fit 0\.0 GB of memory twice; use a smaller --shape"):
        measure(0, None)


def test_the_table() -> None:
    machine = {"device": "cpu", "threads": 2, "torch": "2.13.0", "load_before": 0.3}
    model = {**dataclasses.asdict(SHAPE), "dtype": "bfloat16", "bytes": 13e9, "tensors": 291, "largest_tensor": 262e6}
    there = Direction("parallel", [2.0], [1.0], [3.0], 0.5, 1e9, 2**28, 2**27, 0.25)
    back = Direction("hf", [6.0], [1.5], [2.5], 1.5, 2e9, 2**28, 2**26, 0.0)
    conversion = Conversion(model, {"tensor": 2, "pipeline": 2}, [there, back], 1.0, 1.3, 2**30 + 2**28, 292)
    cold = ShardedLoad("parallel", True, True, 0.0, [3.0], [2.0], [1.0], 1.5, 3.0, 2e9, [10, 10], [15, 20], 2.0, 10)
    saving = SavingBenchmark(machine, {"bytes": 5e8, "tensors": 64}, 4.0, 0.5, 0.8, 5.0, 0.25, 2.0, 8.0, 2.0, 2.0, 1.1)
    shown = Console(file=io.StringIO(), width=160, highlight=False)
    print_convert(ConvertBenchmark(machine, conversion, ShardedLoads(model, 2, 1.3, [cold]), saving), shown)
    lines = shown.file.getvalue().splitlines()  # type: ignore[attr-defined]

    def cells(start: str) -> list[str]:
        return next(line.split() for line in lines if line.strip().startswith(start))

    assert cells("parallel ") == ["parallel", "0.50x", "2.00", "1.00", "3.00", "1,000", "128", "1,280", "256"]
    assert cells("Hugging Face  ")[2:] == ["1.50x", "6.00", "1.50", "2.50", "2,000", "64", "1,280", "256"]
    assert cells("both") == ["both", "1.00x"]
    assert cells("target") == ["target", "at", "most", "1.30x"]
    assert any("All 292 tensors and files came back byte for byte" in line and "25% of it" in line for line in lines)
    expected = ["parallel,", "verified,", "cold", "0%", "1.50x", "3.00x", "3.00", "2.00", "1.00", "2,000"]
    assert cells("parallel, verified") == [*expected, "2.000x", "0.500x"]
    assert cells("in the background") == ["in", "the", "background", "0.500", "8.0x", "less"]
    assert any("291 tensors of at most 262 MB" in line for line in lines)
