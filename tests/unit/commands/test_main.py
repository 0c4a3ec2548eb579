"""The console script as a process: exit status, the one line of an error, and what --help costs."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ee import __version__
from megatron_ee.commands.main import COMMANDS, main

ROOT = Path(__file__).resolve().parents[3]
HEAVY = ("torch", "transformers", "megatron.core", "numpy", "matplotlib", "tensorboard")


def command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "megatron_ee", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=cwd, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "megatron-ee: error: no command given; possible: quickstart, prepare-data, regenerate, convert, probe"),
        (["tuen"], 2, "megatron-ee: error: unknown command 'tuen'; did you mean 'tune'?"),
        (["tune"], 2, "megatron-ee tune: error: the following arguments are required: --config, --output (see "),
        (
            ["tune", "--config", "no.yaml", "--output", "o"],
            2,
            "megatron-ee tune: error: no.yaml: no such configuration",
        ),
        (
            ["tune", "--config", "no.yaml", "--output", "o", "--resume", "--init-adapter", "a"],
            2,
            "megatron-ee tune: error: argument --init-adapter: not allowed with argument --resume",
        ),
        (
            ["generate", "--model", "m", "--prompt", "p", "--mode", "fast"],
            2,
            "megatron-ee generate: error: argument --mode: invalid choice: 'fast'",
        ),
        (
            ["generate", "--model", "m", "--adapter", "a", "--prompt", "p", "--threshold", "0"],
            2,
            "megatron-ee generate: error: --threshold: must be above 0, not 0.0",
        ),
        (
            ["generate", "--model", "m", "--prompt", "p", "--threshold", "nan"],
            2,
            "megatron-ee generate: error: --threshold: must be a finite number, not nan",
        ),
        (
            ["generate", "--model", "m", "--prompt", "p", "--max-tokens", "x"],
            2,
            "megatron-ee generate: error: argument --max-tokens: must be a whole number, not 'x'",
        ),
        (
            ["prepare-data", "--input", "a", "--tokenizer", "t", "--output", "o", "--workers", "0"],
            2,
            "megatron-ee prepare-data: error: argument --workers: must be at least 1, not 0",
        ),
        (
            ["prepare-data", "--input", "a", "--tokenizer", "t", "--output", "o", "--chat", "--text-key", "k"],
            2,
            "megatron-ee prepare-data: error: --text-key: cannot be used with --chat",
        ),
        (
            ["evaluate", "--model", "m", "--dat", "d"],
            2,
            "megatron-ee evaluate: error: one of the arguments --data --tasks is required",
        ),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1


CONFIG = "model: {path: here}\nexits: [{layer: 1}]\ndata: {train: [here], validation: [here]}\n"
INPUTS = {
    "prepare-data --input here --tokenizer here --output out --chat --chat-template here": (
        *("--input", "--tokenizer", "--chat-template"),
    ),
    "convert --input here --model here --adapter here --config here --to hf --output out": (
        *("--input", "--model", "--adapter", "--config"),
    ),
    "tune --config run.yaml --model.path here --output out --init-adapter here": (
        *("--config", "--model.path", "--init-adapter"),
    ),
    "tune --config run.yaml --output out --data.train [here] --data.validation [here]": (
        *("--data.train", "--data.validation"),
    ),
    "plan --config run.yaml --model.path here": ("--config", "--model.path"),
    "evaluate --model here --adapter here --data here --probe here": ("--model", "--adapter", "--data", "--probe"),
    "calibrate --model here --adapter here --data here --corpus here --risk 0.1 --delta 0.1 --output out": (
        *("--model", "--adapter", "--data", "--corpus"),
    ),
    "generate --model here --prompts here --adapter here": ("--model", "--prompts", "--adapter"),
    "generate --model here --prompt a --calibration here": ("--calibration",),
    "generate --model here --prompt a --draft-vocabulary 4 --draft-corpus here": ("--draft-corpus",),
    "regenerate --model here --prompts here --output out": ("--model", "--prompts"),
    "probe --model here --data here": ("--model", "--data"),
    "drift here --calibration here": ("--calibration",),
    "exits-report here": ("exits-report",),
    "report --run here --evaluation here --calibration here --drift here --plan here --output out.html": (
        *("--run", "--evaluation", "--calibration", "--drift", "--plan"),
    ),
    "serve --model here --adapter here --calibration here --rules here --api-key-file here": (
        *("--model", "--adapter", "--calibration", "--rules", "--api-key-file"),
    ),
    "quickstart --base here --data here --out out": ("--base", "--data"),
    "quickstart --base here --prompts here --out out": ("--prompts",),
}
"""Command lines, and their options that name what is read."""


@pytest.mark.parametrize(("line", "option"), [(line, option) for line, options in INPUTS.items() for option in options])
def test_an_input_that_does_not_exist_is_named_with_status_2(
    line: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here.idx").touch()
    (tmp_path / "run.yaml").write_text(CONFIG)
    words = line.split()
    place = words.index(option) + 1
    words[place] = "[none]" if words[place].startswith("[") else "none"
    before = sorted(tmp_path.iterdir())
    assert main(words) == 2
    out, err = capsys.readouterr()
    named = (
        "no such configuration file"
        if option == "--config" and words[0] in ("plan", "tune")
        else option.removeprefix("--")
    )
    assert out == "" and err.count("\n") == 1 and named in err, err
    assert "no such" in err and "none" in err and sorted(tmp_path.iterdir()) == before


def test_all_commands_are_among_these() -> None:
    # doctor reads none, and harness passes its arguments on.
    assert {line.split()[0] for line in INPUTS} == set(COMMANDS) - {"doctor", "harness"}


@pytest.mark.smoke
def test_a_configuration_mistake_ends_the_process_with_2(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {path: m}\nexits: [{layer: 1}]\ndata: {train: [c]}\n")
    arguments = ["tune", "--config", "run.yaml", "--optimizer.lrr", "3", "--output", "out"]
    result = command(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "megatron-ee tune: error: optimizer.lrr: unknown key; did you mean 'lr'?\n"
    result = command("tune", "--config", "run.yaml", "--output=out", "--optimizer.lr", "-1e-4", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "megatron-ee tune: error: model.path: no such directory: m\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.smoke
def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"megatron-ee {__version__}\n"
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n  {name} " in out
    assert main(["tune", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--init-adapter DIR" in out
    assert "--optimizer.lr LR     peak learning rate." in out


def test_every_command_exists() -> None:
    for module, _ in COMMANDS.values():
        assert importlib.util.find_spec(f"megatron_ee.commands.{module}"), module


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys, json\nfrom megatron_ee.commands.main import main\nstatus = main(sys.argv[1:])\n"
        "print(json.dumps([status, sorted(sys.modules)]), file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    status, modules = json.loads(result.stderr)
    assert status == 0
    assert not {name for name in modules if name in HEAVY}
    assert result.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["tune", "--help"]])
def test_a_reader_that_goes_away_is_no_traceback(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # before the command starts: a busy machine may otherwise let it finish first
    with subprocess.Popen(
        [sys.executable, "-m", "megatron_ee", *arguments],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
    ) as process:
        os.close(writer)
        _, errors = process.communicate(timeout=120)
    # argparse itself ignores a failed write of more than one buffer.
    assert process.returncode in ((0, 141) if arguments[0] == "tune" else (141,))
    assert errors == b""


@pytest.mark.parametrize("arguments", [["generate", "--model", "m", "--prompt", "p"], ["tune", "--config", "run.yaml"]])
def test_signals_are_handled_before_torch_is_imported(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {path: .}\nexits: [{layer: 1}]\ndata: {train: [c]}\n")
    (tmp_path / "c.idx").touch()
    code = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os._exit(40 + all(callable(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGUSR1)))
sys.meta_path.insert(0, Finder())
from megatron_ee.commands.main import main
main(sys.argv[1:] + ["--output", "o"] * (sys.argv[1] == "tune"))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", code, *arguments]
    assert subprocess.run(line, cwd=tmp_path, env=environment, timeout=120).returncode == 41


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_a_command_with_its_status(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_ee.commands.generate.run", lambda arguments: signal.raise_signal(number))
    assert main(["generate", "--model", "m", "--prompt", "p"]) == 128 + number
    assert capsys.readouterr().err == f"megatron-ee generate: interrupted by {number.name}\n"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_text_beyond_the_encoding_of_stdout_is_replaced(errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii", errors=errors))
    monkeypatch.setattr("megatron_ee.commands.generate.run", lambda arguments: print("caf\u00e9 \udce9") or 0)
    assert main(["generate", "--model", "m", "--prompt", "p"]) == 0
    assert raw.getvalue() == b"caf? ?\n"


@pytest.mark.parametrize("script", ["tune", "plan", "evaluate", "generate", "preprocess_data"])
def test_tools_work_from_anywhere_without_installation(script: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [sys.executable, str(ROOT / "tools" / f"{script}.py"), "--help"]
    result = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    name = "prepare-data" if script == "preprocess_data" else script
    assert result.stdout.startswith(f"usage: megatron-ee {name} ")
