"""Layers as compiled functions (``torch.compile``).

A token's pass through a small model, or through any model on a GPU, waits for Python: some twenty operations to a layer
that do little each. Compiled, those between the matrix products are fused. For a row that runs alone a segment between
two exits, or a head, is one call; for rows that run together, what lies between two layers' attentions is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.errors import ConfigError, first_line
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.kv_cache import Extent, LayerKV, Masks, PackedCaches, shared_mask
from megatron_ee.inference.segments import Between, Head, Said, Segment
from megatron_ee.model.attention import Positions
from megatron_ee.model.layer import DecoderLayer
from megatron_ee.progress import track

FORMS = 64
"""Compiled forms of a segment at most: other numbers of tokens and caches with other room may be cases of their own."""
WARM_POSITIONS = 8


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
        self._layers = layers
        self._halves = {exit_.spec.layer for exit_ in stage.exits if exit_.mlp is not None}
        first, last = min(layers) - 1, max(layers)
        places = sorted({first, last} | {exit_.spec.layer for exit_ in stage.exits})
        heads = {exit_.spec.layer: Head(stage, exit_) for exit_ in stage.exits}
        final = stage.setup.architecture.num_layers + 1
        if stage.backbone.head is not None and stage.backbone.final_norm is not None:
            heads[final] = Head(stage, None)
        self._heads = {place: _compiled(head) for place, head in heads.items()}
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
        # The norms' epsilon is the only number with a fraction. Taken for a variable, as by default, each trace is made
        # twice: its constancy is found at the end of the first.
        with _in_one_line(), _dynamo.config.patch(specialize_float=True), platform.inference_attention():
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
        """What ``Head`` makes of ``x`` at a place where rows wait; None where there is none."""
        head = self._heads.get(place)
        return None if head is None else head(x)

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
        if segment is None:
            return None
        mine = [caches[number] for number in range(place + 1, stop + 1)]
        rooms = [cache.room(tokens) for cache in mine]
        if None in rooms:
            return None
        start, arch, mask = mine[0].length, self._stage.setup.architecture, None
        if tokens > 1:
            mask = shared_mask(masks, (start, start + tokens, 0, None), h, arch.num_heads // arch.num_kv_heads)
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
        if len(h) == 1:
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
        return between(h, context, positions, *layers)


def _compiled(module: Segment | Between | Head) -> Callable[..., Any]:
    """The ``forward`` of a module whose parts stay what they are.

    torch keeps what it made with a function's code, and checks at every call which of it is right for the module:
    a copy of the code for each spares these checks, which take half as long as a small model's layers.
    """
    given = type(module).forward
    forward = MethodType(FunctionType(given.__code__.replace(), given.__globals__), module)
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
