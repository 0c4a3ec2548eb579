"""A probe's findings as tables, as a block of a configuration, in a sentence, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_ee.evaluation.probe.forecast import DecodeTimes, Forecast
from megatron_ee.evaluation.probe.run import ABOVE, GATE_PAYS, MIDDLE, Probe
from megatron_ee.evaluation.probe.shape import ShapeForecast
from megatron_ee.tables import add_columns, make_console, new_table

if TYPE_CHECKING:
    from rich.console import Console

PAYS = 1.05
"""Forecast speed-up from which exits are recommended: forecasts are not more exact than this."""
DEEP = 0.75
"""Share of the layers by which half of the tokens should agree."""


def best_early(found: Probe | ShapeForecast, least: float) -> Forecast:
    """The best setting in which tokens leave early: by gates where they pay, else by the heads' confidence."""
    by_heads, by_gates = found.threshold[least], found.gate.get(least)
    if by_gates is not None and by_gates.speedup >= GATE_PAYS * by_heads.speedup:
        return by_gates
    return by_heads


def paying(found: Probe) -> dict[str, Forecast]:
    """The settings that are forecast to pay, by what they are called in a sentence.

    They are the best setting in which tokens leave early, of those that pay with the highest agreement up to
    ``MIDDLE``, and speculative mode if that pays.
    """
    pays = {}
    for least in [MIDDLE, *sorted((each for each in found.threshold if each < MIDDLE), reverse=True)]:
        early = best_early(found, least)
        if early.speedup >= PAYS:
            mode = "policy gate" if early.gated else "threshold mode"
            pays[f"{mode} with {least:.0%} of the tokens equal"] = early
            break
    if found.speculative.speedup >= PAYS:
        pays["speculative mode"] = found.speculative
    return pays


def recommended(found: Probe) -> dict[int, bool]:
    """The exits to tune, by layer, and whether with a gate: those of the settings that pay."""
    settings = paying(found).values()
    gated = {layer for each in settings if each.gated for layer in each.exits}
    return {layer: layer in gated for layer in sorted({layer for each in settings for layer in each.exits})}


def yaml_block(exits: Mapping[int, bool]) -> str:
    """The exits as a block of ``tune``'s configuration: ``mlp`` exits with the shared head that was measured."""
    gate = {True: ", gate: true", False: ""}
    lines = (f"  - {{layer: {layer}, body: mlp, head: shared{gate[gated]}}}" for layer, gated in exits.items())
    return "\n".join(["exits:", *lines])


def judgement(found: Probe) -> str:
    """Whether exits pay, in a sentence or two."""
    times, pays = found.times, paying(found)
    if pays:
        forecasts = [f"{name} at {each.speedup:.2f} times the speed of full mode" for name, each in pays.items()]
        lines = [f"Exits should pay: forecast are {' and '.join(forecasts)}."]
    elif found.work.body == "norm":
        return (
            "It cannot be told whether exits pay: for lack of time or text norm exits were measured, which agree with "
            "the final exit far less often than mlp exits. Give a longer --budget or more text."
        )
    else:
        settings = (*found.threshold.values(), *found.gate.values(), found.speculative)
        best = max(settings, key=lambda each: each.speedup)
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
    tensor, pipeline, data = found.processes
    return {
        **{key: getattr(found, key) for key in ("model", "data", "dtype", "vocab_size", "final_loss")},
        "parallel": {"tensor": tensor, "pipeline": pipeline, "data": data},
        "work": dataclasses.asdict(found.work),
        "layers": [dataclasses.asdict(figures) for figures in found.layers],
        **_forecast_dict(found),
        "shapes": [
            {"name": each.shape.name, "gpu": each.shape.device.name, "gpus": each.shape.gpus, **_forecast_dict(each)}
            for each in found.shapes
        ],
        "exits": [
            {"layer": layer, "body": "mlp", "head": "shared", "gate": gated}
            for layer, gated in recommended(found).items()
        ],
        "judgement": judgement(found),
    }


