"""A probe's findings as tables, as a block of a configuration, in a sentence, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ee.config.untrusted import read_json
from megatron_ee.config.validation import validated
from megatron_ee.errors import DataError
from megatron_ee.evaluation.forecast import Forecast
from megatron_ee.evaluation.probe import ABOVE, LayerFigures, Probe
from megatron_ee.model.quality import Quality
from megatron_ee.tables import add_columns, make_console, new_table

PAYS = 1.05
"""Forecast speed-up from which exits are recommended: forecasts are not more exact than this."""
MIDDLE = 0.95
"""Agreement of the threshold setting whose exits are recommended, if one this good pays."""
DEEP = 0.75
"""Share of the layers by which half of the tokens should agree."""


def recommended(found: Probe) -> tuple[int, ...]:
    """Layers of the exits to tune: of the best threshold setting that pays, and of speculative mode if that pays."""
    at_least = [MIDDLE, *sorted((each for each in found.threshold if each < MIDDLE), reverse=True)]
    paying = [found.threshold[each] for each in at_least if found.threshold[each].speedup >= PAYS][:1]
    paying += [found.speculative] if found.speculative.speedup >= PAYS else []
    return tuple(sorted({layer for each in paying for layer in each.exits}))


def yaml_block(exits: tuple[int, ...]) -> str:
    """The exits as a block of ``tune``'s configuration; ``mlp`` exits with the shared head that was measured."""
    return "\n".join(["exits:", *(f"  - {{layer: {layer}, body: mlp, head: shared}}" for layer in exits)])


def judgement(found: Probe) -> str:
    """Whether exits pay, in a sentence or two."""
    threshold, speculative, times = found.threshold[MIDDLE], found.speculative, found.times
    if recommended(found):
        lines = [
            f"Exits should pay: speculative mode is forecast at {speculative.speedup:.2f} times the speed of full "
            f"mode, threshold mode at {threshold.speedup:.2f} times with {MIDDLE:.0%} of the tokens equal."
        ]
    elif found.work.body == "norm":
        return (
            "It cannot be told whether exits pay: for lack of time or text norm exits were measured, which agree with "
            "the final exit far less often than mlp exits. Give a longer --budget or more text."
        )
    else:
        best = max((*found.threshold.values(), speculative), key=lambda each: each.speedup)
        lines = [f"Exits will not pay here: nothing is forecast above {best.speedup:.2f} times the speed of full mode."]
        asked, middle = times.asked() / times.layer[1], [e for e in found.layers if e.layer <= DEEP * times.num_layers]
        most = max((figures.agreement for figures in middle), default=0.0)
        if asked >= times.num_layers / 5:
            lines.append(
                f"Asking an exit takes as long as {asked:.1f} of the {times.num_layers} layers (a vocabulary of "
                f"{found.vocab_size:,} on a small model)."
            )
        if most < 0.5:
            lines.append(
                f"The layers do not saturate: no exit in the first {DEEP:.0%} of them agrees with the final exit on "
                f"half of the tokens (at most {most:.0%})."
            )
        if len(lines) == 1:
            lines.append("The layers that exits save take no longer than the exits themselves.")
    lines.append("Exits were fitted, not tuned: tuning lets them agree more often.")
    if found.work.body == "norm":
        lines.append("They were norm exits, for lack of time or text; mlp exits agree more often.")
    return " ".join(lines)


def probe_dict(found: Probe) -> dict[str, Any]:
    """As JSON: times in milliseconds, and the recommended ``exits``, empty if exits do not pay."""
    times = found.times
    return {
        **{key: getattr(found, key) for key in ("model", "data", "dtype", "vocab_size", "final_loss")},
        "num_layers": times.num_layers,
        "work": dataclasses.asdict(found.work),
        "layers": [dataclasses.asdict(figures) for figures in found.layers],
        "milliseconds": {"layer": _ms(times.layer), "head": _ms(times.head), "body": _ms(times.body)},
        "threshold": [{"at_least": least, **dataclasses.asdict(each)} for least, each in found.threshold.items()],
        "speculative": dataclasses.asdict(found.speculative),
        "exits": [{"layer": layer, "body": "mlp", "head": "shared"} for layer in recommended(found)],
        "judgement": judgement(found),
    }


