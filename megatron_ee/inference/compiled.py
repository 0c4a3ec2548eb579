"""The traversal of layers as compiled functions (``torch.compile``), for passes with one sequence.

On a GPU, or with a small model, a pass of one token is limited by Python overhead: about twenty small operations per
layer. A compiled segment, from one depth with a tap to the next, is a single call, and the operations between its
matrix products are fused. Passes with several sequences, and tokens that do not see all kept positions because of a
sliding window, run eagerly on the same KV cache.
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
from megatron_ee.config.schema import Residency
from megatron_ee.errors import ConfigError, first_line
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.kv_cache import Extent, LayerKV, MaskKey, Masks, attend_together, shared_mask
from megatron_ee.model.attention import Positions
from megatron_ee.model.traversal import run_segment
from megatron_ee.progress import track

FORMS = 64
"""Maximum compiled variants of one function, for different numbers of tokens and cache sizes."""
WARM_POSITIONS = 8
"""Cached positions during the warm-up."""


class CompiledStage:
    """The compiled segments of a stage."""

    def __init__(self, stage: Stage) -> None:
        """Wrap each segment; compilation happens in ``warm_up``."""
        self._stage, self._arch = stage, stage.setup.architecture
        numbers = [number for number, _ in stage.backbone.numbered_layers()]
        depths = sorted({numbers[0] - 1, numbers[-1], *stage.taps})
        self._segments = {(start, stop): _compiled(_Segment(stage, start, stop)) for start, stop in pairwise(depths)}

    @platform.inference_attention()
    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile every segment for one token and for several tokens.

        This takes seconds per layer, and less if torch finds the code in its cache on disk.
        """
        from torch import _dynamo  # the compiler, which takes long to import

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=self._stage.setup.dtype, device=platform.device())

        _dynamo.config.recompile_limit = max(FORMS, _dynamo.config.recompile_limit)
        size, parts = self._arch.hidden_size, len(self._segments)
        kept = zeros(WARM_POSITIONS, self._arch.num_kv_heads, self._arch.head_dim)
        # The norms' epsilon is the only float. By default it is traced as a variable, which doubles every trace.
        with (
            _dynamo.config.patch(specialize_float=True),
            track(parts, "parts", "compiling", enabled=self._stage.setup.groups.is_main) as bar,
        ):
            for start, stop in self._segments:
                for tokens in (1, 3):
                    end = WARM_POSITIONS + tokens
                    # Spare room: code compiled for a full cache is valid for full caches only.
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
        """Run ``traversal.run_segment`` for one sequence.

        Args:
            start: depth of ``x``.
            stop: depth of the result.
            x: ``[tokens, 1, hidden]``.
            positions: of the tokens.
            caches: of layers ``start + 1 .. stop``.
            masks: of the pass.

        Returns:
            ``[tokens, 1, hidden]``; None if ``start .. stop`` is not a segment or a cache has no room.
        """
        segment, tokens = self._segments.get((start, stop)), len(x)
        rooms = [cache.room(tokens) for cache in caches]
        if segment is None or None in rooms:
            return None
        length, mask = caches[0].length, None
        if tokens > 1:
            shared = self._arch.num_heads // self._arch.num_kv_heads
            mask = shared_mask(masks, MaskKey(length, length + tokens, 0, None), x, shared)
        x = segment(x, positions, mask, length, *(list(each) for each in zip(*rooms, strict=True)))  # type: ignore[misc]
        for cache in caches:
            cache.length += tokens
        return x


class _Segment(nn.Module):
    """The traversal from one depth to another, as a function of tensors and one integer."""

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
        """Run the layers.

        Args:
            x: ``[tokens, 1, hidden]``.
            positions: of the tokens.
            mask: from ``shared_mask``; None for one token.
            length: positions that each layer has run.
            keys: one per layer, ``[1, kv_heads, room, head_dim]``; the keys of the tokens are written into them.
            values: as ``keys``.

        Returns:
            ``[tokens, 1, hidden]``.
        """
        rooms = [_Room(key, value, mask, length) for key, value in zip(keys, values, strict=True)]
        first = self.start + 1
        return run_segment(
            self.layers, self.taps, self.start, self.stop, x, positions, lambda layer: rooms[layer - first]
        )


@dataclass
class _Room:
    """A ``LayerCache`` over one layer's tensors, which have room for the tokens. All kept positions are visible."""

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
    """Compile the ``forward`` of a module that never changes.

    torch stores compiled variants with a function's code object and checks at each call which variant fits. With one
    copy of the code object per module and without guards on modules, these checks take much less time.
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
        ConfigError: the layers cannot be compiled on this machine.
    """
    if stage.backbone.slots is not None:
        raise ConfigError("compile: needs the weights of all layers in the device's memory; leave it out")
    compiled = CompiledStage(stage)

    def warm_up() -> None:
        try:
            compiled.warm_up()
        except Exception as error:  # from tracing, from the compiler, or from loading its output
            line = f"compile: the layers cannot be compiled here ({first_line(error)}); leave it out"
            raise ConfigError(line) from error

    stage.setup.groups.together(warm_up)
    return compiled


def check_compiler(architecture: Architecture, tensor: int, residency: Residency = "device") -> None:
    """Check that ``compile`` can work, before a model is loaded.

    Raises:
        ConfigError: attention has a soft cap, tensor parallelism is used, layers are streamed, or there is no compiler.
    """
    if residency != "device":
        raise ConfigError(f"compile: not supported with residency {residency}; leave one of them out")
    if architecture.attention_soft_cap is not None:
        raise ConfigError("compile: not supported for attention with a soft cap; leave it out")
    if tensor > 1:
        raise ConfigError(f"compile: not supported with tensor parallelism ({tensor} ranks); leave it out, or use one")
    compiler, there = platform.cpp_compiler()
    if not (platform.has_accelerator() or there):
        raise ConfigError(
            f"compile: on a CPU it needs a C++ compiler, and there is no {compiler}; install one, or set CXX"
        )
