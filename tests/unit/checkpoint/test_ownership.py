"""Where commands may write: what they refuse by name, and that a refusal changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ee.checkpoint.ownership import MARKER, check_file, check_output, claim_output
from megatron_ee.errors import ConfigError


def names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_a_new_directory_is_marked_and_known_again(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "run"
    check_output(output, "tune")
    assert not output.parent.exists()
    claim_output(output, "tune")
    assert json.loads((output / MARKER).read_text()) == {"made_by": "tune"}
    (output / "log.jsonl").touch()
    claim_output(output, "tune")
    with pytest.raises(ConfigError, match=r"--output: .*run was made by tune, not by evaluate"):
        claim_output(output, "evaluate")


@pytest.mark.parametrize("held", [["config.json"], ["a", "b", "c", "d", "e"], ["sub/file"], [".megatron-ee.json"]])
def test_what_others_made_is_refused_by_name(held: list[str], tmp_path: Path) -> None:
    for name in held:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    before = names(tmp_path)
    with pytest.raises(ConfigError, match="--out: ") as refused:
        claim_output(tmp_path, "tune", "--out")
    assert names(tmp_path) == before
    shown = {"config.json": "holds config.json, which tune", "a": "holds a, b, c and 2 more", "sub/file": "holds sub,"}
    assert shown.get(held[0], "was made by somebody else") in str(refused.value)


def test_a_file_in_the_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(ConfigError, match="is not a directory"):
        check_output(tmp_path / "run", "tune")


def test_a_directory_with_only_our_own_files_can_be_claimed(tmp_path: Path) -> None:
    """Locks, what a killed writer left, and directories that another command of ours made."""
    (tmp_path / ".writer.lock").touch()
    (tmp_path / f"{MARKER}.tmp-0123abcd").touch()
    claim_output(tmp_path / "debug", "tune --debug")
    claim_output(tmp_path, "tune")
    assert json.loads((tmp_path / MARKER).read_text()) == {"made_by": "tune"}


def test_a_run_of_a_version_without_markers_is_known(tmp_path: Path) -> None:
    for name in (".writer.lock", "status.json", "config.json"):
        (tmp_path / name).touch()
    check_output(tmp_path, "tune")
    with pytest.raises(ConfigError, match="made by tune"):
        check_output(tmp_path, "evaluate")


def test_single_files(tmp_path: Path) -> None:
    check_file(tmp_path / "new.html", "--html")
    (tmp_path / "page.html").write_text('<meta name="generator" content="megatron-ee">')
    check_file(tmp_path / "page.html", "--html")
    (tmp_path / "notes.html").write_text("mine")
    with pytest.raises(ConfigError, match=r"--html: .*notes.html exists, and megatron-ee did not write it"):
        check_file(tmp_path / "notes.html", "--html")
    with pytest.raises(ConfigError, match="is a directory"):
        check_file(tmp_path, "--plot")
