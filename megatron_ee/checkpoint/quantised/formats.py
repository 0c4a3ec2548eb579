"""How the formats of quantised releases are described: the tensors of a weight, their shapes, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_ee.checkpoint.manifest import Box
from megatron_ee.errors import CheckpointError, shown
from megatron_ee.families.quantisation import LARGEST
from megatron_ee.model.packed import Grid, PackedMatrix, join_halves

Shape = tuple[int, ...]
ROWS, COLUMNS = 0, 1
FLOATING = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Axis:
    """A dimension of a tensor that holds a part of a weight.

    Attributes:
        of: the weight's dimension that it follows, ``ROWS`` (output features) or ``COLUMNS`` (input features).
        unit: rows or columns of the weight per element.
        whole: whether every box of the weight needs all of it.
    """

    of: int
    unit: int = 1
    whole: bool = False


@dataclass(frozen=True)
class PartSpec:
    """One of the tensors that hold a weight.

    Attributes:
        dtypes: possible dtypes.
        axes: one for each dimension.
        optional: whether it may be missing.
        allowed: its values. ``nonzero`` and ``positive`` ones, which are scales, must also be finite.
    """

    dtypes: tuple[torch.dtype, ...]
    axes: tuple[Axis, ...]
    optional: bool = False
    allowed: Literal["any", "nonzero", "positive"] = "any"

    def shape(self, weight: Shape) -> Shape:
        """Its shape, for a weight of this shape."""
        return tuple(-(-weight[axis.of] // axis.unit) for axis in self.axes)

    def covering(self, weight: Shape, box: Box) -> Box:
        """The smallest box of it that a box of the weight needs."""
        ends = []
        for axis, size in zip(self.axes, self.shape(weight), strict=True):
            start, stop = box[0][axis.of], box[0][axis.of] + box[1][axis.of]
            ends.append((0, size) if axis.whole else (start // axis.unit, -(-stop // axis.unit)))
        return tuple(first for first, _ in ends), tuple(end - first for first, end in ends)

    def share(self, box: Box) -> Box | None:
        """The elements that begin in a box of the weight. None if there are none, or if another box has them: they
        belong to the first rows if the tensor does not follow rows, and so for columns."""
        offset, shape = box
        followed = {axis.of for axis in self.axes}
        if any(offset[of] for of in (ROWS, COLUMNS) if of not in followed):
            return None
        firsts = [-(-offset[axis.of] // axis.unit) for axis in self.axes]
        ends = [-(-(offset[axis.of] + shape[axis.of]) // axis.unit) for axis in self.axes]
        sizes = [end - first for first, end in zip(firsts, ends, strict=True)]
        return (tuple(firsts), tuple(sizes)) if all(sizes) else None


@dataclass(frozen=True)
class Reader:
    """Reads what a box of a weight needs of its tensors.

    Attributes:
        weight: shape of the whole weight.
        offset: start of the box.
        shape: of the box.
        parts: the tensors' descriptions, by the end of their names; those that exist.
        read: reads a box of a tensor, by the end of its name, into CPU memory, and checks it.
        place: file and name of a tensor, by the end of its name, for messages.
    """

    weight: Shape
    offset: Shape
    shape: Shape
    parts: Mapping[str, PartSpec]
    read: Callable[[str, Box], Tensor]
    place: Callable[[str], str]

    def __contains__(self, name: str) -> bool:
        return name in self.parts

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name, self.parts[name].covering(self.weight, (self.offset, self.shape)))

    @property
    def rows(self) -> int:
        """Rows of the box."""
        return self.shape[ROWS]

    @property
    def columns(self) -> int:
        """Columns of the box."""
        return self.shape[COLUMNS]

    def grid(self, rows: int, columns: int) -> Grid:
        """Blocks of this size, as the box cuts them."""
        return Grid(rows, columns, self.offset[ROWS] % rows, self.offset[COLUMNS] % columns)

    def within(self, values: Tensor, row_unit: int = 1, column_unit: int = 1) -> Tensor:
        """The box's share of ``values``, which start at a multiple of these units."""
        first_row, first_column = self.offset[ROWS] % row_unit, self.offset[COLUMNS] % column_unit
        return values[first_row : first_row + self.rows, first_column : first_column + self.columns]


@dataclass(frozen=True)
class Format:
    """How a weight is stored.

    Attributes:
        text: in words. Equal texts and equal tensors give equal values.
        parts: description of its tensors, by the end of their names, for a weight of a shape.
        pack: reads a box of the weight.
    """

    text: str
    parts: Callable[[Shape], dict[str, PartSpec]]
    pack: Callable[[Reader], PackedMatrix]


