"""What several packages' tests share: tokenizers made on the spot, a tiny model with exits, and what models compute."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

TEXT = "the quick brown fox jumps over a lazy dog while seven naïve wizards write café letters in Łódź 漢字 😀"
WORDS = TEXT.split()


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Documents of 3 to 60 words, several lines each, with characters of one to four bytes."""
    source = random.Random(seed)
    return [
        "".join(source.choice(WORDS) + source.choice([" ", " ", "\n", "\n    "]) for _ in range(source.randint(3, 60)))
        for _ in range(count)
    ]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(60)


@pytest.fixture(scope="session")
def sp_model(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A SentencePiece model as Llama's: BPE, byte fallback, white space kept."""
    import sentencepiece

    directory = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.split("\n")),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return directory / "tokenizer.model"


@pytest.fixture(scope="session")
def make_hf(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Callable[..., Path]:
    """Makes Hugging Face directories around one byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )

    def make(template: str | None = None, eos: str = "<|endoftext|>") -> Path:
        directory = tmp_path_factory.mktemp("hf")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core, eos_token=eos, pad_token=eos, additional_special_tokens=special
        )
        if template is not None:
            tokenizer.chat_template = template
        tokenizer.save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def hf_dir(make_hf: Callable[..., Path]) -> Path:
    return make_hf()


@pytest.fixture(scope="session")
def fallback_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face tokenizer as Llama 2's: a space before the text, bytes for unknown characters.

    Its decoder shows a run of bytes as text only if all of the run is valid, and else each byte as U+FFFD.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("o", "x"), ("f", "ox"), ("▁", "fox"), ("▁", "▁")]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["▁", *"abcdefghijklmnopqrstuvwxyz", *("".join(pair) for pair in merges)]
    vocabulary = {name: index for index, name in enumerate(names)}
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    directory = tmp_path_factory.mktemp("fallback")
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    """``[2, 24]``, longer than the windows of the tiny models."""
    return torch.randint(0, 131, (2, 24), generator=torch.Generator().manual_seed(11))


@pytest.fixture(scope="session")
def trace() -> Callable[[Any, Tensor], dict[str, list[Tensor]]]:
    """Runs a transformers model; gives h_0 .. h_L and r_1 .. r_L, ``[seq, batch, hidden]``, both indexed by layer."""

    def run(model: Any, tokens: Tensor) -> dict[str, list[Tensor]]:
        seen: dict[str, list[Tensor]] = {"h": [], "r": [torch.empty(0)]}
        handles = []
        for layer in model.model.layers:
            handles.append(layer.register_forward_pre_hook(lambda _, args: seen["h"].append(args[0].transpose(0, 1))))
            # What the MLP half reads: through the norm before the MLP, or by the MLP itself.
            named = dict(layer.named_children())
            place = named.get("pre_feedforward_layernorm", named["post_attention_layernorm"])
            if "post_feedforward_layernorm" in named and "pre_feedforward_layernorm" not in named:
                place = named["mlp"]
            handles.append(place.register_forward_pre_hook(lambda _, args: seen["r"].append(args[0].transpose(0, 1))))
        handles.append(
            model.model.norm.register_forward_pre_hook(lambda _, args: seen["h"].append(args[0].transpose(0, 1)))
        )
        with torch.no_grad():
            model(tokens, use_cache=False)
        for handle in handles:
            handle.remove()
        return seen

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
    from megatron_ee.testing.models import save_tiny_model

    path = tmp_path_factory.mktemp("model")
    save_tiny_model("llama2", path, vocab_size=258, max_position_embeddings=64, bos_token_id=0, eos_token_id=1)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def adapter(byte_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exits after layers 1 and 2 of ``byte_model``, disturbed so that they differ."""
    from megatron_ee.checkpoint.adapter_writing import save_adapter
    from megatron_ee.checkpoint.initialise import initialise_exit
    from megatron_ee.checkpoint.loading import load_backbone
    from megatron_ee.checkpoint.saved_model import open_model
    from megatron_ee.config.exits import ExitSpec
    from megatron_ee.exits.stage import Stage
    from megatron_ee.model.setup import build_setup
    from megatron_ee.parallel.groups import process_groups

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
