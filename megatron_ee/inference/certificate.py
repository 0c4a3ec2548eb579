"""A certificate: exit thresholds with a tested bound on what early exit costs, and the requests that it covers.

``megatron-ee calibrate`` writes it (see ``evaluation.calibration``). It says of *one* model with *its* exits, tokenizer
and decoding settings: with probability at least 1 - delta over the calibration sample, the expected loss of an answer
against full mode's is at most ``risk``, for requests from where the sample came from. So a certificate is refused for
another model or other exits when it is loaded, and each request is compared with its settings. A request outside them
runs in full mode, or without certificate where that is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from megatron_ee.checkpoint.digest import file_sha256
from megatron_ee.checkpoint.journal import DIGESTS
from megatron_ee.config.untrusted import read_json
from megatron_ee.config.validation import Strict, validated
from megatron_ee.errors import CheckpointError, ConfigError, DataError, shown
from megatron_ee.inference.options import EngineOptions
from megatron_ee.inference.policy import AnyPolicy, ExitPolicy, ThresholdPolicy
from megatron_ee.inference.released import Released, released_digests
from megatron_ee.inference.requests import Coverage, Request
from megatron_ee.inference.sampling import Sampling
from megatron_ee.parallel.groups import launched_rank

VERSION: Final = 1
MADE_BY: Final = "megatron-ee calibrate"
MAX_BYTES = 2**22
LEAST_SAVED = 0.01
"""Smallest share of the layers that a setting has to skip. Heads that are asked cost time, too."""
DEFAULTS = EngineOptions()
Loss = Literal["disagreement", "quality", "rouge"]
Metric = Literal["contains", "exact_match", "f1", "rouge_l"]
PValue = Literal["betting", "hoeffding-bentkus"]
Overlap = Literal["none", "allowed", "unknown"]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Share = Annotated[float, Field(ge=0, le=1)]
Open = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=0)]


class Decoding(Strict):
    """The settings under which the losses were measured.

    Attributes:
        chat: whether prompts went through the chat template.
        max_tokens: largest number of tokens of an answer.
        sampling: how tokens were chosen; the seed has no effect on greedy answers.
        stop: strings that ended an answer.
        ignore_eos: whether answers went on after an end of text.
        dtype: of the model.
        weights: how a quantised model's weights were held.
        quantise: what the layers were quantised to when they were loaded.
    """

    chat: bool
    max_tokens: int = Field(ge=1)
    sampling: Sampling
    stop: tuple[str, ...] = Field(default=(), strict=False)
    ignore_eos: bool = False
    dtype: str
    weights: str
    quantise: str


class ExitScaling(Strict):
    """How an exit's confidence became an estimated probability of agreement: ``sigmoid(logit(confidence) / temperature
    + offset)``. The thresholds of the policy follow from it, and those of safer settings after an alarm.

    Attributes:
        layer: of the exit.
        temperature: above 1 if the exit is more confident than right.
        offset: in logits.
        tokens: number of tokens it was fitted to.
        agreement: share of them where the exit agreed with full mode.
    """

    layer: int
    temperature: float = Field(gt=0)
    offset: float
    tokens: Count
    agreement: Share


class Interval(Strict):
    """A mean and its interval.

    Attributes:
        mean: over the test part.
        low: lower end; None if only an upper bound is stated.
        high: upper end.
    """

    mean: float
    low: float | None
    high: float


class Tested(Strict):
    """One setting on the test part of the sample, or of a group.

    Attributes:
        level: the estimated probability of agreement at which a token leaves.
        p_value: of the null hypothesis that the expected loss is above the risk.
        passed: whether it is at most delta.
        loss: mean loss.
        mean_exit_layer: mean layer at which the tokens after an answer's first left; None if no answer has two.
    """

    level: Share
    p_value: Share
    passed: bool
    loss: Share
    mean_exit_layer: float | None

    def saves(self, full_layers: int) -> bool:
        """Whether it skips so many of the layers that it can save time."""
        return self.mean_exit_layer is not None and self.mean_exit_layer <= (1 - LEAST_SAVED) * full_layers


class GroupResult(Strict):
    """A group of the sample.

    Attributes:
        n: its records in the test part.
        needed: the smallest number with which it could pass at all.
        p_value: of the chosen setting; None if nothing was tested.
        loss: mean loss with the chosen setting and an upper bound, as ``Certificate.loss_interval``; None if all is
            full mode.
        policy: with thresholds of its own: the exit policy, None for full mode.
    """

    n: Count
    needed: Count
    p_value: Share | None = None
    loss: Interval | None = None
    policy: AnyPolicy | None = None


class Certificate(Strict):
    """The content of the file that ``calibrate`` writes.

    Attributes:
        made_by: marks the file as this package's.
        version: of the format.
        task: name of what was calibrated on.
        loss: loss of an answer, in [0, 1]. ``disagreement``: 1 if the answer differs from full mode's; ``quality``:
            max(0, full mode's ``metric`` - the answer's), against references; ``rouge``: 1 - ROUGE-L of the answer
            against full mode's.
        metric: of the quality; None for other losses.
        risk: bound of the expected loss.
        delta: probability, over the sample, that the bound does not hold.
        p_value: name of the p-value.
        n: records of the test part.
        n_fit: records of the other part, which chose the settings that were tested.
        per_group: ``no``; ``worst``: the bound holds for every group; ``own``: each group has thresholds of its own,
            tested at delta / number of groups.
        groups: by name.
        policy: the exit policy; None for full mode, if nothing faster is safe, and with ``per_group: own``.
        scaling: of the exits.
        tested: by group, or under ``all``, the settings that were tested, in their order.
        loss_interval: mean loss with the policy, and an upper bound at 1 - delta that takes the policy as given. The
            same answers chose the policy, so what is promised is ``risk``. None for full mode.
        full_quality: mean ``metric`` of full mode's answers to the test part, which no answer can lose more than; None
            for other losses.
        mean_exit_layer: mean layer at which the tokens after an answer's first left, with a 95% bootstrap interval;
            None for full mode.
        full_layers: decoder layers of full mode.
        model_sha256: hash of the backbone; with the next two as from ``released_digests``.
        adapter_sha256: hash of the exits.
        tokenizer_sha256: hash of the tokenizer, its chat templates and its end-of-text tokens.
        data_sha256: hash of the sample's file.
        decoding: settings that a request must have.
        overlap: whether the sample overlaps the corpus that the exits were tuned on: ``none``, ``allowed``, or
            ``unknown`` if no hashes of its texts were found.
        seed: of the split and of the order.
        date: when it was made, ISO 8601 in UTC.
    """

    made_by: Literal["megatron-ee calibrate"]
    version: Literal[1]
    task: str
    loss: Loss
    metric: Metric | None = None
    risk: Open
    delta: Open
    p_value: PValue
    n: Count
    n_fit: Count
    per_group: Literal["no", "worst", "own"] = "no"
    groups: Mapping[str, GroupResult] = Field(default_factory=dict)
    policy: AnyPolicy | None
    scaling: tuple[ExitScaling, ...] = Field(default=(), strict=False)
    tested: Mapping[str, Annotated[tuple[Tested, ...], Field(strict=False)]] = Field(default_factory=dict)
    loss_interval: Interval | None = None
    full_quality: Share | None = None
    mean_exit_layer: Interval | None = None
    full_layers: int = Field(ge=1)
    model_sha256: Sha256
    adapter_sha256: Sha256
    tokenizer_sha256: Sha256
    data_sha256: Sha256
    decoding: Decoding
    overlap: Overlap
    seed: Count
    date: str

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.per_group == "own") and self.policy is not None:
            raise ValueError("policy: must be null where each group has its own")
        if (self.loss == "quality") != (self.metric is not None):
            raise ValueError("metric: goes with the loss quality, and with no other")
        return self

    @property
    def says_little(self) -> bool:
        """Whether full mode's own quality is at most the risk: then answers that are all wrong keep the promise."""
        return self.full_quality is not None and self.full_quality <= self.risk

    def policy_for(self, group: str | None) -> ExitPolicy | None:
        """The exit policy for a request of this group; None for full mode."""
        if self.per_group != "own":
            return self.policy
        found = self.groups.get(group) if group is not None else None
        return None if found is None else found.policy

    def chosen_test(self, group: str | None = None) -> int | None:
        """Index in ``tested`` of the setting that requests run with; None for full mode.

        It is the last one that saves layers of those before the first that failed. Where groups share it, it has to
        pass in every one of them, and to save layers in one.

        Args:
            group: where each group has thresholds of its own. Otherwise it has no effect.
        """
        if self.policy_for(group) is None:
            return None
        scopes = [self.tested[group]] if self.per_group == "own" and group is not None else self.tested.values()
        chosen = None
        for index, tests in enumerate(zip(*scopes, strict=False)):  # one setting, in every scope
            if not all(test.passed for test in tests):
                break
            if any(test.saves(self.full_layers) for test in tests):
                chosen = index
        return chosen


