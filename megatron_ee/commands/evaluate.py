"""``megatron-ee evaluate``: quality per exit on a corpus, with a threshold sweep; or quality and speed on tasks."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron_ee.commands import Parser, at_least
from megatron_ee.commands.engine_options import add_model, add_parallel, add_residency
from megatron_ee.commands.evaluate_tasks import add_tasks, run_tasks
from megatron_ee.errors import ConfigError

CORPUS = ("sequence_length", "sequences", "batch_size", "speed", "probe")
TASKS = (
    "thresholds",
    "policy",
    "max_tokens",
    "stop",
    "by",
    "calibration",
    "kv_memory",
    "max_num_seqs",
    "resume",
    "overwrite",
)
"""Options that only ``--data`` and only ``--tasks`` have."""

DESCRIPTION = """With --data, measure each exit on a corpus: loss, perplexity, agreement with the final exit,
calibration; and sweep the threshold: layers per token and agreement at each. With --tasks, answer prompts in every mode
and at several thresholds: quality of the answers, agreement with full mode and speed."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser("evaluate", DESCRIPTION)
    add_model(result, adapter="exits to measure (default: those in the model's directory, if any)")
    what = result.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, metavar="PREFIX", help="corpus from prepare-data")
    what.add_argument(
        "--tasks",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="prompts as JSON lines, each with a prompt or messages, and optionally references (right answers), or "
        "choices with answer (index of the right one), task, group and id",
    )
    add_parallel(result)
    add_residency(result)
    result.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    result.add_argument("--plot", type=Path, metavar="FILE", help="plot the result to a .png, .pdf or .svg file")
    result.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write evaluation.json, .png and reliability.png, or of tasks tasks.json, tasks.png and answers.jsonl, to "
        "this directory: new, or an earlier evaluation's",
    )
    _add_corpus(result.add_argument_group("with --data"))
    add_tasks(result.add_argument_group("with --tasks"))
    return result


def _add_corpus(group: Any) -> None:
    add = group.add_argument
    add("--sequence-length", type=at_least(1), metavar="N", help="tokens per sequence (default: 2048, or the model's)")
    add(
        "--sequences",
        type=at_least(0),
        default=256,
        metavar="N",
        help="largest number of sequences; 0: all (default: 256)",
    )
    add("--batch-size", type=at_least(1), default=1, metavar="N", help="sequences per pass (default: 1)")
    add(
        "--speed",
        action="store_true",
        help="also decode after the beginnings of some documents in every mode, and compare the speed with full mode",
    )
    add(
        "--probe",
        type=Path,
        metavar="FILE",
        help="probe.json of a probe: compare with its fitted exits, and with --speed the speed with its forecast",
    )


def run(arguments: argparse.Namespace) -> int:
    """Evaluate. Print tables or JSON to stdout, and write the requested files."""
    _check_options(arguments)
    from megatron_ee.checkpoint.ownership import check_output
    from megatron_ee.commands.inputs import check_input
    from megatron_ee.evaluation.figure import check_plot

    if arguments.plot is not None:
        check_plot(arguments.plot, "--plot")
    if arguments.output is not None:
        check_output(arguments.output, "evaluate")
    check_input("--model", arguments.model)
    check_input("--adapter", arguments.adapter)
    return _run_corpus(arguments) if arguments.tasks is None else run_tasks(arguments)


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuse an option that has no effect."""
    others, needed = (TASKS, "--tasks") if arguments.tasks is None else (CORPUS, "--data")
    defaults = parser()
    for name in others:
        if getattr(arguments, name) != defaults.get_default(name):
            raise ConfigError(f"--{name.replace('_', '-')}: is an option of {needed}")


def _run_corpus(arguments: argparse.Namespace) -> int:
    from megatron_ee.checkpoint.ownership import claim_output
    from megatron_ee.commands.inputs import check_corpus, check_input

    check_input("--probe", arguments.probe)
    check_corpus("--data", [arguments.data])
    from megatron_ee.evaluation.evaluate import evaluate
    from megatron_ee.evaluation.plots import plot_reliability, plot_sweep
    from megatron_ee.evaluation.probe.compare import print_since, print_speed, read_probe, since_dict, speed_dict
    from megatron_ee.evaluation.report import print_quality, write_quality
    from megatron_ee.parallel.groups import launched_rank

    probed = None if arguments.probe is None else read_probe(arguments.probe)
    result = evaluate(
        model=arguments.model,
        adapter=arguments.adapter,
        data=arguments.data,
        sequence_length=arguments.sequence_length,
        sequences=arguments.sequences,
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
        weights=arguments.weights,
        quantise=arguments.quantise,
        tensor=arguments.tensor,
        pipeline=arguments.pipeline,
        residency=arguments.residency,
        verify=not arguments.no_verify,
        speed=arguments.speed,
        gate_threshold=None if probed is None else probed.gate_threshold,
    )
    if launched_rank() > 0:
        return 0
    compared = {} if probed is None else {"since_probe": since_dict(probed, result.quality)}
    if result.speed:
        compared["speed"] = speed_dict(result.speed, probed)
    if arguments.json:
        print(json.dumps({**result.to_dict(), **compared}))
    else:
        print_quality(result.quality, result.exits)
        if probed is not None:
            print_since(probed, result.quality)
        if result.speed:
            print_speed(result.speed, probed)
    if arguments.output is not None:
        claim_output(arguments.output, "evaluate")
        write_quality(result.quality, result.exits, arguments.output / "evaluation", {**result.inputs, **compared})
        if result.exits:
            plot_reliability(result.quality, arguments.output / "reliability.png")
    if arguments.plot is not None and result.exits:
        plot_sweep(result.quality, arguments.plot)
    elif arguments.plot is not None:
        print(f"megatron-ee evaluate: no exits to sweep, so no {arguments.plot}", file=sys.stderr)
    return 0
