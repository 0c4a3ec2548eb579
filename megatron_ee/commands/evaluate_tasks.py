"""``megatron-ee evaluate --tasks``: quality of answers beside their speed, in every mode."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ee.commands import at_least
from megatron_ee.commands.engine_options import add_serving, engine_options, errors_of_options, rounding_settings
from megatron_ee.errors import ConfigError, UserError, printable

if TYPE_CHECKING:
    from megatron_ee.evaluation.tasks.answers import Setting
    from megatron_ee.evaluation.tasks.records import TaskRecord
    from megatron_ee.evaluation.tasks.results import TaskResults
    from megatron_ee.inference.certificate import Certificate
    from megatron_ee.inference.released import Released

ANSWERS, RESULTS, PLOT, GROUPS = "answers.jsonl", "tasks.json", "tasks.png", "groups.png"
"""Files in ``--output``."""
MADE_BY = "megatron-ee evaluate"


def add_tasks(group: Any) -> None:
    """The options of ``--tasks``."""
    add = group.add_argument
    add(
        "--thresholds",
        type=float,
        nargs="+",
        metavar="X",
        help="thresholds of threshold mode (default: 0.6 0.8 0.9 0.95)",
    )
    add(
        "--policy",
        choices=("threshold", "gate"),
        nargs="+",
        default=["threshold"],
        help="what decides in threshold mode, see generate; both are compared if both are given (default: threshold)",
    )
    add("--max-tokens", type=at_least(1), default=64, metavar="N", help="largest number of new tokens (default: 64)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end answers before this text; repeatable")
    add(
        "--by",
        choices=("group", "script", "length"),
        help="also compare groups of records in threshold mode: by their field group, the script or the tokens of the "
        "prompt",
    )
    add(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="also answer with the thresholds of this certificate; with --by, give its loss and a bound of it by group",
    )
    add_serving(group)
    existing = group.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true", help="continue the evaluation in --output, or show a finished one again"
    )
    existing.add_argument("--overwrite", action="store_true", help="replace the evaluation in --output")


def run_tasks(arguments: argparse.Namespace) -> int:
    """Answer the records in every mode. Print a table or JSON, and write the requested files."""
    from megatron_ee.commands.inputs import check_input
    from megatron_ee.evaluation.tasks.records import read_records
    from megatron_ee.evaluation.tasks.run import calibrated_setting, evaluate_tasks, in_full_mode
    from megatron_ee.inference.certificate import open_calibration
    from megatron_ee.inference.loading import open_engine
    from megatron_ee.inference.released import open_released
    from megatron_ee.parallel.groups import launched_rank

    if arguments.output is None and (arguments.resume or arguments.overwrite):
        raise ConfigError("--resume and --overwrite: need --output, the directory of an earlier evaluation")
    with errors_of_options():
        check_input("tasks", *arguments.tasks)
        check_input("calibration", arguments.calibration)
        released = open_released(
            arguments.model, arguments.adapter, verify=not arguments.no_verify, quantise=arguments.quantise
        )
        records = read_records(arguments.tasks, released)
        options = engine_options(arguments, released)
        settings = _settings(arguments, records, released)
        calibration = None
        if arguments.calibration is not None:
            calibration = open_calibration(arguments.calibration, released, options, quantise=arguments.quantise)
            settings.append(
                calibrated_setting(calibration, settings[0], records, chat=bool(released.tokenizer.templates))
            )
        about = _about(arguments, settings, records, released)
    first = launched_rank() == 0
    bare = dict.fromkeys(record.task for record in records if not record.scored)
    if first and bare:
        which = printable(", ".join(bare))
        print(f"{which}: no references or choices, so only agreement and speed are measured", file=sys.stderr)
    for line in filter(None, (in_full_mode(setting, records) for setting in settings) if first else ()):
        print(line, file=sys.stderr)
    certificate = None if calibration is None else calibration.certificate
    if first and _calibrated_here(arguments, certificate):
        line = "was calibrated on --tasks, so its setting looks better here than on other records"
        print(f"{arguments.calibration}: {line}", file=sys.stderr)
    with (
        _opened_journal(arguments, about) if first else contextlib.nullcontext() as journal,
        open_engine(released, options) as engine,
    ):
        if engine is None:
            return 0
        try:
            results = evaluate_tasks(engine, records, settings, journal, batch=arguments.max_num_seqs)
        except (KeyboardInterrupt, UserError):
            if journal is not None:
                print("megatron-ee evaluate: the same command with --resume continues", file=sys.stderr)
            raise
    _report(arguments, results, about, certificate)
    return 0


def _calibrated_here(arguments: argparse.Namespace, certificate: Certificate | None) -> bool:
    """Whether a file of ``--tasks`` is the sample that chose the certificate's thresholds."""
    from megatron_ee.checkpoint.digest import file_sha256

    return certificate is not None and certificate.data_sha256 in map(file_sha256, arguments.tasks)


