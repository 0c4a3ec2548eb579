"""Megatron's distributed checkpoints between our converter and megatron-core on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ee.conversion.copy import write_output
from megatron_ee.conversion.formats import open_contents
from megatron_ee.families.registry import read_architecture
from megatron_ee.importers.megatron.export import to_torch_dist
from megatron_ee.importers.megatron.torch_dist import open_torch_dist
from megatron_ee.parallel.groups import process_groups
from megatron_ee.testing.gpt import gpt_logits, gpt_model, load_gpt, save_gpt
from megatron_ee.testing.ranks import run_ranks

LAYOUTS: list[dict[str, Any] | None] = [None, {"non_homogeneous_layers": True}]


def exchange(path: Path, checkpoint: Path, output: Path, tensor: int, pipeline: int, tokens: torch.Tensor) -> Any:
    """On one rank: load an export into Megatron's model, save that in both layouts; its logits if on one stage."""
    arch = read_architecture(path)
    with process_groups(tensor, pipeline) as groups:
        model = gpt_model(arch, groups, 512)
        load_gpt(model, checkpoint)
        for number, metadata in enumerate(LAYOUTS):
            save_gpt(model, output / f"iter_{number:07}", metadata)
        return gpt_logits(model, tokens).tolist() if pipeline == 1 else None


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "pipeline", "tied"), [(2, 1, False), (2, 2, True)])
def test_ranks_of_megatron_read_an_export_and_write_what_is_imported(
    tensor: int, pipeline: int, tied: bool, saved_model: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    path, reference = saved_model("llama2", num_key_value_heads=2, tie_word_embeddings=tied)
    write_output(to_torch_dist(open_contents(path)), tmp_path / "export")
    tokens = torch.randint(131, (2, 16), generator=torch.Generator().manual_seed(2))
    checkpoint, output = tmp_path / "export" / "release", tmp_path / "saved"
    found = run_ranks(tensor * pipeline, exchange, path, checkpoint, output, tensor, pipeline, tokens)
    if pipeline == 1:
        with torch.no_grad():
            expected = reference(tokens).logits
        for logits in found:
            assert (torch.tensor(logits)[..., :131] - expected).abs().max() <= 1e-4
    released = open_contents(path).backbone
    for number in range(len(LAYOUTS)):
        directory = output / f"iter_{number:07}"
        assert len(list(directory.glob("*.distcp"))) >= tensor * pipeline, "every rank wrote"
        backbone = open_torch_dist(directory, trust=True, config=path).backbone
        assert backbone.keys() == released.keys()
        for name, tensor_ in released.items():
            assert backbone[name].sha256() == tensor_.sha256(), name
