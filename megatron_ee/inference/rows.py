"""The state of a row between passes, and of the rows that a pass runs together."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from megatron_ee.exits.stage import Stage
from megatron_ee.inference.kv_cache import Extent, LayerKV, Masks, PackedCaches
from megatron_ee.model.attention import Positions


class Row:
    """What one row keeps on one stage between passes.

    Attributes:
        caches: of each backbone layer, by number.
        exit_caches: of each ``layer`` exit's own decoder layer; filled for every token that passes the exit.
        held: by place, the taps of tokens that wait there, deferred or about to go on, each ``[tokens, 1, hidden]``,
            in the order of their positions.
        drafts: distributions ``[vocab]`` that the proposals in work were drawn from, where they are sampled.
    """

    def __init__(self, stage: Stage, limit: int, slack: int, pass_tokens: int) -> None:
        """An empty row for at most ``limit`` tokens; ``slack`` and ``pass_tokens`` as in ``Extent``."""

        def cache(window: int | None) -> LayerKV:
            return LayerKV(Extent(limit, window, slack, pass_tokens))

        self.caches = {number: cache(layer.attention.window) for number, layer in stage.backbone.numbered_layers()}
        self.exit_caches = {
            exit_.spec.layer: cache(exit_.layer.attention.window) for exit_ in stage.exits if exit_.layer is not None
        }
        self.held: dict[int, list[Tensor]] = {}
        self.drafts: list[Tensor] = []

    @property
    def all_caches(self) -> list[LayerKV]:
        """Of layers and exits."""
        return [*self.caches.values(), *self.exit_caches.values()]

    def crop(self, length: int) -> None:
        """Take back the positions from ``length`` on; no token may be held."""
        assert not self.held, "a row is cropped when nothing waits"
        for cache in self.all_caches:
            cache.crop(length)

    def begin(self, other: Row, length: int) -> None:
        """Let this row, which is empty, begin with a copy of another's first ``length`` positions."""
        for mine, theirs in zip(self.all_caches, other.all_caches, strict=True):
            mine.begin(theirs, length)

    def keep(self, length: int) -> None:
        """Nothing will go on from here: forget what waits, and the positions from ``length`` on."""
        self.held, self.drafts = {}, []
        self.crop(length)


@dataclass
class Flow:
    """The rows of a chain in one layer: their tokens lie one after another in ``[tokens, 1, hidden]``.

    Attributes:
        counts: tokens of each.
        stops: positions that each has with its newest token.
        positions: of the tokens.
        masks: of ``PackedCaches``.
    """

    rows: list[Row]
    counts: list[int]
    stops: list[int]
    positions: Positions
    masks: Masks = field(default_factory=dict)

    def cache(self, layer: int) -> PackedCaches:
        """The rows' of a backbone layer."""
        return PackedCaches([row.caches[layer] for row in self.rows], self.counts, self.masks)

    def exit_cache(self, layer: int) -> PackedCaches:
        """The rows' of the ``layer`` exit after a layer."""
        return PackedCaches([row.exit_caches[layer] for row in self.rows], self.counts, self.masks)
