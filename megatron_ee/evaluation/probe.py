"""``probe``: what is to be gained by exits on a model and a user's text, before anything is tuned.

Exits are fitted in closed form after each layer, on part of the text, and measured on another part. Their records and
the measured times of decoding on this machine give the speed of sets of exits (``forecast``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.checkpoint.initialise import initialise_exit
from megatron_ee.checkpoint.loading import load_backbone
from megatron_ee.checkpoint.saved_model import SavedModel, choose_dtype, open_model, say_limits
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import FitConfig
from megatron_ee.data.checks import check_tokenizer
from megatron_ee.data.indexed import Corpus, open_corpus
from megatron_ee.data.loader import Batch, validation_windows
from megatron_ee.data.prepare import prepare_corpus
from megatron_ee.data.read import JSON_LINES
from megatron_ee.errors import ConfigError, DataError
from megatron_ee.evaluation.decode_times import measure_decode
from megatron_ee.evaluation.forecast import (
    DecodeTimes,
    Forecast,
    Records,
    best_speculative,
    best_threshold,
)
from megatron_ee.evaluation.probe_work import Work, choose_work, measure_pace
from megatron_ee.exits.stage import Stage
from megatron_ee.exits.tensors import body_weights
from megatron_ee.model.metrics import TokenStats
from megatron_ee.model.setup import ModelSetup, build_setup
from megatron_ee.parallel.groups import process_groups, world_size
from megatron_ee.parallel.layout import even_layout
from megatron_ee.progress import track
from megatron_ee.tuning.fit import Fitter
from megatron_ee.tuning.fit_tokens import Tokens
from megatron_ee.tuning.interrupt import Interrupt
from megatron_ee.tuning.schedule import Microbatch, one_stage

AGREEMENTS = (0.99, 0.95, 0.9)
"""Shares of tokens equal to the full model's that threshold mode is forecast for."""
ABOVE = 0.8
"""Confidence above which tokens are counted in the table of layers."""
WINDOW, WINDOWS = 512, 8
"""Tokens of a window at most, and windows at least: a short text has shorter ones."""


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
        work: what was done.
        final_loss: of the final exit, on the held-out tokens.
        layers: the exits.
        times: of decoding.
        threshold: by smallest agreement, the best setting of threshold mode.
        speculative: the best setting of speculative mode.
    """

    model: str
    data: str
    dtype: str
    vocab_size: int
    work: Work
    final_loss: float
    layers: tuple[LayerFigures, ...]
    times: DecodeTimes
    threshold: dict[float, Forecast]
    speculative: Forecast


def probe(
    *, model: str | Path, data: str | Path, budget_minutes: float = 5.0, dtype: str = "auto", verify: bool = True
) -> Probe:
    """Probe a model in this process.

    Args:
        model: Hugging Face directory or parallel checkpoint.
        data: prefix of a corpus, or a text or JSON lines file, which is tokenised with the model's tokenizer.
        budget_minutes: time to take, after loading the model.
        dtype: dtype of the model; ``auto`` is the checkpoint's own.
        verify: check checksums, if the files have any.

    Raises:
        ConfigError: there are several processes, the budget is no positive number, or the model has one layer.
        CheckpointError: the model cannot be used.
        DataError: the text cannot be used.
    """
    if world_size() > 1:
        raise ConfigError("probe runs in one process; start it without torchrun")
    if not 0 < budget_minutes < float("inf"):
        raise ConfigError(f"--budget: must be a positive number of minutes, not {budget_minutes}")
    saved = open_model(model, verify=verify)
    if saved.architecture.num_layers < 2:
        raise ConfigError("--model: the model has one layer, so there is no layer to leave it early")
    dtype = choose_dtype(dtype, saved, "--dtype")
    say_limits(saved)
    with _corpus(Path(data), saved) as corpus, process_groups() as groups:
        text = _Text(corpus, Path(data), saved.architecture.max_positions)
        setup = build_setup(saved.architecture, platform.DTYPES[dtype], groups)
        began = time.monotonic()
        times, work = _measure_machine(setup, saved, text, 60 * budget_minutes, began)
        _say(work, text, 60 * budget_minutes - (time.monotonic() - began))
        fitted, held_out = text.parts(work)
        stage = _load(setup, saved, [ExitSpec(layer, work.body, "shared", init="fit") for layer in work.layers])
        specs = [exit_.spec for exit_ in stage.exits]
        layout = even_layout(saved.architecture.num_layers, 1, work.layers)
        tokens = _tokens(fitted)
        Fitter(stage, layout, specs, tokens, FitConfig(), Interrupt()).run()
        taken = _record(stage, held_out)
    records = taken.records(work.layers)
    work = dataclasses.replace(work, fitted=tokens.num_fitted, held_out=len(records.starts))
    return Probe(
        model=str(model),
        data=str(data),
        dtype=dtype,
        vocab_size=saved.architecture.vocab_size,
        work=work,
        final_loss=float(np.mean(taken.final_losses)),
        layers=_figures(records, taken.losses()),
        times=times,
        threshold=dict(zip(AGREEMENTS, best_threshold(records, times, AGREEMENTS), strict=True)),
        speculative=best_speculative(records, times),
    )


@contextlib.contextmanager
def _corpus(data: Path, model: SavedModel) -> Iterator[Corpus]:
    """The corpus at a prefix, or a temporary one of a file. A line with ``messages`` makes it chat data."""
    with tempfile.TemporaryDirectory(prefix="megatron-ee-probe-") as directory:
        prefix = data
        if data.is_file():
            prefix = Path(directory) / "corpus"
            prepare_corpus([data], model.path, prefix, chat=_is_chat(data))
        corpus = open_corpus(prefix)
        corpus.check_vocabulary(model.architecture.vocab_size)
        for line in check_tokenizer([("--data", corpus)], model.path):
            print(line, file=sys.stderr, flush=True)
        yield corpus


def _is_chat(data: Path) -> bool:
    """Whether the first line of a file is a JSON object with ``messages``. Errors are left to the tokenisation."""
    if data.suffix not in JSON_LINES:
        return False
    with data.open(encoding="utf-8", errors="replace") as file:
        try:
            first = json.loads(file.readline())
        except ValueError:
            return False
    return isinstance(first, dict) and "messages" in first


class _Text:
    """A corpus in windows: the last ones are held out.

    Attributes:
        windows: of all tokens.
        per_window: unmasked tokens, in the mean, estimated.
        available: unmasked tokens, estimated.
    """

    def __init__(self, corpus: Corpus, data: Path, max_positions: int) -> None:
        total = int(corpus.lengths.sum())
        length = min(WINDOW, max_positions, total // WINDOWS)
        if length < 16:
            raise DataError(f"--data: {data} has {total:,} tokens; give at least {16 * WINDOWS}")
        self.windows = validation_windows([corpus], length)
        count = len(self.windows)
        looked_at = [self._batch(int(place)) for place in np.linspace(0, count - 1, min(count, 256))]
        share = sum(batch.num_tokens for batch in looked_at) / sum(batch.mask.numel() for batch in looked_at)
        if share == 0:
            raise DataError(f"--data: all tokens of {data} are masked; give other text")
        self.per_window = share * length
        self.available = int(self.per_window * count)

    def _batch(self, number: int) -> Batch:
        return self.windows.batch(range(number, number + 1))

    @property
    def first(self) -> Batch:
        """A whole window, to time."""
        return self._batch(0)

    def parts(self, work: Work) -> tuple[list[Batch], list[Batch]]:
        """Windows to fit on, spread over all but the held-out ones, and the held-out ones, at the end of the text."""
        count = len(self.windows)
        held = max(1, round(work.held_out / self.per_window))
        fitted = min(count - held, max(2, round(work.fitted / self.per_window)))
        places = np.linspace(0, count - held - 1, fitted).astype(int).tolist()
        return [self._batch(n) for n in places], [self._batch(n) for n in range(count - held, count)]


def _measure_machine(
    setup: ModelSetup, saved: SavedModel, text: _Text, budget: float, began: float
) -> tuple[DecodeTimes, Work]:
    """Times of decoding, and the work that fits into the rest of the budget, in seconds."""
    arch = setup.architecture
    spec = ExitSpec(max(1, arch.num_layers // 2), "mlp", "shared")
    stage = _load(setup, saved, [spec])
    times = measure_decode(stage)
    pace = measure_pace(stage, text.first, text.per_window)
    # Half of the memory for the exits, each of which is fitted beside its copied weights.
    most = platform.free_memory() // 2 // (2 * body_weights(spec, arch) * setup.dtype.itemsize)
    left = budget - (time.monotonic() - began)
    return times, choose_work(pace, left, arch.num_layers, arch.ffn_size, text.available, most, text.first.num_tokens)


def _load(setup: ModelSetup, saved: SavedModel, specs: list[ExitSpec]) -> Stage:
    """All layers, the final exit, and copied exits."""
    layers = range(1, setup.architecture.num_layers + 1)
    stage = Stage(setup, layers, specs, embedding=True, final_exit=True)
    load_backbone(stage, saved)
    for exit_ in stage.exits:
        initialise_exit(exit_, saved, seed=0)
    return stage


def _tokens(batches: list[Batch]) -> Tokens:
    """Windows to fit on, and the one with the most unmasked tokens to choose each exit's ridge on."""
    chosen_on = max(batches, key=lambda batch: batch.num_tokens)
    fitted = [batch for batch in batches if batch is not chosen_on]
    count = sum(batch.num_tokens for batch in fitted)
    return Tokens([[batch] for batch in fitted], [[chosen_on]], count, chosen_on.num_tokens)


