"""Chat tokenizers, and corpora."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