def print_probe(found: Probe) -> None:
    """Print tables, the recommended exits and the judgement to stdout."""
    console = make_console()
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
    tensor, pipeline, _ = found.processes
    ranks = f", tensor {tensor} x pipeline {pipeline}" if tensor * pipeline > 1 else ""
    _print_times(f"Milliseconds of a decoding pass ({found.dtype}{ranks})", found.times, console)
    _print_forecast("Forecast of the best settings, one sequence, greedy", found, console)
    exits = recommended(found)
    if exits:
        console.print(yaml_block(exits))
        console.print()
    console.print(judgement(found), soft_wrap=True)
    _print_shapes(found, console)


def _print_shapes(found: Probe, console: Console) -> None:
    for each in found.shapes:
        shape, times = each.shape, each.times
        device = shape.device.name if shape.gpus == 1 else f"{shape.gpus} {shape.device.name}"
        console.print()
        layer, head = (f"{1000 * part[1]:.3f} ms" for part in (times.layer, times.head))
        title = f"Forecast, not measured: {shape.name} ({times.num_layers} layers of {layer}, head {head}) on {device}"
        _print_forecast(title, each, console)
    if found.shapes:
        console.print(
            "These forecasts take exits to agree as often as those measured here, at the same share of the depth. A "
            "pass takes the time of reading its weights in bfloat16 from the memory of the GPUs, or of its products if "
            "that is longer. Links, attention and the launch of kernels are left out.",
            soft_wrap=True,
        )


def _print_times(title: str, times: DecodeTimes, console: Console) -> None:
    table = new_table(title, console)
    add_columns(table, "tokens", "a layer", "head", "exit body", "full mode")
    for size in times.layer:
        parts = (times.layer[size], times.head[size], times.body[size])
        full = times.num_layers * times.layer[size] + times.head[size]
        table.add_row(str(size), *(f"{1000 * each:.3f}" for each in (*parts, full)))
    console.print(table)
    console.print()


def _print_forecast(title: str, found: Probe | ShapeForecast, console: Console) -> None:
    table = new_table(title, console)
    add_columns(table, "mode", "exits", "setting", words=True)
    add_columns(table, "tokens equal", "early", "tokens per round", "ms per token", "speed-up")
    for name, settings in (("threshold", found.threshold), ("policy gate", found.gate)):
        for least, each in settings.items():
            setting = "" if each.threshold is None else f"threshold {each.threshold:g}"
            table.add_row(f"{name}, {least:.0%} equal", *_cells(setting, each))
    table.add_row("speculative", *_cells(f"draft length {found.speculative.draft_length}", found.speculative))
    console.print(table)
    console.print()


def _cells(setting: str, each: Forecast) -> tuple[str, ...]:
    return (
        ", ".join(map(str, each.exits)) or "none (full mode)",
        setting,
        f"{each.agreement:.1%}",
        f"{each.early:.1%}",
        "" if each.tokens_per_round is None else f"{each.tokens_per_round:.2f}",
        f"{1000 * each.seconds:.2f}",
        f"{each.speedup:.2f}",
    )


def _forecast_dict(found: Probe | ShapeForecast) -> dict[str, Any]:
    times = found.times
    return {
        "num_layers": times.num_layers,
        "milliseconds": {"layer": _ms(times.layer), "head": _ms(times.head), "body": _ms(times.body)},
        "threshold": _settings(found.threshold),
        "gate": _settings(found.gate),
        "speculative": dataclasses.asdict(found.speculative),
    }


def _settings(found: Mapping[float, Forecast]) -> list[dict[str, Any]]:
    return [{"at_least": least, **dataclasses.asdict(each)} for least, each in found.items()]


def _ms(seconds: Mapping[int, float]) -> dict[str, float]:
    return {str(size): 1000 * each for size, each in seconds.items()}