def _say(work: Work, text: _Text, left: float) -> None:
    """What is done, and whether it takes longer than wanted, on stderr."""
    print(
        f"probe: {work.body} exits after {len(work.layers)} layers, fitted on about {work.fitted:,} tokens and "
        f"measured on {work.held_out:,} others of {text.available:,}; about {max(1, round(work.seconds)):,} s",
        file=sys.stderr,
        flush=True,
    )
    if work.seconds > left:
        print("probe: this is the least work; it takes longer than --budget", file=sys.stderr, flush=True)


@dataclass
class _Taken:
    """What exits and the final exit say of the unmasked tokens, window by window."""

    confidences: list[Tensor] = field(default_factory=list)
    agreements: list[Tensor] = field(default_factory=list)
    exit_losses: list[Tensor] = field(default_factory=list)
    starts: list[Tensor] = field(default_factory=list)
    final_losses: list[float] = field(default_factory=list)

    def records(self, layers: tuple[int, ...]) -> Records:
        """Of all tokens."""
        confidence, agrees = torch.cat(self.confidences, dim=1), torch.cat(self.agreements, dim=1)
        return Records(layers, confidence.numpy(), agrees.numpy(), torch.cat(self.starts).numpy())

    def losses(self) -> list[float]:
        """Mean of each exit."""
        means: list[float] = torch.cat(self.exit_losses, dim=1).double().mean(dim=1).tolist()
        return means


