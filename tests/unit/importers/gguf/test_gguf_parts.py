"""Models in several GGUF files: read as one, whichever is given; a part that is missing or foreign is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.commands.main import main
from megatron_ee.testing.gguf_files import write_model
from megatron_ee.testing.models import tiny_model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``whole.gguf``, and the same model in four parts; a model of two layers, and one of other shape, in parts."""
    directory = tmp_path_factory.mktemp("files")
    model = tiny_model("llama2", num_hidden_layers=1)
    write_model(directory / "whole.gguf", model, "llama")
    write_model(directory / "parts.gguf", model, "llama", part_tensors=5)
    write_model(directory / "deeper.gguf", tiny_model("llama2", num_hidden_layers=2), "llama", part_tensors=8)
    write_model(directory / "other.gguf", tiny_model("llama2", num_hidden_layers=1), "llama", part_tensors=4)
    return directory


def part(number: int, count: int = 4) -> str:
    return f"parts-{number:05d}-of-{count:05d}.gguf"


def convert(path: Path, output: Path) -> int:
    return main(["convert", "--input", str(path), "--output", str(output), "--to", "hf"])


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_any_part_gives_the_whole_model(files: Path, tmp_path: Path) -> None:
    assert convert(files / "whole.gguf", tmp_path / "whole") == 0
    for number in (1, 3):
        assert convert(files / part(number), tmp_path / str(number)) == 0
        assert contents(tmp_path / str(number)) == contents(tmp_path / "whole")


def removed(directory: Path, files: Path) -> None:
    (directory / part(4)).unlink()


def of_another_split(directory: Path, files: Path) -> None:
    shutil.copy(files / "other-00004-of-00004.gguf", directory / part(4))


def twice(directory: Path, files: Path) -> None:
    shutil.copy(directory / part(2), directory / part(4))


def of_a_deeper_model(directory: Path, files: Path) -> None:
    shutil.copy(files / "deeper-00004-of-00004.gguf", directory / part(4))


def a_whole_model(directory: Path, files: Path) -> None:
    shutil.copy(files / "whole.gguf", directory / part(4))


def truncated(directory: Path, files: Path) -> None:
    path = directory / part(4)
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (removed, f"{part(4)}: is missing; {part(1)} is one of 4 parts"),
        (of_another_split, "is also in"),
        (twice, f"{part(4)}: is not part 4 of the model in {part(1)}: split.no is 1, not 3"),
        (of_a_deeper_model, "split.tensors.count is 21, not 12"),
        (a_whole_model, f"{part(4)}: is not part 4 of the model in {part(1)}: split.no is None, not 3"),
        (truncated, f"{part(4)}: tensor 'blk.0.ffn_down.weight': truncated or damaged"),
    ],
)
def test_a_part_that_does_not_belong(
    change: Callable[[Path, Path], Any], named: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(1, 5):
        shutil.copy(files / part(number), tmp_path)
    change(tmp_path, files)
    assert convert(tmp_path / part(1), tmp_path / "output") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line and not (tmp_path / "output").exists()


def test_a_part_under_another_name(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(files / part(2), tmp_path / "model.gguf")
    assert convert(tmp_path / "model.gguf", tmp_path / "output") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "is part 2 of 4 of a model, but its name does not end in -00002-of-00004.gguf" in line
