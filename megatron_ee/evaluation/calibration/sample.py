"""The sample of a calibration: what is asked of it, whether it can be had at all, and its two parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from megatron_ee.checkpoint.adapter import Adapter
from megatron_ee.checkpoint.digest import file_sha256
from megatron_ee.config.validation import Strict
from megatron_ee.data.indexed import open_corpus
from megatron_ee.data.texts import Hashes, hashed, message_texts, read_hashes
from megatron_ee.errors import ConfigError, DataError, common_error, shown
from megatron_ee.evaluation.calibration.pvalues import smallest_count
from megatron_ee.evaluation.tasks.records import TaskRecord, read_records
from megatron_ee.inference.certificate import Loss, Metric, Open, Overlap, PValue
from megatron_ee.inference.policy import Measure
from megatron_ee.inference.released import Released

ALL = "all"
"""Name of the sample as a whole among the groups."""
MOST_FIT = 200
"""Largest number of records that choose the settings. They fit two numbers per exit from many tokens."""
_LISTED = 3


class CalibrationPlan(Strict):
    """What is fixed before the data is seen.

    Attributes:
        risk: bound of the expected loss.
        delta: probability, over the sample, that the bound does not hold.
        loss: of an answer, see ``Certificate``.
        metric: of ``loss: quality``, a key of ``METRICS``.
        p_value: its name.
        per_group: see ``Certificate``.
        policy: what decides whether a token leaves, a key of ``POLICIES``.
        measure: confidence measure, see ``ExitPolicy``.
        points: largest number of settings to test.
        fit_share: share of the records that choose the settings, at most ``MOST_FIT``.
        seed: of the split and of the order.
        max_tokens: largest number of tokens of an answer.
        stop: strings that end an answer.
    """

    risk: Open
    delta: Open
    loss: Loss = "disagreement"
    metric: Metric = "contains"
    p_value: PValue = "betting"
    per_group: Literal["no", "worst", "own"] = "no"
    policy: Literal["threshold", "gate"] = "threshold"
    measure: Measure = "probability"
    points: int = Field(default=12, ge=1, le=1000)
    fit_share: Open = 0.2
    seed: int = Field(default=0, ge=0)
    max_tokens: int = Field(default=64, ge=1)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), strict=False)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.policy == "gate" and self.measure != "probability":
            raise ValueError("measure: has no effect with policy gate, where the gate decides; leave it out")
        return self

    def test_delta(self, groups: int) -> float:
        """The delta of each test, if there are so many groups."""
        return self.delta / groups if self.per_group == "own" else self.delta

    def fit_count(self, count: int) -> int:
        """Number of records of ``count`` that choose the settings."""
        return min(math.ceil(self.fit_share * count), MOST_FIT)


@dataclass(frozen=True)
class Sample:
    """The sample of a calibration.

    Attributes:
        fit: the records that choose the settings.
        test: the records that test them, in the order of the bets.
        needed: by scope (``ALL``, or each group), the smallest number of test records with which it could pass.
        overlap: see ``Certificate``.
        notices: lines for the user.
        sha256: of the file.
    """

    fit: tuple[TaskRecord, ...]
    test: tuple[TaskRecord, ...]
    needed: Mapping[str, int]
    overlap: Overlap
    notices: tuple[str, ...]
    sha256: str


def draw_sample(
    path: Path, plan: CalibrationPlan, released: Released, *, corpora: Sequence[Path], allow_overlap: bool
) -> Sample:
    """Read a sample, check that it can be calibrated on, and split it.

    Args:
        path: of the JSON lines.
        plan: of the calibration.
        released: the model, with exits.
        corpora: prefixes of the corpora that the exits were tuned on, if they do not find them.
        allow_overlap: accept prompts that are in the corpora.

    Raises:
        ConfigError: a line is invalid, the sample is too small, or there is an overlap; the message names the line, the
            file or the key.
        DataError: a corpus is damaged.
    """
    records = read_records([path], released)
    check_records(records, plan)
    fit, test = split_sample(records, plan)
    scopes = scopes_of(test, plan)
    needed = check_possible(scopes, plan)
    overlap, notices = check_overlap(records, released.adapter, corpora, allow=allow_overlap)
    notices += [
        f"group {shown(name)}: {len(members)} records to test on, {needed[name]} needed: it stays in full mode"
        for name, members in scopes.items()
        if len(members) < needed[name]
    ]
    return Sample(tuple(fit), tuple(test), needed, overlap, tuple(notices), file_sha256(path))


def check_records(records: Sequence[TaskRecord], plan: CalibrationPlan) -> None:
    """Refuse records without what the plan needs.

    Raises:
        ConfigError: the message names file and line.
    """
    for record in records:
        if plan.loss == "quality" and not record.references:
            raise common_error(
                f"{record.where}: references: missing; --loss quality compares answers with them, so add them, or give "
                "another --loss"
            )
        if plan.per_group != "no" and record.group is None:
            raise common_error(f"{record.where}: group: missing; --per-group needs the group of every line")


def split_sample(records: Sequence[TaskRecord], plan: CalibrationPlan) -> tuple[list[TaskRecord], list[TaskRecord]]:
    """The part that chooses the settings, and the part that tests them, each in a random order.

    The order is a permutation with the plan's seed. With groups that are certified, each group is split in the same
    shares, so that none is left out of a part by chance.
    """
    order = np.random.default_rng(plan.seed).permutation(len(records))
    groups: dict[str | None, list[TaskRecord]] = {}
    for index in order:
        record = records[index]
        groups.setdefault(record.group if plan.per_group != "no" else None, []).append(record)
    fit = {each.id for members in groups.values() for each in members[: plan.fit_count(len(members))]}
    shuffled = [records[index] for index in order]
    return [each for each in shuffled if each.id in fit], [each for each in shuffled if each.id not in fit]


def by_group(records: Sequence[TaskRecord]) -> dict[str, list[TaskRecord]]:
    """The records of each group, sorted by its name. Records without group are in none."""
    groups: dict[str, list[TaskRecord]] = {}
    for record in records:
        if record.group is not None:
            groups.setdefault(record.group, []).append(record)
    return dict(sorted(groups.items()))


def scopes_of(records: Sequence[TaskRecord], plan: CalibrationPlan) -> dict[str, list[TaskRecord]]:
    """What the statement is made of: every group's records, or those of the whole sample under ``ALL``."""
    return {ALL: list(records)} if plan.per_group == "no" else by_group(records)


