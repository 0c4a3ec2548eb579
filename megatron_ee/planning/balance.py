"""Balances layouts: spreads layers and exits over the stages to minimise the work of the busiest stage.

Every stage processes every microbatch, so the busiest stage limits the speed. Pure: no
process group is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import ParallelConfig
from megatron_ee.errors import ConfigError
from megatron_ee.parallel.costs import final_exit_flops
from megatron_ee.parallel.layout import Layout, StageLayout, even_layout, parse_layout
from megatron_ee.planning.costs import exit_flops, last_layer, layer_flops

PRECISION = 1e-4
"""The search ends when the work of the busiest stage cannot fall by more than this share."""


def resolve_layout(
    parallel: ParallelConfig,
    specs: Sequence[ExitSpec],
    architecture: Architecture,
    sequence_length: int,
    distillation: bool = False,
    free_running: bool = False,
) -> Layout:
    """The layout in a configuration, or the balanced one for ``auto``.

    Args:
        parallel: the configuration's block.
        specs: the run's exits.
        architecture: of the model.
        sequence_length: tokens per sequence; attention's share of the work grows with it.
        distillation: all layers run, and the last stage with layers has the final exit.
        free_running: all layers stay loaded, and an engine can run on them (``validation.free_running``). ``auto`` then
            spreads them evenly, with each exit on the stage of its layer.

    Raises:
        ConfigError: an impossible layout, see ``parse_layout`` and ``balance``.
    """
    run = last_layer(specs, architecture.num_layers, distillation)
    if free_running:
        return _decoding_layout(parallel, specs, architecture).up_to(run)
    if parallel.layout == "auto":
        kinds = tuple(ExitSpec(spec.layer, spec.body, spec.head, rank=spec.rank) for spec in specs)
        return _balanced(architecture, kinds, parallel.pipeline, sequence_length, distillation, parallel.tensor)
    return parse_layout(parallel.layout, specs, architecture.num_layers, run)


@lru_cache
def _balanced(
    architecture: Architecture,
    specs: tuple[ExitSpec, ...],
    stages: int,
    tokens: int,
    distillation: bool,
    tensor: int,
) -> Layout:
    """``balance``, remembered: a search of layouts asks for the same ones many times."""
    return balance(architecture, specs, stages, tokens, distillation=distillation, tensor=tensor)


def _decoding_layout(parallel: ParallelConfig, specs: Sequence[ExitSpec], architecture: Architecture) -> Layout:
    depth = architecture.num_layers
    if parallel.layout == "auto":
        layout = even_layout(depth, parallel.pipeline, [spec.layer for spec in specs])
    else:
        layout = parse_layout(parallel.layout, specs, depth, depth)
    if not layout.decodes:
        raise ConfigError(
            "validation.free_running: true needs layers on every stage, and each exit on the stage of its layer; lower "
            "parallel.pipeline, change parallel.layout, or measure free running only at the end (false)"
        )
    return layout


def balance(
    architecture: Architecture,
    specs: Sequence[ExitSpec],
    stages: int,
    tokens: int,
    *,
    distillation: bool = False,
    tensor: int = 1,
) -> Layout:
    """Balance layers and exits over the stages.

    The first stages hold ranges of layers. Each exit is on the stage of its layer, or on one of the last stages, which
    have no layers. The search (see ``_Search``) minimises the FLOPs of the busiest stage. Among equal layouts it takes
    the one with the fewest stages without layers.

    Args:
        architecture: of the model.
        specs: the run's exits.
        stages: pipeline size.
        tokens: sequence length.
        distillation: all layers run, and the last stage with layers has the final exit.
        tensor: tensor-parallel size, which affects the padding of the vocabulary.

    Raises:
        ConfigError: more stages than layers and exits.
    """
    layers = layer_flops(architecture, specs, tokens, distillation)
    if stages > len(layers) + len(specs):
        raise ConfigError(
            f"parallel.pipeline: {stages} stages, but {len(layers)} layers and {len(specs)} exits fill at most "
            f"{len(layers) + len(specs)}; lower it"
        )
    if distillation:
        layers[-1] += final_exit_flops(architecture, tokens, tensor)
    exits = {spec.layer: exit_flops(architecture, spec, tokens, tensor) for spec in specs}
    search = _Search(layers, exits, stages)

    total = sum(layers) + sum(exits.values())
    least = max(-(-total // stages), *layers, *exits.values())
    best = search.within(total)
    assert best is not None, "without a limit there is always a layout"
    most, least = search.busiest(best), least - 1  # ``most`` can be reached, ``least`` cannot
    while most - least > PRECISION * most:
        middle = (most + least) // 2
        found = search.within(middle)
        if found is None:
            least = middle
        else:
            best, most = found, search.busiest(found)
    # Once more with the best limit, which may be possible with fewer stages without layers.
    return search.within(most) or best


_Cut = tuple[int, tuple[StageLayout, ...]]


@dataclass(frozen=True)
class _Search:
    """Searches for layouts in which no stage exceeds a limit.

    For each number of stages with layers, the layers are split so that the exits that do not fit beside them cost least
    (dynamic programming over the splits). These exits are assigned to the other stages by decreasing cost, first fit.
    The first step is exact, the second is approximate. If all exits have the same cost, the usual case, both are exact.

    Attributes:
        layers: cost of each layer.
        exits: cost of each exit by its layer.
        stages: number of stages.
    """

    layers: list[int]
    exits: dict[int, int]
    stages: int

    def busiest(self, layout: Layout) -> int:
        """Work of the busiest stage."""
        return max(self._work(stage) for stage in layout.stages)

    def within(self, limit: int) -> Layout | None:
        """A layout without a stage above ``limit``, with the fewest stages without layers."""
        cuts = self._cuts(limit)
        for layered in range(min(self.stages, len(self.layers)), 0, -1):
            found = self._complete(cuts[layered], limit)
            if found is not None:
                return found
        return None

    def _work(self, stage: StageLayout) -> int:
        return sum(self.layers[layer - 1] for layer in stage.layers) + sum(self.exits[layer] for layer in stage.exits)

    def _cuts(self, limit: int) -> list[tuple[StageLayout, ...] | None]:
        """For each number of stages from 0: the layers split into this many stages, with the exits that fit beside
        them."""
        count = len(self.layers)
        runs = [self._runs(start, limit) for start in range(count)]
        # best[end]: cost of the exits of layers up to ``end`` that do not fit, and the stages of these layers.
        best: list[_Cut | None] = [(0, ()), *[None] * count]
        cuts = [best[count]]
        for _ in range(min(self.stages, count)):
            longer: list[_Cut | None] = [None] * (count + 1)
            for start, here in enumerate(best[:count]):
                if here is None:
                    continue
                for end, (left_over, exits) in enumerate(runs[start], start + 1):
                    known = longer[end]
                    if known is None or here[0] + left_over < known[0]:
                        stage = StageLayout(range(start + 1, end + 1), exits)
                        longer[end] = here[0] + left_over, (*here[1], stage)
            best = longer
            cuts.append(best[count])
        return [None if cut is None else cut[1] for cut in cuts]

    def _runs(self, start: int, limit: int) -> list[tuple[int, tuple[int, ...]]]:
        """For stages of 1, 2, ... layers after layer ``start``, while they are within ``limit``: the cost of the exits
        that do not fit beside the layers, and those that do."""
        found, work, total, here = [], 0, 0, dict[int, int]()
        kept: tuple[int, ...] = ()
        for layer in range(start + 1, len(self.layers) + 1):
            work += self.layers[layer - 1]
            if work > limit:
                break
            if layer in self.exits:
                here[layer] = self.exits[layer]
                total += here[layer]
                kept = tuple(here)
            if work + total <= limit:
                found.append((0, kept))
            else:
                fullest = _fullest(here, limit - work)
                found.append((total - sum(here[number] for number in fullest), fullest))
        return found

    def _complete(self, layered: tuple[StageLayout, ...] | None, limit: int) -> Layout | None:
        """Add stages without layers for the remaining exits; each needs at least one exit."""
        if layered is None:
            return None
        hosted = {layer for stage in layered for layer in stage.exits}
        bins: list[list[int]] = []
        for layer in sorted(self.exits.keys() - hosted, key=lambda layer: (-self.exits[layer], layer)):
            room = limit - self.exits[layer]
            fitting = next((held for held in bins if sum(self.exits[other] for other in held) <= room), None)
            if fitting is not None:
                fitting.append(layer)
            else:
                bins.append([layer])
        places = [*layered, *(StageLayout(range(0), tuple(sorted(held))) for held in bins)]
        while len(places) < self.stages:
            # Surplus stages: each takes an exit from the busiest stage that can give one away.
            givers = [stage for stage in places if len(stage.exits) > (not stage.layers)]
            if not givers:
                return None
            giver = max(givers, key=self._work)
            places[places.index(giver)] = StageLayout(giver.layers, giver.exits[:-1])
            places.append(StageLayout(range(0), giver.exits[-1:]))
        return Layout(tuple(places)) if len(places) == self.stages else None


def _fullest(costs: dict[int, int], room: int) -> tuple[int, ...]:
    """The keys whose costs fill ``room`` best. Sums within 1/64 of it count as equal, which limits the work."""
    if sum(costs.values()) <= room:
        return tuple(costs)
    step = room // 64 + 1
    sums: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for key, cost in costs.items():
        for total, keys in [*sums.values()]:
            total += cost
            if total <= room and total >= sums.get(total // step, (0,))[0]:
                sums[total // step] = total, (*keys, key)
    return sums[max(sums)][1]
