"""The quantised weights of a release: found by their tensors' names, checked, and read in boxes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_ee.checkpoint.manifest import Box
from megatron_ee.checkpoint.quantised.formats import Format, PartSpec, Reader, Shape, check_scales
from megatron_ee.checkpoint.quantised.registry import MARKS, METHODS, Quantisation
from megatron_ee.checkpoint.tensors import StoredTensor
from megatron_ee.errors import CheckpointError
from megatron_ee.model.packed import PackedMatrix

EXPANDED = 2**24
"""Elements of a weight that are read and expanded at a time."""


@dataclass(frozen=True)
class QuantisedWeight:
    """A matrix of a release, stored in several tensors.

    Attributes:
        name: its released name, as if it were one tensor.
        shape: ``[out, in]``.
        format: how it is stored.
        parts: its tensors, by the end of their names.
    """

    name: str
    shape: Shape
    format: Format
    parts: Mapping[str, StoredTensor]

    def stored(self) -> dict[str, StoredTensor]:
        """Its tensors by their released names."""
        prefix = self.name.removesuffix("weight")
        return {prefix + end: tensor for end, tensor in self.parts.items()}

    def shares(self, box: Box) -> Iterator[tuple[str, StoredTensor, Box]]:
        """Yield the share of each tensor that belongs to a box of the weight, by its released name.

        Boxes that cover the weight without overlap have shares that cover its tensors without overlap.
        """
        parts = self.format.parts(self.shape)
        for name, end in zip(self.stored(), self.parts, strict=True):
            tensor, share = self.parts[end], parts[end].share(box)
            if share is not None:
                yield name, tensor, share if parts[end].axes else ((0,) * len(tensor.shape), tensor.shape)

    def pack(self, offset: Sequence[int], shape: Sequence[int]) -> PackedMatrix:
        """Read a box into CPU memory, without expanding it.

        Raises:
            CheckpointError: a file cannot be read, or a scale has a value that its format does not allow.
        """
        described = {end: part for end, part in self.format.parts(self.shape).items() if end in self.parts}
        read = partial(self._read, described)
        return self.format.pack(Reader(self.shape, tuple(offset), tuple(shape), described, read, self._place))

    def expanded(self, dtype: torch.dtype) -> StoredTensor:
        """The weight as one tensor, expanded as it is read. ``dtype`` is its nominal dtype."""

        def read(out: Tensor, offset: Sequence[int]) -> None:
            if not out.dtype.is_floating_point:
                raise CheckpointError(f"{self._place(next(iter(self.parts)))} cannot be read as {out.dtype}")
            rows = max(1, EXPANDED // max(1, out.shape[1]))
            for first in range(0, len(out), rows):
                part = out[first : first + rows]
                packed = self.pack((offset[0] + first, offset[1]), part.shape)
                values = part if part.device.type == "cpu" else torch.empty(part.shape, dtype=part.dtype)
                packed.expand(values)
                if values is not part:
                    part.copy_(values)

        files = tuple(dict.fromkeys(file for tensor in self.parts.values() for file in tensor.files))
        return StoredTensor(dtype, self.shape, read, files, f"{self.name} of {self.format.text}")

    def _read(self, described: Mapping[str, PartSpec], end: str, box: Box) -> Tensor:
        tensor, allowed = self.parts[end], described[end].allowed
        offset, shape = box
        out = torch.empty(tuple(shape) or tensor.shape, dtype=tensor.dtype)
        tensor.read(out, tuple(offset) or (0,) * out.ndim)
        if allowed != "any":
            check_scales(out, allowed, self._place(end))
        return out

    def _place(self, end: str) -> str:
        return f"{self.parts[end].files[-1]}: tensor {self.name.removesuffix('weight') + end!r}"


def split_quantised(
    tensors: Mapping[str, StoredTensor], shapes: Mapping[str, Shape], quantisation: Quantisation, where: str
) -> tuple[dict[str, QuantisedWeight], dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Find the quantised weights among a model's tensors.

    Args:
        tensors: of the release, by name.
        shapes: of the weights that the model may have, by name.
        quantisation: of the release.
        where: the release, for messages.

    Returns:
        The quantised weights by name, known tensors that hold no weight, and all other tensors.

    Raises:
        CheckpointError: a tensor of a quantised weight is missing, or has another shape or dtype than its format.
    """
    method = quantisation.method
    if not quantisation.formats:
        check_plain(tensors, shapes)
    modules: dict[str, dict[str, StoredTensor]] = {module: {} for _, module in _marked(tensors, shapes, method.marks)}
    extra, others = {}, {}
    for name, tensor in tensors.items():
        module, _, end = name.rpartition(".")
        spare_bias = end == "bias" and name not in shapes and method.zero_bias
        if module in modules and spare_bias:
            _check_zero(name, tensor)
        if end in method.extra or (module in modules and (end in method.carried or spare_bias)):
            extra[name] = tensor
        elif module in modules and end != "bias":
            modules[module][end] = tensor
        else:
            others[name] = tensor
    names = {f"{module}.weight": parts for module, parts in modules.items()}
    found = {name: _weight(name, shapes[name], parts, quantisation, where) for name, parts in names.items()}
    return found, extra, others


