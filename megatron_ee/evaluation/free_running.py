"""Free-running threshold mode: what it writes after held-out prompts, beside what the full model writes.

Agreement on given text counts each token alone. Here a token that differs changes all that follows, as for a user.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from megatron_ee.config.exits import ExitSpec
from megatron_ee.evaluation.continuations import Continuation
from megatron_ee.evaluation.decoding import decode
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.policy import ThresholdPolicy
from megatron_ee.inference.requests import Request
from megatron_ee.model.quality import FreeRunning
from megatron_ee.parallel.layout import Layout
from megatron_ee.tuning.interrupt import Interrupt


def measure_free_running(
    stage: Stage,
    layout: Layout,
    specs: Sequence[ExitSpec],
    continuations: Sequence[Continuation],
    threshold: float,
    eos: frozenset[int],
    interrupt: Interrupt,
) -> FreeRunning:
    """Decode the prompts in threshold mode, and compare with their continuations; equal on every rank.

    Args:
        stage: as for ``decode``.
        layout: of all stages.
        specs: the exits of all stages.
        continuations: the full model's; at least one.
        threshold: confidence at which a token leaves.
        eos: end-of-text tokens.
        interrupt: ends the decoding early.

    Raises:
        ConfigError: there is not enough memory for the KV cache.
        Interrupted: one of the ranks received a signal; raised on all ranks.
    """
    policy = ThresholdPolicy(threshold=threshold)
    requests = [
        Request(prompt=each.prompt, mode="threshold", policy=policy, max_tokens=each.limit) for each in continuations
    ]
    outputs = decode(stage, layout, specs, requests, eos, interrupt, "free-running threshold mode")
    equal = before = later = layers = 0
    for continuation, output in zip(continuations, outputs, strict=True):
        if output is None:  # its logits are not finite: no token is right
            continue
        same = [mine == theirs for mine, theirs in zip(output.tokens, continuation.tokens, strict=False)]
        equal += sum(same)
        before += sum(takewhile(bool, same))
        later += len(output.tokens) - 1
        layers += output.layer_runs
    tokens = sum(len(each.tokens) for each in continuations)
    return FreeRunning(threshold, len(continuations), tokens, equal, before, later, layers)
