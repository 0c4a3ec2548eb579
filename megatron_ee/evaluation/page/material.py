"""All that a page is made of, and the setting that it looks at more closely."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from megatron_ee.errors import ConfigError, DataError, printable
from megatron_ee.evaluation.page.language import Language
from megatron_ee.evaluation.page.runs import TunedRun
from megatron_ee.evaluation.page.sources import CertificateFile, Measurements, check_one_model
from megatron_ee.evaluation.page.task_file import TaskFile, WrittenAnswer
from megatron_ee.evaluation.tasks.results import AGREEMENT_SCORES, BASELINE, PREFERRED_QUALITY, MeanScore, SettingResult
from megatron_ee.evaluation.tasks.run import CALIBRATED

EQUAL_ANSWERS = "equal_answers"
UNKNOWN = "MODEL"
"""Stands in command lines for a path that no file tells."""


@dataclass(frozen=True)
class Material:
    """What a page is made of. It is about one model and one set of exits.

    Attributes:
        t: the language.
        run: of ``tune``; None if it was not given.
        measured: by other commands.
        wanted: name of the setting to look at more closely; None to choose one.
        most_examples: number of examples.
    """

    t: Language
    run: TunedRun | None
    measured: Measurements
    wanted: str | None = None
    most_examples: int = 6

    @property
    def tasks(self) -> TaskFile | None:
        """The first evaluation of tasks, which the page begins with."""
        return self.measured.tasks[0] if self.measured.tasks else None

    @property
    def certificate(self) -> CertificateFile | None:
        """The certificate whose thresholds the tasks were answered with, or else the first one."""
        named = None if self.tasks is None else self.tasks.calibration_sha256
        found = self.measured.certificates
        return next((each for each in found if each.sha256 == named), found[0] if found else None)

    @property
    def absent_certificate(self) -> str | None:
        """Digest of the certificate whose thresholds the tasks were answered with, if it was not given."""
        named = None if self.tasks is None else self.tasks.calibration_sha256
        return None if named in {each.sha256 for each in self.measured.certificates} else named

    @cached_property
    def chosen(self) -> tuple[str, str] | None:
        """The setting to look at more closely, and the key of the reason; None if there is none.

        Raises:
            ConfigError: the wanted setting was not measured.
        """
        return None if self.tasks is None else choose_setting(self.tasks, self.wanted)

    @cached_property
    def answers(self) -> Mapping[tuple[str, str], WrittenAnswer]:
        """Answers of full mode and of the chosen setting."""
        if self.tasks is None or self.chosen is None:
            return {}
        return self.tasks.read_answers((BASELINE, self.chosen[0]))

    @cached_property
    def num_layers(self) -> int | None:
        """Layers of the model, from the first file that tells."""
        if self.run is not None and self.run.adapter.settings is not None:
            layers = self.run.adapter.settings.get("num_layers")
            if isinstance(layers, int):
                return layers
        for certificate in self.measured.certificates:
            return certificate.content.full_layers
        for corpus in self.measured.corpora:
            return corpus.quality.num_layers
        if self.tasks is not None and (full := self.tasks.content.overall[BASELINE].exit_layer) is not None:
            return round(full)
        return None

    @property
    def model(self) -> str | None:
        """Path of the model."""
        if self.tasks is not None:
            return self.tasks.content.model
        return None if self.run is None else self.run.model

    @property
    def adapter(self) -> str | None:
        """Path of the exits."""
        if self.tasks is not None and self.tasks.content.adapter is not None:
            return self.tasks.content.adapter
        return None if self.run is None else str(self.run.adapter.path)

    def command(self, name: str, *words: str) -> str:
        """A command line on this model and these exits."""
        exits = ["--adapter", self.adapter or "ADAPTER"]
        given = ["megatron-ee", name, "--model", self.model or UNKNOWN, *exits]
        return printable(" ".join([shlex.join(given), *words]))

    def setting(self, name: str) -> str:
        """A setting's name in the page's language."""
        kind, _, value = name.partition(" ")
        if f"setting.{kind}" not in self.t.texts:
            return printable(name)[:60]
        return self.t(f"setting.{kind}", value=printable(value)[:20]).strip()


def choose_setting(tasks: TaskFile, wanted: str | None = None) -> tuple[str, str] | None:
    """A setting of threshold mode, and the key of the reason why it is this one.

    That of the certificate; or else the fastest whose quality is not measurably below full mode's by any score; or else
    the one that agrees most with it. None if there is no setting of threshold mode.

    Raises:
        ConfigError: ``wanted`` is not among the settings.
    """
    found = tasks.content.overall
    early = [found[name] for name, mode in tasks.modes.items() if mode == "threshold"]
    if wanted is not None:
        if wanted not in {each.setting for each in early}:
            names = ", ".join(each.setting for each in early) or "none"
            raise ConfigError(
                f"--setting: {wanted!r} is not a setting of threshold mode in {tasks.path}; it has {names}"
            )
        return wanted, "choice.wanted"
    if not early:
        return None
    if CALIBRATED in found:
        return CALIBRATED, "choice.calibrated"
    safe = [each for each in early if quality_of(each) is not None and not _loses(each)]
    if safe:
        return max(safe, key=_speed).setting, "choice.safe"
    return max(early, key=_agreement).setting, "choice.agreement"


def quality_of(result: SettingResult) -> tuple[str, MeanScore] | None:
    """Name and mean of the score that is taken as quality; None if none was measured."""
    return next(((name, result.scores[name]) for name in PREFERRED_QUALITY if name in result.scores), None)


def _loses(result: SettingResult) -> bool:
    """Whether any score of quality, not only the one that is shown first, is measurably below full mode's."""
    return any(score.high < 0 for name, score in result.scores.items() if name not in AGREEMENT_SCORES)


def _speed(result: SettingResult) -> tuple[float, float]:
    """Speed, or without it how early tokens leave."""
    layer = result.exit_layer if result.exit_layer is not None else 0.0
    return (result.speed.speedup if result.speed is not None else 0.0), -layer


def _agreement(result: SettingResult) -> float:
    score = result.scores.get(EQUAL_ANSWERS)
    return score.mean if score is not None else 0.0


def check_material(material: Material) -> None:
    """Refuse files about different models, exits or tokenizers, and audits under other certificates.

    Raises:
        DataError: naming the files.
        ConfigError: the wanted setting was not measured.
    """
    owners: list[tuple[str, Mapping[str, str | None]]] = []
    measured = material.measured
    if material.run is not None:
        owners.append((f"--run {material.run.path}", material.run.digests))
    for tasks in measured.tasks:
        content = tasks.content
        digests = {name: getattr(content, name) for name in ("model_sha256", "adapter_sha256", "tokenizer_sha256")}
        owners.append((str(tasks.path), digests))
    for corpus in measured.corpora:
        owners.append((str(corpus.path), vars(corpus)))
    for certificate in measured.certificates:
        owners.append((str(certificate.path), certificate.content.model_dump()))
    check_one_model(owners)
    known = {each.sha256 for each in measured.certificates}
    for drift in measured.drifts:
        foreign = [digest for digest in drift.content.certificates if digest not in known]
        if known and foreign:
            raise DataError(
                f"{drift.path}: its requests ran under the certificate {foreign[0][:16]}..., which is not among those "
                "of --calibration; give that file, or leave this one out"
            )
    if material.wanted is not None and material.chosen is None:
        raise ConfigError("--setting: no evaluation of tasks was given, so there are no settings to choose from")
