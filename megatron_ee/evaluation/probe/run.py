"""``probe``: what is to be gained by exits on a model and a user's text, before anything is tuned.

Exits are fitted in closed form after each layer, on part of the text, and measured on another part. Their records and
the measured times of decoding on this machine give the speed of sets of exits (``forecast``). Where asking a head costs
much, gates are fitted too.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from megatron_ee import platform
from megatron_ee.checkpoint.initialise import initialise_exit
from megatron_ee.checkpoint.packing import packed_slots
from megatron_ee.checkpoint.saved_model import SavedModel, choose_dtype, open_model, quantise_layers, say_limits
from megatron_ee.config.check import check_ranks
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import FitConfig, Quantise, Weights
from megatron_ee.data.loader import Batch
from megatron_ee.errors import ConfigError
from megatron_ee.evaluation.probe.decode_times import measure_decode
from megatron_ee.evaluation.probe.forecast import (
    DecodeTimes,
    Forecast,
    Records,
    best_speculative,
    best_threshold,
    calibrated,
)
from megatron_ee.evaluation.probe.records import Measured, measure_exits, measure_gates
from megatron_ee.evaluation.probe.shape import Shape, ShapeForecast
from megatron_ee.evaluation.probe.text import HeldWindows, ProbeText, open_text
from megatron_ee.evaluation.probe.work import Pace, Work, choose_work, measure_pace
from megatron_ee.exits.tensors import body_weights
from megatron_ee.model.setup import ModelSetup, build_setup
from megatron_ee.parallel.agreement import each_own
from megatron_ee.parallel.groups import Groups, gather_objects, joined_processes, model_groups, world_size
from megatron_ee.parallel.watchdog import SILENCE_SECONDS, watch_ranks
from megatron_ee.tuning.fit import Fitter
from megatron_ee.tuning.fit_tokens import Tokens
from megatron_ee.tuning.full_model import FullModel
from megatron_ee.tuning.interrupt import Interrupt
from megatron_ee.tuning.schedule import Pipeline
from megatron_ee.tuning.teacher import LastHidden

AGREEMENTS, MIDDLE = (0.99, 0.95, 0.9), 0.95
"""Shares of tokens equal to the full model's that threshold mode is forecast for, and the one that is most wanted."""
ABOVE = 0.8
"""Confidence above which tokens are counted in the table of layers."""
GATE_SHARE = 0.2
"""Share of the time that is kept for gates, also if all else took longer than it should."""
GATE_PAYS = 1.02
"""Gain over deciding by the head from which gates are fitted, and recommended."""
GATE_TOKENS = 8
"""Tokens to fit a gate on, for each feature of the hidden state."""


@dataclass(frozen=True)
class LayerFigures:
    """One fitted exit on held-out tokens.

    Attributes:
        layer: of the exit.
        agreement: share of tokens whose top-1 token is the final exit's.
        loss: of the text's tokens, in nats.
        confidence: mean.
        above: share of tokens with a confidence of at least ``ABOVE``.
        agreement_above: among these; None if there are none.
    """

    layer: int
    agreement: float
    loss: float
    confidence: float
    above: float
    agreement_above: float | None


@dataclass(frozen=True)
class Probe:
    """What a probe found.

    Attributes:
        model: its directory.
        data: the text.
        dtype: of the model.
        vocab_size: of the model.
        processes: tensor-parallel size, number of stages, and number of model copies.
        work: what was done.
        final_loss: of the final exit, on the held-out tokens.
        layers: the exits.
        times: of decoding.
        threshold: by smallest agreement, the best setting of threshold mode.
        gate: the same with policy ``gate``; empty if no gates were fitted.
        speculative: the best setting of speculative mode.
        shapes: forecasts for other models.
    """

    model: str
    data: str
    dtype: str
    vocab_size: int
    processes: tuple[int, int, int]
    work: Work
    final_loss: float
    layers: tuple[LayerFigures, ...]
    times: DecodeTimes
    threshold: Mapping[float, Forecast]
    gate: Mapping[float, Forecast]
    speculative: Forecast
    shapes: tuple[ShapeForecast, ...]


