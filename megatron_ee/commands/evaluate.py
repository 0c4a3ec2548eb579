"""``megatron-ee evaluate``: quality per exit on a corpus, and a threshold sweep."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_ee.commands import Parser, at_least
from megatron_ee.commands.engine_options import add_model, add_parallel, add_residency
from megatron_ee.errors import ConfigError

PLOTS = (".png", ".pdf", ".svg")

DESCRIPTION = """Measure each exit on a corpus: loss, perplexity, agreement with the final exit, calibration. Then sweep
the threshold: layers per token and agreement at each. With --speed, compare the speed of the modes."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser("evaluate", DESCRIPTION)
    add_model(result, adapter="exits to measure (default: those in the model's directory, if any)")
    result.add_argument("--data", type=Path, required=True, metavar="PREFIX", help="corpus from prepare-data")
    result.add_argument(
        "--sequence-length", type=at_least(1), metavar="N", help="tokens per sequence (default: 2048, or the model's)"
    )
    result.add_argument(
        "--sequences",
        type=at_least(0),
        default=256,
        metavar="N",
        help="largest number of sequences; 0: all (default: 256)",
    )
    result.add_argument(
        "--batch-size", type=at_least(1), default=1, metavar="N", help="sequences per pass (default: 1)"
    )
    add_parallel(result)
    add_residency(result)
    result.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    result.add_argument(
        "--speed",
        action="store_true",
        help="also decode after the beginnings of some documents in every mode, and compare the speed with full mode",
    )
    result.add_argument(
        "--probe",
        type=Path,
        metavar="FILE",
        help="probe.json of a probe: compare with its fitted exits, and with --speed the speed with its forecast",
    )
    result.add_argument("--plot", type=Path, metavar="FILE", help="plot the sweep to a .png, .pdf or .svg file")
    result.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write evaluation.json, .png and reliability.png to this directory: new, or an earlier evaluation's",
    )
    return result


def run(arguments: argparse.Namespace) -> int:
    """Evaluate. Print tables or JSON to stdout, and write the requested files."""
    if arguments.plot is not None and arguments.plot.suffix not in PLOTS:
        raise ConfigError(f"--plot: {arguments.plot} must end in one of {', '.join(PLOTS)}")
    from megatron_ee.checkpoint.ownership import check_file, check_output, claim_output
    from megatron_ee.commands.inputs import check_corpus, check_input

    if arguments.plot is not None:
        check_file(arguments.plot, "--plot")
    if arguments.output is not None:
        check_output(arguments.output, "evaluate")
    check_input("--model", arguments.model)
    check_input("--adapter", arguments.adapter)
    check_input("--probe", arguments.probe)
    check_corpus("--data", [arguments.data])
    from megatron_ee.evaluation.evaluate import evaluate
    from megatron_ee.evaluation.plots import plot_reliability, plot_sweep
    from megatron_ee.evaluation.probe_compare import print_since, print_speed, read_probe, since_dict, speed_dict
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
        write_quality(result.quality, result.exits, arguments.output / "evaluation", compared)
        if result.exits:
            plot_reliability(result.quality, arguments.output / "reliability.png")
    if arguments.plot is not None and result.exits:
        plot_sweep(result.quality, arguments.plot)
    elif arguments.plot is not None:
        print(f"megatron-ee evaluate: no exits to sweep, so no {arguments.plot}", file=sys.stderr)
    return 0
