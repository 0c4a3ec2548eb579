"""Fairness: whether early exit treats some groups of records worse than the others.

Each group is compared with all records outside it, in exit depth, agreement with full mode, difference of quality and
loss. Each comparison is a permutation test, and Holm's method corrects for the number of groups and settings. Records
are the unit, and must not depend on each other.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_ee.evaluation.statistics import PERMUTATIONS, Floats, holm, paired_intervals, permutation_p, wilson

LEAST_MEMBERS = 10
"""Smaller groups are named, but not judged."""
SIGNIFICANCE = 0.05
"""Level of the tests of one measure, all groups and settings together."""
LAYERS, AGREEMENT, QUALITY, LOSS = "exit layer", "agreement", "quality difference", "loss"
"""The measures. Quality difference is early minus full: below 0, early answers are worse."""
WORSE = {LAYERS: 1, AGREEMENT: -1, QUALITY: -1, LOSS: 1}
"""Whether a higher (1) or a lower (-1) value is worse for a group."""
RISK = (LOSS, QUALITY, AGREEMENT)
"""The measure of risk is the first of these that was measured."""
RANGES = {AGREEMENT: (0, 1), QUALITY: (-1, 1), LOSS: (0, 1)}
"""What a record can have of a measure."""


@dataclass(frozen=True)
class EarlyResults:
    """Early exit beside full mode, record by record. Each array is ``[records]``; NaN where nothing was measured.

    Attributes:
        layers: mean layer of the exits that emitted the tokens of the early answer.
        agreement: share of its tokens that are full mode's, in [0, 1].
        early_quality: quality of the early answer, in [0, 1]; None if there is none for any record.
        full_quality: of full mode's answer, likewise.
        losses: loss of the early answer as a certificate defines it, in [0, 1]; None without a certificate.
    """

    layers: Floats
    agreement: Floats
    early_quality: Floats | None = None
    full_quality: Floats | None = None
    losses: Floats | None = None

    def measures(self) -> dict[str, Floats]:
        """By name, the measures that any record has."""
        found = {LAYERS: self.layers, AGREEMENT: self.agreement}
        if self.early_quality is not None and self.full_quality is not None:
            found[QUALITY] = self.early_quality - self.full_quality
        if self.losses is not None:
            found[LOSS] = self.losses
        return {name: values for name, values in found.items() if not np.isnan(values).all()}


@dataclass(frozen=True)
class GroupFigure:
    """One measure of a group.

    Attributes:
        members: records that have the measure.
        mean: over them.
        rest: mean over the records outside the group; None if there are none.
        low, high: 95% confidence interval of the mean.
        p: that the group equals the rest, two-sided, after Holm's correction; None if the rest is too small.
        worse: whether the group is significantly worse than the rest.
    """

    members: int
    mean: float
    rest: float | None
    low: float
    high: float
    p: float | None
    worse: bool


@dataclass(frozen=True)
class GroupOutcome:
    """A group.

    Attributes:
        name: of the group.
        members: number of its records.
        figures: by measure. A measure that too few of its records have is left out.
        largest_loss: upper confidence bound of the expected loss; None without a certificate, or if the group is small.
    """

    name: str
    members: int
    figures: Mapping[str, GroupFigure]
    largest_loss: float | None = None

    @property
    def too_small(self) -> bool:
        """Whether the group is too small to be judged."""
        return self.members < LEAST_MEMBERS


@dataclass(frozen=True)
class GroupComparison:
    """All groups.

    Attributes:
        by: what the groups are made by, in words.
        groups: in their order.
        overall: mean over all records, by measure.
        risk: the measure that risk is judged by.
        certified: the risk and the delta of the certificate; None without one.
    """

    by: str
    groups: tuple[GroupOutcome, ...]
    overall: Mapping[str, float]
    risk: str
    certified: tuple[float, float] | None = None

    @property
    def large_enough(self) -> tuple[GroupOutcome, ...]:
        """The groups that are not too small."""
        return tuple(each for each in self.groups if not each.too_small)

    @property
    def riskier(self) -> tuple[GroupOutcome, ...]:
        """The groups that carry significantly more risk than the others."""
        return tuple(each for each in self.groups if self.risk in each.figures and each.figures[self.risk].worse)


def compare_groups(
    results: Mapping[str, EarlyResults],
    names: Sequence[str],
    by: str,
    *,
    seed: int = 0,
    permutations: int = PERMUTATIONS,
) -> dict[str, GroupComparison]:
    """Compare each group with the records outside it, in each setting.

    Args:
        results: by setting, one entry per record.
        names: the group of each record.
        by: what the groups are made by, in words.
        seed: of permutations and bootstrap samples.
        permutations: of each test.

    Raises:
        ValueError: there are no records, nothing was measured, or ``names`` has another length.
    """
    labels, members = np.array(names), Counter(names)
    measured = {setting: each.measures() for setting, each in results.items()}
    figures: dict[tuple[str, str, str], GroupFigure] = {}
    for setting, measures in measured.items():
        count = len(results[setting].layers)
        if not measures or len(names) != count:
            raise ValueError(f"{count} records have {len(measures)} measures and {len(names)} groups")
        for measure, values in measures.items():
            known = ~np.isnan(values)
            for name, figure in _figures(measure, values[known], labels[known], seed, permutations).items():
                figures[setting, name, measure] = figure
    figures = _corrected(figures)

    def outcome(setting: str, name: str) -> GroupOutcome:
        own = {measure: figures.get((setting, name, measure)) for measure in measured[setting]}
        return GroupOutcome(name, members[name], {measure: each for measure, each in own.items() if each is not None})

    return {
        setting: GroupComparison(
            by,
            tuple(outcome(setting, name) for name in sorted(members, key=_order)),
            {measure: float(np.nanmean(values)) for measure, values in measures.items()},
            next((measure for measure in RISK if measure in measures), AGREEMENT),
        )
        for setting, measures in measured.items()
    }


def _order(name: str) -> tuple[int, str]:
    """By a number that the name begins with, as lengths do, then by name."""
    number = re.match(r"\d{1,15}", name, re.ASCII)
    return int(number[0]) if number else 0, name


def _figures(
    measure: str, values: Floats, labels: NDArray[np.str_], seed: int, permutations: int
) -> dict[str, GroupFigure]:
    """The figures of one measure in one setting, by group, before the correction."""
    large_enough = sorted(name for name, count in Counter(labels.tolist()).items() if count >= LEAST_MEMBERS)
    inside = {name: labels == name for name in large_enough}
    tested = [name for name in large_enough if np.count_nonzero(~inside[name]) >= LEAST_MEMBERS]
    rng = np.random.default_rng(seed)
    p_values = {name: permutation_p(values[inside[name]], values[~inside[name]], rng, permutations) for name in tested}
    found = {}
    for name in large_enough:
        own, others = values[inside[name]], values[~inside[name]]
        mean, rest = float(own.mean()), float(others.mean()) if len(others) else None
        interval = _interval(measure, own, seed)
        found[name] = GroupFigure(len(own), mean, rest, *interval, p_values.get(name), worse=False)
    return found


def _corrected(figures: Mapping[tuple[str, str, str], GroupFigure]) -> dict[tuple[str, str, str], GroupFigure]:
    """Figures by setting, group and measure, after Holm's correction over the settings and groups of each measure."""
    found = dict(figures)
    for measure in {key[-1] for key in figures}:
        p_values = {key: each.p for key, each in figures.items() if key[-1] == measure and each.p is not None}
        for key, p in zip(p_values, holm(list(p_values.values())), strict=True):
            figure = figures[key]
            assert figure.rest is not None  # it was tested against the rest
            worse = p <= SIGNIFICANCE and WORSE[measure] * (figure.mean - figure.rest) > 0
            found[key] = replace(figure, p=p, worse=worse)
    return found


def _interval(measure: str, values: Floats, seed: int) -> tuple[float, float]:
    """Confidence interval of the mean: Wilson's for shares of records, else from bootstrap percentiles."""
    first, count = float(values[0]), len(values)
    if np.all(values == first):
        if measure not in RANGES:
            return first, first
        # The bootstrap has no width here. A share of the records that none of these showed may have any other value.
        unseen, (low, high) = wilson(0, count)[1], RANGES[measure]
        return first - unseen * (first - low), first + unseen * (high - first)
    if RANGES.get(measure) == (0, 1) and np.isin(values, (0, 1)).all():
        return wilson(int(values.sum()), count)
    low, high = paired_intervals(values[:, None], seed=seed)[0].tolist()
    return low, high
