"""FLOPs of a tuning step: of the layers that exits need, and of the exits. Units as in ``parallel.costs``."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.registry import body_of, tap_of, trains
from megatron_ee.parallel.costs import attention_flops, mlp_flops, padded_vocab


def last_layer(specs: Sequence[ExitSpec], num_layers: int, distillation: bool) -> int:
    """The last layer that a step runs: the deepest exit's layer, or with ``distillation`` the model's last."""
    return num_layers if distillation else max(spec.layer for spec in specs)


def layer_flops(
    architecture: Architecture, specs: Sequence[ExitSpec], tokens: int, distillation: bool = False
) -> list[int]:
    """Forward FLOPs of each backbone layer that a step runs, in order.

    The MLP of the last layer is left out if the exit after it reads the residual before the MLP.
    """
    run = last_layer(specs, architecture.num_layers, distillation)
    mlp = mlp_flops(architecture, tokens)
    costs = [attention_flops(architecture, layer, tokens) + mlp for layer in range(1, run + 1)]
    if not distillation and all(tap_of(spec) == "residual" for spec in specs if spec.layer == run):
        costs[-1] -= mlp
    return costs


def exit_flops(architecture: Architecture, spec: ExitSpec, tokens: int, tensor: int = 1) -> int:
    """FLOPs of forward and backward of an exit, for body and head; 0 if it trains nothing."""
    if not trains(spec):
        return 0
    return body_of(spec).flops(architecture, tokens) + head_flops(architecture, spec, tokens, tensor)


def exit_forward_flops(architecture: Architecture, spec: ExitSpec, tokens: int, tensor: int = 1) -> int:
    """FLOPs of a forward of an exit with its head, as in validation."""
    vocab, hidden = padded_vocab(architecture.vocab_size, tensor), architecture.hidden_size
    flops = body_of(spec).forward_flops(architecture, tokens) + 2 * tokens * hidden * vocab
    return flops + (2 * tokens * spec.rank * (hidden + vocab) if spec.head == "low_rank" else 0)


def head_flops(architecture: Architecture, spec: ExitSpec, tokens: int, tensor: int = 1) -> int:
    """FLOPs of forward and backward of an exit's head.

    - ``own``: logits, input gradient and weight gradient, ``2 T h V`` each.
    - ``shared``: the same without the weight gradient.
    - ``low_rank`` of rank r: as ``shared``, and these three products for both of its factors: ``6 T r (h + V)``.

    A body that trains nothing needs no gradient of its output, so input gradients with respect to h are then left out.
    """
    vocab, hidden = padded_vocab(architecture.vocab_size, tensor), architecture.hidden_size
    to_features = bool(body_of(spec).saved)
    flops = 2 * tokens * hidden * vocab * (1 + to_features + (spec.head == "own"))
    if spec.head == "low_rank":
        flops += 2 * tokens * spec.rank * (hidden * (2 + to_features) + 3 * vocab)
    return flops