@dataclass(frozen=True)
class Method:
    """A method of quantisation.

    Attributes:
        name: ``quant_method`` in ``config.json``.
        formats: reads ``quantization_config`` (the second argument names the file), and returns the formats that its
            weights may have. Raises CheckpointError.
        marks: ends of tensors' names that only quantised weights have.
        carried: ends of names of further tensors of a quantised module. They do not affect the weights, and are copied.
        extra: the same for tensors of other modules, such as scales of the KV cache.
        zero_bias: whether modules may have biases that the family lacks, if these are zero.
        activations: whether ``quantization_config`` also quantises activations or the KV cache.
    """

    name: str
    formats: Callable[[Mapping[str, Any], str], tuple[Format, ...]]
    marks: tuple[str, ...]
    carried: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    zero_bias: bool = False
    activations: Callable[[Mapping[str, Any]], bool] = lambda config: False


def packed(
    codes: Tensor, bits: int, scale: Tensor, zero: Tensor | float, grid: Grid, order: Tensor | None = None
) -> PackedMatrix:
    """A ``PackedMatrix`` from codes ``[rows, columns]``, one per element, and scales and zero points of its blocks."""
    columns = codes.shape[1]
    zero = zero.to(scale.dtype).contiguous() if isinstance(zero, Tensor) else zero
    codes = join_halves(codes) if bits == 4 else codes.contiguous()
    return PackedMatrix(codes, columns, bits, scale.contiguous(), zero, grid, order)


def check_scales(scales: Tensor, allowed: Literal["nonzero", "positive"], place: str) -> None:
    """Check scales of any shape.

    Args:
        scales: of a floating dtype.
        allowed: their values, as in ``PartSpec``.
        place: file and name of their tensor, for the message.

    Raises:
        CheckpointError: one of them is zero, not finite, or negative where this is not allowed.
    """
    good = (scales > 0 if allowed == "positive" else scales != 0).logical_and_(scales.isfinite())
    if not bool(good.all()):
        bad = scales[~good].flatten()[0].item()
        wanted = "above 0" if allowed == "positive" else "not 0"
        raise CheckpointError(f"{place} has a scale of {bad:g}; scales must be finite and {wanted}")


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """The codes in int32 words ``[..., words]``, from the lowest bits on: uint8 ``[..., words * 32 / bits]``."""
    found = words.contiguous().view(torch.uint8)
    return found if bits == 8 else torch.stack((found & 15, found >> 4), dim=-1).flatten(-2)


def read_size(value: object, key: str, where: str, *, none: int | None = None) -> int:
    """Check a group or block size of ``quantization_config``. ``none`` replaces -1 and null, if given.

    Raises:
        CheckpointError: it is not a whole number from 1 to ``LARGEST``.
    """
    if none is not None and (value is None or value == -1):
        return none
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LARGEST:
        raise CheckpointError(f"{where}: {key} must be a whole number from 1 to {LARGEST}, not {shown(value)}")
    return value


def check_one_of(value: object, key: str, possible: Sequence[object], where: str) -> None:
    """Refuse a setting that is not supported.

    Raises:
        CheckpointError: it is none of ``possible``.
    """
    if value not in possible or isinstance(value, bool) != any(isinstance(each, bool) for each in possible):
        listed = ", ".join(str(each) for each in possible)
        raise CheckpointError(f"{where}: {key} {shown(value)} is not supported; supported: {listed}")


def ordered(
    reader: Reader, name: str, size: int, scale: Tensor, zero: Tensor | float
) -> tuple[Tensor, Tensor | float, Grid, Tensor | None]:
    """Apply the tensor that gives each column its group ("act-order").

    Args:
        reader: of the box.
        name: end of the tensor's name. If it does not exist, groups are contiguous.
        size: columns of a group.
        scale: ``[rows, groups]``, of all groups.
        zero: the same, or one number.

    Returns:
        Scales and zero points, the grid, and the groups of the columns. If groups are contiguous, only those of the
        box, and None.

    Raises:
        CheckpointError: a group does not exist.
    """
    first, groups = reader.offset[COLUMNS], scale.shape[1]
    order = reader[name].to(torch.int32) if name in reader else None
    contiguous = torch.arange(first, first + reader.columns, dtype=torch.int32) // size
    if order is None or torch.equal(order, contiguous):
        run = slice(first // size, -(-(first + reader.columns) // size))
        return scale[:, run], zero[:, run] if isinstance(zero, Tensor) else zero, reader.grid(1, size), None
    if int(order.min()) < 0 or int(order.max()) >= groups:
        raise CheckpointError(
            f"{reader.place(name)} has groups {int(order.min())} to {int(order.max())}, not 0 to {groups - 1}"
        )
    return scale, zero, Grid(1, size), order
