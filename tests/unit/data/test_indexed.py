from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ee.data.indexed import file_of, frequent_tokens, open_corpus
from megatron_ee.data.prepare import prepare_corpus
from megatron_ee.data.tokenizer import load_tokenizer
from megatron_ee.errors import DataError


@pytest.fixture
def prefix(tmp_path: Path, sp_model: Path, write_lines: Callable[..., Path], texts: list[str]) -> Path:
    prepare_corpus([write_lines("a.jsonl", [{"text": text} for text in texts])], sp_model, tmp_path / "corpus")
    return tmp_path / "corpus"


def test_missing_files(prefix: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.idx: not found; .*prepare-data --output"):
        open_corpus(tmp_path / "none")
    file_of(prefix, ".bin").unlink()
    with pytest.raises(DataError, match=r"corpus.bin: not found"):
        open_corpus(prefix)


def test_truncated_data(prefix: Path) -> None:
    data = file_of(prefix, ".bin").read_bytes()
    file_of(prefix, ".bin").write_bytes(data[:-2])
    with pytest.raises(DataError, match=rf"corpus.bin: {len(data) - 2} bytes, but .*corpus.idx says {len(data)}"):
        open_corpus(prefix)
    file_of(prefix, ".bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"corpus.bin: empty"):
        open_corpus(prefix)


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-8], lambda d: d[:20], lambda d: b"x" + d[1:], lambda d: d[:-8] + bytes(8)]
)
def test_damaged_index(prefix: Path, damage: Callable[[bytes], bytes], capfd: pytest.CaptureFixture[str]) -> None:
    path = file_of(prefix, ".idx")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"corpus.idx: damaged"):
        open_corpus(prefix)
    assert "Exception ignored" not in capfd.readouterr().err


def test_metadata_that_does_not_belong(prefix: Path) -> None:
    path = file_of(prefix, ".json")
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "tokens": values["tokens"] + 1}))
    with pytest.raises(DataError, match=r"corpus.json: its counts are not those"):
        open_corpus(prefix)
    path.write_text("{")
    with pytest.raises(DataError, match=r"corpus.json: damaged"):
        open_corpus(prefix)
    path.write_text(json.dumps({**values, "mask_sha256": "0"}))
    with pytest.raises(DataError, match=r"corpus.mask.bin: not found"):
        open_corpus(prefix)


def test_masks_must_match_the_tokens(write_corpus: Callable[..., Path]) -> None:
    good = open_corpus(write_corpus("good", [[1, 2, 3], [4]], [[0, 1, 1], [1]]))
    assert good.masks is not None and good.masks[0].tolist() == [0, 1, 1]
    with pytest.raises(DataError, match=r"bad.mask.idx: does not have the documents"):
        open_corpus(write_corpus("bad", [[1, 2, 3], [4]], [[0, 1], [1, 1]]))


def test_vocabulary(prefix: Path, sp_model: Path) -> None:
    corpus = open_corpus(prefix)
    largest = int(corpus.every_token().max())
    corpus.check_vocabulary(largest + 1)
    larger = corpus.metadata.model_copy(update={"vocab_size": 500})  # more tokens do no harm that do not occur
    dataclasses.replace(corpus, metadata=larger).check_vocabulary(largest + 1)
    name = re.escape(repr(load_tokenizer(sp_model).name_of(largest)))
    message = rf"holds token {name} \(id {largest}\), .* model's vocabulary of {largest} tokens; prepare the data"
    with pytest.raises(DataError, match=message):
        corpus.check_vocabulary(largest)
    older = corpus.metadata.model_copy(update={"largest_id": None, "largest_token": None})
    with pytest.raises(DataError, match=rf"holds token id {largest}, "):
        dataclasses.replace(corpus, metadata=older).check_vocabulary(largest)


def test_datasets_of_other_tools(write_corpus: Callable[..., Path]) -> None:
    corpus = open_corpus(write_corpus("other", [[1, 2, 3], [70_000]]))
    assert corpus.metadata is None and corpus.masks is None and corpus.num_tokens == 4
    corpus.check_vocabulary(70_001)
    with pytest.raises(DataError, match="holds token id 70000, "):
        corpus.check_vocabulary(70_000)


def test_fingerprint_tells_content_apart(write_corpus: Callable[..., Path]) -> None:
    corpora = [
        write_corpus("a", [[1, 2], [3]]),
        write_corpus("b", [[1], [2, 3]]),
        write_corpus("c", [[1, 2], [4]]),
        write_corpus("d", [[1, 2], [3]], [[1, 1], [1]]),
    ]
    assert len({open_corpus(path).fingerprint for path in corpora}) == 4
    assert open_corpus(write_corpus("e", [[1, 2], [3]])).fingerprint == open_corpus(corpora[0]).fingerprint


def test_a_fingerprint_reads_samples_of_large_files(
    write_corpus: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = write_corpus("a", [list(range(1000))] * 2)  # 8000 bytes
    whole = open_corpus(prefix).fingerprint
    monkeypatch.setattr("megatron_ee.data.indexed.BLOCK", 40)
    monkeypatch.setattr("megatron_ee.data.indexed.BLOCKS", 3)
    sampled = open_corpus(prefix).fingerprint
    found = set()
    for place in (0, 2000, 3990, 7999):  # first, between two samples, middle, last
        content = bytearray(file_of(prefix, ".bin").read_bytes())
        content[place] ^= 1
        file_of(prefix, ".bin").write_bytes(content)
        found.add(open_corpus(prefix).fingerprint)
        content[place] ^= 1
        file_of(prefix, ".bin").write_bytes(content)
    assert whole != sampled and len(found) == 4 and sampled in found


def test_the_largest_token_is_found_in_parts(
    write_corpus: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_ee.data.indexed.SCANNED", 3)
    corpus = open_corpus(write_corpus("a", [[1, 2, 9], [3, 4], [5]]))
    assert corpus.largest_id() == 9


def test_frequent_tokens(write_corpus: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write_corpus("corpus", [[5, 5, 5, 9, 9], [2, 9, 7, 7]])
    assert frequent_tokens(prefix, 2, 10) == [5, 9]
    assert frequent_tokens(prefix, 100, 10) == [2, 5, 7, 9]
    with pytest.raises(DataError, match="holds token id 9, which is not in the model's vocabulary of 9"):
        frequent_tokens(prefix, 2, 9)
    monkeypatch.setattr("megatron_ee.data.indexed.COUNTED", 3)
    assert frequent_tokens(prefix, 2, 10) == [5]
