"""YAML of configurations: plain values only, ``1e-4`` is a number, and a repeated key is an error."""

from __future__ import annotations

import re
from typing import Any

import yaml


class YamlProblem(ValueError):
    """A text is not valid YAML.

    Attributes:
        line: where, from 1; None if it is not known.
        problem: what is wrong, on one line. It may contain a part of the text.
    """

    def __init__(self, line: int | None, problem: str) -> None:
        super().__init__(problem if line is None else f"line {line}: {problem}")
        self.line, self.problem = line, problem


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as in PyYAML, but ``1e-4`` is a number, and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key in seen:
                raise yaml.constructor.ConstructorError(problem=f"key {key!r} twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text: mappings, lists and plain values.

    Raises:
        YamlProblem: it is not valid.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506  _Loader is a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise YamlProblem(mark.line + 1 if mark else None, problem) from None
