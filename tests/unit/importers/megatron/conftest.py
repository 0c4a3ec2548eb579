"""Distributed checkpoints of Megatron's to read, and to do harm to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch_dist_helpers import FAMILIES, Exported, Model

from megatron_ee.conversion.copy import write_output
from megatron_ee.conversion.formats import open_contents
from megatron_ee.importers.megatron.export import to_torch_dist


@pytest.fixture(scope="session")
def exported(saved_model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Gives a family's Hugging Face directory, the same as a torch_dist directory, and its transformers model."""
    made: dict[str, tuple[Path, Path, Any]] = {}

    def make(family: str) -> tuple[Path, Path, Any]:
        if family not in made:
            path, model = saved_model(family, **FAMILIES[family])
            output = tmp_path_factory.mktemp("megatron") / family
            write_output(to_torch_dist(open_contents(path)), output)
            made[family] = path, output, model
        return made[family]

    return make


@pytest.fixture
def copied(exported: Exported, tmp_path: Path) -> Path:
    """A torch_dist directory of one iteration to do harm to."""
    return Path(shutil.copytree(exported("llama2")[1] / "release", tmp_path / "release"))