def probe(
    *,
    model: str | Path,
    data: str | Path,
    budget_minutes: float = 5.0,
    dtype: str = "auto",
    weights: Weights = "packed",
    quantise: Quantise = "none",
    tensor: int = 1,
    pipeline: int = 1,
    verify: bool = True,
    shapes: Sequence[Shape] = (),
) -> Probe:
    """Probe a model. Every rank calls this and gets the result.

    Args:
        model: Hugging Face directory or parallel checkpoint.
        data: prefix of a corpus, or a text or JSON lines file, which is tokenised with the model's tokenizer. Only the
            first rank reads it.
        budget_minutes: time to take, after loading the model.
        dtype: dtype of the model; ``auto`` is the checkpoint's own.
        weights: how a quantised model's weights are held.
        quantise: quantise the layers of a plain model as they are loaded.
        tensor: tensor-parallel size.
        pipeline: number of pipeline stages. The other ranks are used for data parallelism.
        verify: check checksums, if the files have any.
        shapes: other models to forecast the gain for, if exits agreed as often there.

    Raises:
        ConfigError: the budget is no positive number, the model has one layer, or the ranks do not fit it.
        CheckpointError: the model cannot be used.
        DataError: the text cannot be used.
    """
    if not 0 < budget_minutes < float("inf"):
        raise ConfigError(f"--budget: must be a positive number of minutes, not {budget_minutes}")
    with joined_processes() as control:
        saved = each_own(
            partial(gather_objects, group=control), lambda: _open(model, tensor, pipeline, verify, quantise)
        )
        dtype = choose_dtype(dtype, saved, "--dtype")
        say_limits(saved)
        with (
            model_groups(control, tensor, pipeline) as groups,
            watch_ranks(groups.rank, groups.world.size(), SILENCE_SECONDS, lambda: f"stage {groups.pipeline.rank()}"),
            open_text(Path(data), saved, groups) as text,
        ):
            slots = packed_slots(saved, weights)
            setup = build_setup(saved.architecture, platform.DTYPES[dtype], groups, slots=slots)
            found = _run(FullModel(setup, saved, Interrupt()), text, 60 * budget_minutes, shapes)
            return groups.from_first(lambda: _result(str(model), str(data), dtype, setup, found))


def _open(model: str | Path, tensor: int, pipeline: int, verify: bool, quantise: Quantise) -> SavedModel:
    saved = quantise_layers(open_model(model, verify=verify), quantise, "--quantise")
    if saved.architecture.num_layers < 2:
        raise ConfigError("--model: the model has one layer, so there is no layer to leave it early")
    check_ranks(saved.architecture, tensor, pipeline, world_size())
    return saved


@dataclass(frozen=True)
class _ForecastSubject:
    """A model whose speed is forecast: the one that was measured, or a shape with its agreements.

    Attributes:
        shape: None for the measured model.
        records: of its exits.
        times: of decoding.
        threshold: by smallest agreement, the best setting of threshold mode.
    """

    shape: Shape | None
    records: Records
    times: DecodeTimes
    threshold: Mapping[float, Forecast]


@dataclass(frozen=True)
class _Found:
    """What was done and measured; ``gates`` are the records of the exits that got one, if any."""

    work: Work
    measured: Measured
    subjects: tuple[_ForecastSubject, ...]
    gates: Records | None


