"""Layers as compiled functions (``torch.compile``).

A token's pass through a small model, or through any model on a GPU, waits for Python: some twenty operations to a layer
that do little each. Compiled, those between the matrix products are fused. For a row that runs alone a segment between
two exits, or a head, is one call; for rows that run together, what lies between two layers' attentions is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ee import platform
from megatron_ee.errors import ConfigError, first_line
from megatron_ee.inference.heads import likeliest
from megatron_ee.inference.kv_cache import Extent, LayerKV, Masks, PackedCaches, attend_together, shared_mask
from megatron_ee.model import kernels
from megatron_ee.model.attention import Positions
from megatron_ee.model.backbone import VocabHead
from megatron_ee.model.exits import Exit
from megatron_ee.model.layer import DecoderLayer
from megatron_ee.model.stage import Stage
from megatron_ee.progress import track

FORMS = 64
"""Compiled forms of a segment at most: other numbers of tokens and caches with other room may be cases of their own."""
WARM_POSITIONS = 8
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
            mask: as ``shared_mask`` makes it; None where ``kernels.attend`` takes the tokens.
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
        if self.mask is None:
            return kernels.attend(query, [keys], [values])
        return attend_together(query, keys, values, self.mask)


class CompiledStage:
    """Every segment and every head of a stage, compiled, and what lies between attentions for rows that run together.

    For one token each segment is compiled together with its head too.
    """

    def __init__(self, stage: Stage) -> None:
        """Compile. This takes seconds for each layer; torch keeps what it made on disk for the next time.

        Raises:
            ConfigError: it cannot be compiled here.
        """
        self._stage, layers = stage, dict(stage.backbone.numbered_layers())
        self._layers, self._largest = layers, layers[max(layers)].mlp.gate_up.weight
        self._halves = {exit_.spec.layer for exit_ in stage.exits if exit_.mlp is not None}
        first, last = min(layers) - 1, max(layers)
        places = sorted({first, last} | {exit_.spec.layer for exit_ in stage.exits})
        heads = {exit_.spec.layer: Head(stage, exit_) for exit_ in stage.exits}
        final = stage.setup.architecture.num_layers + 1
        if stage.backbone.head is not None and stage.backbone.final_norm is not None:
            heads[final] = Head(stage, None)
        self._heads = {place: (_compiled(head), head.head.weight) for place, head in heads.items()}
        # A head reads what a segment leaves, but for that of a ``layer`` exit, whose own layer comes between.
        readers = {exit_.spec.layer: exit_.spec.layer for exit_ in stage.exits if exit_.layer is None}
        if final in heads and last not in heads:
            readers[last] = final
        self._segments = {
            (place, stop, asked): _compiled(
                Segment(
                    layers.get(place) if place in self._halves else None,
                    [layers[number] for number in range(place + 1, stop + 1)],
                    stop not in self._halves,
                    None if asked is None else heads[asked],
                )
            )
            for place, stop in zip(places, places[1:], strict=False)
            for asked in ((None, readers[stop]) if stop in readers else (None,))
        }
        self._between: dict[tuple[bool, bool, bool], Callable[..., Any]] = {}
        from torch import _dynamo  # the compiler, which takes long to import

        _dynamo.config.recompile_limit = max(FORMS, _dynamo.config.recompile_limit)
        with _in_one_line():
            parts = len(self._segments) + len(self._heads) + 1
            with track(parts, "parts", "compiling", enabled=stage.setup.groups.is_main) as bar:
                for place, stop, asked in self._segments:
                    self._warm(place, stop, asked)
                    bar.advance()
                for place in self._heads:
                    self._warm_head(place)
                    bar.advance()
                for place, stop in zip(places, places[1:], strict=False):
                    self._warm_together(place, stop)
                bar.advance()

    @torch.inference_mode()
    def _warm(self, place: int, stop: int, asked: int | None) -> None:
        """Once for one token, and once for more, at whose end nothing is asked."""
        arch, device = self._stage.setup.architecture, platform.device()
        kept = torch.zeros(
            WARM_POSITIONS, arch.num_kv_heads, arch.head_dim, dtype=self._stage.setup.dtype, device=device
        )
        for tokens in (1, 3) if asked is None else (1,):
            stand = WARM_POSITIONS + tokens
            # With room to spare: what is compiled for a cache that is just full holds for no other.
            caches = {number: LayerKV(Extent(2 * stand)) for number in range(place + 1, stop + 1)}
            for cache in caches.values():
                cache.extend(kept, kept)
            positions = self._stage.backbone.packed_positions(torch.arange(WARM_POSITIONS, stand, device=device))
            self.run(place, stop, asked, kept.new_zeros(tokens, 1, arch.hidden_size), positions, caches, {})

    @torch.inference_mode()
    def _warm_together(self, place: int, stop: int) -> None:
        arch, device = self._stage.setup.architecture, platform.device()
        positions = self._stage.backbone.packed_positions(torch.arange(3, device=device))
        h = torch.zeros(3, 1, arch.hidden_size, dtype=self._stage.setup.dtype, device=device)
        self.run_together(place, stop, h, positions, lambda _: PackedCaches([LayerKV(Extent(3))], [3]))

    @torch.inference_mode()
    def _warm_head(self, place: int) -> None:
        setup = self._stage.setup
        for tokens in (1, 3):
            shape = (tokens, 1, setup.architecture.hidden_size)
            self.head(place, torch.zeros(shape, dtype=setup.dtype, device=platform.device()))

    def head(self, place: int, x: Tensor) -> Said | None:
        """What ``Head`` makes of ``x`` at a place where rows wait; None where it is not compiled for so many tokens."""
        if place not in self._heads:
            return None
        head, weight = self._heads[place]
        if not kernels.compiles(len(x), weight):
            return None
        with kernels.torch_products():
            return head(x)  # type: ignore[no-any-return]

    def run(
        self,
        place: int,
        stop: int,
        asked: int | None,
        h: Tensor,
        positions: Positions,
        caches: Mapping[int, LayerKV],
        masks: Masks,
    ) -> tuple[Tensor, Said | None] | None:
        """From one place to another, if that is a segment, and the row's caches have room and hide nothing; else None.

        Args:
            asked: place of the head that is to read the one token at the end; None for none.
            caches: the row's, by layer.
            masks: of the pass.

        Returns:
            The tap there, and what the head made of it: None too where it has to be asked by itself.
        """
        tokens, parts = len(h), self._segments
        segment = parts.get((place, stop, asked if tokens == 1 else None)) or parts.get((place, stop, None))
        if segment is None or not kernels.compiles(tokens, self._largest):
            return None
        mine = [caches[number] for number in range(place + 1, stop + 1)]
        rooms = [cache.room(tokens) for cache in mine]
        if None in rooms:
            return None
        start, arch, mask = mine[0].length, self._stage.setup.architecture, None
        if tokens > 1 and not kernels.attends_several(tokens, h, arch.head_dim):
            mask = shared_mask(masks, (start, start + tokens, 0, None), h, arch.num_heads // arch.num_kv_heads)
        with kernels.torch_products():
            done = segment(h, positions, mask, start, *(list(each) for each in zip(*rooms, strict=True)))  # type: ignore[misc]
        for cache in mine:
            cache.length += tokens
        return done  # type: ignore[no-any-return]

    def run_together(
        self,
        place: int,
        stop: int,
        h: Tensor,
        positions: Positions,
        caches: Callable[[int], PackedCaches],
    ) -> Tensor | None:
        """From one place to another with tokens of any rows, ``[tokens, 1, hidden]``; None where eager layers are best.

        Args:
            caches: of the rows, by layer.
        """
        if len(h) == 1 or not kernels.compiles(len(h), self._largest):
            return None
        done, context = None, None
        lead: DecoderLayer | None = self._layers[place] if place in self._halves else None
        for number in range(place + 1, stop + 1):
            ahead = self._layers[number]
            h, (query, key, value) = self._run_between(h, context, positions, done, lead, ahead)
            context = caches(number).attend(query, key, value, ahead.attention.window)
            done = lead = ahead
        lead = None if stop in self._halves else lead
        return self._run_between(h, context, positions, done, lead, None)[0]  # type: ignore[no-any-return]

    def _run_between(
        self, h: Tensor, context: Tensor | None, positions: Positions, *layers: DecoderLayer | None
    ) -> Any:
        """Each case as a code of its own, made when it is first met: see ``_compiled``."""
        done, lead, ahead = (layer is not None for layer in layers)
        between = self._between.get((done, lead, ahead))
        if between is None:
            between = self._between[done, lead, ahead] = _compiled(Between())
        with kernels.torch_products():
            return between(h, context, positions, *layers)


def _compiled(module: Segment | Between | Head) -> Callable[..., Any]:
    """The ``forward`` of a module whose parts stay what they are.

    torch keeps what it made with a function's code, and checks at every call which of it is right for the module:
    a copy of the code for each spares these checks, which take half as long as a small model's layers.
    """
    code = type(module).forward.__code__.replace()
    forward = MethodType(FunctionType(code, globals()), module)
    # Nor does each operation in it check what it is given.
    options: dict[str, Any] = {"guard_filter_fn": _on_arguments, "size_asserts": False}
    return torch.compile(forward, fullgraph=True, dynamic=True, options=options)


def _on_arguments(guards: Sequence[Any]) -> list[bool]:
    """Which checks are of arguments, rather than of modules or of what their code refers to."""
    kept = (torch.compiler.skip_guard_on_all_nn_modules_unsafe, torch.compiler.skip_guard_on_globals_unsafe)
    return [all(each) for each in zip(*(keep(guards) for keep in kept), strict=True)]


@contextlib.contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the tracer, of a compiler, of loading what it made
        raise ConfigError(f"compile: the layers cannot be compiled here ({first_line(error)}); leave it out") from error


def compile_stage(stage: Stage) -> CompiledStage:
    """Compile layers and heads of a loaded stage. Every rank calls this.

    Raises:
        ConfigError: they cannot be compiled here.
    """
    made: list[CompiledStage] = []
    stage.setup.groups.together(lambda: made.append(CompiledStage(stage)))
    return made[0]


def check_compiler(tensor: int) -> None:
    """Refuse ``compile`` where it cannot work, before a model is loaded.

    Raises:
        ConfigError: several ranks share a layer, or there is no compiler.
    """
    if tensor > 1:
        raise ConfigError(f"compile: layers that {tensor} ranks share are not compiled; leave it out, or use one")
    compiler, there = platform.cpp_compiler()
    if not (platform.has_accelerator() or there):
        raise ConfigError(
            f"compile: on a CPU it needs a C++ compiler, and there is no {compiler}; install one, or set CXX"
        )
