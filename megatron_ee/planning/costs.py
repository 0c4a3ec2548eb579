"""Counted work of a tuning step: of the layers that exits need, and of the exits; units as in ``parallel.costs``."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.parallel.costs import attention_flops, mlp_flops, padded_vocab


def last_layer(specs: Sequence[ExitSpec], num_layers: int, distillation: bool) -> int:
    """The last layer that a step runs: the deepest exit's, or with ``distillation`` the model's."""
    return num_layers if distillation else max(spec.layer for spec in specs)


def layer_flops(
    architecture: Architecture, specs: Sequence[ExitSpec], tokens: int, distillation: bool = False
) -> list[int]:
    """Forward of each backbone layer that a step runs, the first layer's first.

    The last one's MLP is left out where only an ``mlp`` exit, which has its own, reads that layer.
    """
    run = last_layer(specs, architecture.num_layers, distillation)
    mlp = mlp_flops(architecture, tokens)
    costs = [attention_flops(architecture, layer, tokens) + mlp for layer in range(1, run + 1)]
    if not distillation and all(spec.body == "mlp" for spec in specs if spec.layer == run):
        costs[-1] -= mlp
    return costs


def exit_flops(architecture: Architecture, spec: ExitSpec, tokens: int, tensor: int = 1) -> int:
    """Forward and backward of an exit, ``body_flops + head_flops``; 0 where it trains nothing and is only read."""
    if not spec.trains:
        return 0
    return body_flops(architecture, spec, tokens) + head_flops(architecture, spec, tokens, tensor)


def body_flops(architecture: Architecture, spec: ExitSpec, tokens: int) -> int:
    """Forward and backward of an exit's body. A tap needs no gradient.

    - ``embedding``, ``norm``: 0.
    - ``mlp``: ``14 T h f``: forward and weight gradients ``6 T h f`` each, and the input gradient of the down
      projection, ``2 T h f``. What gate and up read is frozen.
    - ``layer``: three times a layer's forward: its norms are trained too, so every product has both gradients.
    """
    if spec.body == "mlp":
        return 14 * tokens * architecture.hidden_size * architecture.ffn_size
    if spec.body == "layer":
        # It is the last layer's copy, so it has that one's window.
        last = architecture.num_layers
        return 3 * (attention_flops(architecture, last, tokens) + mlp_flops(architecture, tokens))
    return 0


def head_flops(architecture: Architecture, spec: ExitSpec, tokens: int, tensor: int = 1) -> int:
    """Forward and backward of an exit's head.

    - ``own``: logits, input gradient and weight gradient, ``2 T h V`` each.
    - ``shared``: the same without the weight gradient.
    - ``low_rank``, of rank r: as ``shared``, and for both of its factors the same three products:
      ``6 T r (h + V)``.

    The features of an ``embedding`` exit are the tap itself, so input gradients with respect to h are left out.
    """
    vocab, hidden = padded_vocab(architecture.vocab_size, tensor), architecture.hidden_size
    to_features = spec.body != "embedding"
    flops = 2 * tokens * hidden * vocab * (1 + to_features + (spec.head == "own"))
    if spec.head == "low_rank":
        flops += 2 * tokens * spec.rank * (hidden * (2 + to_features) + 3 * vocab)
    return flops
