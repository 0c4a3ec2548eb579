"""``megatron-ee drift``: whether the audited requests of a server's exit logs still keep to the certified risk."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_ee.commands import Parser
from megatron_ee.errors import ConfigError

ALARM_LEVEL = 0.01
DESCRIPTION = """Read exit logs, and test whether the mean loss of the audited requests is still at most the risk. The
probability that the test from the start ever gives a false alarm is at most --alarm-level. The restarting test finds a
change after a long good time sooner, and begins again after each alarm; its false alarms are 1/level or more audits
apart on average."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser("drift", DESCRIPTION)
    result.add_argument("logs", type=Path, nargs="+", metavar="LOG", help="exit logs of one server, JSON lines")
    allowed = result.add_mutually_exclusive_group(required=True)
    allowed.add_argument(
        "--calibration", type=Path, metavar="FILE", help="certificate of calibrate: only requests under it count"
    )
    allowed.add_argument(
        "--risk", type=_share, metavar="R", help="mean loss that is allowed, for logs with a single certificate"
    )
    result.add_argument(
        "--alarm-level",
        type=_share,
        default=ALARM_LEVEL,
        metavar="A",
        help=f"probability of a false alarm (default: {ALARM_LEVEL})",
    )
    result.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    result.add_argument("--plot", type=Path, metavar="FILE", help="plot the tests to a .png, .pdf or .svg file")
    return result


def run(arguments: argparse.Namespace) -> int:
    """Test. Print tables or JSON to stdout, and write the requested plot."""
    from megatron_ee.checkpoint.digest import file_sha256
    from megatron_ee.commands.inputs import check_input
    from megatron_ee.evaluation.drift.audits import certificates, read_audits
    from megatron_ee.evaluation.drift.monitor import new_monitor, run_monitor
    from megatron_ee.evaluation.drift.report import drift_dict, plot_drift, print_drift
    from megatron_ee.evaluation.figure import check_plot
    from megatron_ee.inference.certificate import read_certificate

    if arguments.plot is not None:
        check_plot(arguments.plot, "--plot")
    check_input("LOG", *arguments.logs)
    check_input("--calibration", arguments.calibration)
    audits = read_audits(arguments.logs)
    if arguments.calibration is not None:
        certificate = read_certificate(arguments.calibration)
        if certificate.loss == "quality":
            raise ConfigError(
                f"--calibration: {arguments.calibration}: its loss is quality, by references that no request has, so "
                "its requests are never audited; calibrate with --loss disagreement or rouge"
            )
        risk, digests = certificate.risk, [file_sha256(arguments.calibration)]
    else:
        risk, digests = arguments.risk, certificates(audits)
        if len(digests) > 1:
            raise ConfigError(
                f"--risk: audited requests ran under {len(digests)} certificates; choose one with --calibration"
            )
    counted = [each for each in audits if each.audit is not None and each.audit.certificate in digests]
    losses = [each.audit.loss for each in counted if each.audit is not None]
    history = run_monitor(new_monitor(risk, arguments.alarm_level), losses)
    uncounted = len(audits) - len(counted)
    if arguments.json:
        print(json.dumps(drift_dict(history, counted, uncounted)))
    else:
        print_drift(history, counted, uncounted)
    if arguments.plot is not None and losses:
        plot_drift(history, arguments.plot)
    elif arguments.plot is not None:
        print(f"megatron-ee drift: no audited request counts, so no {arguments.plot}", file=sys.stderr)
    return 0


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, not {text}")
    return value
