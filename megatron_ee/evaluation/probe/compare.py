"""An earlier probe beside what came out after tuning: agreement of the exits, and speed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ee.config.untrusted import read_json
from megatron_ee.config.validation import validated
from megatron_ee.errors import DataError
from megatron_ee.evaluation.probe.forecast import Forecast
from megatron_ee.evaluation.probe.run import MIDDLE, LayerFigures
from megatron_ee.evaluation.speed import ModeSpeed
from megatron_ee.model.quality import Quality
from megatron_ee.tables import add_columns, make_console, new_table


@dataclass(frozen=True)
class Probed:
    """What is kept of a ``probe.json``.

    Attributes:
        layers: the fitted exits.
        forecasts: by mode as in ``ModeSpeed``, the best setting with ``MIDDLE`` of the tokens equal.
    """

    layers: tuple[LayerFigures, ...]
    forecasts: Mapping[str, Forecast]

    @property
    def gate_threshold(self) -> float | None:
        """Of policy ``gate``; None if no gates were fitted, or none pay."""
        return self.forecasts["gate"].threshold if "gate" in self.forecasts else None


@dataclass(frozen=True)
class _Setting(Forecast):
    """As in ``probe.json``."""

    at_least: float = 1.0


@dataclass(frozen=True)
class _Content:
    """As in ``probe.json``; older ones have no gates."""

    layers: tuple[LayerFigures, ...]
    threshold: tuple[_Setting, ...]
    speculative: Forecast
    gate: tuple[_Setting, ...] = ()


def read_probe(path: Path) -> Probed:
    """Read a ``probe.json``.

    Raises:
        DataError: it is none.
        CheckpointError: it cannot be read.
    """
    content = validated(_Content, read_json(path), where=str(path), error=DataError)
    forecasts: dict[str, Forecast] = {"speculative": content.speculative}
    for mode, settings in (("threshold", content.threshold), ("gate", content.gate)):
        for each in settings:
            if each.at_least == MIDDLE:
                forecasts[mode] = each
    return Probed(content.layers, forecasts)


def since_dict(probed: Probed, quality: Quality) -> list[dict[str, float]]:
    """Agreement of the exits that a probe measured too, then and now."""
    then = {each.layer: each.agreement for each in probed.layers}
    return [
        {"layer": exit_.layer, "probed": then[exit_.layer], "agreement": exit_.agreement}
        for exit_ in quality.exits
        if exit_.layer in then
    ]


def print_since(probed: Probed, quality: Quality) -> None:
    """Print ``since_dict`` to stdout."""
    console = make_console()
    table = new_table("Agreement since the probe", console)
    add_columns(table, "after layer", "fitted, probe", "now")
    for each in since_dict(probed, quality):
        table.add_row(str(each["layer"]), f"{each['probed']:.1%}", f"{each['agreement']:.1%}")
    console.print()
    console.print(table)


def speed_dict(speed: Sequence[ModeSpeed], probed: Probed | None) -> list[dict[str, Any]]:
    """Each mode's measured speed, and the ``forecast`` of its speed-up, None without one."""
    forecasts = {} if probed is None else {mode: each.speedup for mode, each in probed.forecasts.items()}
    return [{**dataclasses.asdict(each), "forecast": forecasts.get(each.mode)} for each in speed]


def print_speed(speed: Sequence[ModeSpeed], probed: Probed | None) -> None:
    """Print ``speed_dict`` to stdout."""
    console = make_console()
    table = new_table("Speed of each mode, one sequence at a time, greedy", console)
    add_columns(table, "mode", "setting", words=True)
    add_columns(table, "tokens/s", "speed", *(() if probed is None else ("forecast, probe",)))
    add_columns(table, "tokens equal", "layers per token")
    for each in speed_dict(speed, probed):
        setting = "" if each["threshold"] is None else f"threshold {each['threshold']:g}"
        cells = [each["mode"], setting, f"{each['tokens_per_second']:.1f}", f"{each['speedup']:.2f}x"]
        if probed is not None:
            cells.append("" if each["forecast"] is None else f"{each['forecast']:.2f}x")
        table.add_row(*cells, f"{each['agreement']:.1%}", f"{each['layers_per_token']:.1f}")
    console.print()
    console.print(table)
