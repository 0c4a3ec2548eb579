from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ee import progress

SCRIPT = """
import time
from megatron_ee.progress import track
with track(4, "steps", "tuning", rate_unit="tokens") as bar:
    for step in range(4):
        time.sleep(0.15)
        bar.describe(f"tuning, loss {step}.5")
        bar.advance(1, 1000)
        if step == 1:
            bar.note("[saved] step-2")
print("result")
"""


def run(**streams: int) -> subprocess.Popen[str]:
    root = Path(progress.__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        text=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
        **streams,  # type: ignore[call-overload]
    )


def test_lines_where_there_is_no_terminal() -> None:
    process = run(stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert out == "result\n"
    note, last = err.splitlines()
    assert note == "[saved] step-2"
    match = re.fullmatch(r"tuning, loss 3.5: 4/4 steps, ([\d,]+) tokens/s", last)
    assert match and 3000 < int(match[1].replace(",", "")) < 7000


def test_a_bar_on_a_terminal() -> None:
    master, slave = pty.openpty()
    process = run(stderr=slave)
    os.close(slave)
    out, _ = process.communicate(timeout=60)
    chunks = []
    while True:
        try:
            chunk = os.read(master, 4096)
        except OSError:
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(master)
    err = b"".join(chunks).decode()
    assert out == "result\n"
    assert "━" in err and "[saved] step-2" in err
    assert "tokens/s" in err and "4/4 steps" in err and "100%" in err and "loss 3.5" in err and "0:00:0" in err


def test_time_between_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with progress.track(10_000_000, "B", "reading", completed=2_000_000) as bar:
        bar.advance(3_000_000)
        bar.advance(5_000_000)
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("reading: 5.0/10.0 MB, ") and "MB/s" in first and first.endswith(" left")
    assert last.startswith("reading: 10.0/10.0 MB") and "left" not in last


def test_silent_processes_count_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.track(3, "steps", "x", enabled=False) as bar:
        bar.advance(3)
        bar.note("unseen")
    assert bar.done == 3
    assert capsys.readouterr() == ("", "")
