"""No code from a checkpoint is ever run: what ruff has no rule for. Its rules are in ``pyproject.toml``.

An honest author is reminded; who hides a call gets past.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BANNED = re.compile(
    r"""(trust_remote_code|allow_pickle)["']?\]?\s*(=|:)\s*(?!False\b)"""
    r"""|(?<![\w.])(__import__|compile|exec)\s*\("""
    r"""|import_module\((?!["']|f["']megatron_ee\.)"""
)
REQUIRED = "importlib.import_module(modules.get(name, "


def lines() -> Iterator[tuple[str, str]]:
    """``FILE:LINE`` and content of every line of Python that users run."""
    for top in ("megatron_ee", "tools", "examples", "benchmarks"):
        for path in sorted((ROOT / top).rglob("*.py")):
            if "out" not in path.relative_to(ROOT).parts:  # what the quickstart makes
                for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                    yield f"{path.relative_to(ROOT)}:{number}", line


def test_nothing_banned_is_used() -> None:
    found = [f"{place}: {line.strip()}" for place, line in lines() if BANNED.search(line)]
    # Its names are those that the installed package's own metadata requires.
    found = [line for line in found if not line.startswith("megatron_ee/commands/machine.py") or REQUIRED not in line]
    assert not found, "\n".join(found)
    files = {place.partition(":")[0] for place, _ in lines()}
    assert {"tools/tune.py", "megatron_ee/checkpoint/store.py", "benchmarks/pipeline.py"} <= files


@pytest.mark.parametrize(
    "line",
    [
        "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)",
        "f(**{'trust_remote_code': True})",
        "options['trust_remote_code'] = True",
        "np.load(path, allow_pickle=True)",
        "importlib.import_module(name)",
        "importlib.import_module(f'{name}.x')",
        "__import__('x')",
        "compile(text, 'x', 'exec')",
    ],
)
def test_a_violation_is_noticed(line: str) -> None:
    assert BANNED.search(line)


@pytest.mark.parametrize(
    "line",
    [
        "AutoTokenizer.from_pretrained(path, trust_remote_code=False)",
        "np.load(path, mmap_mode='r', allow_pickle=False)",
        "torch.compile(model)",
        "importlib.import_module(f'megatron_ee.commands.{name}')",
    ],
)
def test_the_rest_passes(line: str) -> None:
    assert not BANNED.search(line)
