"""The package's closed-form fit of exits on one rank of an example configuration."""

from __future__ import annotations

from unittest import mock

from megatron_ee import platform
from megatron_ee.exits.stage import build_stage
from megatron_ee.model.setup import build_setup
from megatron_ee.parallel.groups import process_groups
from megatron_ee.parallel.layout import even_layout
from megatron_ee.planning.balance import resolve_layout
from megatron_ee.planning.plan import plan_run
from megatron_ee.testing.examples import example_architecture, open_example
from megatron_ee.tuning.fit import Fitter
from megatron_ee.tuning.fit_tokens import Tokens
from megatron_ee.tuning.interrupt import Interrupt

from .cluster import as_rank
from .runs import Fitting, Result
from .tune import make_batch


def run(case: Fitting, explained: int | None = None) -> Result:
    """Build a rank's stage as ``fit_exits`` does, without values; fit and measure its exits one at a time.

    Args:
        explained: bytes whose composition is wanted, such as an earlier result's ``peak``.
    """
    architecture = example_architecture(case.example)
    config, specs, processes = open_example(case.example, case.overrides, case.processes)
    rank, parallel = case.rank % processes, config.parallel
    tuned = resolve_layout(parallel, specs, architecture, config.data.sequence_length, False)
    plan = plan_run(config, tuned, architecture, specs, processes)
    with (
        as_rank(rank, processes, explained) as watch,
        process_groups(parallel.tensor, parallel.pipeline) as groups,
        mock.patch.object(platform, "free_memory", lambda sharing: 0),  # exits are fitted in turns, as the plan counts
    ):
        setup = build_setup(
            architecture, platform.DTYPES[config.model.dtype], groups, sequence_parallel=parallel.sequence
        )
        layout = even_layout(architecture.num_layers, parallel.pipeline, [spec.layer for spec in specs])
        stage = build_stage(setup, layout, specs, final_exit=True)
        batches = [make_batch(config, number) for number in range(case.microbatches)]
        count = sum(batch.num_tokens for batch in batches)
        watch.restart()
        tokens = Tokens([batches], [batches], count, count)
        Fitter(stage, layout, specs, tokens, config.fit, Interrupt(), config.loss.chunk_tokens).run()
        index, tensor, data = (group.rank() for group in (groups.pipeline, groups.tensor, groups.data))
        fitted = [exit_ for exit_ in stage.exits if exit_.spec.init == "fit"]
        return Result(
            name=case.name,
            where=f"rank {rank} of {processes}: stage {index}, tensor {tensor}, data {data}",
            planned=plan.stages[index].memory.fit,
            planned_for_another=tensor > 0,  # the first rank solves for the others
            peak=watch.peak,
            launches=sum(watch.launches.values()),
            syncs=dict(watch.syncs),
            units={"exit": len(fitted)},
            attention=dict(watch.attention),
            faults=tuple(watch.faults),
            launches_by_place=dict(watch.places.most_common(12)),
            composition=watch.composition,
        )
