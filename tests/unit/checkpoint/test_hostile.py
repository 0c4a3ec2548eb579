"""Hostile files and directories: each refused in one clear line, at once, within little memory; nothing is run."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.checkpoint.adapter import open_adapter
from megatron_ee.checkpoint.digest import backbone_digest, cache_directory
from megatron_ee.checkpoint.hf_directory import HFDirectory
from megatron_ee.checkpoint.safetensors_file import read_header
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.checkpoint.store import open_checkpoint
from megatron_ee.commands.main import main
from megatron_ee.data.tokenizer import load_tokenizer
from megatron_ee.errors import CheckpointError, DataError, UserError, printable, shown
from megatron_ee.families.registry import read_architecture
from megatron_ee.testing.hostile import (
    ESCAPES,
    Spoil,
    add_pieces,
    instead,
    link,
    make_adapter,
    make_checkpoint,
    make_model,
    make_parallel,
    single_columns,
    tensor,
    with_header,
    write,
)
from megatron_ee.testing.hostile_cases import (
    ADAPTERS,
    CONFIGS,
    DESCRIBED,
    HEADERS,
    MANIFESTS,
    MODELS,
    NOT_FILES,
    NOT_JSON,
    PARALLELS,
)

MEMORY = 256 * 2**20  # bytes that a refusal may take beside what the process has
SECONDS = 3.0


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Whatever takes more than ``MEMORY`` fails."""
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def refusal(read: Callable[[Path], Any], path: Path) -> str:
    """The one line that ``read`` refuses ``path`` with."""
    start = time.process_time()
    with little_memory(), pytest.raises(CheckpointError) as caught:
        read(path)
    assert time.process_time() - start < SECONDS
    text = str(caught.value)
    assert text.isprintable() and len(text) < 2500, text
    assert str(path) in text
    return text


def refuse(
    make: Callable[[Path], Path], spoil: Spoil, words: str, tmp_path: Path, *readers: Callable[[Path], Any]
) -> None:
    """Every one of ``readers`` reads what ``make`` makes, and refuses it once it is spoilt."""
    directory = make(tmp_path / "directory")
    for read in readers:
        read(directory)
    spoil(directory)
    for read in readers:
        assert words in refusal(read, directory)


@pytest.mark.parametrize("case", NOT_JSON)
def test_what_is_not_json(case: str, tmp_path: Path) -> None:
    content, words = NOT_JSON[case]
    refuse(make_model, write("config.json", content), words, tmp_path, read_architecture)


@pytest.mark.parametrize("case", NOT_FILES)
def test_config_that_is_not_a_regular_file(case: str, tmp_path: Path) -> None:
    make, words = NOT_FILES[case]
    refuse(make_model, instead("config.json", make), words, tmp_path, read_architecture)


@pytest.mark.parametrize("case", HEADERS)
def test_headers(case: str, tmp_path: Path) -> None:
    content, words = HEADERS[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content if isinstance(content, bytes) else content())
    assert words in refusal(read_header, path)


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations(case: str, tmp_path: Path) -> None:
    refuse(make_model, *CONFIGS[case], tmp_path, read_architecture, open_model)


@pytest.mark.parametrize("case", MODELS)
def test_models(case: str, tmp_path: Path) -> None:
    spoil, words = MODELS[case]
    of_the_model = words.startswith("unknown tensor") or case in ("integers", "tensor that is nowhere")
    refuse(make_model, spoil, words, tmp_path, open_model, *([] if of_the_model else [HFDirectory.open]))


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests(case: str, tmp_path: Path) -> None:
    refuse(make_checkpoint, *MANIFESTS[case], tmp_path, open_checkpoint)


@pytest.mark.parametrize("case", PARALLELS)
def test_parallel_checkpoints(case: str, tmp_path: Path) -> None:
    refuse(make_parallel, *PARALLELS[case], tmp_path, open_model)


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(case: str, tmp_path: Path) -> None:
    refuse(make_adapter, *ADAPTERS[case], tmp_path, open_adapter)


@pytest.mark.parametrize("case", DESCRIBED)
def test_exits_of_checkpoints(case: str, tmp_path: Path) -> None:
    refuse(make_checkpoint, *DESCRIBED[case], tmp_path, open_adapter)


def test_many_pieces_are_opened_at_once(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "directory")
    add_pieces([1, 20_000], single_columns(20_000))(directory)
    start = time.process_time()
    with little_memory():
        assert open_checkpoint(directory).shape("more") == (1, 20_000)
    assert time.process_time() - start < 2 * SECONDS