def _run(full: FullModel, text: ProbeText, budget: float, shapes: Sequence[Shape]) -> _Found:
    """Measure this machine and the exits in ``budget`` seconds; equal on every rank."""
    groups, arch = full.setup.groups, full.setup.architecture
    assert full.stage is not None, "it is loaded before the time begins"
    began = time.monotonic()

    def left() -> float:
        return budget - (time.monotonic() - began)

    times, pace, most = _measure_machine(full, text)
    work = groups.from_first(
        lambda: choose_work(
            pace,
            (1 - GATE_SHARE) * left(),
            arch.num_layers,
            arch.ffn_size,
            text.available,
            most,
            int(text.first.counts[0]),
        )
    )
    if groups.is_main:
        _say(work, text, left())
    fitted, held_out = text.parts(work.fitted, work.held_out)
    tokens = _tokens(fitted, groups)
    pipeline = _with_exits(full, [ExitSpec(layer, work.body, "shared", init="fit") for layer in work.layers])
    Fitter(pipeline.stage, pipeline.layout, pipeline.specs, tokens, FitConfig(), full.interrupt).run()
    measured = measure_exits(pipeline, held_out)
    subjects = groups.from_first(lambda: _subjects(measured.records, times, shapes))
    some = _first(tokens, GATE_TOKENS * arch.hidden_size)
    layers = groups.from_first(
        lambda: _layers_to_gate(subjects, pace, some.num_fitted, max(left(), GATE_SHARE * budget))
    )
    gates = None
    if layers:
        gates = measure_gates(pipeline, some, held_out, layers, measured.records)
    work = dataclasses.replace(work, fitted=tokens.num_fitted, held_out=len(measured.records.starts))
    return _Found(work, measured, subjects, gates)


