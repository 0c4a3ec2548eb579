"""What import-linter does not see of the package's structure: a reader finds one class by a name."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_ee"


def classes(directory: Path) -> dict[str, list[str]]:
    """Files by the name of a class that they define, outside functions or in them."""
    found = defaultdict(list)
    for path in sorted(directory.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(str(path.relative_to(directory)))
    return found


def test_no_two_classes_have_one_name() -> None:
    found = classes(PACKAGE)
    assert len(found) > 100
    twice = {name: files for name, files in found.items() if len(files) > 1}
    assert not twice, "\n".join(f"{name}: {', '.join(files)}" for name, files in sorted(twice.items()))


def test_a_second_class_of_a_name_is_found(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("class Plan: ...\nclass Other: ...\n")
    (tmp_path / "two.py").write_text("def make():\n    class Plan: ...\n")
    assert classes(tmp_path) == {"Plan": ["one.py", "two.py"], "Other": ["one.py"]}
