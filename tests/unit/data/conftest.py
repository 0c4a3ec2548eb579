"""Tokenizers trained on the spot, and corpora made with them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TEXT = "the quick brown fox jumps over a lazy dog while seven naïve wizards write café letters in Łódź 漢字 😀"
WORDS = TEXT.split()

# ChatML, as Qwen has it, without and with generation marks.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


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
def chat_dir(make_hf: Callable[..., Path]) -> Path:
    """A chat tokenizer whose end-of-text is its end of turn, and its padding too."""
    return make_hf(CHATML, eos="<|im_end|>")


@pytest.fixture(scope="session")
def templates() -> dict[str, str]:
    """The same chat template without and with generation marks."""
    return {"prefixes": CHATML, "marks": CHATML_MARKED}


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[[str, list[Any]], Path]:
    """Writes JSON lines."""

    def write(name: str, records: list[Any]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_corpus(tmp_path: Path) -> Callable[..., Path]:
    """Writes a corpus of given token ids, one list per document, straight with megatron-core's builder."""

    def write(name: str, documents: list[list[int]], masks: list[list[int]] | None = None) -> Path:
        from megatron_ee.data.indexed import indexed_dataset

        module = indexed_dataset()
        prefix = tmp_path / name
        for suffix, lists, dtype in (("", documents, np.int32), (".mask", masks, np.uint8)):
            if lists is None:
                continue
            builder = module.IndexedDatasetBuilder(f"{prefix}{suffix}.bin", dtype=dtype)
            for values in lists:
                builder.add_document(np.array(values), [len(values)])
            builder.finalize(f"{prefix}{suffix}.idx")
        return prefix

    return write
