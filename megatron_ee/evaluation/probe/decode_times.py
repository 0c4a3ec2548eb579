"""Measures the parts of decoding on this machine: layers, head and an exit's body on a few tokens with a KV cache."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_ee import platform
from megatron_ee.config.exits import ExitSpec
from megatron_ee.evaluation.probe.forecast import DecodeTimes
from megatron_ee.exits.registry import tap_of
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.stage_runner import StageSequence, TokenBatch
from megatron_ee.model.traversal import run_segment
from megatron_ee.parallel.groups import Groups
from megatron_ee.parallel.layout import Layout
from megatron_ee.parallel.transfer import connect

SIZES = (1, 2, 4, 8, 16)
"""Tokens of the passes. Drafts and deferred tokens, with the new one, are at most 16."""
CONTEXT = 128
"""Positions in the KV cache; fewer if the model has fewer positions."""
LEAST_REPEATS, MOST_REPEATS, SECONDS = 5, 50, 10.0
"""Repeats: at least, at most, and seconds after which there are no more than the least."""
RINGS = 20
"""Messages from stage to stage and back to the first that are timed, of each size."""

DISTURBED = 1.25
"""Median over first quartile from which other load is mentioned."""
Seconds = dict[int, float]
"""By number of tokens."""


@dataclass(frozen=True)
class _StageTimes:
    """Typical seconds of one stage.

    Attributes:
        layers: all of its layers.
        body: the exit's body; empty on another stage than its own.
        head: final norm and LM head; empty but on the last stage.
        spread: first quartile and median of all layers on one token.
    """

    layers: Seconds
    body: Seconds
    head: Seconds
    spread: tuple[float, float]


def measure_decode(stage: Stage, layout: Layout, spec: ExitSpec) -> DecodeTimes:
    """Typical times of decoding; equal on every rank, which all call this.

    The stages of the first model copy take turns, as they do for a sequence that is decoded alone. The time of a layer
    is the mean of all, with its share of the messages between stages, and back to the first with the new token.

    Args:
        stage: loaded, with the final exit after the last layer and the exit of ``spec`` as the only one.
        layout: of all stages.
        spec: the exit whose body is timed.
    """
    groups, layered = stage.setup.groups, layout.layered
    found: list[_StageTimes] = []
    for turn in layered:
        mine = groups.data.rank() == 0 and groups.pipeline.rank() == turn
        measured = groups.together(lambda mine=mine: _measure_stage(stage, SECONDS / len(layered)) if mine else None)  # type: ignore[misc]
        found.append(next(each for each in measured if each is not None))  # of the first tensor-parallel rank
    messages = _measure_messages(stage, groups)
    if groups.is_main:
        _say_disturbed(*map(sum, zip(*(each.spread for each in found), strict=True)))
    count = stage.setup.architecture.num_layers
    layer = {size: (sum(each.layers[size] for each in found) + messages[size]) / count for size in SIZES}
    body = found[layered.index(layout.host(spec.layer))].body
    return DecodeTimes(count, layer=layer, head=found[-1].head, body=body, skipped=tap_of(spec) == "residual")


@platform.inference_attention()
@torch.inference_mode()
def _measure_stage(stage: Stage, seconds: float) -> _StageTimes:
    """Passes through the layers, then the exit's body, then the final exit's head, in about ``seconds``.

    All weights are read between two measurements of one part, as in decoding, so caches hold no more of them than then.
    The tensor-parallel ranks of the stage call this together.
    """
    setup, backbone, arch = stage.setup, stage.backbone, stage.setup.architecture
    context = max(1, min(CONTEXT, arch.max_positions - SIZES[-1]))
    limit = context + SIZES[-1]
    sequence = StageSequence(stage, limit, SIZES[-1], limit)
    table = backbone.packed_positions(torch.arange(limit, device=platform.device()))
    numbers = [number for number, _ in backbone.numbered_layers()]
    generator = torch.Generator().manual_seed(0)

    def run(start: int, size: int) -> tuple[float, float, float]:
        """Seconds of all layers, the body and the head, on the tokens after ``start`` positions."""
        if backbone.embedding is None:  # times do not depend on values, so no stage waits for another
            x = platform.to_device(torch.randn(size, 1, arch.hidden_size, generator=generator).to(setup.dtype))
        else:
            x = backbone.embed(platform.to_device(torch.randint(0, arch.vocab_size, (1, size), generator=generator)))
        batch = TokenBatch([sequence], [size], [start + size], table.pick([slice(start, start + size)]))
        layers = platform.DeviceTimer()
        h = run_segment(backbone.layers_between, {}, numbers[0] - 1, numbers[-1], x, batch.positions, batch.cache)
        layers.stop()
        body = platform.DeviceTimer()
        for exit_ in stage.exits:
            exit_.rest(h)
        body.stop()
        head = platform.DeviceTimer()
        if backbone.head is not None:
            stage.final_logits(stage.final_features(h))
        head.stop()
        return layers.seconds(), body.seconds(), head.seconds()

    run(0, context)
    found: dict[int, list[tuple[float, float, float]]] = {size: [] for size in SIZES}
    began = time.monotonic()
    for repeat in range(MOST_REPEATS):  # the sizes take turns, so that other load on the machine slows all of them
        if repeat > LEAST_REPEATS and _any(time.monotonic() - began > seconds, setup.groups.tensor):
            break
        for size, measured in found.items():
            measured.append(run(context, size))
            sequence.crop(context)
    # Without the first of each, which is slow.
    by_part = [{size: [each[part] for each in measured[1:]] for size, measured in found.items()} for part in range(3)]
    first, median, _ = statistics.quantiles(by_part[0][1])
    layers, body, head = map(typical, by_part)
    return _StageTimes(layers, body if stage.exits else {}, head if backbone.head is not None else {}, (first, median))


def _measure_messages(stage: Stage, groups: Groups) -> Seconds:
    """Hidden states of the first model copy from stage to stage, and back from the last stage to the first."""
    group, hidden = groups.pipeline, stage.setup.architecture.hidden_size
    last = group.size() - 1
    if last == 0:
        return dict.fromkeys(SIZES, 0.0)
    for source in range(last + 1):
        connect(group, source, (source + 1) % (last + 1))
    before, after = (group.rank() - 1) % (last + 1), (group.rank() + 1) % (last + 1)
    found: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(RINGS):
        for size, seconds in found.items():
            h = torch.zeros(size, 1, hidden, dtype=stage.setup.dtype, device=platform.device())
            platform.synchronize()
            began = time.perf_counter()
            if group.rank() == 0:
                dist.send(h, group=group, group_dst=after)
                dist.recv(h, group=group, group_src=before)
            else:
                dist.recv(h, group=group, group_src=before)
                dist.send(h, group=group, group_dst=after)
            platform.synchronize()
            seconds.append(time.perf_counter() - began)
    return groups.from_first(lambda: typical(found))


def _any(value: bool, group: dist.ProcessGroup) -> bool:
    """Whether it holds on any rank of the group."""
    if group.size() == 1:
        return value
    flag = torch.tensor(float(value), device=platform.device())
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
    return bool(flag)


def typical(measured: Mapping[int, Sequence[float]]) -> Seconds:
    """By number of tokens: the first quartile, since other load only adds time.

    If a pass over more tokens is faster, its time counts for fewer tokens too, which could be padded.
    """
    quartiles = {size: statistics.quantiles(seconds)[0] for size, seconds in measured.items()}
    return {size: min(quartiles[more] for more in quartiles if more >= size) for size in quartiles}


def _say_disturbed(first: float, median: float) -> None:
    """Say on stderr that times vary much."""
    if median > DISTURBED * first:
        print(
            f"probe: the same pass took {1000 * first:.1f} ms in the fastest quarter of its repeats, but "
            f"{1000 * median:.1f} ms or more in half of them; other load makes the forecast less exact",
            file=sys.stderr,
            flush=True,
        )
