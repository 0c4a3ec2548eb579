"""A tiny model with exits, opened, and records for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_ee.evaluation.tasks.records import TaskRecord, read_records
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.loading import open_engine
from megatron_ee.inference.options import EngineOptions
from megatron_ee.inference.released import Released, open_released

Read = Callable[..., list[TaskRecord]]


@pytest.fixture(scope="module")
def released(byte_model: Path, adapter: Path) -> Released:
    return open_released(byte_model, adapter)


@pytest.fixture(scope="module")
def engine(released: Released) -> Iterator[Engine | None]:
    with open_engine(released, EngineOptions(dtype="float32", max_num_seqs=4)) as engine:
        yield engine


@pytest.fixture
def read(released: Released, tmp_path: Path) -> Read:
    """Writes lines to ``task.jsonl``, or to the file of a name, and reads them."""

    def run(*lines: object, name: str = "task", **options: bool) -> list[TaskRecord]:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
        return read_records([path], released, **options)

    return run
