"""What there is to compile of a stage: functions of tensors alone, without lengths or rows to look up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from megatron_ee.exits.exit import Exit
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.heads import likeliest
from megatron_ee.inference.kv_cache import attend_together
from megatron_ee.model.attention import Positions
from megatron_ee.model.backbone import VocabHead
from megatron_ee.model.layer import DecoderLayer

Said = tuple[Tensor, Tensor]
"""Float32 logits ``[tokens, vocab]``, and ``likeliest`` of them."""


class Head(nn.Module):
    """An exit from what its rows' attention left, or the final exit where there is none."""

    def __init__(self, stage: Stage, exit_: Exit | None) -> None:
        super().__init__()
        self.stage, self.exit_ = stage, exit_

    @property
    def head(self) -> VocabHead:
        """The matrix that it ends with."""
        head = self.stage.backbone.head if self.exit_ is None else self.exit_.head
        assert head is not None, "no final exit here"
        return head

    def forward(self, x: Tensor) -> Said:
        """``[tokens, 1, hidden]`` -> float32 logits ``[tokens, vocab]``, and ``likeliest`` of them."""
        if self.exit_ is None:
            logits = self.stage.final_logits(self.stage.final_features(x)[:, 0])
        else:
            logits = self.exit_.logits(self.exit_.rest(x)[:, 0])
        return logits, likeliest(logits)


class Segment(nn.Module):
    """The layers from one place where rows wait to the next.

    Attributes:
        lead: the layer whose MLP half comes first, where rows wait between its halves; None for none.
        layers: all that follow.
        trail: whether the last of them runs its MLP half too.
        head: what is asked at the next place; None for nothing. Each call of compiled code takes a small model as long
            as a layer, so that the two are one.
    """

    def __init__(
        self, lead: DecoderLayer | None, layers: Sequence[DecoderLayer], trail: bool, head: Head | None
    ) -> None:
        super().__init__()
        self.lead, self.layers, self.trail, self.head = lead, nn.ModuleList(layers), trail, head

    def forward(
        self, h: Tensor, positions: Positions, mask: Tensor | None, start: int, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, Said | None]:
        """The tap at the next place from the one at this, ``[tokens, 1, hidden]``, and what ``head`` makes of it.

        Args:
            mask: as ``shared_mask`` makes it; None for one token.
            start: positions that each layer has run.
            keys: of each layer, ``[1, kv_heads, room, head_dim]``; the tokens' own are written into them.
            values: as ``keys``.
        """
        if self.lead is not None:
            h = self.lead.mlp_half(h)
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            h = layer.attention_half(h, positions, _Room(keys[number], values[number], start, mask))
            if self.trail or number + 1 < len(self.layers):
                h = layer.mlp_half(h)
        return h, None if self.head is None else self.head(h)


class Between(nn.Module):
    """What lies between one layer's attention and the next one's, for tokens of any rows.

    Attention itself is not compiled: each number of rows would be a case of its own. The modules are arguments, so
    that one code serves all layers, which are alike.
    """

    def forward(
        self,
        h: Tensor,
        context: Tensor | None,
        positions: Positions,
        done: DecoderLayer | None,
        lead: DecoderLayer | None,
        ahead: DecoderLayer | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
        """``[tokens, 1, hidden]`` after as much, and what is to attend next; arguments that are None are left out.

        Args:
            context: what the attention of ``done`` made, ``[tokens, heads * head_dim]``.
            lead: whose MLP half follows.
            ahead: whose attention comes next.
        """
        if done is not None and context is not None:
            h = h + done.attention.output(context[:, None])
        if lead is not None:
            h = lead.mlp_half(h)
        if ahead is None:
            return h, None
        query, key, value = ahead.attention.project(ahead.attention_norm(h), positions)
        return h, (query[:, 0], key[:, 0], value[:, 0])


@dataclass
class _Room:
    """One layer's cache, with room for the tokens: a ``LayerCache`` that knows no lengths but the one it is told."""

    keys: Tensor
    values: Tensor
    start: int
    mask: Tensor | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
        """See ``LayerCache``; no window hides anything yet."""
        stop = self.start + query.shape[0]
        self.keys[0, :, self.start : stop] = key.transpose(0, 1)
        self.values[0, :, self.start : stop] = value.transpose(0, 1)
        keys, values = self.keys[:, :, :stop], self.values[:, :, :stop]
        return attend_together(query, keys, values, self.mask)
