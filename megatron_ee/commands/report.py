"""``megatron-ee report``: one HTML page of what was gained and risked, for readers who do not read code."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ee.commands import Parser, add_files, at_least
from megatron_ee.errors import ConfigError
from megatron_ee.evaluation.page import LANGUAGES

EXAMPLES = 6
DESCRIPTION = """Make one HTML page of what tune, evaluate, calibrate and drift left on disk: what was tuned on what,
cost, speed, quality, guarantee, groups, examples and what to watch, in plain words. It loads nothing from a network
and prints well. Parts that are missing are left out, and the page says how to get them. All files must be about one
model and one set of exits."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser("report", DESCRIPTION)
    add = result.add_argument
    add("--run", type=Path, metavar="DIR", help="directory of a run of tune, or of a quickstart, with its evaluation")
    add_files(
        result,
        "--evaluation",
        "directories of evaluate --output, or files of evaluate --json; repeatable. The page begins with the first "
        "evaluation of tasks",
        "PATH",
    )
    add_files(result, "--calibration", "certificates of calibrate; repeatable")
    add_files(result, "--drift", "outputs of drift --json; repeatable")
    add("--plan", type=Path, metavar="FILE", help="output of plan --json, for planned time, energy and price")
    add("--output", type=Path, required=True, metavar="FILE", help="HTML file to write")
    add("--language", choices=LANGUAGES, default="en", help="language of the page (default: en)")
    add("--title", metavar="TEXT", help="title of the page")
    add(
        "--setting",
        metavar="NAME",
        help="setting of threshold mode that the page looks at more closely, such as 'threshold 0.9' (default: that of "
        "the certificate, or the fastest that is not measurably worse than full mode)",
    )
    add(
        "--examples",
        type=at_least(0),
        default=EXAMPLES,
        metavar="N",
        help=f"examples of answers that early exit changed (default: {EXAMPLES})",
    )
    return result


def run(arguments: argparse.Namespace) -> int:
    """Read the files, check that they belong together, and write the page."""
    from megatron_ee.checkpoint.ownership import check_file
    from megatron_ee.commands.inputs import check_input

    given = (arguments.run, *arguments.evaluation, *arguments.calibration)
    if not any(given):
        raise ConfigError("--run, --evaluation, --calibration: give at least one of them; see docs/report.md")
    for option in ("run", "evaluation", "calibration", "drift", "plan"):
        value = getattr(arguments, option)
        check_input(f"--{option}", *(value if isinstance(value, list) else [value]))
    if arguments.output.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--output: {arguments.output} must end in .html")
    check_file(arguments.output, "--output")
    from megatron_ee.evaluation.page.language import load_language
    from megatron_ee.evaluation.page.material import Material, check_material
    from megatron_ee.evaluation.page.render import make_page, write_page
    from megatron_ee.evaluation.page.runs import read_run, run_directory
    from megatron_ee.evaluation.page.sources import (
        Measurements,
        read_certificates,
        read_drifts,
        read_evaluations,
        read_plan,
    )

    directory, evaluations = None, list(arguments.evaluation)
    if arguments.run is not None:
        directory, own = run_directory(arguments.run)
        evaluations += [own] if own is not None else []
    tasks, corpora = read_evaluations(evaluations)
    certificates = read_certificates(arguments.calibration)
    plan = None if arguments.plan is None else read_plan(arguments.plan)
    measured = Measurements(tasks, corpora, certificates, read_drifts(arguments.drift), plan)
    tuned = None if directory is None else read_run(directory, measured.adapter_sha256)
    language = load_language(arguments.language)
    material = Material(language, tuned, measured, arguments.setting, arguments.examples)
    check_material(material)
    write_page(make_page(material, arguments.title), arguments.output)
    print(arguments.output)
    return 0
