"""The name table: every rank's boxes tile the released tensors, and take bytes there and back unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_ee.config.architecture import Architecture, Rope
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.tensors import exit_copy_sources, exit_saved_sources, exit_tensors, shared_head_sources
from megatron_ee.families.family import LLAMA_LAYER, Source
from megatron_ee.families.registry import read_architecture
from megatron_ee.families.weights import expected_tensors, is_non_weight, layer_source, parameter_parts
from megatron_ee.model.names import Block, backbone_sources, blocks
from megatron_ee.testing.models import FAMILIES


def architecture(
    kv_heads: int = 4, queries: int = 2, head_dim: int = 6, ffn: int = 12, vocab: int = 131
) -> Architecture:
    heads = kv_heads * queries
    return Architecture(
        family="llama",
        num_layers=2,
        hidden_size=20,
        ffn_size=ffn,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        max_positions=64,
        norm_eps=1e-5,
        rope=Rope(),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        qk_norm=True,
        tied=False,
        windows=(None, None),
    )


def local_shape(source: Source, whole: dict[str, Tensor], vocab: int, size: int) -> tuple[int, ...]:
    """Shape of one rank's parameter, worked out from the released shapes."""
    first = whole[source.names[0]].shape
    if source.kind == "whole":
        return tuple(first)
    if source.kind == "columns":
        return first[0], first[1] // size
    if source.kind == "vocabulary":
        return -(-vocab // (128 * size)) * 128, *first[1:]
    return sum(len(whole[name]) for name in source.names) // size, *first[1:]


def cut(tensor: Tensor, block: Block) -> Tensor:
    return tensor[tuple(slice(o, o + n) for o, n in zip(block.offset, block.tensor.shape, strict=True))]


def load_ranks(source: Source, whole: dict[str, Tensor], arch: Architecture, size: int) -> list[Tensor]:
    """Every rank's parameter, filled from the released tensors as loading does."""
    ranks = []
    for rank in range(size):
        parameter = torch.zeros(local_shape(source, whole, arch.vocab_size, size), dtype=torch.int64)
        for block in blocks(parameter, source, arch, rank, size):
            assert block.shape == tuple(whole[block.name].shape), block.name
            block.tensor.copy_(cut(whole[block.name], block))
        ranks.append(parameter)
    return ranks


def check_round_trip(source: Source, arch: Architecture, size: int) -> None:
    shapes = {name.removeprefix("model.layers.0."): shape for name, shape in expected_tensors(arch).items()}
    shapes |= {"exits.1.lm_head.b": (arch.vocab_size, 5)}
    # Every element has a value of its own, so that a misplaced one cannot hide.
    whole, start = {}, 1
    for name in source.names:
        count = torch.Size(shapes[name]).numel()
        whole[name] = torch.arange(start, start + count).view(shapes[name])
        start += count
    ranks = load_ranks(source, whole, arch, size)

    back = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    seen = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    for rank, parameter in enumerate(ranks):
        for block in blocks(parameter, source, arch, rank, size):
            cut(back[block.name], block).copy_(block.tensor)
            cut(seen[block.name], block).add_(1)
    replicas = size if source.kind == "whole" else 1
    for name in source.names:
        assert torch.equal(back[name], whole[name])
        assert (seen[name] == replicas).all(), f"{name} is not tiled exactly"
    # And all of a parameter is filled, but for rows that pad the vocabulary.
    filled = sum(int((parameter != 0).sum()) for parameter in ranks)
    assert filled == replicas * (start - 1)
    if source.kind in ("qkv", "vocabulary"):  # cut along the fused rows as one process holds them
        (single,) = load_ranks(source, whole, arch, 1)
        joined = torch.cat(ranks)
        assert torch.equal(joined[: len(single)], single) and not joined[len(single) :].any()
    if source.kind == "gated":  # a rank's gate rows, then its up rows
        for rank, parameter in enumerate(ranks):
            parts = [whole[name].chunk(size)[rank] for name in source.names]
            assert torch.equal(parameter, torch.cat(parts))


SOURCES = dict(LLAMA_LAYER) | {
    "embedding": Source(("model.embed_tokens.weight",), "vocabulary"),
    "head": Source(("lm_head.weight",), "vocabulary"),
    "low_rank up": Source(("exits.1.lm_head.b",), "vocabulary"),
}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("parameter", SOURCES)
def test_blocks_tile_and_round_trip(parameter: str, size: int) -> None:
    check_round_trip(SOURCES[parameter], architecture(), size)


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from([1, 2, 4]),
    groups=st.integers(1, 3),
    queries=st.integers(1, 4),
    head_dim=st.integers(1, 5),
    ffn=st.integers(1, 4),
    vocab=st.integers(1, 600),
)
def test_any_shape_round_trips(size: int, groups: int, queries: int, head_dim: int, ffn: int, vocab: int) -> None:
    arch = architecture(size * groups, queries, 2 * head_dim, size * ffn, vocab)
    for source in SOURCES.values():
        check_round_trip(source, arch, size)


def test_ranks_of_padding_alone_hold_no_rows() -> None:
    arch = architecture(vocab=130)
    held = [blocks(torch.zeros(128, 20), SOURCES["head"], arch, rank, 4) for rank in range(4)]
    assert [[len(block.tensor) for block in each] for each in held] == [[128], [2], [], []]


