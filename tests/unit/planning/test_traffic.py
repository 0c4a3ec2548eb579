"""Bytes over each kind of link, worked out by hand."""

from __future__ import annotations

from megatron_ee.config.exits import ExitSpec
from megatron_ee.parallel.layout import Layout, StageLayout
from megatron_ee.planning.parameters import trained_parameters
from megatron_ee.planning.traffic import stage_traffic
from megatron_ee.planning.workload import Workload
from megatron_ee.testing.models import llama2_7b

HIDDEN = 2048 * 4096 * 2  # bytes of a microbatch's hidden states
MODEL = llama2_7b()


def test_messages_between_stages() -> None:
    """h and two taps to the next stages; the last stage with layers sends no h on, but the teacher's tokens back."""
    stages = Layout((StageLayout(range(1, 9)), StageLayout(range(9, 13), (12,)), StageLayout(range(0), (4, 8))))
    specs = [ExitSpec(4), ExitSpec(8), ExitSpec(12)]
    found = [stage_traffic(stages, index, MODEL, specs, Workload(2)) for index in range(3)]
    assert [each.messages for each in found] == [{1: HIDDEN, 2: 2 * HIDDEN}, {}, {}]
    taught = stage_traffic(stages, 1, MODEL, specs, Workload(2, top_k=8))
    assert taught.messages == {2: 2048 * 8 * (4 + 4)}
    assert found[0].per_step(5) == (5 * 3 * HIDDEN, 0, 0)
    # With sequence parallelism a rank sends its share.
    split = stage_traffic(stages, 0, MODEL, specs, Workload(2, tensor=4, sequence_parallel=True))
    assert split.messages == {1: HIDDEN // 4, 2: HIDDEN // 2}


def test_reductions_over_tensor_parallel_ranks() -> None:
    """An all-reduce over four ranks sends 2 x 3/4 of the hidden states: two in a layer, one of the embedding."""
    stages, ring = Layout((StageLayout(range(1, 9), (8,)),)), 3 / 4 * HIDDEN
    plain = Workload(2, tensor=4)
    # The last layer's MLP is the exit's. The exit reduces its projection and the gradient of the head's input.
    found = stage_traffic(stages, 0, MODEL, [ExitSpec(8)], plain)
    assert found.layers == (2 * 8 - 1 + 1) * 2 * ring
    assert found.exits == (1 + 1) * 2 * ring
    # A norm body has no projection, a layer body two, and their inputs' gradients.
    assert stage_traffic(stages, 0, MODEL, [ExitSpec(8, "norm")], plain).layers == (2 * 8 + 1) * 2 * ring
    assert stage_traffic(stages, 0, MODEL, [ExitSpec(8, "norm")], plain).exits == 2 * ring
    assert stage_traffic(stages, 0, MODEL, [ExitSpec(8, "layer")], plain).exits == (4 + 1) * 2 * ring
    # Gathers and scatters take as much; the embedding is scattered once, the head's input gathered once more.
    split = Workload(2, tensor=4, sequence_parallel=True)
    assert stage_traffic(stages, 0, MODEL, [ExitSpec(8, "norm")], split).layers == (4 * 8 + 1) * ring
    assert stage_traffic(stages, 0, MODEL, [ExitSpec(8)], split).exits == (3 + 1 + 2) * ring
    # An exit that trains nothing is left out.
    assert stage_traffic(stages, 0, MODEL, [ExitSpec(8, "embedding", "shared")], plain).exits == 0
    assert stage_traffic(stages, 0, MODEL, [ExitSpec(8)], Workload(2)).per_step(3) == (0, 0, 0)


def test_gradients_and_weights_over_data_parallel_ranks() -> None:
    stages, specs = Layout((StageLayout(range(1, 9), (4, 8)),)), [ExitSpec(4, "norm"), ExitSpec(8)]
    found = stage_traffic(stages, 0, MODEL, specs, Workload(2, data=4, tensor=2))
    counts = {spec.layer: trained_parameters(MODEL, spec, 2) for spec in specs}
    assert found.gradients == {layer: 3 * count for layer, count in counts.items()}  # 3/4 of 4 bytes
    assert found.weights == int(3 / 4 * 2 * sum(counts.values()))
