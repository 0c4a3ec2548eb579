"""What exits would gain on a model of another shape and a GPU, if they agreed as often as those that were measured.

A pass over few tokens takes as long as reading its weights from the GPU's memory, or as multiplying them if that takes
longer. The agreement of an exit is that of the measured exit at the same share of the depth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.evaluation.probe.forecast import DecodeTimes, Forecast, Records
from megatron_ee.exits.registry import tap_of
from megatron_ee.exits.tensors import body_weights
from megatron_ee.parallel.costs import padded_vocab
from megatron_ee.planning.devices import Device
from megatron_ee.planning.parameters import layer_parameters

ITEMSIZE = 2
"""Bytes of a weight: bfloat16."""
SIZES = (1, 16)
"""Tokens of a pass; times between are on the line through these."""


@dataclass(frozen=True)
class Shape:
    """A model that exits are forecast for.

    Attributes:
        name: for the reader.
        architecture: of the model.
        device: that it runs on.
    """

    name: str
    architecture: Architecture
    device: Device

    @property
    def gpus(self) -> int:
        """How many of the device hold the weights."""
        arch = self.architecture
        vocabulary = padded_vocab(arch.vocab_size) * arch.hidden_size * (1 if arch.tied else 2)
        weights = arch.num_layers * layer_parameters(arch) + vocabulary
        return math.ceil(weights * ITEMSIZE / self.device.memory)

    def times(self) -> DecodeTimes:
        """Seconds on as many devices as hold the weights, with tensor parallelism and no time for links."""
        arch, spec = self.architecture, ExitSpec(1, "mlp", "shared")
        return DecodeTimes(
            arch.num_layers,
            layer=self._seconds(layer_parameters(arch)),
            head=self._seconds(padded_vocab(arch.vocab_size) * arch.hidden_size),
            body=self._seconds(body_weights(spec, arch)),
            skipped=tap_of(spec) == "residual",
        )

    def _seconds(self, weights: int) -> dict[int, float]:
        reading = ITEMSIZE * weights / (self.gpus * self.device.bandwidth)
        return {size: max(reading, 2 * weights * size / (self.gpus * self.device.bfloat16)) for size in SIZES}

    def places(self, layers: Sequence[int], num_layers: int) -> dict[int, int]:
        """By layer of this shape, the layer of a model of ``num_layers`` layers at the same share of the depth.

        Of ``layers`` that come to the same place of a shallower shape, the last is kept.
        """
        depth = self.architecture.num_layers
        return {min(depth - 1, max(1, round(layer * depth / num_layers))): layer for layer in layers}

    def records(self, measured: Records, num_layers: int) -> Records:
        """The records of a model of ``num_layers`` layers, with each exit at its place in this shape."""
        places = self.places(measured.layers, num_layers)
        rows = measured.rows(list(places.values()))
        return Records(tuple(places), measured.confidence[rows], measured.agrees[rows], measured.starts)


@dataclass(frozen=True)
class ShapeForecast:
    """Forecasts for a shape; ``threshold``, ``gate`` and ``speculative`` as in ``Probe``."""

    shape: Shape
    times: DecodeTimes
    threshold: Mapping[float, Forecast]
    gate: Mapping[float, Forecast]
    speculative: Forecast
