"""The package's inference passes on the first rank of an engine for an example configuration's model and exits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any
from unittest import mock

from megatron_ee import platform
from megatron_ee.exits.gate import Gate
from megatron_ee.exits.stage import Stage
from megatron_ee.inference import loading, remote, stage_runner
from megatron_ee.inference.policy import GatePolicy, ThresholdPolicy
from megatron_ee.inference.requests import Request
from megatron_ee.inference.sampling import Sampling
from megatron_ee.model.setup import build_setup
from megatron_ee.parallel.groups import process_groups
from megatron_ee.parallel.layout import even_layout
from megatron_ee.testing.examples import example_architecture, open_example

from .cluster import as_rank
from .runs import Inference, Result

PROMPT = 600
"""Tokens of a prompt: two passes."""


def run(case: Inference, explained: int | None = None) -> Result:
    """Load a stage as ``inference.loading`` does, without values, and answer requests; prompts are counted too."""
    architecture = example_architecture(case.example, case.window)
    config, specs, _ = open_example(case.example, case.overrides)
    tensor = config.parallel.tensor
    layout = even_layout(architecture.num_layers, 1)
    with (
        as_rank(0, tensor, explained) as watch,
        process_groups(tensor) as groups,
        mock.patch.object(loading, "broadcast", _broadcast),
        mock.patch.object(remote, "broadcast", _broadcast),
        mock.patch.object(stage_runner, "head_outputs", _counting(stage_runner.head_outputs, heads := [])),
        mock.patch.object(Gate, "forward", _counting(Gate.forward, gates := [])),
    ):
        specs = tuple(dataclasses.replace(spec, gate=case.gates) for spec in specs)
        setup = build_setup(architecture, platform.DTYPES[config.model.dtype], groups)
        stage = Stage(setup, range(1, architecture.num_layers + 1), specs, final_exit=True)
        with loading.engine_on_ranks(stage, layout, specs) as engine:
            assert engine is not None, "the first rank has the engine"
            built = watch.live
            watch.restart()
            # Heads answer with a token and its probability: some are confident, and drafts sometimes prove wrong.
            watch.answer(floats=[0.9, 0.3, 1.9], integers=[1, 1, 1, 2])
            sampling = Sampling(temperature=0.8, top_p=0.9) if case.sampled else Sampling()
            for row in range(case.rows):
                engine.submit(
                    Request(
                        prompt=[1] * (PROMPT + row),
                        mode=case.mode,
                        policy=(GatePolicy if case.gates else ThresholdPolicy)(threshold=0.8),
                        sampling=sampling,
                        max_tokens=case.tokens,
                        ignore_eos=True,
                    )
                )
            scheduler = engine._scheduler
            held = claimed = 0
            while not engine.idle:
                engine.step()
                if watch.live - built > held:
                    held, claimed = watch.live - built, scheduler.kv_caches.budget.used
        return Result(
            name=case.name,
            where=f"rank 0 of {tensor}",
            planned=claimed,
            peak=held,
            launches=sum(watch.launches.values()),
            syncs=dict(watch.syncs),
            units={"head": len(heads), "gate": len(gates)},
            attention=dict(watch.attention),
            faults=tuple(watch.faults),
            launches_by_place=dict(watch.places.most_common(12)),
            composition=watch.composition,
        )


def _counting(call: Any, calls: list[None]) -> Any:
    """``call``, with an entry in ``calls`` for each call. A mock would keep the arguments, and so their memory."""

    def counted(*args: Any) -> Any:
        calls.append(None)
        return call(*args)

    return counted


def _broadcast(content: Sequence[Any] | None, group: Any) -> list[Any]:
    """``remote.broadcast`` of the first rank, without the message."""
    return list(content or ())
