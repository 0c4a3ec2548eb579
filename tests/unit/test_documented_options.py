"""Every option that a page of the documentation names belongs to the command or tool that it is about."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

import pytest

from megatron_ee.commands.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*")
OF_OTHERS = {
    *(
        "--nproc-per-node",
        "--signals-to-handle",
        "--nnodes",
        "--rdzv-backend",
        "--rdzv-endpoint",
        "--rdzv-id",
        "--standalone",
    ),
    *("--apply_chat_template", "--batch_size", "--gen_kwargs", "--max_batch_size", "--model_args", "--tasks"),
    *("--signal", "--kill-on-bad-exit", "--gpus-per-task", "--ntasks-per-node", "--nodes", "--gres", "--export"),
    "--stop-timeout",
}
"""Options of torchrun, lm-evaluation-harness, SLURM and Docker."""
PASSED_ON = ("harness",)
"""Commands whose options are those of another program."""


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {name for each in action.choices.values() for name in options_of(each)}
    return found


def options_of_command(name: str) -> set[str]:
    module = importlib.import_module(f"megatron_ee.commands.{COMMANDS[name][0]}")
    return options_of(module.parser())


@pytest.fixture(scope="module")
def by_command() -> dict[str, set[str]]:
    return {name: options_of_command(name) for name in COMMANDS}


def described(path: Path) -> list[str]:
    """The commands of a page, each with its continued lines."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"megatron-ee ([a-z-]+(?: [^`\n#|]*)?)", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_have_the_options_that_they_are_shown_with(page: Path, by_command: dict[str, set[str]]) -> None:
    unknown = [
        f"{words}: {option}"
        for words in described(page)
        if (name := words.split()[0]) in by_command and name not in PASSED_ON
        for option in OPTION.findall(re.sub(r"--[a-z_]+\.[\w.]+", "", words))
        if option not in by_command[name]
    ]
    assert unknown == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_options_in_the_text_exist(page: Path, by_command: dict[str, set[str]]) -> None:
    known = set().union(*by_command.values()) | OF_OTHERS
    scripts = [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*/*.sh"), *ROOT.glob("tools/*.*")]
    for source in (*scripts, ROOT / "tests" / "fake_cuda" / "__main__.py"):
        known |= set(OPTION.findall(source.read_text(encoding="utf-8")))
    inline = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
    found = {option for text in inline for option in OPTION.findall(re.sub(r"--[a-z_]+\.[\w.]+", "", text))}
    assert found - known == set()
