"""One pass through the layers with early exits, and the state of a row between passes (design: inference).

A token that leaves at layer k has no keys and values above it. Its tap is kept, and the next pass that goes beyond
layer k takes it along, so that each layer runs each position once, in order, and its cache is exact: it is what a pass
of all tokens through all layers would have left. Layer i of a pass thus runs the positions that its cache lacks, a
contiguous run that ends with the newest token and grows with depth.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.inference.kv_cache import LayerKV
from megatron_ee.inference.policy import ExitPolicy
from megatron_ee.model.attention import Positions
from megatron_ee.model.exits import Exit
from megatron_ee.model.stage import Stage


@dataclass(frozen=True)
class Emitted:
    """One token, the layer whose exit emitted it (the last for the final exit), and that exit's confidence."""

    token: int
    layer: int
    confidence: float


class Row:
    """What one sequence keeps between passes.

    Attributes:
        length: tokens run so far, through the first layer at least.
        caches: of each backbone layer, by number.
        exit_caches: of each ``layer`` exit's own decoder layer; filled for every token that passes the exit.
        taps: by layer k, the taps of the tokens deferred there, each ``[tokens, 1, hidden]``, in position order.
    """

    def __init__(self, stage: Stage, limit: int) -> None:
        """An empty row for at most ``limit`` tokens."""
        self.length = 0
        self.caches = {number: LayerKV(limit) for number, _ in stage.backbone.numbered_layers()}
        self.exit_caches = {exit_.spec.layer: LayerKV(limit) for exit_ in stage.exits if exit_.spec.body == "layer"}
        self.taps: dict[int, list[Tensor]] = {}

    @property
    def deferred(self) -> int:
        """Number of deferred tokens."""
        return sum(len(tap) for taps in self.taps.values() for tap in taps)

    def defer(self, layer: int, tap: Tensor) -> None:
        """Keep the tap of the tokens that have just run ``layer``, to go on from there in a later pass."""
        self.taps.setdefault(layer, []).append(tap)

    def join(self, layer: int, tap: Tensor) -> Tensor:
        """The taps of those deferred at ``layer``, who come first, and of those who have just run it."""
        waiting = self.taps.pop(layer, None)
        return tap if waiting is None else torch.cat([*waiting, tap])


@torch.inference_mode()
def run_pass(stage: Stage, row: Row, tokens: Tensor, policy: ExitPolicy | None = None) -> Emitted:
    """Run new tokens, and as far as it goes those deferred before; emit the token that follows the newest.

    Args:
        stage: all layers and the final exit.
        row: state of the sequence; brought up to date.
        tokens: ``[1, new]`` int64, on the stage's device.
        policy: None, as in prefill: nothing leaves and no exit but the final one is asked.
    """
    if policy is not None and not policy.may_leave(row.deferred):
        policy = None
    row.length += tokens.shape[1]
    exits = {exit_.spec.layer: exit_ for exit_ in stage.exits}
    last = stage.setup.architecture.num_layers
    positions = _Positions(stage, row.length)
    h = stage.backbone.embed(tokens)
    for number, layer in stage.backbone.numbered_layers():
        exit_ = exits.get(number)
        tap = layer.attention_half(h, positions.of(h), row.caches[number])
        taps_residual = exit_ is not None and exit_.spec.body == "mlp"
        if not taps_residual:
            tap = layer.mlp_half(tap)
        if exit_ is not None:
            emitted = _ask(exit_, row, tap, positions.of(tap), policy)
            if emitted is not None:
                if number < last:
                    row.defer(number, tap)
                return emitted
        tap = row.join(number, tap)
        # The MLP above an mlp exit waits for the decision, and runs for the deferred tokens when they go on.
        h = layer.mlp_half(tap) if taps_residual else tap
    stats = stage.final_statistics(h[-1:], tokens.new_zeros(1))
    return Emitted(int(stats.top1), last, float(stats.confidence))


class _Positions:
    """The positions of each layer's share of a pass: its last ``len(h)`` tokens, made once per length."""

    def __init__(self, stage: Stage, stop: int) -> None:
        self._stage, self._stop = stage, stop
        self._made: dict[int, Positions] = {}

    def of(self, h: Tensor) -> Positions:
        if len(h) not in self._made:
            self._made[len(h)] = self._stage.backbone.positions(self._stop - len(h), self._stop)
        return self._made[len(h)]


def _ask(exit_: Exit, row: Row, tap: Tensor, positions: Positions, policy: ExitPolicy | None) -> Emitted | None:
    """What the exit emits for the newest token if the policy lets it leave there; its own cache is filled anyway."""
    cache = row.exit_caches.get(exit_.spec.layer)
    if policy is None:
        if exit_.layer is not None:
            exit_.layer.attention_half(tap, positions, cache)
        return None
    # Only a body with attention needs the tokens before the newest.
    z = exit_.features(tap if cache is not None else tap[-1:], positions, cache)[-1, 0][None]
    # Labels only matter to the loss, which is not looked at.
    stats = exit_.read(z, torch.zeros(1, dtype=torch.int64, device=z.device))
    if not policy.leaves(stats.confidence):
        return None
    return Emitted(int(stats.top1), exit_.spec.layer, float(stats.confidence))


def decode(
    stage: Stage, row: Row, prompt: Sequence[int], policy: ExitPolicy | None, eos: Collection[int], max_tokens: int
) -> Iterator[Emitted]:
    """Continue a prompt greedily, up to an end-of-text token, which is emitted too, or ``max_tokens``.

    Args:
        stage: all layers, the exits that may emit, and the final exit.
        row: empty, with room for the prompt and ``max_tokens - 1`` more: the last token is not run.
        prompt: token ids, at least one; it runs all layers, so the first token is the final exit's.
        policy: None for full mode.
    """
    device = platform.device()
    emitted = run_pass(stage, row, torch.tensor([list(prompt)], device=device))
    yield emitted
    for _ in range(max_tokens - 1):
        if emitted.token in eos:
            return
        emitted = run_pass(stage, row, torch.tensor([[emitted.token]], device=device), policy)
        yield emitted