@dataclass(frozen=True)
class Calibration:
    """A certificate whose hashes fit a model, for an engine with these options.

    Attributes:
        certificate: its content.
        path: of the file, for messages.
        sha256: of the file.
        dtype: of the engine.
        weights: as in ``EngineOptions``.
        quantise: as for ``open_released``.
    """

    certificate: Certificate
    path: Path
    sha256: str
    dtype: str
    weights: str
    quantise: str

    def apply(self, request: Request, *, chat: bool, group: str | None = None, uncertified: bool = False) -> Request:
        """The request under the certificate: with its policy, or in full mode if the certificate does not cover it.

        A request that asks for full or speculative mode keeps it, since its answer is full mode's. The result's
        ``coverage`` says what the answer is, and the answer's statistics repeat it.

        Args:
            request: with the default policy and all exits, which the certificate replaces.
            chat: whether its prompt went through the chat template.
            group: its group, for a certificate with thresholds by group.
            uncertified: run a request outside the certificate's settings with its policy all the same.

        Raises:
            ConfigError: the request has a policy or exits of its own.
        """
        for name, default in (("policy", ThresholdPolicy()), ("exits", None)):
            if getattr(request, name) != default:
                raise ConfigError(f"{name}: {self.path} sets the thresholds; leave out threshold and the like")

        def covered(status: Literal["certified", "full", "uncertified"], reason: str | None = None) -> Coverage:
            return Coverage(status=status, task=self.certificate.task, certificate=self.sha256, reason=reason)

        if request.mode != "threshold":
            return request.model_copy(update={"coverage": covered("full", f"mode {request.mode} was asked for")})
        policy, reason = self.certificate.policy_for(group), self._outside(request, chat=chat, group=group)
        if policy is None or (reason is not None and not uncertified):
            reason = reason or "no threshold was safe enough"
            return request.model_copy(update={"mode": "full", "coverage": covered("full", reason)})
        exits = tuple(sorted({layer for layers in policy.named_exits().values() for layer in layers}))
        coverage = covered("certified") if reason is None else covered("uncertified", reason)
        return request.model_copy(update={"policy": policy, "exits": exits, "coverage": coverage})

    def check_group(self, group: str | None) -> None:
        """Refuse a group of all requests where the certificate has the same thresholds for every group.

        Raises:
            ConfigError: naming the file.
        """
        if group is not None and self.certificate.per_group != "own":
            raise ConfigError(f"calibration_group: {self.path} has no thresholds by group; leave it out")

    @property
    def engine_outside(self) -> str | None:
        """The first setting of the engine that the certificate does not cover: then it covers no request. None if it
        covers all."""
        return _outside_setting(self._engine, self._wanted())

    @property
    def _engine(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "weights": self.weights,
            "quantise": self.quantise,
        }

    def _wanted(self) -> dict[str, Any]:
        """The settings that the certificate covers, but ``max_tokens``."""
        settings = self.certificate.decoding
        return {
            **settings.sampling.model_dump(exclude={"seed"}),
            **settings.model_dump(exclude={"sampling", "max_tokens", "stop"}),
            "stop": tuple(settings.stop),
            "stop_ids": (),
            "forced_ids": (),
        }

    def _outside(self, request: Request, *, chat: bool, group: str | None) -> str | None:
        """The first setting of a request that the certificate does not cover; None if it covers all."""
        certificate = self.certificate
        if certificate.per_group == "own" and group not in certificate.groups:
            return "group: none was given" if group is None else f"group: {shown(group)} was not calibrated"
        own = {
            "forced_ids": tuple(request.forced_ids),  # first, since a forced text has other limits too
            **request.sampling.model_dump(exclude={"seed"}),
            "chat": chat,
            "stop": tuple(request.stop),
            "stop_ids": tuple(request.stop_ids),
            "ignore_eos": request.ignore_eos,
            **self._engine,
        }
        if (difference := _outside_setting(own, self._wanted())) is not None:
            return difference
        most = certificate.decoding.max_tokens
        # An answer that equals full mode's does so in its beginning, too. The other losses say nothing of beginnings.
        if request.max_tokens > most or (request.max_tokens < most and certificate.loss != "disagreement"):
            return f"max_tokens: {request.max_tokens}, but it was calibrated with {most}"
        return None


