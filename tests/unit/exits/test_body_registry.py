"""The bodies by name: those of the configuration, told by their tensors' names, and whether they train anything."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from megatron_ee.config import schema
from megatron_ee.config.exits import ExitSpec
from megatron_ee.errors import ConfigError
from megatron_ee.exits.registry import BODIES, bodies_with, body_of, check_trains, tap_of


def test_a_body_declares_the_names_that_it_is_saved_with() -> None:
    from megatron_ee.config.architecture import Architecture, Rope

    arch = Architecture(
        family="qwen3",
        num_layers=2,
        hidden_size=8,
        ffn_size=16,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        vocab_size=10,
        max_positions=8,
        norm_eps=1e-5,
        rope=Rope(),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        qk_norm=True,
        tied=False,
        windows=(None, None),
    )
    # A body declares the names of all families: those with norms after attention and MLP have more of them.
    families = (arch, replace(arch, family="gemma3_text", norm_placement="sandwich"))
    for name in get_args(schema.Body):
        parts = [part for family in families for part in body_of(ExitSpec(1, name)).parts(family, 1)]
        saved = {each.split(".")[2] for part in parts for each in part.saved.names}
        assert saved == BODIES[name].saved, name


@pytest.mark.parametrize(
    "kinds, bodies",
    [
        (set(), ["embedding"]),
        ({"norm"}, ["norm"]),
        ({"mlp"}, ["mlp"]),  # its norm is missing
        ({"mlp", "norm"}, ["mlp"]),
        ({"self_attn", "mlp"}, ["layer"]),
        ({"norm", "conv"}, []),
    ],
)
def test_a_body_is_told_by_the_names_of_its_tensors(kinds: set[str], bodies: list[str]) -> None:
    assert bodies_with(kinds) == bodies


def test_exits_that_train_nothing_are_refused() -> None:
    nothing = ExitSpec(1, "embedding", "shared")
    with pytest.raises(ConfigError, match=r"^exits: nothing to train"):
        check_trains([nothing])
    check_trains([nothing, ExitSpec(2, "embedding", "low_rank")])
    check_trains([nothing, ExitSpec(2, "norm", "shared")])


def test_only_the_mlp_reads_a_residual() -> None:
    taps = {name: tap_of(ExitSpec(3, name)) for name in get_args(schema.Body)}
    assert taps == {"embedding": "hidden", "norm": "hidden", "mlp": "residual", "layer": "hidden"}