@torch.no_grad()
def _record(stage: Stage, held_out: list[Batch]) -> _Taken:
    """Run windows of one sequence each through all layers and exits."""
    taken = _Taken()

    def at_end(micro: Microbatch, h: Tensor) -> TokenStats:
        return stage.final_statistics(h, micro.labels)

    def take(micro: Microbatch, final: TokenStats) -> None:
        found = [exit_.statistics(micro.taps[exit_.spec.layer], micro.positions, micro.labels) for exit_ in stage.exits]
        counted = micro.mask.bool()
        confidence, loss, top1 = (
            torch.stack([getattr(each, name)[counted] for each in found]) for name in ("confidence", "loss", "top1")
        )
        places = counted.nonzero()[:, 0]
        starts = torch.ones_like(places, dtype=torch.bool)
        starts[1:] = places[1:] != places[:-1] + 1
        taken.confidences.append(confidence.cpu())
        taken.exit_losses.append(loss.cpu())
        taken.agreements.append((top1 == final.top1[counted]).cpu())
        taken.starts.append(starts.cpu())
        taken.final_losses.extend(final.loss[counted].tolist())

    pipeline = one_stage(stage)
    with track(len(held_out), "windows", "measuring exits") as bar:
        for batch in held_out:
            if batch.num_tokens:
                pipeline.run([batch], take, at_end)
            bar.advance()
    if not taken.starts:
        raise DataError("--data: all tokens at the end of the text are masked; give other text")
    return taken


def _figures(records: Records, losses: list[float]) -> tuple[LayerFigures, ...]:
    figures = []
    for row, (layer, loss) in enumerate(zip(records.layers, losses, strict=True)):
        confidence, agrees = records.confidence[row], records.agrees[row]
        above = confidence >= np.float32(ABOVE)
        share = float(agrees[above].mean()) if above.any() else None
        figures.append(
            LayerFigures(layer, float(agrees.mean()), loss, float(confidence.mean()), float(above.mean()), share)
        )
    return tuple(figures)
