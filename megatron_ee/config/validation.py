"""One validator for values from users and files: strict pydantic models, with one-line errors.

``Strict`` is the base class of such models, and ``validated`` reads values into one. Types are strict: '1' and true are
not numbers, 1.0 is not a whole number, NaN and infinity are refused, and unknown keys are errors. A model's own check
raises ``ValueError`` in a ``field_validator`` or ``model_validator``. Its text follows the key in the message. A
validator that reads a whole model uses ``nested``.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError

from megatron_ee.errors import ConfigError, UserError, shown

T = TypeVar("T")

# Descriptions of the expected value by pydantic's error names. Braces are filled from the error's context.
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_unicode": "text without lone surrogates",
    "string_too_short": "text of {min_length} or more characters",
    "string_too_long": "text of at most {max_length} characters",
    "string_pattern_mismatch": "text like {pattern}",
    "none_required": "null",
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "below {lt}",
    "literal_error": "one of {expected}",
    "list_type": "a list",
    "tuple_type": "a list",
    "sequence_str": "a list",
    "is_instance_of": "a list",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "dict_type": "an object",
    "mapping_type": "an object",
    "model_type": "an object",
    "invalid_key": "a key that is text",
}


class Strict(BaseModel):
    """Base of the models that ``validated`` reads.

    A tuple field accepts a list, as in JSON, if it is declared with ``Field(strict=False)``.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def one_of(names: Collection[str]) -> AfterValidator:
    """Annotation of a text field that must be one of ``names``, which may grow later."""

    def check(value: str) -> str:
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}, not {shown(value)}")
        return value

    return AfterValidator(check)


def validated(kind: type[T], values: Any, *, where: str = "", error: type[UserError] = ConfigError) -> T:
    """Validate ``values`` and convert them to ``kind``.

    Args:
        kind: a ``Strict`` model, or any other type that pydantic supports.
        values: to validate.
        where: source of the values, such as a file and line; the message starts with it.
        error: class of the raised error.

    Raises:
        UserError: ``error``; its message is one line that names the key and the value.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as problem:
        line = first_problem(problem, kind, values)
        raise error(f"{where}: {line}" if where else line) from None


class NestedError(ValueError):
    """A validator's value is invalid at a key inside it, which follows the value's own key in the message.

    Attributes:
        key: the inner key.
        problem: what is wrong there.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key, self.problem = key, problem


def nested(kind: type[T], values: Any) -> T:
    """``validated`` for use in a validator, whose error then names the whole path of keys.

    Raises:
        ValueError: for pydantic, which goes on to describe it.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        key, problem = _first_problem(error, kind, values)
        raise (NestedError(key, problem) if key else ValueError(problem)) from None


def first_problem(error: ValidationError, kind: Any = None, values: Any = None) -> str:
    """Describe the first problem of an error, unknown keys first: ``key: must be EXPECTED, not VALUE``.

    Args:
        error: from pydantic.
        kind: the validated type. If given, a problem with an unknown key names the known keys.
        values: the validated values. If given, the names of a union's members are left out of the key.
    """
    key, problem = _first_problem(error, kind, values)
    return f"{key}: {problem}" if key else problem


def _first_problem(error: ValidationError, kind: Any, values: Any) -> tuple[str, str]:
    """The key, empty for the whole value, and the description of its problem."""
    problems = [
        (
            each,
            tuple(_path(each["loc"], values, missing=each["type"] == "missing") if values is not None else each["loc"]),
        )
        for each in error.errors(include_url=False)
    ]
    problems.sort(key=lambda problem: problem[0]["type"] != "extra_forbidden")  # otherwise in the order of the fields
    first, path = problems[0]
    # In a union, the member that fits the value's form fails inside the value.
    first, path = max((each for each in problems if each[1][: len(path)] == path), key=lambda each: len(each[1]))
    key, value = _spelt(path), shown(first["input"])
    if first["type"] == "missing":
        return key, "missing"
    if first["type"] == "extra_forbidden":
        return key, f"unknown key{_meant(str(path[-1]), _keys(kind, path[:-1]))}"
    if first["type"] == "value_error":
        reason = first["ctx"]["error"]
        if isinstance(reason, NestedError):
            return f"{key}.{reason.key}".removeprefix("."), reason.problem
        return key, str(reason)
    # Otherwise all members fail at the same place, each with its own problem.
    here = [_expected(each) for each, other in problems if other == path]
    of_key = "its keys " if first["loc"][-1:] == ("[key]",) else ""
    return key, f"{of_key}must be {' or '.join(dict.fromkeys(here))}, not {value}"


def _expected(problem: Any) -> str:
    words = _EXPECTED.get(problem["type"])
    if words is None:
        return str(problem["msg"]).removeprefix("Input should be ").removeprefix("a valid ")
    return words.format(**{key: _plain(value) for key, value in problem.get("ctx", {}).items()})


def _plain(value: Any) -> Any:
    """Numbers in plain form: 1 for 1.0."""
    return f"{value:.15g}" if isinstance(value, float) else value


def _path(loc: tuple[int | str, ...], values: Any, *, missing: bool) -> Iterator[int | str]:
    """The parts of ``loc`` that are keys and indices of ``values``, and the last one if it is ``missing`` there.

    Other parts name the members of a union.
    """
    for index, part in enumerate(loc):
        try:
            # JSON's keys are texts, also where the field's are whole numbers.
            values = values[str(part) if isinstance(values, dict) and part not in values else part]
        except (LookupError, TypeError):
            if not (missing and index == len(loc) - 1):
                continue
        yield part


def _spelt(path: Sequence[int | str]) -> str:
    """``exits[0].layer`` from its parts."""
    names = ((f"[{part}]" if isinstance(part, int) else f".{part}") for part in path)
    text = "".join(names).removeprefix(".")
    return text if text.isprintable() and len(text) <= 80 else shown(text)


def _keys(kind: Any, path: Sequence[int | str]) -> list[str]:
    """The known keys at ``path`` within ``kind``."""
    for part in path:
        kind = _item(kind) if isinstance(part, int) else getattr(_fields(kind).get(part), "annotation", None)
    return list(_fields(kind))


def _fields(kind: Any) -> dict[str, Any]:
    """The fields of a model, or of the model in a union."""
    for each in (kind, *get_args(kind)):
        if isinstance(each, type) and issubclass(each, BaseModel):
            return each.model_fields
    return {}


def _item(kind: Any) -> Any:
    """The item type of a list, or of the list in a union."""
    inner = [each for each in get_args(kind) if each is not Ellipsis]
    return next((_item(each) for each in inner if get_args(each)), inner[0] if inner else None)


def _meant(name: str, known: Sequence[str]) -> str:
    """A hint for a misspelt key: a similar known key, or all known keys."""
    near = difflib.get_close_matches(name[:80], known, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; possible: {', '.join(known)}" if known else ""
