"""Builds a ``RunConfig`` from a YAML file and dotted overrides.

jsonargparse writes the help, fills in defaults and builds the dataclasses. This module first checks the user's values,
because jsonargparse is lenient (it reads ``steps: '10'`` as 10), reports errors in unions over several lines, and does
not support items of lists (``--exits.0.layer 4``).
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from math import isfinite
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_ee.config.schema import CorpusConfig, ExitConfig, RunConfig, StageConfig
from megatron_ee.config.yaml_text import YamlProblem, parse_yaml
from megatron_ee.errors import ConfigError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the YAML file ``path``, apply ``overrides`` in order, and build the configuration.

    Args:
        path: YAML file with the blocks of ``RunConfig``.
        overrides: as on the command line: ``--optimizer.lr 3e-4``, ``--optimizer.lr=3e-4``, ``--exits.0.layer 4``
            (items of a list count from 0), ``--exits '[{layer: 4}]'``. Values are YAML.

    Raises:
        ConfigError: one line that names the key (or file and line) and the possible values.
    """
    values = read_yaml(Path(path))
    for key, text in _pairs(overrides):
        _override(values, key, text)
    return config_from_dict(values)


def config_from_dict(values: dict[str, Any]) -> RunConfig:
    """The configuration in ``values`` (nested dicts and lists, as in YAML or JSON).

    Raises:
        ConfigError: as ``load_config``.
    """
    _check(RunConfig, values, "")
    from jsonargparse import ArgumentError

    parser = _parser()
    try:
        config = parser.instantiate(parser.parse_object(copy.deepcopy(values)))  # jsonargparse changes its argument
    except ArgumentError as error:
        raise ConfigError(" ".join(str(error).split())) from None
    return RunConfig(**{field.name: config[field.name] for field in dataclasses.fields(RunConfig)})


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Every value of ``config``, defaults included, in types of JSON and YAML. ``config_from_dict`` reads it back."""
    return dataclasses.asdict(config)


def parse_exits(text: str, key: str) -> list[ExitConfig]:
    """Parse a YAML list of at least one exit, in the form of a configuration.

    Raises:
        ConfigError: as ``load_config``, naming ``key``.
    """
    values = _parse(text, list[ExitConfig], key)
    _check(list[ExitConfig], values, key)
    if not values:
        raise ConfigError(f"{key}: at least one exit is needed, such as [{{layer: 8}}]")
    return [ExitConfig(**value) for value in values]


def config_help() -> str:
    """The configuration's keys with description, type and default, as text for ``--help``."""
    parser = _parser()
    parser.add_class_arguments(ExitConfig, "exits.N", help="one exit; N counts from 0")
    parser.add_class_arguments(CorpusConfig, "data.train.N", help="one corpus of data.train or data.validation")
    parser.add_class_arguments(StageConfig, "parallel.layout.N", help="one stage of a layout; N counts from 0")
    text = parser.format_help()
    text = text[text.index("--exits [") :]  # the text before belongs to the parser, not to the configuration
    # Entries for whole blocks and for jsonargparse's --X.help only repeat the groups.
    text = re.sub(r"^  --\S+ CONFIG\s+Path to a configuration file\.\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^  --\S+\.help\s+Show the help for \w+ and exit\.\n", "", text, flags=re.MULTILINE)
    text = re.sub(r", --[\w.]+\+ \S+", "", text)
    return f"exits:\n  {text}"


def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(add_help=False, exit_on_error=False, usage="")
    parser.add_class_arguments(RunConfig, as_group=False)
    return parser


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping at the top of the YAML file ``path``.

    Raises:
        ConfigError: not found, not UTF-8, not YAML (with the line number), or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as text: {error}") from None
    try:
        values = parse_yaml(text)
    except YamlProblem as error:
        line = "" if error.line is None else f"{error.line}:"
        raise ConfigError(f"{path}:{line} not valid YAML: {error.problem}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys such as {_some_keys(RunConfig)}, found {_show(values)}")
    return values