def test_names_that_look_alike_are_not_mixed_up(tmp_path: Path) -> None:
    composed, decomposed, cyrillic = "caf\u00e9", "cafe\u0301", "c\u0430fe"
    header = {name: tensor("U8", [1], [i, i + 1]) for i, name in enumerate((composed, decomposed, cyrillic))}
    (tmp_path / "x.safetensors").write_bytes(with_header(header, b"abc"))
    assert list(read_header(tmp_path / "x.safetensors")) == [composed, decomposed, cyrillic]


def test_little_memory_limits_allocations() -> None:
    with little_memory(), pytest.raises(MemoryError):
        bytearray(2 * MEMORY)
    bytearray(2 * MEMORY)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(b"[" * 100_000),
        lambda file: file.write_bytes(b'{"digest": NaN}'),
        lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), "digest": ["a"] * 64})),
        lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), "digest": "A" * 64})),
        lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), "key": "another"})),
        lambda file: os.truncate(file, 2**40),
        lambda file: (file.unlink(), os.mkfifo(file)),
        lambda file: (file.unlink(), file.mkdir()),
        lambda file: (file.unlink(), file.symlink_to("/dev/zero")),
        lambda file: (file.unlink(), file.symlink_to(file.name)),
    ],
)
def test_the_cache_of_digests(spoil: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_EE_CACHE", str(tmp_path / "cache"))
    weights = open_model(make_model(tmp_path / "directory")).weights
    digest = backbone_digest(weights)
    (file,) = (cache_directory() / "backbone-digests").iterdir()
    spoil(file)
    with little_memory():
        assert backbone_digest(weights) == digest


def test_messages_are_one_line_that_a_terminal_only_shows() -> None:
    text = str(UserError(f"{ESCAPES}\udcff\u2028 a\r\nb\tc\0 caf\u00e9 \u6f22 \U0001f600"))
    assert text == "\\x1b[31m\\x07\\u202e\\udcff\\u2028 a\\r b\\tc\\x00 caf\u00e9 \u6f22 \U0001f600"
    long = str(UserError("a" * 10**6 + "the end"))
    assert len(long) < 2500 and long.endswith("the end") and printable(long) == long
    assert len(shown("x" * 10**6)) < 300 and len(shown(10**4000)) < 100
    assert len(shown(json.loads("[" * 500 + "]" * 500))) < 100


@pytest.mark.parametrize("command", ["generate --prompt a --mode full", "evaluate --data {}/x"])
def test_nothing_of_a_file_moves_the_cursor(command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    directory = make_model(tmp_path / f"dir{ESCAPES}")
    for file in directory.glob("*.safetensors"):
        file.rename(directory / f"{ESCAPES}{file.name}")
    (tmp_path / "x.idx").touch()
    assert main([*command.format(tmp_path).split(), "--model", str(directory)]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.endswith("\n") and err[:-1].isprintable()
    assert "\\x1b[31m" in err and "is missing" in err


def convert(directory: Path, to: str) -> int:
    """What would be done, asked of the command."""
    output = str(directory.parent / "out")
    return main(["convert", "--input", str(directory), "--output", output, "--to", to, "--dry-run"])


def test_names_of_files_that_go_along_are_only_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    directory = make_model(tmp_path / "[" / "red]")  # rich would take [/red] for the end of a colour
    (directory / "[red].txt").write_text("")
    assert convert(directory, "hf") == 0
    assert "[red].txt" in capfd.readouterr().out
    (directory / f"{ESCAPES}.txt").write_text("")
    assert convert(directory, "hf") == 1
    out, err = capfd.readouterr()
    assert out == "" and err[:-1].isprintable() and "not a plain file" in err


@pytest.mark.parametrize("make", [link("/etc/passwd"), link("../outside"), os.mkfifo])
def test_nothing_from_elsewhere_goes_along(
    make: Callable[[Path], object], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "outside").write_text("")
    directory = make_model(tmp_path / "directory")
    make(directory / "tokenizer.json")
    assert convert(directory, "parallel") == 1
    assert "tokenizer.json: not a plain file" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_for_a_tokenizer_is_not_run(name: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    code = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"], "AutoConfig": "evil.Config"}}
    (tmp_path / name).write_text(json.dumps({"model_type": "evil", "tokenizer_class": "Tokenizer", **code}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "ran").exists()