def check_plain(tensors: Mapping[str, StoredTensor], shapes: Mapping[str, Shape]) -> None:
    """Refuse quantised weights that ``config.json`` does not describe. Arguments as for ``split_quantised``.

    Raises:
        CheckpointError: a tensor is of a quantised weight.
    """
    for name, module in _marked(tensors, shapes, MARKS):
        raise CheckpointError(
            f"{tensors[name].files[-1]}: tensor {name!r} makes {module}.weight a quantised weight, but config.json "
            f"describes none in quantization_config; supported there: {', '.join(METHODS)}"
        )


def _marked(tensors: Iterable[str], shapes: Mapping[str, Shape], marks: Collection[str]) -> Iterator[tuple[str, str]]:
    """Names of tensors that only quantised weights have, each with its module's name."""
    for name in tensors:
        module, _, end = name.rpartition(".")
        if end in marks and len(shapes.get(f"{module}.weight", ())) == 2:
            yield name, module


def _weight(
    name: str, shape: Shape, parts: Mapping[str, StoredTensor], quantisation: Quantisation, where: str
) -> QuantisedWeight:
    """The weight that consists of ``parts``, by the end of their names."""
    problems = {}
    for each in quantisation.formats:
        problem = _problem(name.removesuffix("weight"), parts, each.parts(shape), shape, where)
        if problem is None:
            return QuantisedWeight(name, shape, each, parts)
        problems[each] = problem
    # The format that fits best says what is wrong.
    best = max(problems, key=lambda each: len(each.parts(shape).keys() & parts.keys()))
    raise CheckpointError(f"{problems[best]} ({best.text})")


def _problem(
    prefix: str, found: Mapping[str, StoredTensor], expected: Mapping[str, PartSpec], shape: Shape, where: str
) -> str | None:
    """Why tensors are not those of a format, for a weight of this shape; None if they are."""
    for end, tensor in found.items():
        if end not in expected:
            return f"{tensor.files[-1]}: unknown tensor {prefix + end!r}"
    for end, part in expected.items():
        if end not in found:
            if part.optional:
                continue
            return f"{where}: tensor {prefix + end!r} is missing"
        tensor, wanted = found[end], part.shape(shape)
        place = f"{tensor.files[-1]}: tensor {prefix + end!r}"
        if tensor.shape != wanted and not (wanted == () and tensor.shape == (1,)):
            return (
                f"{place} has shape {list(tensor.shape)}, but a weight of shape {list(shape)} makes it {list(wanted)}"
            )
        if tensor.dtype not in part.dtypes:
            return f"{place} has dtype {tensor.dtype}; expected {' or '.join(map(str, part.dtypes))}"
    return None


def _check_zero(name: str, bias: StoredTensor) -> None:
    """Refuse a bias that the model does not have. AutoGPTQ saves biases of zeros for all modules."""
    values = torch.empty(bias.shape, dtype=bias.dtype)
    bias.read(values, (0,) * len(bias.shape))
    if bool(values.count_nonzero()):
        raise CheckpointError(
            f"{bias.files[-1]}: tensor {name!r} is not zero, but config.json makes a model without it"
        )


def expanded_weights(
    quantised: Mapping[str, QuantisedWeight], dtype: torch.dtype | None = None
) -> dict[str, StoredTensor]:
    """The weights as one tensor each, by name; ``dtype`` is their nominal dtype, by default that of their scales."""
    found = {}
    for name, weight in quantised.items():
        scale = next(tensor.dtype for end, tensor in weight.parts.items() if "scale" in end)
        found[name] = weight.expanded(dtype or scale)
    return found


def stored_weights(
    weights: Mapping[str, StoredTensor], quantised: Mapping[str, QuantisedWeight]
) -> dict[str, StoredTensor]:
    """The tensors that hold a model's weights, by released name: several for a quantised weight."""
    found: dict[str, StoredTensor] = {}
    for name, tensor in weights.items():
        found |= quantised[name].stored() if name in quantised else {name: tensor}
    return found