def _pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of each override."""
    words = iter(overrides)
    for word in words:
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"{word!r}: expected an override such as --optimizer.lr 3e-4")
        key, equals, text = word[2:].partition("=")
        if not equals:
            text = next(words, "--")
            if text.startswith("--"):
                _locate(RunConfig, _path(key))  # report a misspelt key first
                raise ConfigError(f"{key}: --{key} needs a value")
        yield key, text


def _path(key: str) -> list[str]:
    """The parts of ``exits.0.layer`` or ``exits[0].layer``."""
    return re.sub(r"\[(\d+)\]", r".\1", key).split(".")


def _override(values: dict[str, Any], key: str, text: str) -> None:
    """Set the dotted ``key`` in ``values``. A mapping is merged into an existing mapping."""
    path = _path(key)
    kind = _locate(RunConfig, path)
    here: Any = values
    for depth, part in enumerate(path[:-1]):
        if isinstance(here, dict):
            here = here.setdefault(part, {})
        else:
            here = here[_index(here, part, _join(path[:depth]))]
        if not isinstance(here, (dict, list)):
            raise ConfigError(f"{_join(path[: depth + 1])}: the file has {_show(here)} here, which has no keys to set")
    value = _parse(text, kind, key)
    if isinstance(here, list):
        here[_index(here, path[-1], _join(path[:-1]))] = value
    elif isinstance(value, dict) and isinstance(here.get(path[-1]), dict):
        here[path[-1]] |= value
    else:
        here[path[-1]] = value


def _index(items: list[Any], part: str, key: str) -> int:
    if not part.isdecimal():
        raise ConfigError(f"{key}.{part}: {key} is a list; name an item by its number, such as --{key}.0")
    if int(part) >= len(items):
        raise ConfigError(f"{key}[{part}]: the configuration has {len(items)} items here, counted from 0")
    return int(part)


def _parse(text: str, kind: Any, key: str) -> Any:
    """The value of an override: text if ``kind`` is text (a path may look like a number), else YAML."""
    choices = _choices(kind)
    takes_text = int not in choices and any(choice is str or get_origin(choice) is Literal for choice in choices)
    takes_list = any(get_origin(choice) is list for choice in choices)
    if takes_text and not text.lstrip().startswith(("{", "[") if takes_list else "{"):
        return text
    try:
        return parse_yaml(text)
    except YamlProblem as error:
        raise ConfigError(f"{key}: {text!r} is not valid YAML: {error.problem}") from None


def _choices(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _locate(kind: Any, path: list[str]) -> Any:
    """The type at ``path`` below ``kind``; ConfigError if there is no such key."""
    for depth, part in enumerate(path):
        choices = _choices(kind)
        block = next((choice for choice in choices if dataclasses.is_dataclass(choice)), None)
        items = next((get_args(choice)[0] for choice in choices if get_origin(choice) is list), None)
        if items is not None:
            kind = items
        elif block is not None:
            hints = get_type_hints(block)
            if part not in hints:
                raise _unknown(part, list(hints), _join(path[:depth]))
            kind = hints[part]
        else:
            key = _join(path[:depth])
            raise ConfigError(f"{_join(path[: depth + 1])}: unknown key; {key} is {_describe(kind)} and has no keys")
    return kind


def _check(kind: Any, value: Any, key: str) -> None:
    """ConfigError, naming ``key``, unless ``value`` is strictly of type ``kind``."""
    choices = _choices(kind)
    if dataclasses.is_dataclass(kind):
        _check_block(kind, value, key)
    elif get_origin(kind) is list:
        if not isinstance(value, list):
            raise ConfigError(f"{key}: expected a list, such as [a, b], not {_show(value)}")
        for index, item in enumerate(value):
            _check(get_args(kind)[0], item, f"{key}[{index}]")
            if item == {}:
                raise ConfigError(f"{key}[{index}]: is empty; give keys such as {_some_keys(get_args(kind)[0])}")
    elif len(choices) > 1 and (structure := _structure(choices, value)) is not None:
        _check(structure, value, key)
    elif not any(_is(choice, value) for choice in choices):
        words = [word for choice in choices for word in get_args(choice)]
        raise ConfigError(f"{key}: must be {_describe(kind)}, not {_show(value)}{_meant(value, words)}")


def _structure(choices: Sequence[Any], value: Any) -> Any:
    """The block or list type among ``choices`` that fits the form of ``value``; None if none does."""
    blocks = (choice for choice in choices if dataclasses.is_dataclass(choice) and isinstance(value, dict))
    lists = (choice for choice in choices if get_origin(choice) is list and isinstance(value, list))
    return next(chain(blocks, lists), None)


def _check_block(kind: Any, value: Any, key: str) -> None:
    if not isinstance(value, dict):
        raise ConfigError(f"{key}: expected keys such as {_some_keys(kind)}, not {_show(value)}")
    hints = get_type_hints(kind)
    for name in value:
        if name not in hints:
            raise _unknown(str(name), list(hints), key)
    for field in dataclasses.fields(kind):
        name = f"{key}.{field.name}".lstrip(".")
        if field.name in value:
            _check(hints[field.name], value[field.name], name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{name}: missing; it has no default ({_describe(hints[field.name])})")


def _is(kind: Any, value: Any) -> bool:
    """Whether ``value`` is strictly of the plain type ``kind``: true is not a number, 1.0 is not a whole number."""
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
    return type(value) is kind


def _unknown(name: str, known: list[str], block: str) -> ConfigError:
    key = f"{block}.{name}".lstrip(".")
    return ConfigError(f"{key}: unknown key{_meant(name, known) or '; possible: ' + ', '.join(known)}")


def _meant(value: Any, known: Sequence[Any]) -> str:
    """``; did you mean 'X'?`` if a known name is similar."""
    near = difflib.get_close_matches(str(value), [word for word in known if isinstance(word, str)], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind)) if len(get_args(kind)) < 3 else "one of " + ", ".join(get_args(kind))
    if get_origin(kind) is list:
        return "a list"
    if dataclasses.is_dataclass(kind):
        return f"keys such as {_some_keys(kind)}"
    if len(_choices(kind)) > 1:
        return "a number" if float in _choices(kind) else " or ".join(_describe(choice) for choice in _choices(kind))
    return NAMES[kind]


def _some_keys(kind: Any) -> str:
    return ", ".join(field.name for field in dataclasses.fields(kind)[:3])


def _show(value: Any) -> str:
    """The value as the user may have written it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _join(path: Sequence[str]) -> str:
    """``exits[0].layer`` from its parts."""
    return "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in path).lstrip(".")