def _outside_setting(own: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    for name, value in own.items():
        if value != wanted[name]:
            return f"{name}: {shown(value)}, but it was calibrated with {shown(wanted[name])}"
    return None


def read_certificate(path: Path) -> Certificate:
    """Read and validate a certificate.

    Raises:
        DataError: it cannot be read, or is not a certificate; the message names file and key.
    """
    try:
        content = read_json(path, MAX_BYTES)
    except CheckpointError as error:
        raise DataError(str(error)) from None
    if not isinstance(content, dict) or content.get("made_by") != MADE_BY:
        raise DataError(f"{path}: is not a certificate; give a file that megatron-ee calibrate wrote")
    if content.get("version") != VERSION:
        raise DataError(f"{path}: version {shown(content.get('version'))}; this version reads {VERSION}")
    return validated(Certificate, content, where=str(path), error=DataError)


def open_calibration(
    path: Path,
    released: Released,
    options: EngineOptions = DEFAULTS,
    *,
    quantise: str = "none",
) -> Calibration:
    """Read a certificate and check that it was made for this model, these exits and this tokenizer.

    Args:
        path: of the file.
        released: the model, with its exits.
        options: of the engine; those of loading matter.
        quantise: as for ``open_released``.

    Raises:
        DataError: it cannot be read, or was made for something else; the message says for what.
    """
    certificate = read_certificate(path)
    for name, found in released_digests(released, show=launched_rank() == 0).items():
        recorded = getattr(certificate, name)
        if recorded != found:
            raise DataError(f"{path}: {name}: was made for another {DIGESTS[name]}: {_difference(recorded, found)}")
    return Calibration(
        certificate,
        path,
        file_sha256(path),
        used_dtype(options, released),
        options.weights,
        quantise,
    )


def _difference(recorded: str, found: str | None) -> str:
    given = "none is given" if found is None else f"{found[:16]}... is given"
    return f"{recorded[:16]}... was calibrated, {given}; give that one, or calibrate again"


def used_dtype(options: EngineOptions, released: Released) -> str:
    """The dtype that an engine with these options runs the model in."""
    return released.model.dtype if options.dtype == "auto" else options.dtype
