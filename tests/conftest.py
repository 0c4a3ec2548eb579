"""What all tests share: one thread per process, no network, and no GPU tests where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from megatron_ee.exits.stage import Stage
    from megatron_ee.parallel.groups import Groups
    from megatron_ee.testing.project import Project

# Before torch is imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m smoke`` import only the files that have such tests: importing all takes longer than the tests."""
    wanted = config.option.markexpr != "smoke" or not collection_path.name.startswith("test_")
    return None if wanted or "pytest.mark.smoke" in collection_path.read_text(encoding="utf-8") else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` without a CUDA device; torch is imported only if there are such tests."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    """The groups of a world of one, for a module's tests: another one's may run commands, which form their own."""
    from megatron_ee.parallel.groups import process_groups

    with process_groups() as groups:
        yield groups


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """Gives a tiny model of a family as a directory and as the transformers model; arguments of ``save_tiny_model``.

    The same arguments give the same ones: neither may be changed.
    """
    from megatron_ee.testing.models import save_tiny_model

    made: dict[Any, tuple[Path, Any]] = {}

    def make(family: str, **changes: Any) -> tuple[Path, Any]:
        key = (family, *sorted((name, repr(value)) for name, value in changes.items()))
        if key not in made:
            directory = tmp_path_factory.mktemp(family)
            made[key] = directory, save_tiny_model(family, directory, **changes)
        return made[key]

    return make


@pytest.fixture(scope="module")
def load_stage(groups: Groups) -> Callable[..., Stage]:
    """Gives a stage filled from a released model: all layers and the final exit, and initialised exits, by default."""
    import torch

    from megatron_ee.checkpoint.initialise import initialise_exit
    from megatron_ee.checkpoint.loading import load_backbone
    from megatron_ee.checkpoint.saved_model import open_model
    from megatron_ee.exits.stage import Stage
    from megatron_ee.model.setup import build_setup

    def load(
        path: Path,
        exits: Any = (),
        *,
        layers: Any = None,
        dtype: Any = torch.float32,
        seed: int = 1,
        slots: int = 0,
        residency: Any = "device",
        **kwargs: Any,
    ) -> Stage:
        model = open_model(path)
        setup = build_setup(model.architecture, dtype, groups, slots=slots, residency=residency)
        layers = range(1, model.architecture.num_layers + 1) if layers is None else layers
        stage = Stage(setup, layers, exits, **{"final_exit": True, **kwargs})
        load_backbone(stage, model)
        for exit_ in stage.exits:
            initialise_exit(exit_, model, seed)
        return stage

    return load


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Model, tokenizer and corpora."""
    from megatron_ee.testing.project import make_project

    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def tuned(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one uninterrupted run of one process."""
    output = tmp_path_factory.mktemp("tuned") / "run"
    config = project.config(output.with_suffix(".yaml"))
    project.run("tune", "--config", config, "--output", output)
    return output
