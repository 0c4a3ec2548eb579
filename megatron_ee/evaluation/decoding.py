"""Decodes prompts greedily on the ranks of a run, with stages that are loaded already."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.stage import Stage, whole_sequences
from megatron_ee.inference.loading import engine_on_ranks
from megatron_ee.inference.requests import Completion, Request
from megatron_ee.parallel.layout import Layout
from megatron_ee.progress import track
from megatron_ee.tuning.interrupt import Interrupt

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Output:
    """What was decoded after one prompt.

    Attributes:
        tokens: token ids, with an end of text.
        layer_runs: decoder layers that ran for the tokens after the first.
    """

    tokens: Tokens
    layer_runs: int


def decode(
    stage: Stage,
    layout: Layout,
    specs: Sequence[ExitSpec],
    requests: Sequence[Request],
    eos: frozenset[int],
    interrupt: Interrupt,
    title: str,
) -> list[Output | None]:
    """The output of each request, equal on all ranks; None where the logits are not finite. Every rank calls this.

    Args:
        stage: this rank's part of ``layout``, with the final exit. Its sequence parallelism is off meanwhile.
        layout: all layers, some on every stage, and each exit on the stage of its layer.
        specs: the exits of all stages.
        requests: of one sample each; spread over the data-parallel ranks.
        eos: end-of-text tokens.
        interrupt: ends the decoding early.
        title: of the progress bar.

    Raises:
        ConfigError: there is not enough memory for the KV cache.
        Interrupted: one of the ranks received a signal; raised on all ranks.
    """
    groups = stage.setup.groups
    if stage.setup.residency == "disk" and groups.is_main and requests:
        line = f"each of up to {max(each.max_tokens for each in requests)} tokens reads its layers from disk"
        print(f"{title}: {line}; validation.acceptance.prompts: 0 leaves this out", file=sys.stderr, flush=True)
    mine = range(groups.data.rank(), len(requests), groups.data.size())

    def work() -> dict[int, Output]:
        found: dict[int, Output] = {}
        with whole_sequences(stage), engine_on_ranks(stage, layout, specs, eos=eos) as engine:
            if engine is None:
                return found
            numbers = {engine.submit(requests[index]): index for index in mine}
            with track(len(mine), "prompts", title, enabled=groups.is_main) as bar:
                while not engine.idle and not interrupt.requested:
                    for event in engine.step():
                        if event.completion is not None:
                            found[numbers[event.request]] = _output(event.completion)
                        bar.advance(event.last)
        return found

    parts = groups.together(work)
    interrupt.check_together(groups)
    whole = {index: output for part in parts for index, output in part.items()}
    return [whole.get(index) for index in range(len(requests))]


def _output(completion: Completion) -> Output:
    return Output(tuple(token.id for token in completion.tokens), completion.statistics["layer_runs"])
