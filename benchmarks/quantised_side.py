"""The side of the benchmark of packed layers: the tuning step on plain or rounded weights, and its exits' agreement."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.limits import seconds
from benchmarks.models import sample_text
from megatron_ee import platform
from megatron_ee.checkpoint.initialise import initialise_exit
from megatron_ee.checkpoint.loading import load_backbone
from megatron_ee.checkpoint.packing import pack_layers, packed_slots
from megatron_ee.checkpoint.saved_model import SavedModel, open_model, quantise_layers
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import LossConfig, OptimizerConfig, Quantise, ScheduleConfig
from megatron_ee.data.loader import Batch
from megatron_ee.data.tokenizer import load_tokenizer
from megatron_ee.exits.stage import Stage
from megatron_ee.model.setup import build_setup
from megatron_ee.parallel.groups import process_groups
from megatron_ee.parallel.optimizer import ExitOptimizer
from megatron_ee.tuning.schedule import Pipeline, one_stage
from megatron_ee.tuning.step import StepResult, tuning_step

SEED = 1234
STEPS = 1_000_000  # of the learning rate's schedule: never reached
HELD_OUT = 4
"""Sequences that agreement is measured on."""


class QuantisedSide:
    """Runs one step at a time, each on the next batch of a text."""

    def __init__(
        self, pipeline: Pipeline, optimizer: ExitOptimizer, model: SavedModel, ids: Tensor, count: int, saved: Path
    ) -> None:
        """
        Args:
            pipeline: the stage, with all layers and the final exit.
            optimizer: of its exits.
            model: the files.
            ids: ``[sequences, tokens + 1]``; the last ones are held out.
            count: microbatches of a step.
            saved: directory of the sides' exits.
        """
        self._pipeline, self._optimizer, self._model = pipeline, optimizer, model
        self._train, self._held_out = ids[:-HELD_OUT], ids[-HELD_OUT:]
        self._count, self._saved, self._done = count, saved, 0

    def step(self) -> dict[str, Any]:
        """One step: its ``seconds`` and ``losses``."""
        batches, results = [self._batch(number) for number in range(self._count)], list[StepResult]()
        self._done += self._count
        elapsed = seconds(
            lambda: results.append(tuning_step(self._pipeline, self._optimizer, batches, LossConfig(), 1.0))
        )
        return {"seconds": elapsed, "losses": [exit_.loss for exit_ in results[0].exits]}

    def _batch(self, number: int) -> Batch:
        row = self._train[(self._done + number) % len(self._train)]
        tokens = len(row) - 1
        mask = torch.ones(1, tokens, dtype=torch.bool)
        return Batch(row[None, :-1], row[None, 1:], mask, tokens, range(number, number + 1))

    def backbone_bytes(self) -> int:
        """Of all frozen weights in memory: packed layers too, and the slot."""
        backbone = self._pipeline.stage.backbone
        held = sum(parameter.nbytes for parameter in backbone.parameters())
        if backbone.slots is not None:
            held += sum(layer.nbytes for layer in pack_layers(backbone, self._model).values())
        return held

    def save(self) -> None:
        """Save the exits for the other sides."""
        tensors = {
            f"{exit_.spec.layer}.{name}": parameter.detach().cpu()
            for exit_ in self._pipeline.stage.exits
            for name, parameter in exit_.named_parameters()
            if parameter.requires_grad
        }
        save_file(tensors, self._saved / f"{self._model.rounding}.safetensors")

    @torch.no_grad()
    def agreements(self) -> dict[str, float]:
        """Agreement of each side's exits with this side's final exit, by the side's kind; a mean over exits."""
        stage, found = self._pipeline.stage, dict[str, float]()
        for file in sorted(self._saved.glob("*.safetensors")):
            tensors = load_file(file)
            for exit_ in stage.exits:
                for name, parameter in exit_.named_parameters():
                    if parameter.requires_grad:
                        parameter.copy_(tensors[f"{exit_.spec.layer}.{name}"])
            found[file.stem] = sum(map(self._agreement, self._held_out)) / len(self._held_out)
        return found

    def _agreement(self, row: Tensor) -> float:
        stage, ids = self._pipeline.stage, row[None, :-1].to(platform.device())
        positions, labels = stage.backbone.positions(ids.shape[1]), torch.zeros_like(ids[0])
        h, taps = stage.run_layers(stage.backbone.embed(ids), positions, to_end=True)
        final = stage.final_statistics(h, labels).top1
        shares = [
            float((exit_.statistics(taps[exit_.spec.layer], positions, labels).top1 == final).float().mean())
            for exit_ in stage.exits
        ]
        return sum(shares) / len(shares)


@contextlib.contextmanager
def quantised(
    directory: str, kind: Quantise, exits: list[int], dtype: str, tokens: int, microbatches: int, saved: str
) -> Iterator[QuantisedSide]:
    """``mlp`` exits with the shared head; ``tokens`` of each of ``microbatches``, of some text."""
    with process_groups() as groups:
        model = quantise_layers(open_model(directory), kind, "--quantise")
        slots = packed_slots(model, "packed")
        setup = build_setup(model.architecture, platform.DTYPES[dtype], groups, slots=slots)
        specs = [ExitSpec(layer, "mlp", "shared") for layer in exits]
        stage = Stage(setup, range(1, model.architecture.num_layers + 1), specs, final_exit=True)
        load_backbone(stage, model)
        for exit_ in stage.exits:
            initialise_exit(exit_, model, SEED)
        schedule = ScheduleConfig(decay="constant", warmup_fraction=0.0)
        optimizer = ExitOptimizer(stage.exits, setup.config, groups, OptimizerConfig(), schedule, STEPS)
        text = torch.tensor(load_tokenizer(directory).encode(sample_text()))
        count = len(text) // (tokens + 1)
        ids = text[: count * (tokens + 1)].view(count, tokens + 1)
        yield QuantisedSide(one_stage(stage), optimizer, model, ids, microbatches, Path(saved))
