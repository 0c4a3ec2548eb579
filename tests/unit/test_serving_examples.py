"""The examples of serving, and the commands and rules in its page: each is accepted by what reads it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.commands.calibrate import parser as calibrate_parser
from megatron_ee.commands.serve import parser
from megatron_ee.config.yaml_text import parse_yaml
from megatron_ee.serving.access import Access
from megatron_ee.serving.rules.rules_file import RulesFile, read_rules

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES, PAGE = ROOT / "examples/serving", ROOT / "docs/serving.md"
UNIT = (EXAMPLES / "megatron-ee.service").read_text(encoding="utf-8")


def blocks(language: str = "") -> list[str]:
    """The page's blocks of code in a language; of shell commands, which name none."""
    found, inside = [], None
    for line in PAGE.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.startswith("```") and inside is None:
            inside = line[3:].strip()
            found.append((inside, ""))
        elif line.startswith("```"):
            inside = None
        elif inside is not None:
            found[-1] = inside, found[-1][1] + line
    return [text for name, text in found if name == language]


def commands() -> Iterator[list[str]]:
    """The command lines of the page, without continuation lines."""
    for block in blocks():
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line.removesuffix(" &"), comments=True)


def test_the_rules_are_valid_and_those_of_the_page_are_a_part_of_them() -> None:
    rules = read_rules(EXAMPLES / "rules.yaml")
    assert rules.default is not None and rules.default.task == "inquiries"
    assert rules.keys["back-office"].priority == "important" and not rules.may_choose
    [shown] = [RulesFile.model_validate(parse_yaml(each)) for each in blocks("yaml") if "default:" in each]
    assert (shown.default, shown.important, shown.keys) == (rules.default, rules.important, rules.keys)


def test_the_keys_of_the_page_are_valid_once_they_are_keys(tmp_path: Path) -> None:
    [shown] = [each for each in blocks("yaml") if "requests_per_minute" in each]
    path = tmp_path / "keys.yaml"
    path.write_text(shown.replace("...", "0123456789abcdef"))
    path.chmod(0o600)
    assert Access(path).names == ("website", "back-office")


def test_the_page_makes_a_valid_key_file(tmp_path: Path) -> None:
    [script] = [each for each in blocks() if each.startswith("umask")]
    stand_in = tmp_path / "openssl"
    stand_in.write_text("#!/bin/sh\nhead -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \\n'\n")
    stand_in.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", script], cwd=tmp_path, check=True, env=environment)
    assert Access(tmp_path / "keys.yaml").names == ("website", "back-office")


def test_the_commands_of_the_page_are_accepted() -> None:
    found = [words for words in commands() if words[:2] == ["megatron-ee", "serve"]]
    assert len(found) == 2
    served = [parser().parse_args(words[2:]) for words in found]
    assert served[1].audit == 0.02 and served[1].host == "0.0.0.0" and served[1].rules == Path("rules.yaml")
    [calibrated] = [words for words in commands() if words[:2] == ["megatron-ee", "calibrate"]]
    assert calibrate_parser().parse_args(calibrated[2:]).output == served[1].calibration[0]
    [container] = [words for words in commands() if words[:2] == ["docker", "run"]]
    image = container.index("megatron-ee-serve")
    arguments = parser().parse_args(container[image + 1 :])
    assert arguments.api_key_file == Path("keys.yaml")
    assert arguments.calibration and arguments.adapter is not None, "a certificate names the exits that it holds for"
    assert int(container[:image][container.index("--stop-timeout") + 1]) > arguments.drain_seconds + 10


def test_the_unit_starts_the_server_and_gives_it_time_to_end() -> None:
    line = re.search(r"^ExecStart=(.*?[^\\])\n", UNIT, re.DOTALL | re.MULTILINE)[1]  # type: ignore[index]
    words = shlex.split(line.replace("\\\n", " "))
    assert words[0].endswith("/bin/megatron-ee") and words[1] == "serve"
    arguments = parser().parse_args(words[2:])
    [seconds] = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)
    assert int(seconds) > arguments.drain_seconds + 10
    [state] = re.findall(r"^StateDirectory=(.+)$", UNIT, re.MULTILINE)
    assert arguments.exit_log.parent == Path("/var/lib") / state
    assert "ExecReload=/bin/kill -HUP $MAINPID" in UNIT and arguments.api_key_file is not None


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_systemd_knows_the_keys_of_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "megatron-ee.service"
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT, flags=re.MULTILINE))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60)
    assert str(unit) not in done.stderr and unit.name not in done.stderr, done.stderr


def test_the_image_is_everything_without_a_target_and_the_server_with_it() -> None:
    stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    names = [stage.splitlines()[0].split(" AS ")[1] for stage in stages]
    assert names == ["base", "serve", "all"]
    assert 'ENTRYPOINT ["megatron-ee", "serve"]' in stages[1] and re.search(r"^USER \d", stages[1], re.MULTILINE)
    assert 'ENTRYPOINT ["megatron-ee"]' in stages[2] and "USER" not in stages[2]


TORCHRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$RECORD/arguments"
for rank in 0 1; do
    LOCAL_RANK=$rank bash -c '
        trap "echo reloaded >>$RECORD/hup-$LOCAL_RANK" HUP
        trap "echo ended >$RECORD/term-$LOCAL_RANK; exit 0" TERM
        touch "$RECORD/started-$LOCAL_RANK"
        for ((tick = 0; tick < 400; tick++)); do sleep 0.05; done
        exit 5' &
done
trap 'kill -TERM $(jobs -p)' TERM
while [ -n "$(jobs -rp)" ]; do wait -n || true; done
exit 0
"""


def test_the_batch_script_passes_on_what_slurm_signals(tmp_path: Path) -> None:
    script = EXAMPLES / "serve.sbatch"
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)
    assert "#SBATCH --signal=B:TERM@60" in script.read_text()
    (tmp_path / "torchrun").write_text(TORCHRUN)
    (tmp_path / "torchrun").chmod(0o755)
    environment = os.environ | {
        **{"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(tmp_path)},
        **{"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "4", "SLURM_GPUS_ON_NODE": "2"},
    }
    line = ["bash", str(script), "--model", "my model", "--tensor", "2"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Under nohup SIGHUP is ignored, and a shell cannot trap what is ignored when it starts.
    with subprocess.Popen(line, env=environment, **pipes, preexec_fn=hear_sighup) as process:
        wait_for(tmp_path / "started-0", tmp_path / "started-1")
        process.send_signal(signal.SIGUSR2)
        wait_for(tmp_path / "hup-0")
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, ""), errors
    assert "job 7" in out and not (tmp_path / "hup-1").exists()
    assert (tmp_path / "term-0").exists() and (tmp_path / "term-1").exists()
    words = (tmp_path / "arguments").read_text().splitlines()
    arguments = parser().parse_args(words[words.index("serve") + 1 :])
    assert (arguments.model, arguments.tensor) == (Path("my model"), 2)
    [ahead] = re.findall(r"TERM@(\d+)", script.read_text())
    [given] = re.findall(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", script.read_text())
    assert arguments.drain_seconds < int(given) < int(ahead)


def hear_sighup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 20
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, [path.name for path in paths if not path.exists()]
        time.sleep(0.02)


def test_the_batch_script_asks_for_the_model() -> None:
    done = subprocess.run(["bash", EXAMPLES / "serve.sbatch"], capture_output=True, text=True)
    assert done.returncode == 2 and "which model?" in done.stderr
