"""Exits start as the table of bodies says, equal shallower transformers models, and train nothing but themselves."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_ee import platform
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.exit import Exit
from megatron_ee.exits.stage import Stage
from megatron_ee.testing.models import FAMILIES

LAYERS = 4
VOCAB = 131


def released_tensors(path: Any) -> dict[str, Tensor]:
    tensors = load_file(path / "model.safetensors")
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    return tensors


def taps_of(stage: Stage, tokens: Tensor) -> tuple[dict[int, Tensor], Any]:
    positions = stage.backbone.positions(tokens.shape[1])
    return stage.run_layers(stage.backbone.embed(tokens.to(platform.device())), positions)[1], positions


@torch.no_grad()
def logits_of(stage: Stage, tokens: Tensor) -> list[Tensor]:
    """``[batch, seq, vocab]`` of every exit."""
    taps, positions = taps_of(stage, tokens)
    return [
        exit_.head.logits(exit_.features(taps[exit_.spec.layer], positions)).transpose(0, 1).cpu()
        for exit_ in stage.exits
    ]


def with_layers(reference: Any, kept: list[int]) -> Callable[[Tensor], Tensor]:
    """The logits of the transformers model with only the layers ``kept`` (from 0), its norm and its head."""
    model = copy.deepcopy(reference)
    model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None) is not None:
        model.config.layer_types = [model.config.layer_types[index] for index in kept]

    @torch.no_grad()
    def logits(tokens: Tensor) -> Tensor:
        return model(tokens, use_cache=False).logits

    return logits


@pytest.mark.parametrize("family", ["llama3.2-tied", "llama-biases", "qwen3"])
def test_copies_are_the_named_tensors_bit_for_bit(family: str, saved_model: Any, load_stage: Any) -> None:
    path, _ = saved_model(family)
    theirs = released_tensors(path)
    specs = [ExitSpec(1, "embedding"), ExitSpec(2, "norm"), ExitSpec(3, "mlp"), ExitSpec(4, "layer")]
    embedding, norm, mlp, layer = load_stage(path, specs).exits

    def same(ours: Tensor, name: str) -> None:
        assert torch.equal(ours.detach().cpu(), theirs[name]), name

    for exit_ in (embedding, norm, mlp, layer):
        same(exit_.head.matrix.weight[:VOCAB], "lm_head.weight")
        assert not exit_.head.matrix.weight[VOCAB:].any()
        if exit_ is not embedding:
            same(exit_.body.norm.weight, "model.norm.weight")
    assert {name for name, _ in embedding.named_parameters()} == {"head.matrix.weight"}

    def same_mlp(ours: Any, prefix: str) -> None:
        gate, up = ours.gate_up.weight.chunk(2)
        same(gate, f"{prefix}.gate_proj.weight")
        same(up, f"{prefix}.up_proj.weight")
        same(ours.down.weight, f"{prefix}.down_proj.weight")
        assert (ours.gate_up.bias is not None) == (f"{prefix}.gate_proj.bias" in theirs)
        if ours.gate_up.bias is not None:
            same(ours.gate_up.bias[112:], f"{prefix}.up_proj.bias")
            same(ours.down.bias, f"{prefix}.down_proj.bias")

    same(mlp.body.mlp_norm.weight, "model.layers.2.post_attention_layernorm.weight")
    assert not mlp.body.mlp_norm.weight.requires_grad
    same_mlp(mlp.body.mlp, "model.layers.2.mlp")

    last, inner = "model.layers.3", layer.body.layer
    same(inner.attention_norm.weight, f"{last}.input_layernorm.weight")
    same(inner.mlp_norm.weight, f"{last}.post_attention_layernorm.weight")
    same(inner.attention.output.weight, f"{last}.self_attn.o_proj.weight")
    same_mlp(inner.mlp, f"{last}.mlp")
    if family == "qwen3":
        same(inner.attention.q_layernorm.weight, f"{last}.self_attn.q_norm.weight")
        same(inner.attention.k_layernorm.weight, f"{last}.self_attn.k_norm.weight")
    # The fused rows: per key-value head its two query heads, its key, its value.
    dim = inner.attention.head_dim
    groups = inner.attention.qkv.weight.view(2, 4 * dim, 64)
    same(groups[:, : 2 * dim].reshape(-1, 64), f"{last}.self_attn.q_proj.weight")
    same(groups[:, 2 * dim : 3 * dim].reshape(-1, 64), f"{last}.self_attn.k_proj.weight")
    same(groups[:, 3 * dim :].reshape(-1, 64), f"{last}.self_attn.v_proj.weight")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copied_exit_is_a_shallower_model(family: str, tokens: Tensor, saved_model: Any, load_stage: Any) -> None:
    path, reference = saved_model(family)
    for layer in range(1, LAYERS + 1):
        truncated = with_layers(reference, list(range(layer)))(tokens)
        for body, head in (("norm", "own"), ("mlp", "own"), ("norm", "shared"), ("mlp", "low_rank")):
            (ours,) = logits_of(load_stage(path, [ExitSpec(layer, body, head, rank=5)]), tokens)
            torch.testing.assert_close(ours, truncated, atol=1e-4, rtol=0)
        deeper = with_layers(reference, [*range(layer), LAYERS - 1])(tokens)
        (ours,) = logits_of(load_stage(path, [ExitSpec(layer, "layer")]), tokens)
        torch.testing.assert_close(ours, deeper, atol=1e-4, rtol=0)
        assert float((deeper - truncated).abs().max()) > 1e-2


def test_norm_and_mlp_start_out_equal(tokens: Tensor, saved_model: Any, load_stage: Any) -> None:
    path, _ = saved_model("llama3.1")
    for layer in range(1, LAYERS + 1):
        (norm,), (mlp,) = (logits_of(load_stage(path, [ExitSpec(layer, body)]), tokens) for body in ("norm", "mlp"))
        torch.testing.assert_close(norm, mlp, atol=1e-5, rtol=0)


def test_an_embedding_exit_is_the_head_on_the_hidden_state(
    tokens: Tensor, saved_model: Any, load_stage: Any, trace: Callable[..., dict[str, list[Tensor]]]
) -> None:
    path, reference = saved_model("llama3.2-tied")
    theirs = trace(reference, tokens)
    for head in ("own", "shared", "low_rank"):
        (ours,) = logits_of(load_stage(path, [ExitSpec(2, "embedding", head, rank=4)]), tokens)
        expected = F.linear(theirs["h"][2].transpose(0, 1), reference.lm_head.weight).detach()
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


ALL_KINDS = [
    ExitSpec(1, "embedding", "own"),
    ExitSpec(2, "norm", "low_rank", rank=8),
    ExitSpec(3, "mlp", "own"),
    ExitSpec(4, "layer", "shared"),
]


def random_specs() -> list[ExitSpec]:
    return [ExitSpec(spec.layer, spec.body, spec.head, 1.0, spec.rank, "random") for spec in ALL_KINDS]


def test_random_initialisation(saved_model: Any, load_stage: Any) -> None:
    path, reference = saved_model("llama-biases", hidden_size=128, num_attention_heads=8, intermediate_size=256)
    theirs = released_tensors(path)
    exits = load_stage(path, random_specs()).exits

    def check(weight: Tensor, std: float) -> None:
        values = weight.detach().float()
        assert float(values.std()) == pytest.approx(std, rel=0.05)
        assert abs(float(values.mean())) < 5 * std / math.sqrt(values.numel())
        assert float(values.abs().max()) > 3 * std

    embedding, norm, mlp, layer = exits
    check(embedding.head.matrix.weight[:VOCAB], 0.02)
    assert not embedding.head.matrix.weight[VOCAB:].any()
    check(norm.head.down, 0.02)
    assert not norm.head.up.any()
    check(mlp.body.mlp.gate_up.weight, 0.02)
    check(mlp.body.mlp.down.weight, 0.02 / math.sqrt(2 * 3))
    check(mlp.head.matrix.weight[:VOCAB], 0.02)
    check(layer.body.layer.attention.qkv.weight, 0.02)
    check(layer.body.layer.attention.output.weight, 0.02 / math.sqrt(2 * 4))
    check(layer.body.layer.mlp.down.weight, 0.02 / math.sqrt(2 * 4))
    for exit_ in exits:
        for name, parameter in exit_.named_parameters():
            if parameter.requires_grad and parameter.ndim == 1:
                assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name
    # What is frozen is still the model's own.
    assert torch.equal(mlp.body.mlp_norm.weight.cpu(), theirs["model.layers.2.post_attention_layernorm.weight"])
    assert torch.equal(layer.head.matrix.weight[:VOCAB].cpu(), reference.lm_head.weight)


def test_random_weights_depend_on_seed_layer_and_name_alone(saved_model: Any, load_stage: Any) -> None:
    path, _ = saved_model("llama3.1")

    def weights(seed: int, specs: list[ExitSpec]) -> dict[int, dict[str, Tensor]]:
        return {
            exit_.spec.layer: {
                n: p.detach().clone() for n, p in exit_.named_parameters() if p.ndim == 2 and not n.endswith("up")
            }
            for exit_ in load_stage(path, specs, seed=seed).exits
        }

    mlps = [ExitSpec(layer, "mlp", init="random") for layer in (1, 2)]
    first, other = weights(1, mlps), weights(2, mlps)
    torch.manual_seed(99)  # no other source of randomness
    again = weights(1, [*mlps, ExitSpec(4, "layer", init="random")])
    for name in first[1]:
        assert torch.equal(first[1][name], again[1][name]) and torch.equal(first[2][name], again[2][name])
        assert not torch.equal(first[1][name], first[2][name]), f"{name} is the same in two exits"
        assert not torch.equal(first[1][name], other[1][name]), f"{name} is the same with two seeds"
    same = [tensor for tensor in first[1].values() if tensor.shape == first[1]["head.matrix.weight"].shape]
    assert len({tensor.sum().item() for tensor in same}) == len(same)


def test_low_rank_starts_as_the_shared_head(tokens: Tensor, saved_model: Any, load_stage: Any) -> None:
    path, _ = saved_model("qwen2")
    stage = load_stage(path, [ExitSpec(2, "mlp", "low_rank", rank=8)])
    (low_rank,) = logits_of(stage, tokens)
    (shared,) = logits_of(load_stage(path, [ExitSpec(2, "mlp", "shared")]), tokens)
    assert torch.equal(low_rank, shared)
    exit_ = stage.exits[0]
    assert float(exit_.head.down.detach().std()) == pytest.approx(0.02, rel=0.15) and not exit_.head.up.any()
    with torch.no_grad():
        exit_.head.up.normal_(generator=torch.Generator(device=exit_.head.up.device).manual_seed(1))
        taps, positions = taps_of(stage, tokens)
        z = exit_.features(taps[2], positions)
        expected = z @ exit_.head.matrix.weight.t() + z @ exit_.head.down.t() @ exit_.head.up.t()
    torch.testing.assert_close(exit_.head.logits(z), expected[..., :VOCAB])
    ids = torch.tensor([7, 2, 90], device=z.device)
    exit_.head.restrict(ids)
    some = exit_.head.candidate_logits(z)
    torch.testing.assert_close(some[..., ids], expected[..., ids])
    assert some.shape[-1] == VOCAB and int(some[0, 0].isfinite().sum()) == len(ids)
    exit_.head.matrix.soft_cap = 0.5
    capped = exit_.head.candidate_logits(z)
    torch.testing.assert_close(capped[..., ids], 0.5 * torch.tanh(some[..., ids] / 0.5))
    assert int(capped[0, 0].isfinite().sum()) == len(ids)
    # In float32, as logits are, whatever the model's dtype.
    exit_.bfloat16()
    exit_.head.restrict(ids)
    some = exit_.head.candidate_logits(z.bfloat16())
    exact = 0.5 * torch.tanh((z.bfloat16() @ exit_.head.candidates.rows.t()).float() / 0.5)
    torch.testing.assert_close(some[..., ids], exact, rtol=1e-6, atol=0)
    exit_.float()
    exit_.head.matrix.soft_cap = None
    assert not torch.equal(logits_of(stage, tokens)[0], shared)


def targets(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and coefficient of a microbatch, sequence-major."""
    device = platform.device()
    labels = tokens.roll(-1, 1).t().reshape(-1).to(device)
    mask = torch.rand(labels.shape, generator=torch.Generator().manual_seed(8)) < 0.8
    return labels, (mask / mask.sum()).to(device)