def _measure_machine(full: FullModel, text: ProbeText) -> tuple[DecodeTimes, Pace, int]:
    """Times of decoding, the pace of the work, and how many ``mlp`` exits the memory holds; equal on every rank."""
    arch, groups = full.setup.architecture, full.setup.groups
    spec = ExitSpec(max(1, arch.num_layers // 2), "mlp", "shared")
    pipeline = _with_exits(full, [spec])
    times = measure_decode(pipeline.stage, pipeline.layout, spec)
    pace = measure_pace(pipeline, text.first.batch(range(1)), text.per_window)
    name = platform.memory_name()
    free = min(groups.gather(platform.free_memory(groups.gather(name).count(name))))
    # Half of the memory for the exits, each of which is fitted beside its copied weights.
    size = 2 * body_weights(spec, arch) * full.setup.dtype.itemsize
    return times, pace, groups.pipeline.size() * groups.tensor.size() * free // 2 // size


def _with_exits(full: FullModel, specs: Sequence[ExitSpec]) -> Pipeline:
    """All layers, the final exit, and copied exits."""
    stage, layout = full.with_exits(specs)

    def initialise() -> None:
        for exit_ in stage.exits:
            initialise_exit(exit_, full.model, seed=0)

    full.setup.groups.together(initialise)
    return Pipeline(stage, layout, specs, teacher=LastHidden(full.setup))


def _tokens(windows: HeldWindows, groups: Groups) -> Tokens:
    """Windows to fit on, and the one with the most unmasked tokens to choose each exit's ridge and share on.

    Data-parallel ranks take windows in turn. A rank whose turn is empty runs a window of which all tokens are masked,
    so that the exits are those of one rank.
    """
    rank, size = groups.data.rank(), groups.data.size()
    chosen_on = int(windows.counts.argmax())
    others = [window for window in range(len(windows)) if window != chosen_on]
    counts = windows.counts[others]

    def turn(window: int | None) -> Batch:
        if window is not None:
            return windows.batch(range(window, window + 1))
        batch = windows.batch(range(1))
        return dataclasses.replace(batch, mask=batch.mask.zero_(), num_tokens=0)

    fitted = [
        [turn(others[start + rank] if start + rank < len(others) else None)] for start in range(0, len(others), size)
    ]
    held_out = [[turn(chosen_on if rank == 0 else None)]]
    return Tokens(fitted, held_out, int(counts.sum()), int(windows.counts[chosen_on]))


def _first(tokens: Tokens, count: int) -> Tokens:
    """The first windows, with about ``count`` tokens to fit on."""
    share = min(1.0, count / tokens.num_fitted)
    steps = math.ceil(share * len(tokens.fitted))
    return dataclasses.replace(tokens, fitted=tokens.fitted[:steps], num_fitted=math.ceil(share * tokens.num_fitted))


def _say(work: Work, text: ProbeText, left: float) -> None:
    """What is done, and whether it takes longer than wanted, on stderr."""
    print(
        f"probe: {work.body} exits after {len(work.layers)} layers, fitted on about {work.fitted:,} tokens and "
        f"measured on {work.held_out:,} others of {text.available:,}; about {max(1, round(work.seconds)):,} s",
        file=sys.stderr,
        flush=True,
    )
    if work.seconds > left:
        print("probe: this is the least work; it takes longer than --budget", file=sys.stderr, flush=True)


def _subjects(records: Records, times: DecodeTimes, shapes: Sequence[Shape]) -> tuple[_ForecastSubject, ...]:
    models = [(None, records, times), *((s, s.records(records, times.num_layers), s.times()) for s in shapes)]
    return tuple(_ForecastSubject(*model, _by_agreement(*model[1:])) for model in models)


def _by_agreement(records: Records, times: DecodeTimes, *, gated: bool = False) -> dict[float, Forecast]:
    return dict(zip(AGREEMENTS, best_threshold(records, times, AGREEMENTS, gated=gated), strict=True))


def _layers_to_gate(subjects: Sequence[_ForecastSubject], pace: Pace, tokens: int, left: float) -> tuple[int, ...]:
    """Exits whose gates are worth fitting on ``tokens`` tokens in the time that is left.

    They are those of the fastest sets if gates knew what heads know, where that is faster than deciding by heads.
    """
    num_layers, wanted = subjects[0].times.num_layers, dict[int, None]()
    for subject in subjects:
        by_gates = _by_agreement(calibrated(subject.records), subject.times, gated=True)
        source = {layer: layer for layer in subject.records.layers}
        if subject.shape is not None:
            source = subject.shape.places(subjects[0].records.layers, num_layers)
        for least, each in sorted(by_gates.items(), key=lambda item: abs(item[0] - MIDDLE)):
            if each.speedup >= GATE_PAYS * subject.threshold[least].speedup:
                wanted |= dict.fromkeys(source[layer] for layer in each.exits)
    most = int(max(0.0, left - tokens * pace.forward) / pace.fit_gate(tokens))
    if len(wanted) > most:
        print(
            f"probe: gates could pay at {len(wanted)} exits, but there is time for {most}; give a longer --budget",
            file=sys.stderr,
            flush=True,
        )
    return tuple(sorted(list(wanted)[:most]))


def _result(model: str, data: str, dtype: str, setup: ModelSetup, found: _Found) -> Probe:
    def forecasts(subject: _ForecastSubject) -> tuple[Mapping[float, Forecast], Mapping[float, Forecast], Forecast]:
        """Of threshold mode, policy ``gate`` and speculative mode."""
        gates = found.gates
        if gates is not None and subject.shape is not None:
            gates = subject.shape.records(gates, found.subjects[0].times.num_layers)
        by_gates = {} if gates is None else _by_agreement(gates, subject.times, gated=True)
        return subject.threshold, by_gates, best_speculative(subject.records, subject.times)

    own, *others = found.subjects
    groups = setup.groups
    threshold, gate, speculative = forecasts(own)
    return Probe(
        model=model,
        data=data,
        dtype=dtype,
        vocab_size=setup.architecture.vocab_size,
        processes=(groups.tensor.size(), groups.pipeline.size(), groups.data.size()),
        work=found.work,
        final_loss=found.measured.final_loss,
        layers=_figures(found.measured),
        times=own.times,
        threshold=threshold,
        gate=gate,
        speculative=speculative,
        shapes=tuple(
            ShapeForecast(each.shape, each.times, *forecasts(each)) for each in others if each.shape is not None
        ),
    )


def _figures(measured: Measured) -> tuple[LayerFigures, ...]:
    figures, records = [], measured.records
    for row, (layer, loss) in enumerate(zip(records.layers, measured.losses, strict=True)):
        confidence, agrees = records.confidence[row], records.agrees[row]
        above = confidence >= np.float32(ABOVE)
        share = float(agrees[above].mean()) if above.any() else None
        figures.append(
            LayerFigures(layer, float(agrees.mean()), loss, float(confidence.mean()), float(above.mean()), share)
        )
    return tuple(figures)
