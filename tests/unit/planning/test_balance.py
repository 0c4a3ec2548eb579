"""Balanced layouts: as good as trying everything, found in few rounds, and possible to run."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import ParallelConfig, StageConfig
from megatron_ee.errors import ConfigError
from megatron_ee.families.registry import parse_architecture
from megatron_ee.parallel.costs import final_exit_flops
from megatron_ee.parallel.layout import Layout, StageLayout, even_layout, parse_layout
from megatron_ee.planning.balance import PRECISION, _fullest, _Search, balance, resolve_layout
from megatron_ee.planning.costs import exit_flops, last_layer, layer_flops

TOKENS = 512
BODIES: tuple[Any, ...] = ("embedding", "norm", "mlp", "layer")
HEADS: tuple[Any, ...] = ("own", "shared", "low_rank")


def architecture(layers: int, vocab: int = 32000, hidden: int = 1024) -> Architecture:
    return parse_architecture(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": hidden,
            "intermediate_size": hidden * 11 // 4,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 128,
            "vocab_size": vocab,
            "max_position_embeddings": 4096,
        }
    )


def costs(model: Architecture, specs: list[ExitSpec], distillation: bool) -> tuple[list[int], dict[int, int]]:
    layers = layer_flops(model, specs, TOKENS, distillation)
    layers[-1] += final_exit_flops(model, TOKENS) if distillation else 0
    return layers, {spec.layer: exit_flops(model, spec, TOKENS) for spec in specs}


def busiest(layout: Layout, layers: list[int], exits: dict[int, int]) -> int:
    return max(sum(layers[n - 1] for n in stage.layers) + sum(exits[n] for n in stage.exits) for stage in layout.stages)


def best_by_trying_everything(layers: list[int], exits: dict[int, int], stages: int) -> int:
    found = []
    for layered in range(1, min(stages, len(layers)) + 1):
        for cuts in itertools.combinations(range(1, len(layers)), layered - 1):
            bounds = (0, *cuts, len(layers))
            base = [sum(layers[a:b]) for a, b in itertools.pairwise(bounds)] + [0] * (stages - layered)
            homes = [next(i for i in range(layered) if n <= bounds[i + 1]) for n in exits]
            for places in itertools.product(*([home, *range(layered, stages)] for home in homes)):
                if len({place for place in places if place >= layered}) == stages - layered:
                    work = list(base)
                    for place, cost in zip(places, exits.values(), strict=True):
                        work[place] += cost
                    found.append(max(work))
    return min(found)


def check_can_run(layout: Layout, model: Architecture, specs: list[ExitSpec], distillation: bool) -> None:
    listed = [
        StageConfig([stage.layers[0], stage.layers[-1]] if stage.layers else [], [*stage.exits])
        for stage in layout.stages
    ]
    run = last_layer(specs, model.num_layers, distillation)
    assert parse_layout(listed, specs, model.num_layers, run) == layout
    # Stages without layers come last.
    assert layout.layered == tuple(range(len(layout.layered)))


def test_as_good_as_trying_everything() -> None:
    draw = random.Random(0)
    worst, dedicated = 1.0, 0
    for _ in range(200):
        model = architecture(draw.randint(1, 6), vocab=draw.choice([2000, 32000, 128000]))
        places = sorted(draw.sample(range(1, model.num_layers + 1), draw.randint(1, min(4, model.num_layers))))
        specs = [ExitSpec(n, draw.choice(BODIES), draw.choice(HEADS), rank=draw.choice([16, 512])) for n in places]
        distillation = draw.random() < 0.3
        layers, exits = costs(model, specs, distillation)
        stages = draw.randint(1, min(5, len(layers) + len(specs)))
        layout = balance(model, specs, stages, TOKENS, distillation=distillation)
        assert len(layout.stages) == stages
        check_can_run(layout, model, specs, distillation)
        worst = max(worst, busiest(layout, layers, exits) / best_by_trying_everything(layers, exits, stages))
        dedicated += len(layout.layered) < stages
    assert worst < 1.001
    assert dedicated > 30  # both kinds of stages were among them


@pytest.mark.parametrize("stages", [2, 8, 16])
@pytest.mark.parametrize("kinds", ["alike", "mixed"])
def test_few_rounds_make_it_even_for_a_large_model(stages: int, kinds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, draw = architecture(80, hidden=8192), random.Random(1)
    specs = [ExitSpec(8 * n) for n in range(1, 11)]
    if kinds == "mixed":
        specs = [ExitSpec(spec.layer, draw.choice(BODIES), draw.choice(HEADS), rank=spec.layer) for spec in specs]
    limits = []
    within = _Search.within
    monkeypatch.setattr(_Search, "within", lambda search, limit: limits.append(limit) or within(search, limit))
    layout = balance(model, specs, stages, TOKENS)
    assert len(limits) < math.log2(stages / PRECISION) + 3  # each halves what is open
    check_can_run(layout, model, specs, distillation=False)
    layers, exits = costs(model, specs, False)
    share = (sum(layers) + sum(exits.values())) / stages
    assert busiest(layout, layers, exits) < 1.12 * max(share, *exits.values())


def test_many_exits_are_put_together_without_trying_every_choice() -> None:
    draw = random.Random(2)
    costs = {layer: draw.randint(10**6, 10**7) for layer in range(1, 101)}
    room = sum(costs.values()) // 3
    kept = _fullest(costs, room)  # of 2^100 choices
    assert 0.9 * room < sum(costs[layer] for layer in kept) <= room and len(set(kept)) == len(kept)


def test_exits_move_to_stages_of_their_own_only_where_that_helps() -> None:
    # Eight heads cost about as much as the layers: two halves of the model need no help.
    model, specs = architecture(16, hidden=2048), [ExitSpec(2 * n, "norm") for n in range(1, 9)]
    assert len(balance(model, specs, 2, TOKENS).layered) == 2
    # A single one that costs more than all layers does.
    alone = balance(architecture(2, vocab=128000), [ExitSpec(2, "norm")], 2, TOKENS)
    assert alone == Layout((StageLayout(range(1, 3)), StageLayout(range(0), (2,))))
    # An exit whose stage is not the busiest with it stays there.
    assert all(stage.layers for stage in balance(architecture(3, vocab=128), [ExitSpec(3, "norm")], 3, TOKENS).stages)


def test_every_stage_holds_something_up_to_the_last_one_possible() -> None:
    model, specs = architecture(6), [ExitSpec(1), ExitSpec(2, "embedding", "shared"), ExitSpec(4, "norm")]
    for stages in range(1, 8):
        layout = balance(model, specs, stages, TOKENS)
        assert len(layout.stages) == stages
        check_can_run(layout, model, specs, distillation=False)
    with pytest.raises(ConfigError, match=r"^parallel\.pipeline: 8 stages, but 4 layers and 3 exits fill at most 7"):
        balance(model, specs, 8, TOKENS)
    assert len(balance(model, specs, 9, TOKENS, distillation=True).stages) == 9


def test_the_final_exit_counts() -> None:
    # The exit on the first stage costs little more than the final exit on the last one.
    model, specs = architecture(6), [ExitSpec(1, "embedding", "low_rank", rank=1)]
    layout = balance(model, specs, 2, TOKENS, distillation=True)
    assert [stage.layers for stage in layout.stages] == [range(1, 4), range(4, 7)]


def test_even_layout() -> None:
    assert [len(stage.layers) for stage in even_layout(10, 4).stages] == [2, 3, 2, 3]
    assert [layer for stage in even_layout(10, 4).stages for layer in stage.layers] == [*range(1, 11)]
    assert even_layout(2, 3) == Layout(tuple(StageLayout(run) for run in (range(1, 2), range(2, 3), range(0))))
    assert even_layout(5, 1) == Layout((StageLayout(range(1, 6)),))


def test_resolve_layout() -> None:
    model, specs = architecture(8), [ExitSpec(2), ExitSpec(4)]
    assert resolve_layout(ParallelConfig(), specs, model, TOKENS) == Layout((StageLayout(range(1, 5), (2, 4)),))
    with_teacher = resolve_layout(ParallelConfig(), specs, model, TOKENS, distillation=True)
    assert with_teacher == Layout((StageLayout(range(1, 9), (2, 4)),))
    automatic = resolve_layout(ParallelConfig(pipeline=3), specs, model, TOKENS)
    assert automatic == balance(model, specs, 3, TOKENS)
    stages = [StageConfig([1, 3], [2]), StageConfig([4, 4], [0.5])]
    listed = resolve_layout(ParallelConfig(pipeline=2, layout=stages), specs, model, TOKENS)
    assert listed == Layout((StageLayout(range(1, 4), (2,)), StageLayout(range(4, 5), (4,))))
    with pytest.raises(ConfigError, match=r"^parallel\.layout: holds layers 1 to 4, but layers up to 8 have to run"):
        resolve_layout(ParallelConfig(pipeline=2, layout=stages), specs, model, TOKENS, distillation=True)


def test_a_layout_that_keeps_all_layers() -> None:
    model, specs = architecture(8), [ExitSpec(2), ExitSpec(4)]
    even = resolve_layout(ParallelConfig(pipeline=2), specs, model, TOKENS, free_running=True)
    stages = (StageLayout(range(1, 5), (2, 4)), StageLayout(range(0), (), range(5, 9)))
    assert even == Layout(stages)
    taught = resolve_layout(ParallelConfig(pipeline=2), specs, model, TOKENS, distillation=True, free_running=True)
    assert taught == even_layout(8, 2, [2, 4])
    listed = [StageConfig([1, 3], [2]), StageConfig([4, 8], [4])]
    found = resolve_layout(ParallelConfig(pipeline=2, layout=listed), specs, model, TOKENS, free_running=True)
    assert found == Layout((StageLayout(range(1, 4), (2,)), StageLayout(range(4, 5), (4,), range(5, 9))))
    apart = [StageConfig([1, 8]), StageConfig([], [2, 4])]
    for bad in (ParallelConfig(pipeline=9), ParallelConfig(pipeline=2, layout=apart)):
        with pytest.raises(ConfigError, match=r"^validation\.free_running: true needs layers on every stage"):
            resolve_layout(bad, specs, model, TOKENS, free_running=True)