def _settings(arguments: argparse.Namespace, records: list[TaskRecord], released: Released) -> list[Setting]:
    """The settings to compare, checked against the model."""
    from megatron_ee.commands.generate_requests import check_request
    from megatron_ee.evaluation.tasks.run import THRESHOLDS, compared_settings

    if arguments.thresholds is not None and not released.exits:
        raise ConfigError("thresholds: there are no exits; give their adapter with --adapter")
    if arguments.by is not None and not released.exits:
        raise ConfigError("by: there are no exits, so all groups have full mode; give their adapter with --adapter")
    thresholds = THRESHOLDS if arguments.thresholds is None else arguments.thresholds
    limits = {"max_tokens": arguments.max_tokens, "stop": arguments.stop}
    settings = compared_settings(released, thresholds, arguments.policy, **limits)
    for setting in settings:
        check_request(setting.request(records[0].prompt_ids), released)
    return settings


def _about(
    arguments: argparse.Namespace, settings: list[Setting], records: list[TaskRecord], released: Released
) -> dict[str, Any]:
    """What the answers depend on."""
    from megatron_ee.checkpoint.digest import file_sha256
    from megatron_ee.evaluation.tasks.records import records_digest
    from megatron_ee.inference.released import released_digests
    from megatron_ee.parallel.groups import launched_rank

    return {
        "made_by": MADE_BY,
        "model": str(arguments.model),
        "adapter": None if released.adapter is None else str(released.adapter.path),
        "files": [str(path) for path in arguments.tasks],
        **released_digests(released, show=launched_rank() == 0),
        "records_sha256": records_digest(records),
        "settings": {
            "modes": [setting.name for setting in settings],
            "max_tokens": arguments.max_tokens,
            "stop": arguments.stop,
            "calibration_sha256": None if arguments.calibration is None else file_sha256(arguments.calibration),
            "max_num_seqs": arguments.max_num_seqs,
            **rounding_settings(arguments, released),
        },
    }


def _opened_journal(arguments: argparse.Namespace, about: dict[str, Any]) -> Any:
    """The journal in ``--output``, opened; None without an output."""
    from megatron_ee.checkpoint.journal import check_journal, open_journal
    from megatron_ee.checkpoint.ownership import claim_output
    from megatron_ee.evaluation.tasks.answers import entry_key

    output: Path | None = arguments.output
    if output is None:
        return contextlib.nullcontext()
    path, overwrite = output / ANSWERS, arguments.overwrite
    if (output / RESULTS).exists() and not (arguments.resume or overwrite):
        raise ConfigError(
            f"--output: {output} holds a finished evaluation; give --resume to show it again, --overwrite to replace "
            "it, or another directory"
        )
    check_journal(path, resume=arguments.resume, overwrite=overwrite)
    claim_output(output, "evaluate")
    if overwrite:
        for name in (RESULTS, PLOT, GROUPS):
            (output / name).unlink(missing_ok=True)
    return open_journal(path, about, entry_key, resume=arguments.resume, overwrite=overwrite)


def _report(
    arguments: argparse.Namespace, results: TaskResults, about: dict[str, Any], certificate: Certificate | None
) -> None:
    from megatron_ee.checkpoint.atomic import write_json
    from megatron_ee.evaluation.groups.report import groups_dict, plot_groups, print_groups
    from megatron_ee.evaluation.groups.tasks import compare_task_groups
    from megatron_ee.evaluation.tasks.report import plot_tasks, print_tasks

    # The journal knows the options as its settings. In the results, settings are what was compared.
    inputs = {"options" if key == "settings" else key: value for key, value in about.items()}
    found = {**inputs, **results.to_dict(), "timing": results.timing(arguments.max_num_seqs)}
    compared = {}
    if arguments.by is not None:
        here = _calibrated_here(arguments, certificate)
        compared = compare_task_groups(results, arguments.by, certificate, calibrated_here=here)
    if compared:
        found["groups"] = {name: groups_dict(each) for name, each in compared.items()}
    if arguments.json:
        print(json.dumps(found))
    else:
        print_tasks(results, arguments.max_num_seqs)
        if compared:
            print()
            print_groups(compared)
    if arguments.output is not None:
        write_json(arguments.output / RESULTS, {**found, "rows": results.rows_dict()})
        plot_tasks(results, arguments.output / PLOT)
        if any(each.large_enough for each in compared.values()):
            plot_groups(compared, arguments.output / GROUPS)
        else:
            (arguments.output / GROUPS).unlink(missing_ok=True)  # of an earlier comparison of the same answers
    if arguments.plot is not None:
        plot_tasks(results, arguments.plot)
