"""``megatron-ee calibrate``: exit thresholds with a bound on what they cost, tested on the user's own prompts."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ee.commands import Parser, at_least
from megatron_ee.commands.engine_options import add_engine, add_model, engine_options, errors_of_options
from megatron_ee.errors import ConfigError, UserError

if TYPE_CHECKING:
    from megatron_ee.checkpoint.journal import Journal
    from megatron_ee.evaluation.calibration.sample import CalibrationPlan, Sample
    from megatron_ee.inference.certificate import Certificate, Decoding

DESCRIPTION = """Find the fastest exit thresholds whose loss against full mode has a tested bound: with probability 1 -
delta over the sample, the expected loss is at most the risk. Writes a certificate for generate --calibration. Full mode
is an answer, too."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser("calibrate", DESCRIPTION)
    add = result.add_argument
    add_model(result, adapter="exits to calibrate (default: those in the model's directory)")
    add(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="the sample as JSON lines, like what the exits will answer: prompt or messages, and optionally id, task, "
        "references, group",
    )
    add(
        "--output", type=Path, required=True, metavar="FILE", help="JSON file to write; replaces an earlier certificate"
    )
    add("--risk", type=float, required=True, metavar="R", help="bound of the expected loss, such as 0.05")
    add("--delta", type=float, required=True, metavar="D", help="probability that it does not hold, such as 0.1")
    add(
        "--loss",
        choices=("disagreement", "quality", "rouge"),
        default="disagreement",
        help="loss of an answer. disagreement: it differs from full mode's (default). quality: how much less of "
        "--metric it has than full mode's, against references. rouge: 1 - ROUGE-L against full mode's",
    )
    add("--metric", metavar="M", help="of --loss quality: contains (default), exact_match, f1 or rouge_l")
    add("--p-value", choices=("betting", "hoeffding-bentkus"), default="betting", help="test (default: betting)")
    add(
        "--per-group",
        nargs="?",
        choices=("worst", "own"),
        const="worst",
        default="no",
        help="the bound holds for every group of the data (worst), or each group gets its own thresholds (own)",
    )
    add("--max-tokens", type=at_least(1), default=64, metavar="N", help="largest number of new tokens (default: 64)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    add("--policy", choices=("threshold", "gate"), default="threshold", help="as for generate (default: threshold)")
    add("--measure", default="probability", metavar="M", help="as for generate (default: probability)")
    add("--points", type=at_least(1), default=12, metavar="N", help="largest number of settings (default: 12)")
    add(
        "--fit-share",
        type=float,
        default=0.2,
        metavar="X",
        help="share of the sample, at most 200 lines, that chooses the settings; the rest tests them (default: 0.2)",
    )
    add("--seed", type=at_least(0), default=0, metavar="N", help="seed of the split and the order (default: 0)")
    add(
        "--corpus",
        type=Path,
        action="append",
        default=[],
        metavar="PREFIX",
        help="corpus that the exits were tuned on, if it is no longer where tune read it; repeatable",
    )
    add("--allow-overlap", action="store_true", help="accept prompts that the exits were tuned on")
    existing = result.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue an interrupted calibration")
    existing.add_argument("--overwrite", action="store_true", help="discard an interrupted calibration")
    add("--json", action="store_true", help="print the certificate instead of tables")
    add_engine(result.add_argument_group("engine"))
    return result


def run(arguments: argparse.Namespace) -> int:
    """Calibrate, write the certificate and print it."""
    from megatron_ee.checkpoint.ownership import check_file
    from megatron_ee.commands.inputs import check_corpus, check_input
    from megatron_ee.config.validation import validated
    from megatron_ee.evaluation.calibration.report import decoding_of, make_certificate, print_certificate
    from megatron_ee.evaluation.calibration.run import calibrate, usable_exits
    from megatron_ee.evaluation.calibration.sample import CalibrationPlan, draw_sample
    from megatron_ee.inference.loading import open_engine
    from megatron_ee.inference.released import open_released, released_digests
    from megatron_ee.parallel.groups import launched_rank

    first = launched_rank() == 0
    with errors_of_options():
        if arguments.metric is not None and arguments.loss != "quality":
            raise ConfigError("--metric: has an effect with --loss quality only")
        arguments.metric = arguments.metric or "contains"
        plan = validated(CalibrationPlan, {name: getattr(arguments, name) for name in CalibrationPlan.model_fields})
        check_input("model", arguments.model)
        check_input("adapter", arguments.adapter)
        check_input("data", arguments.data)
        check_corpus("corpus", arguments.corpus)
        if first:
            check_file(arguments.output, "--output")
        verify, quantise = not arguments.no_verify, arguments.quantise
        released = open_released(arguments.model, arguments.adapter, verify=verify, quantise=quantise)
        layers = usable_exits(released.exits, released.model.architecture.num_layers, plan)
        sample = draw_sample(
            arguments.data, plan, released, corpora=arguments.corpus, allow_overlap=arguments.allow_overlap
        )
        options = engine_options(arguments, released, exits=layers)
        digests = released_digests(released, show=first)
    if first:
        for line in sample.notices:
            print(f"megatron-ee calibrate: {line}", file=sys.stderr)
    decoding = decoding_of(plan, released, options, quantise)
    with (
        _journal(arguments, plan, decoding, sample, digests) if first else contextlib.nullcontext() as journal,
        open_engine(released, options) as engine,
    ):
        if engine is None or journal is None:
            return 0
        with _resumable():
            outcome = calibrate(engine, sample, plan, journal, batch=arguments.max_num_seqs)
        certificate = make_certificate(outcome, plan, sample, decoding, digests, engine.num_layers)
        _write(arguments.output, certificate, journal)
    if arguments.json:
        print(json.dumps(certificate.model_dump(mode="json")))
    else:
        print_certificate(certificate)
    return 0


def _journal(
    arguments: argparse.Namespace,
    plan: CalibrationPlan,
    decoding: Decoding,
    sample: Sample,
    digests: Mapping[str, str | None],
) -> contextlib.AbstractContextManager[Journal]:
    """The journal beside the output, which holds the answers until the certificate is written."""
    from megatron_ee.checkpoint.journal import open_journal
    from megatron_ee.evaluation.tasks.answers import entry_key
    from megatron_ee.inference.certificate import MADE_BY

    settings = {**plan.model_dump(mode="json"), **decoding.model_dump(mode="json", exclude={"sampling"})}
    about = {"made_by": MADE_BY, **digests, "records_sha256": sample.sha256, "settings": settings}
    path = arguments.output.with_name(f"{arguments.output.name}.partial")
    return open_journal(path, about, entry_key, resume=arguments.resume, overwrite=arguments.overwrite)


@contextlib.contextmanager
def _resumable() -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, UserError):
        print("megatron-ee calibrate: the same command with --resume continues", file=sys.stderr)
        raise


def _write(path: Path, certificate: Certificate, journal: Journal) -> None:
    """Write the certificate, then remove the journal."""
    from megatron_ee.checkpoint.atomic import write_json
    from megatron_ee.checkpoint.journal import info_file
    from megatron_ee.errors import storage_errors

    write_json(path, certificate.model_dump(mode="json"))
    with storage_errors(journal.path, "remove"):
        journal.path.unlink()
        info_file(journal.path).unlink()
