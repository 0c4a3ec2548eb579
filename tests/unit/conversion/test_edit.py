"""Exits added, dropped, merged and given other heads: values bit for bit, and nothing read on the way."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ee.checkpoint.adapter_writing import save_adapter
from megatron_ee.checkpoint.contents import Contents
from megatron_ee.checkpoint.tensors import StoredTensor
from megatron_ee.config.architecture import output_settings
from megatron_ee.config.exits import ExitSpec
from megatron_ee.conversion.edit import add_exits, change_heads, check_exits, drop_exits, merge_exits
from megatron_ee.conversion.formats import open_contents
from megatron_ee.errors import CheckpointError, ConfigError
from megatron_ee.exits.exit import Exit
from megatron_ee.exits.registry import trains
from megatron_ee.exits.tensors import exit_saved_sources
from megatron_ee.model.names import blocks

A, B = ((("corpus/a", "aa" * 32),), (("corpus/b", "bb" * 32),))
HASH = "ab" * 32
HEADS = ("own", "shared", "low_rank")


def whole(tensor: StoredTensor) -> Tensor:
    return torch.cat([slab.clone() for slab in tensor.slabs()])


def held(exit_: Exit) -> dict[str, Tensor]:
    """What a module holds, in an adapter's names; nan where nothing of it belongs."""
    tensors: dict[str, Tensor] = {}
    for parameter, source in exit_saved_sources(exit_):
        for block in blocks(parameter, source, exit_.setup.architecture, 0, 1):
            tensor = tensors.setdefault(block.name, torch.full(block.shape, torch.nan, dtype=parameter.dtype))
            box = tuple(slice(o, o + n) for o, n in zip(block.offset, block.tensor.shape, strict=True))
            tensor[box] = block.tensor.detach().cpu()
    return tensors


def every_body(head: Any, init: str = "copy") -> list[ExitSpec]:
    bodies: Any = enumerate(("embedding", "norm", "mlp", "layer"), 1)
    return [ExitSpec(layer, body, head, rank=3, init=init) for layer, body in bodies]


