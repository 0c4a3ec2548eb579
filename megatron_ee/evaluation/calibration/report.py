"""The result of a calibration: the certificate, and what it says in words and tables."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from megatron_ee.evaluation.calibration.candidates import level_decimals
from megatron_ee.evaluation.calibration.run import Calibrated
from megatron_ee.evaluation.calibration.sample import ALL, CalibrationPlan, Sample
from megatron_ee.inference.certificate import MADE_BY, VERSION, Certificate, Decoding, used_dtype
from megatron_ee.inference.options import EngineOptions
from megatron_ee.inference.released import Released
from megatron_ee.inference.sampling import Sampling
from megatron_ee.tables import add_columns, make_console, new_table


def make_certificate(
    outcome: Calibrated,
    plan: CalibrationPlan,
    sample: Sample,
    decoding: Decoding,
    digests: Mapping[str, str | None],
    full_layers: int,
) -> Certificate:
    """The certificate of a calibration.

    Args:
        outcome: what came out.
        plan: what was asked for.
        sample: what was calibrated on.
        decoding: the settings of the answers.
        digests: from ``released_digests``.
        full_layers: number of backbone layers.
    """
    return Certificate(
        made_by=MADE_BY,
        version=VERSION,
        task=", ".join(sorted({record.task for record in (*sample.fit, *sample.test)})),
        loss=plan.loss,
        metric=plan.metric if plan.loss == "quality" else None,
        risk=plan.risk,
        delta=plan.delta,
        p_value=plan.p_value,
        n=len(sample.test),
        n_fit=len(sample.fit),
        per_group=plan.per_group,
        groups=outcome.groups,
        policy=None if plan.per_group == "own" else next(iter(outcome.scopes.values())).policy,
        scaling=outcome.scaling,
        tested={name: tuple(scope.tests) for name, scope in outcome.scopes.items()},
        loss_interval=outcome.loss_interval,
        full_quality=outcome.full_quality,
        mean_exit_layer=outcome.mean_exit_layer,
        full_layers=full_layers,
        model_sha256=str(digests["model_sha256"]),
        adapter_sha256=str(digests["adapter_sha256"]),
        tokenizer_sha256=str(digests["tokenizer_sha256"]),
        data_sha256=sample.sha256,
        decoding=decoding,
        overlap=sample.overlap,
        seed=plan.seed,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def decoding_of(plan: CalibrationPlan, released: Released, options: EngineOptions, quantise: str) -> Decoding:
    """The settings of a calibration's answers, which are greedy."""
    return Decoding(
        chat=bool(released.tokenizer.templates),
        max_tokens=plan.max_tokens,
        sampling=Sampling(),
        stop=plan.stop,
        dtype=used_dtype(options, released),
        weights=options.weights,
        quantise=quantise,
    )


def print_certificate(certificate: Certificate) -> None:
    """Print what was tested, what is promised and what it gains to stdout."""
    console = make_console()
    if any(certificate.tested.values()):
        console.print(_tests(certificate, console))
    if certificate.groups:
        console.print(_groups(certificate, console))
    console.print(statement(certificate), soft_wrap=True)


def statement(certificate: Certificate) -> str:
    """What the certificate promises, in plain words."""
    c = certificate
    bound = f"{c.risk:g}"
    promised = {
        "disagreement": f"at most {100 * c.risk:g}% of the answers differ from full mode's",
        "quality": f"the answers lose at most {bound} of {c.metric} against full mode's on average",
        "rouge": f"1 - ROUGE-L of the answers against full mode's is at most {bound} on average",
    }[c.loss]
    whom = {"no": "", "worst": ", in every group", "own": ", in each group with its own thresholds"}[c.per_group]
    if c.loss_interval is None:
        return (
            f"Not certified: no setting of the exits that saves layers passed the test that {promised}{whom}, at "
            f"confidence {100 * (1 - c.delta):g}%. The certificate runs full mode."
        )
    parts = [
        f"Certified: with confidence {100 * (1 - c.delta):g}%, {promised}{whom}, for requests like these ({c.task}).",
        f"Measured on {c.n} test records: mean loss {c.loss_interval.mean:.4f}"
        f" (upper bound {c.loss_interval.high:.3f})",
    ]
    if c.mean_exit_layer is not None:
        layer = c.mean_exit_layer
        parts[-1] += (
            f"; tokens left after {layer.mean:.2f} of {c.full_layers} layers on average (95%: {layer.low or 0:.2f} to "
            f"{layer.high:.2f})"
        )
    if c.full_quality is not None:
        parts[-1] += f"; {c.metric} of full mode's own answers: {c.full_quality:.3f}"
    if c.says_little:
        parts[-1] += ". That is at most the risk, so even answers that are all wrong would pass: choose a smaller risk"
    return " ".join(parts) + "."


def _tests(certificate: Certificate, console: Any) -> Any:
    table = new_table(
        f"Settings tested, from safe to fast: loss {certificate.loss}, risk {certificate.risk:g}, "
        f"p-value {certificate.p_value}",
        console,
    )
    scoped = set(certificate.tested) != {ALL}
    add_columns(table, *(["group"] if scoped else []), words=True)
    add_columns(table, "level", "mean loss", "p-value", "mean exit layer")
    add_columns(table, "result", words=True)
    for scope, tests in certificate.tested.items():
        for each in tests:
            layer = "" if each.mean_exit_layer is None else f"{each.mean_exit_layer:.2f}"
            figures = (f"{each.level:.{level_decimals(each.level)}f}", f"{each.loss:.4f}", f"{each.p_value:.4g}", layer)
            table.add_row(*([scope] if scoped else []), *figures, "passed" if each.passed else "failed")
    return table


def _groups(certificate: Certificate, console: Any) -> Any:
    table = new_table("Groups in the test part", console)
    add_columns(table, "group", words=True)
    add_columns(table, "records", "needed", "mean loss", "upper bound")
    add_columns(table, "note", words=True)
    for name, group in certificate.groups.items():
        loss = ("", "") if group.loss is None else (f"{group.loss.mean:.4f}", f"{group.loss.high:.3f}")
        small = "too few to say anything" if group.n < group.needed else ""
        if certificate.per_group == "own" and group.policy is None:
            small = "full mode" + (f": {small}" if small else "")
        table.add_row(name, str(group.n), str(group.needed), *loss, small)
    return table
