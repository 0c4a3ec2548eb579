"""The layout: the layers and exits of each stage, and the messages between stages that follow from it.

Pure: no process group is needed. Hidden states only go forward. An exit's tap goes directly to the stage that hosts the
exit.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_ee.config.exits import ExitSpec, layer_number
from megatron_ee.config.schema import StageConfig
from megatron_ee.errors import ConfigError


@dataclass(frozen=True)
class StageLayout:
    """One pipeline rank.

    Attributes:
        layers: numbers of its layers, from 1, without gaps; empty if it only hosts exits.
        exits: layers of the exits that it hosts, ascending; empty if it trains nothing.
        kept: numbers of layers after those that are loaded too, but do not run while tuning.
    """

    layers: range
    exits: tuple[int, ...] = ()
    kept: range = range(0)

    @property
    def held(self) -> range:
        """All layers that are loaded."""
        return range(self.layers.start, self.kept.stop) if self.layers and self.kept else self.layers or self.kept


@dataclass(frozen=True)
class Message:
    """The message from one stage to another for each microbatch.

    Attributes:
        source: sending stage.
        target: receiving stage.
        hidden: whether it starts with h, for the target's layers.
        taps: layers of the exits whose taps follow, ascending.
    """

    source: int
    target: int
    hidden: bool
    taps: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """All stages, in pipeline order."""

    stages: tuple[StageLayout, ...]

    @cached_property  # the planner asks a layout often
    def layered(self) -> tuple[int, ...]:
        """The stages that hold layers, in order."""
        return tuple(index for index, stage in enumerate(self.stages) if stage.layers)

    @property
    def last_layered(self) -> int:
        """The stage of the last layer that runs."""
        return self.layered[-1]

    def owner(self, layer: int) -> int:
        """The stage that runs ``layer``."""
        return next(index for index, stage in enumerate(self.stages) if layer in stage.layers)

    def host(self, exit_layer: int) -> int:
        """The stage that hosts the exit after ``exit_layer``."""
        return next(index for index, stage in enumerate(self.stages) if exit_layer in stage.exits)

    @property
    def whole(self) -> Layout:
        """The same with all loaded layers as ``layers``."""
        return Layout(tuple(StageLayout(stage.held, stage.exits) for stage in self.stages))

    @property
    def decodes(self) -> bool:
        """Whether an engine can run on its loaded layers: on every stage, with each exit on the stage of its layer."""
        return all(stage.held and all(layer in stage.held for layer in stage.exits) for stage in self.stages)

    def of_all(self, num_layers: int) -> Layout:
        """All layers without exits: as they are held here if none is missing and an engine can run, else evenly."""
        whole = self.whole
        if whole.decodes and whole.stages[-1].layers[-1] == num_layers:
            return whole.with_exits(())
        return even_layout(num_layers, len(self.stages))

    def with_exits(self, exits: Collection[int]) -> Layout:
        """The same layers, with each of these exits, and no others, on the stage of its layer."""
        hosted = [tuple(layer for layer in sorted(exits) if layer in stage.layers) for stage in self.stages]
        return Layout(
            tuple(StageLayout(stage.layers, own, stage.kept) for stage, own in zip(self.stages, hosted, strict=True))
        )

    def up_to(self, layer: int) -> Layout:
        """The same, but layers after ``layer`` are only kept."""
        return Layout(
            tuple(
                StageLayout(
                    range(stage.layers.start, min(stage.layers.stop, layer + 1)),
                    stage.exits,
                    range(max(stage.layers.start, layer + 1), stage.layers.stop),
                )
                for stage in self.stages
            )
        )

    @cached_property
    def messages(self) -> tuple[Message, ...]:
        """All messages of one microbatch, at most one between two stages, ordered by source and target."""
        following = dict(zip(self.layered, self.layered[1:], strict=False))
        found = []
        for source in self.layered:
            for target in range(source + 1, len(self.stages)):
                taps = tuple(layer for layer in self.stages[target].exits if layer in self.stages[source].layers)
                hidden = following.get(source) == target
                if taps or hidden:
                    found.append(Message(source, target, hidden, taps))
        return tuple(found)

    def depth(self, stage: int) -> int:
        """Number of stages with layers that a microbatch passes before ``stage`` can run its exits."""
        if self.stages[stage].layers:
            return self.layered.index(stage)
        return max((self.layered.index(self.owner(layer)) for layer in self.stages[stage].exits), default=0)

    def lag(self, stage: int) -> int:
        """With distillation, the number of microbatches by which the exits of ``stage`` run late.

        After this delay the teacher message has arrived from the stage of the last layer.
        """
        return self.depth(self.last_layered) - self.depth(stage) if self.stages[stage].exits else 0


def even_layout(num_layers: int, stages: int, exits: Collection[int] = ()) -> Layout:
    """A layout of all layers, spread evenly, with each exit on the stage of its layer.

    Stages beyond the number of layers are empty.

    Args:
        num_layers: depth of the model.
        stages: number of stages.
        exits: layers of the exits.
    """
    used = min(stages, num_layers)
    bounds = [num_layers * index // used for index in range(used + 1)]
    places = [StageLayout(range(first + 1, last + 1)) for first, last in zip(bounds, bounds[1:], strict=False)]
    return Layout((*places, *[StageLayout(range(0))] * (stages - used))).with_exits(exits)


def parse_layout(configured: Sequence[StageConfig], specs: Sequence[ExitSpec], num_layers: int, run: int) -> Layout:
    """Build and check the layout of a configuration.

    Args:
        configured: stages in pipeline order.
        specs: the run's exits.
        num_layers: depth of the model.
        run: the last layer that runs: the layer of the deepest exit, or with distillation the model's last layer.

    Raises:
        ConfigError: layers are missing, repeated, out of order or not needed; an exit is hosted by no stage, by several
            stages, or before its layer; a stage is empty.
    """
    stages, before, hosted = [], 0, set()
    known = [spec.layer for spec in specs]
    for index, stage in enumerate(configured):
        key = f"parallel.layout[{index}]"
        layers = _layers(stage.layers, before, run, key)
        before = layers[-1] if layers else before
        exits = sorted(layer_number(position, num_layers, f"{key}.exits") for position in stage.exits)
        for layer in exits:
            if layer not in known:
                raise ConfigError(f"{key}.exits: there is no exit after layer {layer}; exits has {_listed(known)}")
            if layer in hosted:
                raise ConfigError(f"{key}.exits: the exit after layer {layer} is hosted twice; name it once")
            if layer > before:
                raise ConfigError(f"{key}.exits: layer {layer} runs on a later stage; host its exit there or after it")
            if layers and layer not in layers:
                raise ConfigError(
                    f"{key}.exits: layer {layer} is not among this stage's; host its exit with it, or on a later stage "
                    "without layers"
                )
            hosted.add(layer)
        if not layers and not exits:
            raise ConfigError(f"{key}: holds neither layers nor exits; remove it and lower parallel.pipeline")
        stages.append(StageLayout(layers, tuple(exits)))
    if before != run:
        raise ConfigError(f"parallel.layout: holds layers 1 to {before}, but layers up to {run} have to run")
    if missing := [layer for layer in known if layer not in hosted]:
        raise ConfigError(f"parallel.layout: no stage hosts the exits after layers {_listed(missing)}")
    return Layout(tuple(stages))


def _layers(pair: Sequence[int], before: int, run: int, key: str) -> range:
    if not pair:
        return range(0)
    if len(pair) != 2:
        raise ConfigError(f"{key}.layers: give the first and the last layer, such as [1, 8], not {list(pair)}")
    first, last = pair
    if first != before + 1 or last < first:
        raise ConfigError(f"{key}.layers: must start at layer {before + 1} and not end before it, not {list(pair)}")
    if last > run:
        raise ConfigError(f"{key}.layers: ends at {last}, but no layer beyond {run} has to run; end there")
    return range(first, last + 1)


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
