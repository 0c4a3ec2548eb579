"""A stage's taps are transformers' hidden states, and it holds and runs no more than its exits need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.stage import Stage
from megatron_ee.testing.models import FAMILIES

Trace = Callable[[Any, Tensor], dict[str, list[Tensor]]]


def run(stage: Stage, tokens: Tensor, **kwargs: Any) -> tuple[Tensor, dict[int, Tensor]]:
    device = platform.device()
    positions = stage.backbone.positions(tokens.shape[1])
    h, taps = stage.run_layers(stage.backbone.embed(tokens.to(device)), positions, **kwargs)
    return h.cpu(), {layer: tap.cpu() for layer, tap in taps.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_taps_are_transformers_hidden_states(
    family: str, tokens: Tensor, saved_model: Any, load_stage: Any, trace: Trace
) -> None:
    path, reference = saved_model(family)
    exits = (ExitSpec(1, "norm"), ExitSpec(2, "mlp"), ExitSpec(3, "layer"), ExitSpec(4, "mlp"))
    stage, theirs = load_stage(path, exits), trace(reference, tokens)
    h, taps = run(stage, tokens, to_end=True)
    assert sorted(taps) == [1, 2, 3, 4]
    for ours, expected in (
        (taps[1], theirs["h"][1]),
        (taps[2], theirs["r"][2]),
        (taps[3], theirs["h"][3]),
        (taps[4], theirs["r"][4]),
        (h, theirs["h"][4]),
    ):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    assert not h.requires_grad and not any(tap.requires_grad for tap in taps.values())


def test_the_last_mlp_runs_only_where_it_is_needed(tokens: Tensor, saved_model: Any, load_stage: Any) -> None:
    path, _ = saved_model("llama3.1")
    counted: list[int] = []

    def mlps_run(body: str, **kwargs: Any) -> list[int]:
        stage = load_stage(path, [ExitSpec(1, "mlp"), ExitSpec(3, body)], layers=range(1, 4), final_exit=False)
        for number, layer in stage.backbone.numbered_layers():
            layer.mlp.register_forward_hook(lambda *_, number=number: counted.append(number))
        counted.clear()
        run(stage, tokens, **kwargs)
        return list(counted)

    assert mlps_run("mlp") == [1, 2]  # layer 1's own is needed although an mlp exit reads before it
    assert mlps_run("mlp", to_end=True) == [1, 2, 3]
    assert mlps_run("norm") == mlps_run("layer") == mlps_run("embedding") == [1, 2, 3]


def test_a_stage_holds_what_it_is_told_and_no_more(saved_model: Any, load_stage: Any) -> None:
    path, _ = saved_model("llama3.1")
    stage = load_stage(path, [ExitSpec(2, "mlp")], layers=range(1, 3), final_exit=False)
    names = {name for name, _ in stage.named_parameters()}
    assert {name.split(".")[2] for name in names if name.startswith("backbone.layers.")} == {"1", "2"}
    assert not [name for name in names if "final_norm" in name or name.startswith(("backbone.head", "shared_head"))]
    assert stage.backbone.final_norm is None and stage.backbone.head is None and stage.shared_head is None

    bare = load_stage(path, [ExitSpec(4, "norm")], layers=[3, 4], embedding=False, final_exit=False)
    assert bare.backbone.embedding is None
    assert [number for number, _ in bare.backbone.numbered_layers()] == [3, 4]
    for (_, ours), (_, whole) in zip(
        bare.backbone.numbered_layers(), list(load_stage(path).backbone.numbered_layers())[2:], strict=True
    ):
        for a, b in zip(ours.parameters(), whole.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("family", ["llama3.1", "llama3.2-tied"])
def test_there_is_one_shared_head(family: str, saved_model: Any, load_stage: Any) -> None:
    path, reference = saved_model(family)
    exits = [ExitSpec(1, "norm", "shared"), ExitSpec(2, "mlp", "low_rank", rank=4), ExitSpec(3, "norm")]
    tied = reference.config.tie_word_embeddings
    for final_exit in (True, False):
        stage = load_stage(path, exits, final_exit=final_exit)
        head = stage.shared_head
        assert [exit_.head.matrix is head for exit_ in stage.exits] == [True, True, False]
        assert not head.weight.requires_grad
        assert torch.equal(head.weight[:131].cpu(), reference.lm_head.weight)
        assert not head.weight[131:].any()
        assert (stage.backbone.head is head) == final_exit
        assert (head.weight is stage.backbone.embedding.weight) == tied
        assert stage.exits[2].head.matrix.weight.data_ptr() != head.weight.data_ptr()


def test_statistics_of_the_final_exit(tokens: Tensor, saved_model: Any, load_stage: Any) -> None:
    path, reference = saved_model("qwen2")
    stage = load_stage(path)
    h, _ = run(stage, tokens, to_end=True)
    labels = torch.randint(0, 131, (tokens.numel(),), generator=torch.Generator().manual_seed(3))
    device = platform.device()
    stats = stage.final_statistics(h.to(device), labels.to(device), chunk_tokens=10)
    with torch.no_grad():
        logits = reference(tokens, use_cache=False).logits.transpose(0, 1).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(stats.loss.cpu(), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(stats.confidence.cpu(), logits.softmax(-1).amax(-1), atol=1e-5, rtol=1e-4)
    assert torch.equal(stats.top1.cpu(), logits.argmax(-1))
