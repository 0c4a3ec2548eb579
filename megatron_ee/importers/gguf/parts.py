"""A model in several GGUF files, as llama.cpp splits it: ``NAME-00001-of-00003.gguf`` and so on, in one directory.

The first part has the model's metadata, and every part some of its tensors. Each part states its number and the number
of parts and of tensors in all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ee.errors import CheckpointError, DamagedError, shown
from megatron_ee.importers.gguf.header import Header, TensorInfo, read_header

NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
"""Metadata of a part: its number from 0, the number of parts, and the number of tensors in all parts."""


def read_parts(path: Path) -> Header:
    """Read the header of a GGUF file. If it is a part of a model, read those of all parts, as one header.

    Args:
        path: a whole model, or any of its parts.

    Raises:
        CheckpointError: as for ``read_header``; or a part is missing, or is not of this model. The message names it.
    """
    given = read_header(path)
    count = _stated(given, COUNT, 0)
    if count < 2:
        return given
    number = _stated(given, NUMBER)
    ending = _ending(number, count)
    if not path.name.endswith(ending):
        raise CheckpointError(
            f"{path}: is part {number + 1} of {count} of a model, but its name does not end in {ending}, so the other "
            "parts cannot be found; rename it"
        )
    whole = path.name.removesuffix(ending)
    places = [path.with_name(f"{whole}{_ending(other, count)}") for other in range(count)]
    missing = next((place for place in places if not place.is_file()), None)
    if missing is not None:
        raise CheckpointError(f"{missing}: is missing; {path.name} is one of {count} parts, which must lie together")
    parts = [given if place == path else read_header(place) for place in places]
    for other, part in enumerate(parts):
        _check_part(part, other, parts[0])
    return Header(places[0], parts[0].metadata, _joined(parts))


def _ending(number: int, count: int) -> str:
    return f"-{number + 1:05d}-of-{count:05d}.gguf"


def _stated(part: Header, key: str, default: int | None = None) -> int:
    """A number of the metadata, from 0 on."""
    value = part.metadata.get(key, default)
    if type(value) is not int or value < 0:
        raise DamagedError(f"{part.path}: {key} must be a number from 0 on, not {shown(value)}")
    return value


def _check_part(part: Header, number: int, first: Header) -> None:
    """Refuse a file that is not part ``number`` of the model that ``first`` begins."""
    expected: dict[str, Any] = {**first.metadata, NUMBER: number}
    # A further part repeats none of the model's metadata. If it has some, they must not contradict the first part.
    for key in (NUMBER, COUNT, TENSORS, *(part.metadata if number else ())):
        found = part.metadata.get(key)
        if key in expected and found != expected[key]:
            raise CheckpointError(
                f"{part.path}: is not part {number + 1} of the model in {first.path.name}: {key} is {shown(found)}, "
                f"not {shown(expected[key])}"
            )


def _joined(parts: list[Header]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for part in parts:
        for name, info in part.tensors.items():
            if name in tensors:
                raise CheckpointError(f"{part.path}: tensor {shown(name)} is also in {tensors[name].path.name}")
            tensors[name] = info
    total = _stated(parts[0], TENSORS, len(tensors))
    if total != len(tensors):
        raise CheckpointError(
            f"{parts[0].path}: {TENSORS} is {total}, but the {len(parts)} parts have {len(tensors)} tensors; a part is "
            "of another model"
        )
    return tensors