def refusal(error: type[Exception], function: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(error) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def not_asked() -> str:
    raise AssertionError("the backbone was hashed for nothing")


@pytest.fixture(scope="module")
def model_path(saved_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny model's directory, in bfloat16 if asked for."""
    made: dict[str, Path] = {}

    def get(family: str, dtype: torch.dtype = torch.float32) -> Path:
        path: Path = saved_model(family)[0]
        if dtype == torch.float32:
            return path
        if family not in made:
            made[family] = Path(shutil.copytree(path, tmp_path_factory.mktemp("half") / family))
            weights = made[family] / "model.safetensors"
            tensors = {name: tensor.to(dtype) for name, tensor in load_file(weights).items()}
            save_file(tensors, weights, {"format": "pt"})
        return made[family]

    return get


@pytest.fixture(scope="module")
def model(model_path: Any) -> Contents:
    return open_contents(model_path("llama3.1"))


@pytest.fixture(scope="module")
def adapter(saved_model: Any, load_stage: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Contents]:
    """An adapter on disk, opened, with random values; of a model with ``changes``."""

    def make(
        *specs: ExitSpec, sha256: str = HASH, steps: int = 7, dtype: torch.dtype = torch.float32, **changes: Any
    ) -> Contents:
        path = tmp_path_factory.mktemp("adapter") / "_".join(str(spec.layer) for spec in specs)
        stage = load_stage(saved_model("llama3.1", **changes)[0], specs, dtype=dtype)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for exit_ in stage.exits:
                for parameter in exit_.parameters():
                    if parameter.requires_grad:
                        parameter.copy_(torch.randn(parameter.shape, generator=generator))
        described: Any = {"base_model": "models/base", "backbone_sha256": sha256, "steps": steps, "extra": {}}
        save_adapter(path, stage.exits, specs, stage.setup.groups, **described)
        return open_contents(path)

    return make


# --------------------------------------------------------------------------------------------------------- add


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["copy", "random"])
@pytest.mark.parametrize("family", ["llama3.2-tied", "llama-biases", "qwen3"])
def test_new_exits_are_bit_for_bit_what_tuning_starts_from(
    family: str, init: str, dtype: torch.dtype, model_path: Any, load_stage: Any
) -> None:
    path = model_path(family, dtype)
    contents = open_contents(path)
    for head in HEADS:
        specs = every_body(head, init)
        added = add_exits(contents, specs, seed=11)
        check_exits(added)
        assert added.exits == tuple(specs) and added.backbone is contents.backbone
        expected = [held(exit_) for exit_ in load_stage(path, specs, dtype=dtype, seed=11).exits]
        expected_by_name = {name: tensor for each in expected for name, tensor in each.items()}
        assert added.exit_tensors.keys() == expected_by_name.keys()
        for name, tensor in added.exit_tensors.items():
            assert tensor.dtype == dtype and torch.equal(whole(tensor), expected_by_name[name]), name


def test_exits_are_added_beside_others_in_the_dtype_of_each_tensor(model: Contents) -> None:
    norm = "model.norm.weight"
    mixed = replace(model, backbone={**model.backbone, norm: replace(model.backbone[norm], dtype=torch.bfloat16)})
    first = add_exits(mixed, [ExitSpec(3, "norm", "own", init="random")], seed=1)
    assert first.exit_tensors["exits.3.norm.weight"].dtype == torch.bfloat16
    assert first.exit_tensors["exits.3.lm_head.weight"].dtype == torch.float32
    both = add_exits(first, [ExitSpec(1, "embedding", "shared"), ExitSpec(4, "mlp", "shared")], seed=2)
    assert [spec.layer for spec in both.exits] == [1, 3, 4]
    assert all(both.exit_tensors[name] is tensor for name, tensor in first.exit_tensors.items())
    assert add_exits(both, [], seed=1) is both


def test_tensors_under_one_name_are_told_apart(model: Contents) -> None:
    """An interrupted conversion goes on with a finished file only if its tensors are made in the same way."""
    name = "exits.2.mlp.gate_proj.weight"
    made = [
        add_exits(model, [ExitSpec(2, body, "shared", init=init)], seed=seed).exit_tensors[name].made  # type: ignore[arg-type]
        for body, init, seed in (("mlp", "copy", 1), ("layer", "copy", 1), ("mlp", "random", 1), ("mlp", "random", 2))
    ]
    assert len(set(made)) == len(made)


def test_exits_that_cannot_be_added(model: Contents, adapter: Any) -> None:
    def refuse(contents: Contents, *specs: ExitSpec) -> str:
        return refusal(ConfigError, add_exits, contents, specs, 1)

    exited = add_exits(model, [ExitSpec(2)], seed=1)
    text = refuse(exited, ExitSpec(1), ExitSpec(2, "norm"))
    assert "already an exit after layer 2" in text and str(model.source) in text
    assert "already an exit after layer 3" in refuse(model, ExitSpec(3), ExitSpec(3, "norm"))
    for layer in (0, 5):
        assert f"layer {layer} is outside" in refuse(model, ExitSpec(layer)) and "1 to 4" in refuse(
            model, ExitSpec(layer)
        )
    assert "layer 1 has init fit, which needs data" in refuse(model, ExitSpec(1, init="fit"))
    assert add_exits(model, [ExitSpec(1, init="auto")], seed=1).exits == (ExitSpec(1, init="copy"),)
    useless = ExitSpec(1, "embedding", "shared")
    assert "nothing to train" in refuse(model, useless)
    assert len(add_exits(model, [useless, ExitSpec(2)], seed=1).exits) == 2
    assert len(add_exits(exited, [useless], seed=1).exits) == 2
    alone = adapter(ExitSpec(2))
    text = refuse(alone, ExitSpec(1, init="random"))
    assert "holds no backbone" in text and str(alone.source) in text


# -------------------------------------------------------------------------------------------------------- drop


def test_dropped(model: Contents, adapter: Any) -> None:
    contents = add_exits(model, [ExitSpec(layer, "norm") for layer in (1, 2, 4)], seed=1)
    contents = replace(contents, backbone_sha256=HASH, steps=9)
    left = drop_exits(contents, [2, 1])
    assert [spec.layer for spec in left.exits] == [4] and (left.backbone_sha256, left.steps) == (HASH, 9)
    assert left.exit_tensors == {
        name: contents.exit_tensors[name] for name in ("exits.4.norm.weight", "exits.4.lm_head.weight")
    }
    plain = drop_exits(left, [4])
    assert plain == replace(model, exit_tensors={})  # as if there had never been one
    text = refusal(ConfigError, drop_exits, contents, [1, 3])
    assert "no exit after layer 3" in text and "1, 2, 4" in text and str(model.source) in text
    assert "has none" in refusal(ConfigError, drop_exits, plain, [3])
    alone = adapter(ExitSpec(1), ExitSpec(2))
    assert [spec.layer for spec in drop_exits(alone, [1]).exits] == [2]
    assert "nothing is left" in refusal(ConfigError, drop_exits, alone, [1, 2])


def test_layers_whose_numbers_begin_alike(saved_model: Any) -> None:
    deep = open_contents(saved_model("llama2", num_hidden_layers=12)[0])
    contents = add_exits(deep, [ExitSpec(layer, "norm", "shared") for layer in (1, 10, 11)], seed=1)
    assert drop_exits(contents, [1]).exit_tensors.keys() == {"exits.10.norm.weight", "exits.11.norm.weight"}
    assert drop_exits(contents, [10, 11]).exit_tensors.keys() == {"exits.1.norm.weight"}


# ------------------------------------------------------------------------------------------------------- merge


def test_adapters_are_merged_onto_a_backbone(model: Contents, adapter: Any) -> None:
    late, early = adapter(ExitSpec(3), ExitSpec(4, "layer", "shared")), adapter(ExitSpec(1, "norm"), steps=12)
    asked = []
    merged = merge_exits(model, [late, early], lambda: asked.append(1) or HASH)  # type: ignore[func-returns-value]
    assert asked == [1]
    assert merged.exits == (*early.exits, *late.exits)
    assert merged.exit_tensors == {**late.exit_tensors, **early.exit_tensors}
    assert merged.backbone is model.backbone and merged.assets == model.assets
    assert (merged.backbone_sha256, merged.steps, merged.base_model) == (HASH, 12, model.base_model)
    check_exits(merged)
    # Onto exits that lie with their backbone already.
    for known in (None, HASH):
        exited = replace(add_exits(model, [ExitSpec(2)], seed=1), backbone_sha256=known)
        assert [spec.layer for spec in merge_exits(exited, [late], lambda: HASH).exits] == [2, 3, 4]
    assert merge_exits(model, [], not_asked) is model


def test_adapters_are_merged_with_each_other(adapter: Any) -> None:
    first, second = adapter(ExitSpec(3), steps=20), adapter(ExitSpec(1, "norm"))
    merged = merge_exits(first, [second], not_asked)
    assert merged.exits == (*second.exits, *first.exits) and merged.architecture is None
    assert merged.exit_tensors == {**first.exit_tensors, **second.exit_tensors}
    assert (merged.backbone_sha256, merged.base_model, merged.steps) == (HASH, "models/base", 20)


def test_two_exits_at_one_place_are_refused(model: Contents, adapter: Any) -> None:
    first, second = adapter(ExitSpec(1), ExitSpec(3)), adapter(ExitSpec(3, "norm"))
    for contents, others in ((model, [first, second]), (first, [second])):
        text = refusal(CheckpointError, merge_exits, contents, others, not_asked)
        assert str(first.source) in text and str(second.source) in text and "layer 3" in text
    exited = add_exits(model, [ExitSpec(3)], seed=1)
    text = refusal(CheckpointError, merge_exits, exited, [second], not_asked)
    assert str(model.source) in text and str(second.source) in text


def test_exits_of_another_backbone_are_refused(model: Contents, adapter: Any) -> None:
    other = "cd" * 32
    ours, theirs = adapter(ExitSpec(1)), adapter(ExitSpec(3), sha256=other)
    text = refusal(CheckpointError, merge_exits, model, [theirs], lambda: HASH)
    assert all(word in text for word in (HASH[:16], other[:16], str(model.source), str(theirs.source), "models/base"))
    exited = replace(add_exits(model, [ExitSpec(2)], seed=1), backbone_sha256=HASH)
    # Where they contradict each other, the backbone is not hashed.
    for contents, others in ((model, [ours, theirs]), (ours, [theirs]), (exited, [theirs])):
        text = refusal(CheckpointError, merge_exits, contents, others, not_asked)
        first = ours if contents is model else contents
        assert all(word in text for word in (HASH[:16], other[:16], str(first.source), str(theirs.source)))
    # The exits already there may be the ones that do not belong to the backbone.
    text = refusal(CheckpointError, merge_exits, exited, [ours], lambda: other)
    assert HASH[:16] in text and other[:16] in text


def test_exits_for_other_settings_of_the_model_are_refused(model: Contents, adapter: Any) -> None:
    assert model.architecture is not None
    same = output_settings(model.architecture)
    first, second, unknown = adapter(ExitSpec(1)), adapter(ExitSpec(3)), adapter(ExitSpec(4, "norm"))
    first, second = replace(first, settings=same), replace(second, settings={**same, "norm_eps": 1e-6})
    text = refusal(CheckpointError, merge_exits, model, [second], not_asked)
    assert str(second.source) in text and "norm_eps (1e-06 against 1e-05)" in text
    text = refusal(CheckpointError, merge_exits, first, [second], not_asked)
    assert all(word in text for word in (str(first.source), str(second.source), "norm_eps"))
    for contents, others, asked in ((model, [first, unknown], lambda: HASH), (unknown, [first], not_asked)):
        assert merge_exits(contents, others, asked).settings == same
    assert drop_exits(merge_exits(model, [first], lambda: HASH), [1]).settings is None


def test_merged_exits_record_their_quantisation_if_it_is_one(model: Contents, adapter: Any) -> None:
    assert model.architecture is not None
    same = output_settings(model.architecture)
    first, second = (replace(adapter(ExitSpec(layer)), settings={**same, "quantise": "int8"}) for layer in (1, 3))
    assert merge_exits(first, [second], not_asked).settings == {**same, "quantise": "int8"}
    plain = replace(second, settings={**same, "quantise": "none"})
    assert merge_exits(first, [plain], not_asked).settings == same


def test_merged_exits_record_the_corpora_of_all(adapter: Any) -> None:
    parts = [replace(adapter(ExitSpec(layer)), corpora=corpora) for layer, corpora in ((1, A + B), (2, None), (3, B))]
    assert merge_exits(parts[0], parts[1:], not_asked).corpora == A + B
    assert merge_exits(parts[1], [replace(parts[2], corpora=None)], not_asked).corpora is None


def test_what_cannot_be_merged(model: Contents, adapter: Any) -> None:
    good = adapter(ExitSpec(1, "mlp"))
    silent = replace(good, backbone_sha256=None)
    text = refusal(CheckpointError, merge_exits, model, [silent], not_asked)
    assert str(good.source) in text and "does not record the backbone" in text
    assert "does not record" in refusal(CheckpointError, merge_exits, silent, [adapter(ExitSpec(2))], not_asked)
    assert "holds no exits" in refusal(CheckpointError, merge_exits, good, [model], not_asked)
    # A tensor of an exit that only another adapter has would take the place of that one's.
    name = "exits.2.norm.weight"
    stray = replace(good, exit_tensors={**good.exit_tensors, name: good.exit_tensors["exits.1.norm.weight"]})
    for contents in (model, adapter(ExitSpec(2))):
        others = [stray, adapter(ExitSpec(2))] if contents is model else [stray]
        assert repr(name) in refusal(CheckpointError, merge_exits, contents, others, lambda: HASH)
    text = refusal(CheckpointError, merge_exits, model, [adapter(ExitSpec(2), intermediate_size=96)], lambda: HASH)
    assert "exits.2.mlp" in text and "96" in text and "112" in text


# ------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("family", ["llama3.1", "llama3.2-tied"])
def test_a_shared_head_becomes_own_or_low_rank(family: str, model_path: Any, load_stage: Any) -> None:
    path = model_path(family, torch.bfloat16)
    contents = open_contents(path)
    shared = add_exits(contents, every_body("shared", "random"), seed=3)
    for head in ("own", "low_rank"):
        changed = change_heads(shared, dict.fromkeys((1, 3, 4), head), seed=11)  # type: ignore[arg-type]
        check_exits(changed)
        assert [spec.head for spec in changed.exits] == [head, "shared", head, head] and not changed.notes
        specs = every_body(head)
        expected = {
            name: each
            for exit_ in load_stage(path, specs, dtype=torch.bfloat16, seed=11).exits
            for name, each in held(exit_).items()
            if ".lm_head." in name and exit_.spec.layer != 2
        }
        assert changed.exit_tensors.keys() - shared.exit_tensors.keys() == expected.keys()
        for name, values in expected.items():  # as a new exit's with copied weights
            assert torch.equal(whole(changed.exit_tensors[name]), values), name
        assert all(changed.exit_tensors[name] is tensor for name, tensor in shared.exit_tensors.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_low_rank_head_becomes_own(dtype: torch.dtype, model: Contents, adapter: Any) -> None:
    tuned = adapter(ExitSpec(2, "norm", "low_rank", rank=5), ExitSpec(3), dtype=dtype)
    merged = merge_exits(model, [tuned], lambda: HASH)
    changed = change_heads(merged, {2: "own"}, seed=1)
    check_exits(changed)
    assert changed.exits == (replace(tuned.exits[0], head="own"), tuned.exits[1]) and not changed.notes
    b, a = (whole(tuned.exit_tensors[f"exits.2.lm_head.{name}"]).float() for name in "ba")
    w0 = whole(model.backbone["lm_head.weight"])
    head = changed.exit_tensors["exits.2.lm_head.weight"]
    assert head.dtype == dtype
    torch.testing.assert_close(whole(head), (w0 + b @ a).to(dtype), atol=1e-5, rtol=torch.finfo(dtype).eps)
    factors = {"exits.2.lm_head.a", "exits.2.lm_head.b"}
    assert changed.exit_tensors.keys() == {"exits.2.lm_head.weight"} | tuned.exit_tensors.keys() - factors
    others = tuned.exit_tensors.keys() - factors
    assert all(changed.exit_tensors[name] is tuned.exit_tensors[name] for name in others)


def test_a_head_becomes_shared_and_a_note_says_what_is_lost(adapter: Any) -> None:
    # An adapter alone is enough.
    tuned = adapter(ExitSpec(1, "norm"), ExitSpec(2, "norm", "low_rank", rank=5), ExitSpec(3, "norm", "shared"))
    changed = change_heads(tuned, {3: "shared", 2: "shared", 1: "shared"}, seed=1)
    assert [spec.head for spec in changed.exits] == ["shared"] * 3
    assert changed.exit_tensors == {
        f"exits.{layer}.norm.weight": tuned.exit_tensors[f"exits.{layer}.norm.weight"] for layer in (1, 2, 3)
    }
    assert len(changed.notes) == 2
    assert "layer 1" in changed.notes[0] and "exits.1.lm_head.weight" in changed.notes[0]
    assert "layer 2" in changed.notes[1] and "exits.2.lm_head.a, exits.2.lm_head.b" in changed.notes[1]
    again = change_heads(changed, {1: "shared"}, seed=1)
    assert again == changed


def test_heads_that_cannot_be_changed(model: Contents, adapter: Any) -> None:
    alone = adapter(ExitSpec(1), ExitSpec(2, "norm", "low_rank", rank=5), ExitSpec(3, "mlp", "shared"))
    merged = merge_exits(model, [alone], lambda: HASH)
    text = refusal(ConfigError, change_heads, merged, {1: "low_rank"}, 1)
    assert "layer 1" in text and "low_rank" in text and str(model.source) in text
    for heads in ({2: "own"}, {3: "own"}, {3: "low_rank"}):
        text = refusal(ConfigError, change_heads, alone, heads, 1)
        assert "holds no backbone" in text and str(alone.source) in text
    assert "no exit after layer 4; it has them after 1, 2, 3" in refusal(
        ConfigError, change_heads, merged, {4: "own"}, 1
    )


# ------------------------------------------------------------------------------------------------------- check


def without(contents: Contents, name: str, **changes: Any) -> Contents:
    """``contents`` with a tensor changed, or left out."""
    tensors = dict(contents.exit_tensors)
    old = tensors.pop(name)
    return replace(contents, exit_tensors={**tensors, name: replace(old, **changes)} if changes else tensors)


def test_what_does_not_fit_is_named(model: Contents) -> None:
    contents = add_exits(model, [ExitSpec(2, "mlp", "low_rank", rank=3), ExitSpec(4, "norm")], seed=1)
    check_exits(contents)
    check_exits(model)
    where, up, a = str(model.source), "exits.2.mlp.up_proj.weight", "exits.2.lm_head.a"

    def refuse(contents: Contents) -> str:
        text = refusal(CheckpointError, check_exits, contents)
        assert where in text
        return text

    assert f"{up!r} is missing" in refuse(without(contents, up))
    text = refuse(without(contents, up, shape=(111, 64)))
    assert repr(up) in text and "[111, 64]" in text and "[112, 64]" in text
    text = refuse(without(contents, a, shape=(4, 64)))  # another rank than it says
    assert repr(a) in text and "[4, 64]" in text and "[3, 64]" in text
    assert repr(up) in refuse(without(contents, up, dtype=torch.int32)) and "int32" in refuse(
        without(contents, up, dtype=torch.int32)
    )
    for name in ("exits.2.lm_head.weight", "exits.2.mlp.up_proj.bias", "exits.3.norm.weight", "exits.02.norm.weight"):
        stray = {**contents.exit_tensors, name: contents.exit_tensors["exits.4.norm.weight"]}
        assert f"{name!r} is unknown" in refuse(replace(contents, exit_tensors=stray))
    two, four = contents.exits
    assert "layers [4, 2]" in refuse(replace(contents, exits=(four, two)))
    assert "layers [2, 2]" in refuse(replace(contents, exits=(two, two)))
    assert "layer 5" in refuse(replace(contents, exits=(two, replace(four, layer=5))))


def test_an_adapter_alone_is_checked_as_far_as_it_goes(adapter: Any) -> None:
    contents = adapter(ExitSpec(2), ExitSpec(4, "norm"))
    check_exits(contents)
    tensor = contents.exit_tensors["exits.4.norm.weight"]
    stray = replace(contents, exit_tensors={**contents.exit_tensors, "exits.3.norm.weight": tensor})
    assert "'exits.3.norm.weight' is unknown" in refusal(CheckpointError, check_exits, stray)
    assert "[4, 2]" in refusal(CheckpointError, check_exits, replace(contents, exits=contents.exits[::-1]))


# ---------------------------------------------------------------------------------------------------- sequences


def unreadable(out: Tensor, offset: Sequence[int]) -> None:
    raise AssertionError("a tensor was read while exits were edited")


EDITS = st.lists(st.tuples(st.sampled_from(["add", "drop", "heads", "heads"]), st.booleans()), min_size=1, max_size=8)


def draw_edit(data: st.DataObject, specs: dict[int, ExitSpec], what: str, likely: bool) -> Any:
    """What an edit is given; a ``likely`` one names places where there is something to do."""
    there, free = sorted(specs), [layer for layer in range(1, 5) if layer not in specs]
    places = (free if what == "add" else there) if likely else list(range(6))
    layers = data.draw(st.lists(st.sampled_from(places), unique=True, max_size=3) if places else st.just([]))
    if what == "drop":
        return layers
    if what == "heads":
        return {layer: data.draw(st.sampled_from(HEADS)) for layer in layers}
    kinds = {
        "body": st.sampled_from(["embedding", "norm", "mlp", "layer"]),
        "head": st.sampled_from(HEADS),
        "rank": st.integers(1, 3),
        "init": st.sampled_from(["copy", "random"]),
    }
    return [ExitSpec(layer, **{name: data.draw(kind) for name, kind in kinds.items()}) for layer in layers]


def edited(specs: dict[int, ExitSpec], what: str, with_: Any) -> dict[int, ExitSpec] | None:
    """The exits that an edit should leave; None where it should be refused."""
    if what == "add":
        new = specs | {spec.layer: spec for spec in with_}
        possible = len(new) == len(specs) + len(with_) and new.keys() <= {1, 2, 3, 4}
        return new if possible and (not with_ or any(trains(spec) for spec in new.values())) else None
    if not set(with_) <= specs.keys():
        return None
    if what == "drop":
        return {layer: spec for layer, spec in specs.items() if layer not in with_}
    if any(specs[layer].head == "own" and head == "low_rank" for layer, head in with_.items()):
        return None
    return specs | {layer: replace(specs[layer], head=head) for layer, head in with_.items()}


@settings(max_examples=200, deadline=None)
@given(edits=EDITS, family=st.sampled_from(["llama-biases", "llama3.2-tied", "qwen3"]), data=st.data())
def test_any_sequence_of_edits(
    edits: list[tuple[str, bool]], family: str, data: st.DataObject, saved_model: Any
) -> None:
    contents = open_contents(saved_model(family)[0])
    contents = replace(
        contents, backbone={name: replace(each, read=unreadable) for name, each in contents.backbone.items()}
    )
    specs: dict[int, ExitSpec] = {}
    apply: dict[str, Callable[[Contents, Any], Contents]] = {
        "add": lambda contents, new: add_exits(contents, new, seed=1),
        "drop": drop_exits,
        "heads": lambda contents, heads: change_heads(contents, heads, seed=1),
    }
    for what, likely in [("add", True), *edits]:
        with_ = draw_edit(data, specs, what, likely)
        expected = edited(specs, what, with_)
        tensors = dict(contents.exit_tensors)
        if expected is None:
            refusal(ConfigError, apply[what], contents, with_)
            continue
        after = apply[what](contents, with_)
        check_exits(after)
        assert after.exits == tuple(expected[layer] for layer in sorted(expected))
        assert after.backbone is contents.backbone and after.assets is contents.assets
        touched = {layer for layer in expected.keys() | specs.keys() if expected.get(layer) != specs.get(layer)}
        assert contents.exit_tensors == tensors  # what it was made from is as it was
        for name, tensor in tensors.items():
            layer = int(name.split(".")[1])
            if layer not in touched or (what == "heads" and ".lm_head." not in name):
                assert after.exit_tensors[name] is tensor, name
        contents, specs = after, expected