def print_probe(found: Probe) -> None:
    """Print tables, the recommended exits and the judgement to stdout."""
    console, times = make_console(), found.times
    title = (
        f"Fitted {found.work.body} exits on {found.work.held_out:,} held-out tokens; final loss {found.final_loss:.3f}"
    )
    table = new_table(title, console)
    add_columns(table, "after layer", "agreement", "loss", "confidence", f"confident ({ABOVE:g})", "agreement of these")
    for exit_ in found.layers:
        above = "-" if exit_.agreement_above is None else f"{exit_.agreement_above:.1%}"
        shares = (f"{exit_.agreement:.1%}", f"{exit_.loss:.3f}", f"{exit_.confidence:.1%}", f"{exit_.above:.1%}", above)
        table.add_row(str(exit_.layer), *shares)
    console.print(table)
    console.print()
    table = new_table(f"Milliseconds of a decoding pass ({found.dtype})", console)
    add_columns(table, "tokens", "a layer", "head", "exit body", "full mode")
    for size in times.layer:
        parts = (times.layer[size], times.head[size], times.body[size])
        full = times.num_layers * times.layer[size] + times.head[size]
        table.add_row(str(size), *(f"{1000 * each:.3f}" for each in (*parts, full)))
    console.print(table)
    console.print()
    table = new_table("Forecast of the best settings, one sequence, greedy", console)
    add_columns(table, "mode", "exits", "setting", words=True)
    add_columns(table, "tokens equal", "early", "tokens per round", "ms per token", "speed-up")
    for least, each in found.threshold.items():
        setting = "" if each.threshold is None else f"threshold {each.threshold:g}"
        _add(table, f"threshold, {least:.0%} equal", setting, each)
    _add(table, "speculative", f"draft length {found.speculative.draft_length}", found.speculative)
    console.print(table)
    console.print()
    exits = recommended(found)
    if exits:
        console.print(yaml_block(exits))
        console.print()
    console.print(judgement(found), soft_wrap=True)


def read_layers(path: Path) -> list[LayerFigures]:
    """The fitted exits of a ``probe.json``.

    Raises:
        DataError: it is none.
        CheckpointError: it cannot be read.
    """
    content = read_json(path)
    layers = content.get("layers") if isinstance(content, dict) else None
    return validated(list[LayerFigures], layers, where=f"{path}: layers", error=DataError)


def since_dict(probed: Sequence[LayerFigures], quality: Quality) -> list[dict[str, float]]:
    """Agreement of the exits that a probe measured too, then and now."""
    then = {each.layer: each.agreement for each in probed}
    return [
        {"layer": exit_.layer, "probed": then[exit_.layer], "agreement": exit_.agreement}
        for exit_ in quality.exits
        if exit_.layer in then
    ]


def print_since(probed: Sequence[LayerFigures], quality: Quality) -> None:
    """Print ``since_dict`` to stdout."""
    console = make_console()
    table = new_table("Agreement since the probe", console)
    add_columns(table, "after layer", "fitted, probe", "now")
    for each in since_dict(probed, quality):
        table.add_row(str(each["layer"]), f"{each['probed']:.1%}", f"{each['agreement']:.1%}")
    console.print()
    console.print(table)


def _add(table: Any, mode: str, setting: str, each: Forecast) -> None:
    table.add_row(
        mode,
        ", ".join(map(str, each.exits)) or "none (full mode)",
        setting,
        f"{each.agreement:.1%}",
        f"{each.early:.1%}",
        "" if each.tokens_per_round is None else f"{each.tokens_per_round:.2f}",
        f"{1000 * each.seconds:.2f}",
        f"{each.speedup:.2f}",
    )


def _ms(seconds: Mapping[int, float]) -> dict[str, float]:
    return {str(size): 1000 * each for size, each in seconds.items()}