def check_possible(scopes: Mapping[str, Sequence[TaskRecord]], plan: CalibrationPlan) -> dict[str, int]:
    """Refuse a sample that is too small for its plan, whatever the losses are.

    With ``per_group: own`` groups that are too small stay in full mode, unless all are.

    Args:
        scopes: of the test part.
        plan: of the calibration.

    Returns:
        The smallest number of test records with which a scope could pass.

    Raises:
        ConfigError: the message says how many records would do.
    """
    needed = smallest_count(plan.p_value, plan.risk, plan.test_delta(len(scopes)))
    short = {name: len(members) for name, members in scopes.items() if len(members) < needed}
    if short and (plan.per_group != "own" or len(short) == len(scopes)):
        sizes = sorted(short.items(), key=lambda each: each[1])
        which = "" if ALL in short else f" of group {', '.join(shown(name) for name, _ in sizes[:_LISTED])}"
        which += f" and {len(sizes) - _LISTED} more" if len(sizes) > _LISTED else ""
        raise ConfigError(
            f"risk: {plan.risk:g} with delta {plan.delta:g} needs {needed} records to test on even if none has a "
            f"loss, but the lines{which} leave {sizes[0][1]}; give {_total(needed, plan)} lines"
            f"{'' if ALL in short else ' of each group'}, or a larger risk or delta"
        )
    return dict.fromkeys(scopes, needed)


def _total(needed: int, plan: CalibrationPlan) -> int:
    """Smallest number of records that leaves ``needed`` to test on."""
    total = needed
    while total - plan.fit_count(total) < needed:
        total += 1
    return total


def check_overlap(
    records: Sequence[TaskRecord], adapter: Adapter | None, corpora: Sequence[Path], *, allow: bool
) -> tuple[Overlap, list[str]]:
    """Look for prompts of the sample in the corpora that the exits were tuned on.

    Args:
        records: the sample.
        adapter: the exits, which record their corpora.
        corpora: prefixes of corpora that are not where the adapter recorded them.
        allow: accept an overlap.

    Returns:
        The result for the certificate, and notices for the user.

    Raises:
        ConfigError: there is an overlap; the message names the first line.
        DataError: a corpus is damaged, or one of ``corpora`` has no hashes of its texts.
    """
    known, unknown = _hashes(adapter, corpora)
    texts = [_prompt(record) for record in records]
    for prefix, hashes in known.items():
        found = [record for record, same in zip(records, hashed(texts, hashes), strict=True) if same]
        if found:
            line = f"{len(found)} of its {len(records)} prompts are in {prefix}, which the exits were tuned on"
            if not allow:
                raise common_error(f"{found[0].where}: {line}, this one first; leave them out, or give --allow-overlap")
            return "allowed", [f"{line}: the promise holds for other requests only if they are like these, too"]
    if unknown:
        reason = "; ".join(unknown)
        return "unknown", [f"whether the exits were tuned on these prompts is not known: {reason}; see --corpus"]
    return "none", []


def _prompt(record: TaskRecord) -> str:
    """The text that a corpus has hashed if it holds the record: the prompt, or the last message of the user."""
    if record.messages is None:
        return record.prompt or ""
    return next(iter(message_texts(record.messages)[-1:]), "")


def _hashes(adapter: Adapter | None, corpora: Sequence[Path]) -> tuple[dict[str, Hashes], list[str]]:
    """Hashes by prefix, and why some are not known."""
    known, unknown, moved = dict[str, Hashes](), list[str](), set[str]()
    for given in corpora:
        hashes = read_hashes(given)
        if hashes is None:
            raise DataError(f"{given}: has no hashes of its texts; prepare the corpus again with this version")
        known[str(given)] = hashes
        moved.add(open_corpus(given).fingerprint)
    recorded = () if adapter is None or adapter.corpora is None else adapter.corpora
    for prefix, fingerprint in recorded:
        if fingerprint in moved:
            continue
        try:
            hashes = read_hashes(prefix)
            same = hashes is not None and open_corpus(prefix).fingerprint == fingerprint
        except DataError:
            same = False
        if hashes is None or not same:
            unknown.append(f"{prefix} is not there with hashes of its texts, or has changed")
        else:
            known[prefix] = hashes
    return known, unknown if recorded or known else ["the adapter does not record its corpora"]
