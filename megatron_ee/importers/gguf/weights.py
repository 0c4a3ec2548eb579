"""The weights in a GGUF file under their released names, dequantised row by row as they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import gguf
import numpy as np
import torch
from torch import Tensor

from megatron_ee.checkpoint.safetensors_file import tensor_bytes
from megatron_ee.checkpoint.tensors import StoredTensor
from megatron_ee.config.architecture import Architecture
from megatron_ee.config.untrusted import open_regular, read_exactly
from megatron_ee.errors import CheckpointError, shown
from megatron_ee.families.weights import expected_tensors
from megatron_ee.importers.gguf.header import Header, TensorInfo
from megatron_ee.importers.gguf.kinds import Kind

VALUES = 2**22  # dequantised at a time, float32


def released_weights(
    header: Header, kind: Kind, arch: Architecture, dtype: torch.dtype, consumed: Sequence[str]
) -> dict[str, StoredTensor]:
    """Every weight of the model under its released name. None is read.

    Args:
        header: of the file.
        kind: of its architecture.
        arch: of the model.
        dtype: of the weights, to which the dequantised values are rounded.
        consumed: tensors that hold settings, not weights.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape, or of a type that cannot be dequantised.
    """
    places = _gguf_names(header, kind, arch)
    known = {*places.values(), *consumed}
    unknown = next((info for name, info in header.tensors.items() if name not in known), None)
    if unknown is not None:
        raise CheckpointError(f"{unknown.path}: unknown tensor {shown(unknown.name)} for a {arch.family} model")
    found: dict[str, StoredTensor] = {}
    for name, shape in expected_tensors(arch).items():
        if places[name] not in header.tensors:
            raise CheckpointError(f"{header.path}: tensor {places[name]!r} is missing ({name})")
        info = header.tensors[places[name]]
        if info.shape != shape:
            raise CheckpointError(
                f"{info.path}: tensor {info.name!r} has shape {list(info.shape)}, but the metadata make it "
                f"{list(shape)}"
            )
        found[name] = _weight(info, dtype, _rotated_head(name, kind, arch), kind.offset_norms)
    _check_types([header.tensors[place] for place in places.values()])
    return found


def read_vector(info: TensorInfo) -> list[float]:
    """The values of a tensor of one dimension.

    Raises:
        CheckpointError: it has more, or cannot be read.
    """
    if len(info.shape) != 1:
        raise CheckpointError(
            f"{info.path}: tensor {info.name!r} must have one dimension, not shape {list(info.shape)}"
        )
    _check_types([info])
    values: list[float] = _dequantised(info, 0, 1)[0].tolist()
    return values


def _gguf_names(header: Header, kind: Kind, arch: Architecture) -> dict[str, str]:
    """Released name -> name in the file."""
    table = gguf.get_tensor_name_map(kind.model_arch, arch.num_layers)
    names: dict[str, str] = {}
    for name in expected_tensors(arch):
        place = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise CheckpointError(f"{header.path}: its architecture has no tensor for {name}")
        names[name] = place
    return names


def _check_types(infos: Sequence[TensorInfo]) -> None:
    """Refuse types that the package cannot dequantise."""
    examples: Mapping[gguf.GGMLQuantizationType, TensorInfo] = {info.type: info for info in infos}
    for kind, info in examples.items():
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise CheckpointError(
                f"{info.path}: tensor {info.name!r} is stored as {kind.name}, which the package gguf cannot dequantise"
            ) from None


def _rotated_head(name: str, kind: Kind, arch: Architecture) -> int:
    """Rows of each head of a query or key whose halves the file interleaves; 0 for all other tensors."""
    turned = (".self_attn.q_proj.", ".self_attn.k_proj.")
    return arch.head_dim if kind.interleaved and any(part in name for part in turned) else 0


def _weight(info: TensorInfo, dtype: torch.dtype, head: int, offset_norms: bool) -> StoredTensor:
    """A weight of the file.

    Args:
        head: see ``_rotated_head``.
        offset_norms: norms are stored with 1 added.
    """
    added = 1.0 if offset_norms and info.name.endswith("norm.weight") else 0.0
    step = max(1, VALUES // info.shape[-1])

    def read(out: Tensor, offset: Sequence[int]) -> None:
        if len(info.shape) == 1:  # a norm or a bias, which is small
            vector = _dequantised(info, 0, 1)[0][_file_rows(0, info.shape[0], head)] - added
            out.copy_(torch.from_numpy(vector[offset[0] : offset[0] + len(out)]))
            return
        for start in range(0, len(out), step):
            part = out[start : start + step]
            rows = _file_rows(offset[0] + start, len(part), head)
            low, high = int(rows.min()), int(rows.max()) + 1
            values = _dequantised(info, low, high)[rows - low, offset[1] : offset[1] + out.shape[1]]
            part.copy_(torch.from_numpy(values))

    made = f"{info.name} of {info.type.name} at {info.position}, heads of {head}, minus {added}, as {dtype}"
    return StoredTensor(dtype, info.shape, read, (info.path,), made)


def _file_rows(first: int, count: int, head: int) -> np.ndarray:
    """The rows in the file of ``count`` released rows from ``first``.

    A released head has the first halves of all rotated pairs, and then their second halves. With ``head`` rows per
    head, the file has each pair together.
    """
    rows = np.arange(first, first + count)
    if not head:
        return rows
    which, within = np.divmod(rows, head)
    half, pair = np.divmod(within, head // 2)
    return which * head + 2 * pair + half


def _dequantised(info: TensorInfo, first: int, end: int) -> np.ndarray:
    """Rows ``first`` to ``end`` in float32. A tensor of one dimension is one row."""
    row = info.nbytes * info.shape[-1] // math.prod(info.shape)
    data = torch.empty((end - first, row), dtype=torch.uint8)
    with open_regular(info.path) as fd:
        read_exactly(fd, tensor_bytes(data), info.position + first * row, info.path)
    values: np.ndarray = gguf.dequantize(data.numpy(), info.type)
    return values
