"""Measures the parts of decoding on this machine: layers, head and an exit's body on a few tokens with a KV cache."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence

import torch

from megatron_ee import platform
from megatron_ee.evaluation.forecast import DecodeTimes
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.stage_runner import StageSequence, TokenBatch
from megatron_ee.model.traversal import run_segment

SIZES = (1, 2, 4, 8, 16)
"""Tokens of the passes. Drafts and deferred tokens, with the new one, are at most 16."""
CONTEXT = 128
"""Positions in the KV cache; fewer if the model has fewer positions."""
LEAST_REPEATS, MOST_REPEATS, SECONDS = 5, 50, 10.0
"""Repeats: at least, at most, and seconds after which there are no more than the least."""

DISTURBED = 1.25
"""Median over first quartile from which other load is mentioned."""


@platform.inference_attention()
@torch.inference_mode()
def measure_decode(stage: Stage) -> DecodeTimes:
    """Typical times of passes through all layers of ``stage``, then its first exit's body, then the final exit's head.

    All weights are read between two measurements of one part, as in decoding, so caches hold no more of them than then.
    """
    arch, exit_ = stage.setup.architecture, stage.exits[0]
    context = max(1, min(CONTEXT, arch.max_positions - SIZES[-1]))
    limit = context + SIZES[-1]
    sequence = StageSequence(stage, limit, SIZES[-1], limit)
    table = stage.backbone.packed_positions(torch.arange(limit, device=platform.device()))
    generator = torch.Generator().manual_seed(0)

    def run(start: int, size: int) -> tuple[float, float, float]:
        """Seconds of all layers, the body and the head, on the tokens after ``start`` positions."""
        ids = platform.to_device(torch.randint(0, arch.vocab_size, (1, size), generator=generator))
        batch = TokenBatch([sequence], [size], [start + size], table.pick([slice(start, start + size)]))
        x = stage.backbone.embed(ids)
        layers = platform.DeviceTimer()
        h = run_segment(stage.backbone.layers_between, {}, 0, arch.num_layers, x, batch.positions, batch.cache)
        layers.stop()
        body = platform.DeviceTimer()
        exit_.rest(h)
        body.stop()
        head = platform.DeviceTimer()
        stage.final_logits(stage.final_features(h))
        head.stop()
        return layers.seconds(), body.seconds(), head.seconds()

    run(0, context)
    found: dict[int, list[tuple[float, float, float]]] = {size: [] for size in SIZES}
    began = time.monotonic()
    for repeat in range(MOST_REPEATS):  # the sizes take turns, so that other load on the machine slows all of them
        if repeat > LEAST_REPEATS and time.monotonic() - began > SECONDS:
            break
        for size, seconds in found.items():
            seconds.append(run(context, size))
            sequence.crop(context)
    by_part = [{size: [each[part] for each in seconds[1:]] for size, seconds in found.items()} for part in range(3)]
    _say_disturbed(by_part[0][1])
    layers, body, head = (typical(part) for part in by_part)  # without the first, which is slow
    layer = {size: each / arch.num_layers for size, each in layers.items()}
    skipped = "residual" in exit_.body.taps(exit_.spec.layer).values()
    return DecodeTimes(arch.num_layers, layer=layer, head=head, body=body, skipped=skipped)


def typical(measured: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """By number of tokens: the first quartile, since other load only adds time.

    Of several tokens in less time than fewer, the fewer take as long as these: they could be padded.
    """
    quartiles = {size: statistics.quantiles(seconds)[0] for size, seconds in measured.items()}
    return {size: min(quartiles[more] for more in quartiles if more >= size) for size in quartiles}


def _say_disturbed(seconds: Sequence[float]) -> None:
    """Say on stderr that times vary much."""
    first, median, _ = statistics.quantiles(seconds)
    if median > DISTURBED * first:
        print(
            f"probe: the same pass took {1000 * first:.1f} ms in the fastest quarter of its repeats, but "
            f"{1000 * median:.1f} ms or more in half of them; other load makes the forecast less exact",
            file=sys.stderr,
            flush=True,
        )