@pytest.mark.parametrize("family", ["llama3.2-tied", "llama-biases", "qwen3"])
def test_gradients_reach_the_exits_own_parameters_alone(
    family: str, tokens: Tensor, saved_model: Any, load_stage: Any
) -> None:
    stage = load_stage(saved_model(family)[0], random_specs())
    taps, positions = taps_of(stage, tokens)
    labels, coefficient = targets(tokens)
    for exit_ in stage.exits:
        before = {id(p): p.grad is not None for p in stage.parameters()}
        loss, _ = exit_(taps[exit_.spec.layer], positions, labels, coefficient, chunk_tokens=20)
        loss.backward()
        own = {id(p) for p in exit_.parameters() if p.requires_grad}
        reached = {id(p) for p in stage.parameters() if p.grad is not None and not before[id(p)]}
        assert reached == own and own
        assert taps[exit_.spec.layer].grad_fn is None and not taps[exit_.spec.layer].requires_grad
    frozen = [*stage.backbone.parameters(), stage.shared_head.weight, stage.exits[2].body.mlp_norm.weight]
    assert not any(p.requires_grad or p.grad is not None for p in frozen)


@pytest.mark.parametrize("spec", [*ALL_KINDS, ExitSpec(2, "layer", "low_rank", rank=8), ExitSpec(1, "norm")])
@pytest.mark.parametrize("family", ["llama3.1", "qwen3"])
def test_an_exits_gradients_are_those_of_autograd(
    spec: ExitSpec, family: str, tokens: Tensor, saved_model: Any, load_stage: Any
) -> None:
    stage = load_stage(saved_model(family)[0], [spec])
    (exit_,) = stage.exits
    if exit_.head.up is not None:  # away from the start, where A has no gradient
        torch.nn.init.normal_(exit_.head.up, std=0.1, generator=torch.Generator(exit_.head.up.device).manual_seed(1))
    taps, positions = taps_of(stage, tokens)
    labels, coefficient = targets(tokens)
    loss, _ = exit_(taps[spec.layer], positions, labels, coefficient, chunk_tokens=20)
    loss.backward()
    trained = {name: p for name, p in exit_.named_parameters() if p.requires_grad}
    ours = {name: p.grad.clone() for name, p in trained.items()}

    logits = plain_logits(exit_, taps[spec.layer], positions)
    expected = (F.cross_entropy(logits, labels, reduction="none") * coefficient).sum()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    gradients = torch.autograd.grad(expected, list(trained.values()))
    for (name, mine), theirs in zip(ours.items(), gradients, strict=True):
        assert float((mine - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max()), name


def plain_logits(exit_: Exit, tap: Tensor, positions: Any) -> Tensor:
    """Logits ``[tokens, vocab]`` by ordinary operations, for autograd to differentiate."""
    z = exit_.features(tap, positions).flatten(0, 1)
    logits = F.linear(z, exit_.head.matrix.weight)
    if exit_.head.down is not None and exit_.head.up is not None:
        logits = logits + F.linear(F.linear(z, exit_.head.down), exit_.head.up)
    return logits[:, :VOCAB]


def test_the_taps_gradient_is_not_computed(tokens: Tensor, saved_model: Any, load_stage: Any) -> None:
    stage = load_stage(saved_model("llama3.1")[0], [ExitSpec(3, "mlp")])
    (exit_,) = stage.exits
    taps, positions = taps_of(stage, tokens)
    gate_up, down = (
        2 * tokens.numel() * linear.weight.numel() for linear in (exit_.body.mlp.gate_up, exit_.body.mlp.down)
    )
    # Forward, weight gradient, input gradient; the last not of the first linear.
    for tap, products in ((taps[3], 2 * gate_up), (taps[3].clone().requires_grad_(), 3 * gate_up)):
        with FlopCounterMode(display=False) as counter:
            exit_.features(tap, positions).sum().backward()
        assert counter.get_total_flops() == products + 3 * down


def test_statistics_are_those_of_the_logits(tokens: Tensor, saved_model: Any, load_stage: Any) -> None:
    stage = load_stage(saved_model("llama3.1")[0], random_specs())
    taps, positions = taps_of(stage, tokens)
    labels, _ = targets(tokens)
    for exit_ in stage.exits:
        stats = exit_.statistics(taps[exit_.spec.layer], positions, labels, chunk_tokens=7)
        with torch.no_grad():
            logits = exit_.head.logits(exit_.features(taps[exit_.spec.layer], positions)).flatten(0, 1)
        torch.testing.assert_close(stats.loss, F.cross_entropy(logits, labels, reduction="none"))
        torch.testing.assert_close(stats.confidence, logits.softmax(-1).amax(-1))
        assert not stats.loss.requires_grad
