"""Counted work is what torch counts while real layers and exits run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_ee import platform
from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.families.registry import parse_architecture
from megatron_ee.parallel.costs import attended_pairs, attention_flops, final_exit_flops, padded_vocab
from megatron_ee.planning.costs import exit_flops, last_layer, layer_flops

SEQUENCES, TOKENS = 2, 24


def count_flops(work: Any) -> int:
    """Of matrix products, without attention's kernel, which the counter knows on some devices only."""

    def product(a: Any, b: Any, c: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 2 * b[0] * b[1] * c[1]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product})
    with counter:
        work()
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for operator, flops in counts.items() if "scaled_dot" not in str(operator))


def kernel_flops(architecture: Architecture, layer: int) -> int:
    """Of attention's kernel in one forward."""
    seen = attended_pairs(TOKENS, architecture.windows[layer - 1])
    return 4 * seen * architecture.num_heads * architecture.head_dim


@pytest.mark.parametrize("family", ["llama2", "mistral", "qwen3"])
@pytest.mark.parametrize("body", ["embedding", "norm", "mlp", "layer"])
@pytest.mark.parametrize("head", ["own", "shared", "low_rank"])
def test_exits(family: str, body: Any, head: Any, saved_model: Any, load_stage: Any) -> None:
    spec = ExitSpec(2, body, head, rank=8)
    stage = load_stage(saved_model(family)[0], [spec], layers=range(1, 3), final_exit=False)
    (exit_,), architecture, device = stage.exits, stage.setup.architecture, platform.device()
    count = SEQUENCES * TOKENS
    tap = torch.randn(TOKENS, SEQUENCES, architecture.hidden_size, device=device)
    positions, labels = stage.backbone.positions(TOKENS), torch.zeros(count, dtype=torch.int64, device=device)
    coefficient = torch.ones(count, device=device)

    def run() -> None:
        exit_(tap, positions, labels, coefficient, chunk_tokens=20)[0].backward()

    if not exit_.trains:
        assert exit_flops(architecture, spec, TOKENS) == 0
        return
    kernels = 3 * kernel_flops(architecture, architecture.num_layers) if body == "layer" else 0
    assert count_flops(run) == SEQUENCES * (exit_flops(architecture, spec, TOKENS) - kernels)


@pytest.mark.parametrize("family", ["llama2", "mistral", "qwen2-window", "qwen3"])
@pytest.mark.parametrize("deepest", ["mlp", "norm"])
@pytest.mark.parametrize("distillation", [False, True])
def test_layers(family: str, deepest: Any, distillation: bool, saved_model: Any, load_stage: Any) -> None:
    specs = [ExitSpec(1), ExitSpec(3, deepest)]
    path, _ = saved_model(family)
    run = last_layer(specs, 4, distillation)
    assert run == (4 if distillation else 3)
    stage = load_stage(path, specs, layers=range(1, run + 1), final_exit=distillation)
    architecture, device = stage.setup.architecture, platform.device()
    h = torch.randn(TOKENS, SEQUENCES, architecture.hidden_size, device=device)
    positions = stage.backbone.positions(TOKENS)
    counted = count_flops(lambda: stage.run_layers(h, positions, to_end=distillation))
    costs = layer_flops(architecture, specs, TOKENS, distillation)
    kernels = sum(kernel_flops(architecture, layer) for layer in range(1, run + 1))
    assert len(costs) == run
    assert counted == SEQUENCES * (sum(costs) - kernels)
    if distillation:
        labels = torch.zeros(TOKENS * SEQUENCES, dtype=torch.int64, device=device)
        counted = count_flops(lambda: stage.final_statistics(h, labels))
        assert counted == SEQUENCES * final_exit_flops(architecture, TOKENS)


@pytest.mark.parametrize("window", [None, 1, 5, 24, 100])
def test_attended_pairs_are_those_of_the_mask(window: int | None, saved_model: Any, load_stage: Any) -> None:
    stage = load_stage(saved_model("llama2")[0], layers=range(1, 2))
    visible = stage.backbone.positions(TOKENS)._build_mask(window)
    visible = torch.ones(TOKENS, TOKENS).tril() if visible is None else visible
    assert attended_pairs(TOKENS, window) == int(visible.sum())


def test_a_layer_by_hand() -> None:
    architecture = parse_architecture(
        {
            "architectures": ["MistralForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 2,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "sliding_window": 4,
        }
    )
    projections = 2 * 10 * 4096 * (4096 + 1024 + 1024) + 2 * 10 * 4096 * 4096
    pairs = 1 + 2 + 3 + 4 * 7
    assert attention_flops(architecture, 1, 10) == projections + 2 * (2 * pairs * 4096)
    norm = [ExitSpec(2, "norm")]
    assert layer_flops(architecture, norm, 10) == [projections + 4 * pairs * 4096 + 6 * 10 * 4096 * 14336] * 2
    # Only the deepest exit can spare its layer the MLP.
    assert [cost < layer_flops(architecture, norm, 10)[0] for cost in layer_flops(architecture, [ExitSpec(1)], 10)] == [
        True
    ]
    both = layer_flops(architecture, [ExitSpec(1), ExitSpec(2)], 10)
    assert both[0] - both[1] == 6 * 10 * 4096 * 14336


def test_the_vocabulary_is_padded_as_the_model_pads_it(saved_model: Any, load_stage: Any) -> None:
    stage = load_stage(saved_model("llama2")[0], layers=range(1, 2))
    assert padded_vocab(131) == stage.setup.padded_vocab == 256
    assert (padded_vocab(32000), padded_vocab(32000, 8), padded_vocab(32001, 4)) == (32000, 32768, 32256)
