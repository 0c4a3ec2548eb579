"""Stages whose exits differ in what they say, so that tokens leave at all of them; and what a full pass says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.checkpoint.adapter_writing import save_adapter
from megatron_ee.checkpoint.initialise import initialise_exit
from megatron_ee.checkpoint.loading import load_backbone
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.stage import Stage
from megatron_ee.model.setup import build_setup
from megatron_ee.parallel.groups import process_groups
from megatron_ee.testing.models import save_tiny_model


@pytest.fixture(scope="module")
def exit_stage(
    saved_model: Callable[..., tuple], load_stage: Callable[..., Stage]
) -> Callable[[str, Sequence[ExitSpec]], Stage]:
    """Gives a float32 stage of a family with all layers and these exits, disturbed and made confident."""
    made: dict[tuple, Stage] = {}

    def make(family: str, specs: Sequence[ExitSpec]) -> Stage:
        key = (family, *specs)
        if key not in made:
            stage = load_stage(saved_model(family)[0], specs)
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for exit_ in stage.exits:
                    for parameter in exit_.parameters():
                        if parameter.requires_grad:
                            noise = torch.randn(parameter.shape, generator=generator)
                            parameter += 0.05 * noise.to(parameter.device)
                    if exit_.spec.head == "own":
                        exit_.head.matrix.weight *= 3
            made[key] = stage
        return made[key]

    return make


@pytest.fixture(scope="session")
def every_logit() -> Callable[[Stage, Sequence[int]], dict[int, Tensor]]:
    """Gives the logits ``[tokens, vocab]`` of all exits, by layer, and of the final one, by the number after it.

    One pass of all tokens through all layers, without cache: at each position what computing everything anew says.
    """

    @torch.no_grad()
    def run(stage: Stage, ids: Sequence[int]) -> dict[int, Tensor]:
        positions = stage.backbone.positions(len(ids))
        h = stage.backbone.embed(torch.tensor([list(ids)], device=platform.device()))
        h, taps = stage.run_layers(h, positions, to_end=True)
        exits = {e.spec.layer: e.head.logits(e.features(taps[e.spec.layer], positions))[:, 0] for e in stage.exits}
        final = stage.setup.architecture.num_layers + 1
        return {**exits, final: stage.final_logits(stage.final_features(h))[:, 0]}

    return run


@pytest.fixture(scope="session")
def save_tokenizer() -> Callable[..., None]:
    """Saves a tokenizer to which every byte is a token; with ``bos``, texts begin with ``<s>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def save(directory: Path, *, bos: bool = True, extra: int = 0, template: str | None = None) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        names = ["<s>", "</s>", *alphabet, *(f"<extra{number}>" for number in range(extra))]
        core = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        if bos:
            core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(directory)

    return save


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory: pytest.TempPathFactory, save_tokenizer: Callable[..., None]) -> Path:
    """A model of 64 positions with a tokenizer that fits it."""
    path = tmp_path_factory.mktemp("model")
    save_tiny_model("llama2", path, vocab_size=258, max_position_embeddings=64, bos_token_id=0, eos_token_id=1)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def adapter(byte_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exits after layers 1 and 2, disturbed so that they differ."""
    path = tmp_path_factory.mktemp("adapter") / "adapter"
    model = open_model(byte_model)
    specs = [ExitSpec(1), ExitSpec(2, "layer")]
    with process_groups() as groups:
        stage = Stage(build_setup(model.architecture, torch.float32, groups), range(1, 5), specs, final_exit=True)
        load_backbone(stage, model)
        generator = torch.Generator().manual_seed(3)
        for exit_ in stage.exits:
            initialise_exit(exit_, model, 1)
            with torch.no_grad():
                for parameter in exit_.parameters():
                    if parameter.requires_grad:
                        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        about = {"base_model": str(byte_model), "backbone_sha256": model.digest(), "steps": 0, "extra": {}}
        save_adapter(path, stage.exits, specs, groups, **about)
    return path