@pytest.mark.parametrize("family", FAMILIES)
def test_expected_tensors_are_what_transformers_saves(family: str, saved_model: Any) -> None:
    from safetensors.torch import load_file

    path, _ = saved_model(family)
    saved = {name: tuple(tensor.shape) for name, tensor in load_file(path / "model.safetensors").items()}
    assert expected_tensors(read_architecture(path)) == saved


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_stage_has_its_source(family: str, saved_model: Any, load_stage: Any) -> None:
    path, reference = saved_model(family)
    exits = [ExitSpec(1, "embedding", "shared"), ExitSpec(2, "mlp"), ExitSpec(3, "layer", "low_rank", rank=3)]
    stage = load_stage(path, exits)
    arch = stage.setup.architecture
    names: list[str] = []
    for parameter, source in (*backbone_sources(stage.backbone), *shared_head_sources(stage)):
        names += source.names
        padding = (len(parameter) - 131) * 64 if source.kind == "vocabulary" else 0
        held = sum(block.tensor.numel() for block in blocks(parameter, source, arch, 0, 1))
        assert held == parameter.numel() - padding
    assert sorted(names) == sorted(expected_tensors(arch))  # each once
    # Without its end, the stage holds a head of its own, unless it has the tied embedding.
    partial = load_stage(path, exits, layers=[1, 2, 3], final_exit=False)
    heads = [source.names for _, source in shared_head_sources(partial)]
    assert heads == ([] if arch.tied else [("lm_head.weight",)])


def test_exits_copy_from_their_own_layer_and_the_last(saved_model: Any, load_stage: Any) -> None:
    path, _ = saved_model("llama3.1")
    mlp, layer = load_stage(path, [ExitSpec(2, "mlp"), ExitSpec(3, "layer", "low_rank")]).exits
    assert {name for _, source in exit_copy_sources(mlp) for name in source.names} == {
        "model.layers.1.post_attention_layernorm.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    copied = {name for _, source in exit_copy_sources(layer) for name in source.names}
    assert all(name.startswith("model.layers.3.") for name in copied - {"model.norm.weight"}) and len(copied) == 10
    assert "lm_head.weight" not in copied
    assert {name for _, source in exit_saved_sources(mlp) for name in source.names} == {
        "exits.2.mlp.gate_proj.weight",
        "exits.2.mlp.up_proj.weight",
        "exits.2.mlp.down_proj.weight",
        "exits.2.norm.weight",
        "exits.2.lm_head.weight",
    }
    saved = {name for _, source in exit_saved_sources(layer) for name in source.names}
    assert {"exits.3.lm_head.a", "exits.3.lm_head.b", "exits.3.self_attn.q_proj.weight"} <= saved
    assert not any("lm_head.weight" in name for name in saved)


@pytest.mark.parametrize("head", ["own", "shared", "low_rank"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exit_tensors_are_what_modules_hold(family: str, head: Any, saved_model: Any, load_stage: Any) -> None:
    bodies: list[Any] = ["layer", "mlp", "norm", "embedding"]
    specs = [ExitSpec(layer, body, head, rank=3) for layer, body in enumerate(bodies, 1)]
    exits = load_stage(saved_model(family)[0], specs).exits
    for spec, exit_ in zip(specs, exits, strict=True):
        arch = exit_.setup.architecture
        copied = {id(parameter): source.names for parameter, source in exit_copy_sources(exit_)}
        held: dict[str, tuple[tuple[int, ...], str | None]] = {}
        for parameter, source in exit_saved_sources(exit_):
            origins = copied.pop(id(parameter), (None,) * len(source.names))
            shapes: dict[str, tuple[int, ...]] = {}
            for block in blocks(parameter, source, arch, 0, 1):
                assert shapes.setdefault(block.name, block.shape) == block.shape
            held |= {n: (shapes[n], origin) for n, origin in zip(source.names, origins, strict=True)}
        assert exit_tensors(spec, arch) == held
        # What else is copied is the frozen norms of an mlp exit; and all copies fit.
        around = ("mlp_norm.weight",) if spec.body == "mlp" else ()
        kept = [name for name in around if name in parameter_parts(arch)]
        norms = [layer_source(arch, name, f"model.layers.{spec.layer - 1}").names[0] for name in kept]
        assert [name for names in copied.values() for name in names] == norms
        expected = expected_tensors(arch)
        assert all(expected[origin] == shape for shape, origin in held.values() if origin is not None)
        # A body's tensors are all there: biases and q and k norms where the family has them.
        after = ("post_feedforward_layernorm.",) if arch.norms_after else ()
        inner = {"layer": ("",), "mlp": ("mlp.", *after)}.get(spec.body)
        if inner is not None:
            prefix, last = f"exits.{spec.layer}.", "model.layers.3."
            names = {
                prefix + name.removeprefix(last)
                for name in expected
                if name.startswith(tuple(last + part for part in inner))
            }
            assert names == {name for name in held if name not in (prefix + "norm.weight",) and ".lm_head." not in name}


def test_known_non_weights() -> None:
    untied, name = architecture(), "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert is_non_weight(name, untied) and not is_non_weight("lm_head.weight", untied)
    assert not is_non_weight("model.layers.0.self_attn.q_proj.scale", untied)
    with pytest.raises(KeyError):
        layer_source(untied, "mlp.unknown.weight", "model.layers.0")
