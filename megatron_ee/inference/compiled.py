"""The traversal of layers as compiled functions (``torch.compile``), for a sequence that runs alone.

A token's pass through a small model, or through any model on a GPU, waits for Python: some twenty operations per layer
that do little each. A compiled segment, from one depth with a tap to the next, is one call, and the operations between
its matrix products are fused. Several sequences at once, and tokens that a sliding window limits, run eagerly, over the
same keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ee import platform
from megatron_ee.config.architecture import Architecture
from megatron_ee.errors import ConfigError, first_line
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.kv_cache import Extent, LayerKV, Masks, attend_together, shared_mask
from megatron_ee.model.attention import Positions
from megatron_ee.model.traversal import run_segment
from megatron_ee.progress import track

FORMS = 64
"""Compiled forms of a function at most: one token, several tokens and caches of other sizes may each need one."""
WARM_POSITIONS = 8


class CompiledStage:
    """Every segment of a stage, compiled."""

    def __init__(self, stage: Stage) -> None:
        """Compile. This takes seconds for each layer; torch keeps what it made on disk for the next time."""
        self._stage, self._arch = stage, stage.setup.architecture
        numbers = [number for number, _ in stage.backbone.numbered_layers()]
        depths = sorted({numbers[0] - 1, numbers[-1], *stage.taps})
        self._segments = {(start, stop): _compiled(_Segment(stage, start, stop)) for start, stop in pairwise(depths)}

    @platform.inference_attention()
    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile everything for one token and for several."""
        from torch import _dynamo  # the compiler, which takes long to import

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=self._stage.setup.dtype, device=platform.device())

        _dynamo.config.recompile_limit = max(FORMS, _dynamo.config.recompile_limit)
        size, parts = self._arch.hidden_size, len(self._segments)
        kept = zeros(WARM_POSITIONS, self._arch.num_kv_heads, self._arch.head_dim)
        # The norms' epsilon is the only float. As a variable, the default, it makes every trace run twice.
        with (
            _dynamo.config.patch(specialize_float=True),
            track(parts, "parts", "compiling", enabled=self._stage.setup.groups.is_main) as bar,
        ):
            for start, stop in self._segments:
                for tokens in (1, 3):
                    end = WARM_POSITIONS + tokens
                    # With room to spare: what is compiled for a cache that is just full holds for no other.
                    caches = [LayerKV(Extent(2 * end)) for _ in range(start, stop)]
                    for cache in caches:
                        cache.extend(kept, kept)
                    where = torch.arange(WARM_POSITIONS, end, device=kept.device)
                    positions = self._stage.backbone.packed_positions(where)
                    self.run(start, stop, zeros(tokens, 1, size), positions, caches, {})
                bar.advance()

    def run(
        self, start: int, stop: int, x: Tensor, positions: Positions, caches: Sequence[LayerKV], masks: Masks
    ) -> Tensor | None:
        """``traversal.run_segment`` for one sequence; None where that is no segment, or a cache has no room.

        Args:
            start: depth of ``x``.
            stop: depth of the result.
            x: ``[tokens, 1, hidden]``.
            positions: of the tokens.
            caches: of layers ``start + 1 .. stop``.
            masks: of the pass.
        """
        segment, tokens = self._segments.get((start, stop)), len(x)
        rooms = [cache.room(tokens) for cache in caches]
        if segment is None or None in rooms:
            return None
        length, mask = caches[0].length, None
        if tokens > 1:
            shared = self._arch.num_heads // self._arch.num_kv_heads
            mask = shared_mask(masks, (length, length + tokens, 0, None), x, shared)
        x = segment(x, positions, mask, length, *(list(each) for each in zip(*rooms, strict=True)))  # type: ignore[misc]
        for cache in caches:
            cache.length += tokens
        return x


class _Segment(nn.Module):
    """The traversal from one depth to another, as a function of tensors alone."""

    def __init__(self, stage: Stage, start: int, stop: int) -> None:
        super().__init__()
        self.layers, self.taps = stage.backbone.layers_between, stage.taps
        self.start, self.stop = start, stop

    def forward(
        self,
        x: Tensor,
        positions: Positions,
        mask: Tensor | None,
        length: int,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> Tensor:
        """``x`` ``[tokens, 1, hidden]`` at the end.

        Args:
            mask: as ``shared_mask`` makes it; None for one token.
            length: positions that each layer has run.
            keys: of each layer, ``[1, kv_heads, room, head_dim]``; the tokens' own are written into them.
            values: as ``keys``.
        """
        rooms = [_Room(key, value, mask, length) for key, value in zip(keys, values, strict=True)]
        first = self.start + 1
        return run_segment(
            self.layers, self.taps, self.start, self.stop, x, positions, lambda layer: rooms[layer - first]
        )


@dataclass
class _Room:
    """One layer's cache with room for the tokens, as a ``LayerCache``; no window hides anything yet."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None
    length: int

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, window: int | None, soft_cap: float | None = None
    ) -> Tensor:
        """See ``LayerCache``; ``check_compiler`` refuses a soft cap."""
        stop = self.length + query.shape[0]
        self.keys[0, :, self.length : stop] = key.transpose(0, 1)
        self.values[0, :, self.length : stop] = value.transpose(0, 1)
        return attend_together(query, self.keys[:, :, :stop], self.values[:, :, :stop], self.mask)


def _compiled(module: nn.Module) -> Callable[..., Any]:
    """The ``forward`` of a module whose parts stay what they are.

    torch keeps what it made with a function's code and checks at each call which of it fits: a copy of the code for
    each module, and no checks of modules, spare much of a small model's time.
    """
    given: Any = type(module).forward
    forward = MethodType(FunctionType(given.__code__.replace(), given.__globals__), module)
    options: dict[str, Any] = {
        "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
        "size_asserts": False,
    }
    return torch.compile(forward, fullgraph=True, dynamic=True, options=options)


def compile_stage(stage: Stage) -> CompiledStage:
    """Compile the layers of a loaded stage. Every rank calls this.

    Raises:
        ConfigError: they cannot be compiled here.
    """
    compiled = CompiledStage(stage)

    def warm_up() -> None:
        try:
            compiled.warm_up()
        except Exception as error:  # of the tracer, of a compiler, of loading what it made
            line = f"compile: the layers cannot be compiled here ({first_line(error)}); leave it out"
            raise ConfigError(line) from error

    stage.setup.groups.together(warm_up)
    return compiled


def check_compiler(architecture: Architecture, tensor: int) -> None:
    """Refuse ``compile`` where it cannot work, before a model is loaded.

    Raises:
        ConfigError: attention scores have a soft cap, several ranks share a layer, or there is no compiler.
    """
    if architecture.attention_soft_cap is not None:
        raise ConfigError("compile: attention scores with a soft cap are not compiled; leave it out")
    if tensor > 1:
        raise ConfigError(f"compile: layers that {tensor} ranks share are not compiled; leave it out, or use one")
    compiler, there = platform.cpp_compiler()
    if not (platform.has_accelerator() or there):
        raise ConfigError(
            f"compile: on a CPU it needs a C++ compiler, and there is no {compiler}; install one, or set CXX"
        )
