"""Every weight of a legacy Megatron checkpoint, however it was cut, comes out under its released name, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from legacy_writer import Exits, Layout, write_legacy
from safetensors.torch import load_file
from torch import Tensor

from megatron_ee.checkpoint.contents import Contents
from megatron_ee.checkpoint.tensors import StoredTensor
from megatron_ee.config.exits import ExitSpec
from megatron_ee.errors import CheckpointError, DamagedError
from megatron_ee.exits.tensors import exit_tensors
from megatron_ee.families.registry import read_architecture
from megatron_ee.importers.megatron.legacy import open_legacy

SavedModel = Callable[..., tuple[Path, Any]]
SIXTEEN_BIT = {"num_attention_heads": 8, "num_key_value_heads": 4}  # can be cut to 4 ranks, with grouped heads
FIXTURES = Path(os.environ.get("MEGATRON_EE_FIXTURES", Path(__file__).parents[5] / "shared/fixtures"))


def whole(tensor: StoredTensor) -> Tensor:
    out = torch.empty(tensor.shape, dtype=tensor.dtype)
    tensor.read(out, (0,) * out.dim())
    return out


def assert_equal(found: dict[str, StoredTensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(whole(found[name]), tensor), name


def released(model: Any) -> dict[str, Tensor]:
    """The released weights: of a tied head, the embedding alone."""
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return {name: t for name, t in weights.items() if name != "lm_head.weight" or not model.config.tie_word_embeddings}


def random_exits(directory: Path, layers: list[int], body: str, own: bool, before: bool = False) -> Exits:
    arch = read_architecture(directory)
    generator = torch.Generator().manual_seed(3)
    shapes = {
        name: shape
        for layer in layers
        for name, (shape, _) in exit_tensors(spec_of(layer - before, body, own), arch).items()
    }
    return Exits(
        layers, body, own, before, {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    )


def spec_of(layer: int, body: str, own: bool) -> ExitSpec:
    return ExitSpec(layer, body, "own" if own else "shared")  # type: ignore[arg-type]


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def message(path: Path, *, trust: bool = True, config: Path | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_legacy(path, trust=trust, config=config)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------ every layout


@pytest.mark.parametrize("spelling", ["old", "core"])
@pytest.mark.parametrize("tensor, pipeline", [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2)])
def test_every_layout(saved_model: SavedModel, tmp_path: Path, tensor: int, pipeline: int, spelling: str) -> None:
    directory, model = saved_model("qwen2", **SIXTEEN_BIT)
    write_legacy(tmp_path, model, Layout(tensor, pipeline, spelling=spelling))
    contents = open_legacy(tmp_path, trust=True, config=directory)
    assert_equal(dict(contents.backbone), released(model))


@pytest.mark.parametrize("spelling", ["old", "layernorm", "core", "fused"])
@pytest.mark.parametrize(
    "family", ["llama2", "llama3.1", "llama3.2-tied", "llama-biases", "mistral", "qwen2", "qwen2-window", "qwen3"]
)
def test_every_family_in_every_spelling(saved_model: SavedModel, tmp_path: Path, family: str, spelling: str) -> None:
    directory, model = saved_model(family)
    write_legacy(tmp_path, model, Layout(2, 2, spelling=spelling))
    contents = open_legacy(tmp_path, trust=True, config=directory)
    assert_equal(dict(contents.backbone), released(model))
    assert contents.architecture == read_architecture(directory) and not contents.exits


@pytest.mark.parametrize("spelling", ["old", "fused"])
def test_layers_go_round_the_stages_of_a_virtual_pipeline(
    saved_model: SavedModel, tmp_path: Path, spelling: str
) -> None:
    directory, model = saved_model("llama2", num_hidden_layers=8)
    folder = write_legacy(tmp_path, model, Layout(2, 2, virtual=2, spelling=spelling))
    assert "model1" in torch.load(folder / "mp_rank_00_001/model_optim_rng.pt", weights_only=False)
    assert_equal(dict(open_legacy(tmp_path, trust=True, config=directory).backbone), released(model))


def test_dtypes_are_the_stored_ones(saved_model: SavedModel, tmp_path: Path) -> None:
    directory, model = saved_model("llama2")
    model = type(model)(model.config).to(torch.bfloat16)
    write_legacy(tmp_path, model, Layout(2))
    contents = open_legacy(tmp_path, trust=True)
    assert_equal(dict(contents.backbone), released(model))
    assert json.loads(bytes(contents.assets["config.json"]))["torch_dtype"] == "bfloat16"


def test_any_box_of_a_tensor_is_read(saved_model: SavedModel, tmp_path: Path) -> None:
    directory, model = saved_model("qwen2", **SIXTEEN_BIT)
    write_legacy(tmp_path, model, Layout(4, 2))
    contents = open_legacy(tmp_path, trust=True, config=directory)
    generator = torch.Generator().manual_seed(0)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        name = f"model.layers.2.{name}.weight"
        expected, found = released(model)[name], contents.backbone[name]
        for _ in range(20):
            ends = [
                torch.randint(0, extent + 1, (2,), generator=generator).sort()[0].tolist() for extent in found.shape
            ]
            box = tuple(slice(start, stop) for start, stop in ends)
            out = torch.empty(expected[box].T.shape).T  # not contiguous
            found.read(out, [start for start, _ in ends])
            assert torch.equal(out, expected[box]), (name, ends)


# ------------------------------------------------------------------------------------------------------------- exits


@pytest.mark.parametrize("tensor, pipeline", [(1, 1), (2, 2)])
@pytest.mark.parametrize("body", ["embedding", "norm", "mlp", "layer"])
@pytest.mark.parametrize("family, own", [("llama2", True), ("llama3.2-tied", True), ("llama3.2-tied", False)])
def test_exits(
    saved_model: SavedModel, tmp_path: Path, family: str, own: bool, body: str, tensor: int, pipeline: int
) -> None:
    directory, model = saved_model(family)
    exits = random_exits(directory, [1, 2, 3], body, own)
    write_legacy(tmp_path, model, Layout(tensor, pipeline), exits=exits)
    contents = open_legacy(tmp_path, trust=True, config=directory)
    assert_equal(dict(contents.backbone), released(model))
    assert_equal(dict(contents.exit_tensors), exits.tensors)
    assert contents.exits == tuple(
        dataclasses.replace(spec_of(layer, body, own), weight=0.5 * layer) for layer in (1, 2, 3)
    )
    assert contents.format == "EE-LLM checkpoint" and contents.steps == 5


def test_exits_of_a_layer_with_biases_and_norms(saved_model: SavedModel, tmp_path: Path) -> None:
    for family in ("llama-biases", "qwen3"):
        directory, model = saved_model(family)
        exits = random_exits(directory, [2, 4], "layer", True)
        write_legacy(tmp_path / family, model, Layout(2, 2), exits=exits)
        contents = open_legacy(tmp_path / family, trust=True, config=directory)
        assert_equal(dict(contents.exit_tensors), exits.tensors)


def test_heads_are_numbered_within_their_stage_in_the_order_of_the_arguments(
    saved_model: SavedModel, tmp_path: Path
) -> None:
    directory, model = saved_model("llama2")
    exits = random_exits(directory, [4, 2, 1, 3], "norm", True)
    write_legacy(tmp_path, model, Layout(1, 2), exits=exits)
    contents = open_legacy(tmp_path, trust=True, config=directory)
    assert_equal(dict(contents.exit_tensors), exits.tensors)
    assert [spec.layer for spec in contents.exits] == [1, 2, 3, 4]
    assert [spec.weight for spec in contents.exits] == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("body", ["embedding", "norm", "layer"])
def test_an_exit_before_a_layer_stands_after_the_one_before(saved_model: SavedModel, tmp_path: Path, body: str) -> None:
    directory, model = saved_model("llama2")
    exits = random_exits(directory, [3, 4], body, True, before=True)
    write_legacy(tmp_path, model, Layout(2, 2), exits=exits)
    contents = open_legacy(tmp_path, trust=True, config=directory)
    assert [spec.layer for spec in contents.exits] == [2, 3]
    assert_equal(dict(contents.exit_tensors), exits.tensors)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"use_exit_block": True}, "use_exit_mlp and use_exit_block"),
        ({"pre_exit": True, "exit_layer_nums": [2, 4]}, "use_exit_mlp and pre_exit"),
        ({"use_exit_norm": False}, "use_exit_mlp without use_exit_norm"),
        ({"use_exit_mlp": False, "use_exit_block": True, "use_exit_norm": False}, "use_exit_block without"),
        ({"use_exit_mlp": False, "pre_exit": True, "exit_layer_nums": [1]}, "pre_exit at layer 1"),
        ({"untie_exit_output_weights": False}, "untie_exit_output_weights is off"),
        ({"exit_layer_nums": [2, 5]}, "[2, 5] are not layers from 1 to 4"),
        ({"exit_layer_nums": [2, 2]}, "[2, 2] name a layer twice"),
        ({"exit_layer_nums": [2, 3]}, "encoder.layers.1.mlp.branch.dense_h_to_4h.weight' is missing"),
        ({"exit_layer_nums": []}, "does not belong to the model"),
    ],
)
def test_exits_without_counterpart(
    saved_model: SavedModel, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    directory, model = saved_model("llama2")
    exits = random_exits(directory, [1, 3], "mlp", True)
    folder = write_legacy(tmp_path, model, Layout(), exits=exits, **changes)
    found = message(tmp_path, config=directory)
    assert words in found and str(folder / "mp_rank_00/model_optim_rng.pt") in found


# ----------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("family", ["llama2", "llama-biases", "mistral", "qwen2", "qwen3"])
def test_without_config_the_arguments_tell_the_same(saved_model: SavedModel, tmp_path: Path, family: str) -> None:
    directory, model = saved_model(family)
    folder = write_legacy(tmp_path, model, Layout(2))
    contents = open_legacy(folder, trust=True)
    assert contents.architecture == read_architecture(directory)
    assert contents.source == folder and contents.base_model == str(folder) and contents.backbone_sha256 is None
    (tmp_path / "config.json").write_bytes(bytes(contents.assets["config.json"]))
    assert read_architecture(tmp_path) == read_architecture(directory)


def test_settings_that_a_given_configuration_has_otherwise_are_told(saved_model: SavedModel, tmp_path: Path) -> None:
    directory, model = saved_model("mistral")
    folder = write_legacy(tmp_path, model, Layout(), rotary_base=500_000, window_size=(7, 0))
    notes = open_legacy(folder, trust=True, config=directory).notes
    assert [note.split(": ")[1].split(" ")[0] for note in notes] == ["rotary_base", "window_size"]
    assert open_legacy(write_legacy(tmp_path, model, Layout(), iteration=6), trust=True, config=directory).notes == ()


@pytest.mark.parametrize("spelling", ["old", "core"])
def test_a_head_that_is_tied_to_another_tensor(spelling: str, saved_model: SavedModel, tmp_path: Path) -> None:
    directory, model = saved_model("llama3.2-tied")
    folder = write_legacy(tmp_path, model, Layout(2, 2, spelling=spelling), untie_embeddings_and_output_weights=None)
    path = folder / "mp_rank_01_001/model_optim_rng.pt"  # the last rows of the vocabulary, and those that pad it

    def change(row: int) -> Callable[[dict[str, Any]], None]:
        def edit(content: dict[str, Any]) -> None:
            part = content["model"]
            head = part["word_embeddings_for_head"]["weight"] if spelling == "old" else part["output_layer.weight"]
            head[row, -1] += 1

        return edit

    rewrite(path, change(-1))
    assert open_legacy(folder, trust=True, config=directory).architecture == read_architecture(directory)
    rewrite(path, change(2))
    text = message(tmp_path, config=directory)
    assert str(folder / "mp_rank_00_001") in text and "differs from the embedding" in text and "--config" in text
    config = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    backbone = open_legacy(folder, trust=True, config=tmp_path / "config.json").backbone
    difference = whole(backbone["lm_head.weight"]) - whole(backbone["model.embed_tokens.weight"])
    assert difference.nonzero().tolist() == [[80 + 2, 63]]


def test_the_derived_configuration_is_one_that_transformers_reads(saved_model: SavedModel, tmp_path: Path) -> None:
    import transformers

    _, model = saved_model("llama2")
    changes = {"use_rope_scaling": True, "rope_scaling_factor": 32.0, "rotary_base": 500_000}
    contents = open_legacy(write_legacy(tmp_path, model, Layout(), **changes), trust=True)
    (tmp_path / "config.json").write_bytes(bytes(contents.assets["config.json"]))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.rope_parameters["rope_type"] == "llama3" and config.rope_parameters["factor"] == 32.0
    assert config.rope_parameters["rope_theta"] == 500_000 and config.dtype == torch.float32
    assert config.eos_token_id is None and config.vocab_size == 131
    assert contents.architecture is not None and contents.architecture.rope.original_positions == 8192


def test_arguments_of_older_releases(saved_model: SavedModel, tmp_path: Path) -> None:
    directory, model = saved_model("llama2")
    changes: dict[str, Any] = dict.fromkeys(("rotary_base", "rotary_percent", "norm_epsilon", "kv_channels"))
    changes |= {"use_rotary_position_embeddings": True, "position_embedding_type": None, "layernorm_epsilon": 1e-5}
    contents = open_legacy(write_legacy(tmp_path, model, Layout(), **changes), trust=True)
    assert contents.architecture == read_architecture(directory)


def test_linear_rope_scaling(saved_model: SavedModel, tmp_path: Path) -> None:
    _, model = saved_model("llama2")
    contents = open_legacy(write_legacy(tmp_path, model, Layout(), rotary_seq_len_interpolation_factor=4), trust=True)
    assert contents.architecture is not None
    assert (contents.architecture.rope.kind, contents.architecture.rope.factor) == ("linear", 4.0)


@pytest.mark.parametrize(
    "name",
    [
        *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings"),
        *("vocab_size", "add_bias_linear", "swiglu", "normalization", "position_embedding_type", "num_query_groups"),
    ],
)
def test_an_argument_that_is_missing_is_named(saved_model: SavedModel, tmp_path: Path, name: str) -> None:
    directory, model = saved_model("llama3.1", rope_parameters=None)
    write_legacy(tmp_path, model, Layout(), **{name: None})
    found = message(tmp_path)
    assert f"model_optim_rng.pt: {name} is missing" in found and "--config DIR" in found
    assert_equal(dict(open_legacy(tmp_path, trust=True, config=directory).backbone), released(model))


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        *({"swiglu": False}, {"normalization": "LayerNorm"}, {"position_embedding_type": "learned_absolute"}),
        *({"rotary_percent": 0.5}, {"rotary_interleaved": True}, {"apply_layernorm_1p": True}, {"num_experts": 8}),
        *({"apply_residual_connection_post_layernorm": True}, {"multi_latent_attention": True}),
    ],
)
def test_models_that_differ_from_ours_are_refused(
    saved_model: SavedModel, tmp_path: Path, changes: dict[str, Any], given: bool
) -> None:
    directory, model = saved_model("llama2")
    write_legacy(tmp_path, model, Layout(), **changes)
    name, value = next(iter(changes.items()))
    assert f"{name} is {value!r}" in message(tmp_path, config=directory if given else None)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 2, "kv_channels": 32},  # the same shapes, but other rows in fused q, k and v
        *({"kv_channels": 8}, {"hidden_size": 32}, {"num_layers": 8}, {"untie_embeddings_and_output_weights": False}),
    ],
)
def test_a_configuration_of_another_model_is_refused(
    saved_model: SavedModel, tmp_path: Path, changes: dict[str, Any]
) -> None:
    directory, model = saved_model("llama2")
    write_legacy(tmp_path, model, Layout(), **changes)
    found = message(tmp_path, config=directory)
    assert next(iter(changes)) in found and str(directory / "config.json") in found


def test_assets_are_those_of_the_directory_that_is_given(saved_model: SavedModel, tmp_path: Path) -> None:
    directory, model = saved_model("llama2")
    given = tmp_path / "given"
    shutil.copytree(directory, given)
    (given / "tokenizer.json").write_text("{}")
    (given / "code.py").write_text("")
    write_legacy(tmp_path, model, Layout())
    contents = open_legacy(tmp_path, trust=True, config=given)
    assert contents.assets == {n: given / n for n in ("config.json", "generation_config.json", "tokenizer.json")}
    contents = open_legacy(tmp_path, trust=True, config=given / "config.json")
    assert contents.assets == {"config.json": given / "config.json"}


# ------------------------------------------------------------------------------------------------------------ places


def test_a_release_or_one_iteration_is_found(saved_model: SavedModel, tmp_path: Path) -> None:
    directory, model = saved_model("llama2")
    folder = write_legacy(tmp_path, model, Layout())
    assert open_legacy(folder, trust=True, config=directory).source == folder
    folder.rename(tmp_path / "release")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert open_legacy(tmp_path, trust=True, config=directory).source == tmp_path / "release"


def test_it_is_not_opened_without_trust(saved_model: SavedModel, tmp_path: Path) -> None:
    _, model = saved_model("llama2")
    write_legacy(tmp_path, model, Layout())
    found = message(tmp_path, trust=False)
    assert "--trust-checkpoint" in found and "can run code" in found and "\n" not in found


def test_places_without_a_checkpoint(tmp_path: Path) -> None:
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    assert "no mp_rank_* and no latest_checkpointed_iteration.txt" in message(tmp_path)
    tracker.write_text("7")
    assert f"{tmp_path / 'iter_0000007'}: there is no mp_rank_*" in message(tmp_path)
    for text in ("../../etc", "-1", "", "9" * 40):
        tracker.write_text(text)
        assert "latest_checkpointed_iteration.txt: " in message(tmp_path)


@pytest.mark.parametrize(
    "gone, words",
    [
        ("mp_rank_01_000", "mp_rank_01_000/model_optim_rng.pt: is missing"),
        ("mp_rank_00_001/model_optim_rng.pt", "mp_rank_00_001/model_optim_rng.pt: is missing"),
    ],
)
def test_a_missing_rank(saved_model: SavedModel, tmp_path: Path, gone: str, words: str) -> None:
    _, model = saved_model("llama2")
    path = write_legacy(tmp_path, model, Layout(2, 2)) / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert words in message(tmp_path)


def test_missing_last_stages(saved_model: SavedModel, tmp_path: Path) -> None:
    _, model = saved_model("llama2")
    folder = write_legacy(tmp_path, model, Layout(1, 2))
    shutil.rmtree(folder / "mp_rank_00_001")
    found = message(tmp_path)
    assert "pipeline_model_parallel_size is 2, but there are mp_rank_* for 1" in found and "copy" in found


def test_other_ranks_directories(saved_model: SavedModel, tmp_path: Path) -> None:
    _, model = saved_model("llama2")
    folder = write_legacy(tmp_path, model, Layout(1, 1))
    (folder / "mp_rank_00_000").mkdir()
    assert "both with and without a pipeline rank" in message(tmp_path)
    (folder / "mp_rank_00_000").rename(folder / "mp_rank_00_000_003")
    assert "mp_rank_00_000_003: is not mp_rank_TT or mp_rank_TT_PPP" in message(tmp_path)


# -------------------------------------------------------------------------------------------------- contents of files


def _encoder(content: dict[str, Any]) -> dict[str, Any]:
    encoder: dict[str, Any] = content["model"]["language_model"]["encoder"]
    return encoder


FC2 = "layers.1.mlp.dense_4h_to_h.weight"
CHANGES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda content: content.update(checkpoint_version=2.0), "checkpoint_version is 2.0; only 3.0"),
    (lambda content: content.pop("checkpoint_version"), "checkpoint_version is 0; only 3.0"),
    (lambda content: content.pop("model"), "holds no model"),
    (lambda content: content.update(model=[1]), "'model' is not a state dict"),
    (lambda content: content.update(model={1: torch.ones(1)}), "key 1 is not a name"),
    (lambda content: content.update(iteration=6), "is of iteration 6, but"),
    (lambda content: _encoder(content).pop(FC2), f"key 'language_model.encoder.{FC2}' is missing, which"),
    (lambda content: _encoder(content).update({FC2: torch.ones(64, 55)}), f"encoder.{FC2}' has shape [64, 55], but"),
    (lambda content: _encoder(content).update({FC2: torch.ones(64, 56).half()}), "is of torch.float16, but"),
    (lambda content: _encoder(content).update({FC2: torch.ones(64, 56).int()}), "is of torch.int32, but"),
    (lambda content: _encoder(content).update({FC2: torch.ones(56, 64).T}), "is not contiguous"),
    (lambda content: _encoder(content).update({FC2: "text"}), f"{FC2}'"),
    (lambda content: _encoder(content).update({FC2: torch.ones(64, 56).to_sparse()}), f"{FC2}'"),
]


@pytest.mark.parametrize("change, words", CHANGES)
def test_a_file_that_differs_from_its_neighbours(
    saved_model: SavedModel, tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    directory, model = saved_model("llama2")
    path = write_legacy(tmp_path, model, Layout(2, 2)) / "mp_rank_01_000/model_optim_rng.pt"
    rewrite(path, change)
    found = message(tmp_path, config=directory)
    assert words in found and str(path) in found and "\n" not in found


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda encoder: encoder.pop(FC2), f"key 'language_model.encoder.{FC2}' is missing"),
        (lambda encoder: encoder.update(odd=torch.ones(1)), "key 'language_model.encoder.odd' is not known"),
        (lambda encoder: encoder.update({"layers.0.inter_attention.weight": torch.ones(1)}), "is not known"),
        (lambda encoder: encoder.update({"layers.0.input_norm.bias": torch.ones(64)}), "input_norm.bias' is not known"),
        (lambda encoder: encoder.update({"layers.0.self_attention.dense.bias": torch.ones(64)}), "does not belong to"),
        (lambda encoder: encoder.update({"layers.7.mlp_norm": torch.ones(64)}), "layer 2 of this stage"),
        (lambda encoder: encoder.update({"layers.0.input_layernorm.weight": torch.ones(64)}), "are the same"),
        (lambda encoder: encoder.update({FC2: torch.ones(64, 28)}), "makes it [64, 56] on each of 2 ranks"),
        (
            lambda encoder: encoder.update({"layers.0.self_attention.query_key_value.weight": torch.ones(64, 64)}),
            "makes it [96, 64]",
        ),
    ],
)
def test_files_that_agree_on_another_model(
    saved_model: SavedModel, tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    directory, model = saved_model("llama2")
    folder = write_legacy(tmp_path, model, Layout(2, 2))
    for rank in range(2):
        rewrite(folder / f"mp_rank_{rank:02}_000/model_optim_rng.pt", lambda content: change(_encoder(content)))
    found = message(tmp_path, config=directory)
    assert words in found and str(folder / "mp_rank_00_000/model_optim_rng.pt") in found


def test_configurations_that_the_ranks_cannot_hold(saved_model: SavedModel, tmp_path: Path) -> None:
    directory, model = saved_model("llama2")
    config = json.loads((directory / "config.json").read_text())
    write_legacy(tmp_path / "2", model, Layout(2, 2), **dict.fromkeys(("num_layers", "num_query_groups")))
    for changes, words in (
        ({"vocab_size": 1000}, "makes it [500, 64] or longer on each of 2 ranks"),
        ({"num_hidden_layers": 5}, "is the last of 4 layers"),
        ({"num_key_value_heads": 1}, "cannot be split over 2 tensor-parallel ranks"),
        ({"intermediate_size": 113}, "ffn_hidden_size is 112, but 113"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        assert words in message(tmp_path / "2", config=tmp_path / "config.json")


def test_a_model_without_arguments_needs_a_configuration(saved_model: SavedModel, tmp_path: Path) -> None:
    directory, model = saved_model("llama2")
    path = write_legacy(tmp_path, model, Layout()) / "mp_rank_00/model_optim_rng.pt"
    rewrite(path, lambda content: content.pop("args"))
    assert f"{path}: has no args" in message(tmp_path)
    assert_equal(dict(open_legacy(tmp_path, trust=True, config=directory).backbone), released(model))


# ---------------------------------------------------------------------------------------------------- damaged files


def _files(contents: Contents) -> Iterable[Path]:
    return {file for tensor in contents.backbone.values() for file in tensor.files}


def test_a_flipped_byte_is_noticed_when_it_is_read(saved_model: SavedModel, tmp_path: Path) -> None:
    directory, model = saved_model("llama2")
    path = write_legacy(tmp_path, model, Layout(2)) / "mp_rank_01/model_optim_rng.pt"
    weight = model.state_dict()["model.layers.2.mlp.down_proj.weight"].chunk(2, dim=1)[1].contiguous()
    data = bytearray(path.read_bytes())
    data[data.index(weight.numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)
    contents = open_legacy(tmp_path, trust=True, config=directory)
    assert path in _files(contents)
    for name, tensor in contents.backbone.items():
        if name != "model.layers.2.mlp.down_proj.weight":
            whole(tensor)
    with pytest.raises(DamagedError, match="layers.2.mlp.dense_4h_to_h.weight.*CRC-32") as caught:
        whole(contents.backbone["model.layers.2.mlp.down_proj.weight"])
    assert str(path) in str(caught.value)
    unverified = open_legacy(tmp_path, trust=True, config=directory, verify=False)
    assert not torch.equal(
        whole(unverified.backbone["model.layers.2.mlp.down_proj.weight"]),
        model.state_dict()["model.layers.2.mlp.down_proj.weight"],
    )


def test_files_that_are_none_of_torch_save(saved_model: SavedModel, tmp_path: Path) -> None:
    directory, model = saved_model("llama2")
    path = write_legacy(tmp_path, model, Layout()) / "mp_rank_00/model_optim_rng.pt"
    data = path.read_bytes()
    for kept in (0, 3, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:kept])
        assert str(path) in message(tmp_path, config=directory)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in message(tmp_path)
    torch.save({"model": {}}, path, _use_new_zipfile_serialization=False)
    assert "since torch 1.6" in message(tmp_path)
    path.unlink()
    os.mkfifo(path)
    assert "model_optim_rng.pt: is missing" in message(tmp_path)


# ----------------------------------------------------------------------------------------------- a real checkpoint


@pytest.mark.skipif(not (FIXTURES / "ee_llm_mlp_tp2_pp2").is_dir(), reason=f"no EE-LLM checkpoint in {FIXTURES}")
@pytest.mark.parametrize("given", [True, False])
def test_a_real_checkpoint_of_ee_llm(given: bool) -> None:
    source = FIXTURES / "ee_llm_mlp_tp2_pp2"
    hf = source / "source_hf"
    weights = {name: tensor.half() for name, tensor in load_file(hf / "model.safetensors").items()}
    contents = open_legacy(source / "checkpoint", trust=True, config=hf if given else None)
    assert_equal(dict(contents.backbone), weights)
    assert contents.exits == (ExitSpec(1, "mlp", "own"), ExitSpec(3, "mlp", "own")) and contents.steps == 1
    copied: dict[str, Tensor] = {}
    assert contents.architecture is not None
    for spec in contents.exits:
        for name, (_, origin) in exit_tensors(spec, contents.architecture).items():
            assert origin is not None
            copied[name] = weights[origin]
    assert_equal(dict(contents.exit_tensors), copied)
    expected = dataclasses.replace(read_architecture(hf), max_positions=contents.architecture.max_positions)
    assert contents.architecture == expected
