"""``megatron-ee probe``: what exits would gain on a model, a text and this machine, before tuning."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_ee.commands import Parser
from megatron_ee.commands.engine_options import add_model

TEXTS = (".txt", ".jsonl", ".ndjson", ".json")
DESCRIPTION = """Before tuning: fit exits after the layers of a model on your text, measure how often they agree with
the final exit and how long a layer and a head take here, and forecast the speed of threshold and speculative mode.
Prints the exits to tune as a block of a configuration, or why exits will not pay. Runs in one process."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser("probe", DESCRIPTION)
    add_model(result)
    result.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="text like that to be generated: corpus from prepare-data, or a .txt or .jsonl file (text or chat)",
    )
    result.add_argument(
        "--budget", type=float, default=5.0, metavar="MINUTES", help="time to take, loading aside (default: 5)"
    )
    result.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    result.add_argument(
        "--output", type=Path, metavar="DIR", help="write probe.json to this directory: new, or an earlier probe's"
    )
    return result


def run(arguments: argparse.Namespace) -> int:
    """Probe. Print tables or JSON to stdout, and write the requested file."""
    from megatron_ee.checkpoint.atomic import write_json
    from megatron_ee.checkpoint.ownership import check_output, claim_output
    from megatron_ee.commands.inputs import check_corpus, check_input

    if arguments.output is not None:
        check_output(arguments.output, "probe")
    check_input("--model", arguments.model)
    if arguments.data.suffix in TEXTS:
        check_input("--data", arguments.data)
    elif not arguments.data.is_file():
        check_corpus("--data", [arguments.data])
    from megatron_ee.evaluation.probe import probe
    from megatron_ee.evaluation.probe_report import print_probe, probe_dict

    found = probe(
        model=arguments.model,
        data=arguments.data,
        budget_minutes=arguments.budget,
        dtype=arguments.dtype,
        verify=not arguments.no_verify,
    )
    if arguments.json:
        print(json.dumps(probe_dict(found)))
    else:
        print_probe(found)
    if arguments.output is not None:
        claim_output(arguments.output, "probe")
        write_json(arguments.output / "probe.json", probe_dict(found))
    return 0
