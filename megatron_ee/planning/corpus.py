"""Whether there is enough text for what is trained.

The rule is one label (unmasked token) per trained parameter of the largest exit. It follows from two figures. The
EE-Tuning paper (arXiv 2402.00518, section 4.1) shows each exit about 4 tokens per trained parameter: 40,000 steps of 16
sequences of 2,048 tokens, for an ``mlp`` exit of Llama 2 13B with 376M parameters. And text that is read up to 4 times
is about as good as new text (arXiv 2305.16264); with more passes over little text, exits memorise it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import RunConfig
from megatron_ee.planning.parameters import trained_parameters

LABELS_PER_PARAMETER = 1
PASSES = 4


def little_data(
    config: RunConfig,
    architecture: Architecture,
    specs: Sequence[ExitSpec],
    trained_tokens: Sequence[int],
    passes: Sequence[float],
) -> list[str]:
    """A notice if the run reads too little text too often, with the settings that help and are not in use.

    Args:
        trained_tokens: labels in each training corpus.
        passes: number of times that the run reads each.
    """
    labels = sum(trained_tokens)
    seen = sum(count * times for count, times in zip(trained_tokens, passes, strict=True))
    sizes = {spec.layer: trained_parameters(architecture, spec) for spec in specs}
    largest = max(specs, key=lambda spec: sizes[spec.layer])
    wanted = LABELS_PER_PARAMETER * sizes[largest.layer]
    if labels >= wanted or seen <= PASSES * labels:
        return []
    helps = []
    shared = trained_parameters(architecture, dataclasses.replace(largest, head="shared"))
    if largest.head == "own" and shared:
        helps.append(f"head: shared ({shared:,} parameters)")
    if not config.tuning.patience:
        helps.append("tuning.patience")
    if config.optimizer.decay_towards == "zero":
        helps.append("optimizer.decay_towards: initial")
    if not helps:
        return []
    return [
        f"data.train: {labels:,} tokens to learn from, read {seen / labels:.1f} times, are few for the "
        f"{wanted:,} trained parameters of the exit after layer {largest.layer}, which may memorise them; "
        f"consider {', '.join(helps)}, fewer steps or more text"
    ]
