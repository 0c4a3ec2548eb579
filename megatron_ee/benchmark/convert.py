"""Converting a random model, loading what comes of it, and saves, against plain work. This process imports no torch."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_ee.benchmark import files
from megatron_ee.benchmark.conversion import PIPELINE, TENSOR, measure_conversion, start_converter
from megatron_ee.benchmark.results import ConvertBenchmark
from megatron_ee.benchmark.saving import benchmark_saving
from megatron_ee.benchmark.shape import Shape
from megatron_ee.benchmark.sharded_load import measure_loads
from megatron_ee.benchmark.worker import quiet_enough
from megatron_ee.errors import ConfigError, UserError

COPIES = 2.1
"""Of what is measured on disk at a time, with room for small files and for the disk to work."""
OTHERS = 3 * 2**30
"""Bytes of memory that the model loaded leaves to the processes themselves."""


def benchmark_convert(
    shape: Shape,
    *,
    parts: Sequence[str],
    directory: Path | None,
    load_layers: int | None,
    save_megabytes: int,
    repeats: int,
) -> ConvertBenchmark:
    """Measure conversions of a bfloat16 model of ``shape`` with a head of its own, loading it, and saves while tuning.

    Args:
        parts: what to measure: ``convert``, ``load``, ``save``.
        directory: on the disk to measure; None is the system's place for temporary files.
        load_layers: of the model that is loaded; None is all, or as many as fit the memory twice: in the ranks and in
            the page cache.
        save_megabytes: size of the state that is saved.

    Raises:
        ConfigError: no such model exists, or it cannot be cut for the ranks.
        UserError: the disk or the memory is too small, or a process did not survive.
    """
    _check_shape(shape)
    place = Path(tempfile.gettempdir()) if directory is None else directory
    loaded = _shape_to_load(shape, load_layers) if "load" in parts else shape
    sizes = {"convert": model_bytes(shape), "load": model_bytes(loaded), "save": save_megabytes * 10**6}
    _check_disk(place, max(sizes[part] for part in parts))
    load = quiet_enough()
    with tempfile.TemporaryDirectory(prefix="megatron-ee-", dir=place) as temporary, start_converter() as helper:
        work, machine = Path(temporary), helper.call("describe")
        conversion = measure_conversion(shape, work, repeats, helper) if "convert" in parts else None
        loads = measure_loads(loaded, work, repeats, helper) if "load" in parts else None
        saves = benchmark_saving(work, megabytes=save_megabytes, repeats=repeats) if "save" in parts else None
    return ConvertBenchmark({**machine, "load_before": load}, convert=conversion, load=loads, save=saves)


def model_bytes(shape: Shape) -> int:
    """Bytes of all weights of a bfloat16 model with a head of its own."""
    return 2 * (shape.parameters + shape.vocab * shape.hidden)


def _check_shape(shape: Shape) -> None:
    shape.check()
    if shape.heads % TENSOR or shape.ffn % TENSOR:
        raise ConfigError(f"--heads, --ffn: {shape.heads} and {shape.ffn} must be multiples of {TENSOR}")
    if shape.layers < PIPELINE:
        raise ConfigError(f"--layers: {shape.layers} layers are less than {PIPELINE} stages")


def _shape_to_load(shape: Shape, layers: int | None) -> Shape:
    if layers is not None and layers > shape.layers:
        raise ConfigError(f"--load-layers: {layers} are more than the model's {shape.layers} layers")
    if layers is not None:
        return dataclasses.replace(shape, layers=layers)
    available = files.available_memory()
    for count in range(shape.layers, PIPELINE - 1, -1):
        cut = dataclasses.replace(shape, layers=count)
        if 2 * model_bytes(cut) + OTHERS <= available:
            return cut
    raise UserError(f"not even {PIPELINE} layers fit {available / 1e9:.1f} GB of memory twice; use a smaller --shape")


def _check_disk(directory: Path, size: int) -> None:
    free, needed = files.free_bytes(directory), COPIES * size
    if needed > free:
        raise UserError(
            f"{directory}: needs {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free; "
            "choose another --directory or a smaller --shape"
        )
