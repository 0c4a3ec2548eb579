from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ee.commands.main import main
from megatron_ee.data import read
from megatron_ee.data.encode import EncodeOptions, PieceEncoder
from megatron_ee.data.indexed import file_of, open_corpus, sha256
from megatron_ee.data.prepare import _encode_all, prepare_corpus
from megatron_ee.data.read import TextPiece, read_pieces
from megatron_ee.data.tokenizer import load_tokenizer
from megatron_ee.data.write import CorpusWriter
from megatron_ee.errors import ConfigError, DataError

SUFFIXES = (".bin", ".idx", ".json", ".texts", ".mask.bin", ".mask.idx")


def documents(prefix: Path) -> list[list[int]]:
    corpus = open_corpus(prefix)
    return [corpus.tokens[i].tolist() for i in range(corpus.num_documents)]


def left_behind(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith((".", "out"))]


@pytest.mark.parametrize("kind", ["hf_dir", "sp_model"])
def test_text_and_json_lines_round_trip(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, texts: list[str], write_lines: Callable[..., Path]
) -> None:
    path = request.getfixturevalue(kind)
    plain = tmp_path / "plain.txt"
    plain.write_text(texts[0], encoding="utf-8", newline="")
    lines = write_lines("lines.jsonl", [{"body": text, "id": 1} for text in texts[1:]])
    result = prepare_corpus([plain, lines], path, tmp_path / "deep" / "corpus.v1", text_key="body")
    tokenizer = load_tokenizer(path)
    found = documents(tmp_path / "deep" / "corpus.v1")
    assert all(document[-1] == tokenizer.eos_id for document in found)
    assert [tokenizer.decode(document[:-1]) for document in found] == texts
    meta = result.metadata
    assert (meta.documents, meta.tokens, meta.trained_tokens) == (60, sum(map(len, found)), sum(map(len, found)))
    assert meta.vocab_size == tokenizer.vocab_size and meta.mask_sha256 is None
    assert meta.sha256 == sha256(file_of(tmp_path / "deep" / "corpus.v1", ".bin"))
    assert sorted(p.name for p in result.files) == [f"corpus.v1.{end}" for end in ("bin", "idx", "json", "texts")]
    assert open_corpus(tmp_path / "deep" / "corpus.v1").tokens.index.dtype == np.uint16


def test_several_processes_make_the_same_corpus(
    tmp_path: Path, sp_model: Path, texts: list[str], write_lines: Callable[..., Path]
) -> None:
    big = tmp_path / "big.txt"
    big.write_text("\n".join(texts) * 400, encoding="utf-8")
    assert len(list(read_pieces(big, lines=False))) >= 3
    lines = write_lines("lines.jsonl", [{"text": text} for text in texts])
    for workers in (1, 3):
        prepare_corpus([lines, big, lines], sp_model, tmp_path / f"out{workers}", workers=workers)
    for suffix in (".bin", ".idx", ".json"):
        assert file_of(tmp_path / "out1", suffix).read_bytes() == file_of(tmp_path / "out3", suffix).read_bytes()
    assert open_corpus(tmp_path / "out3").num_documents == 2 * len(texts) + 1


@pytest.mark.parametrize("kind", ["hf_dir", "sp_model"])
def test_a_text_read_in_pieces_has_the_tokens_of_the_whole(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = request.getfixturevalue(kind)
    text = "\n".join(texts)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())  # with a byte-order mark
    monkeypatch.setattr(read, "PIECE_BYTES", 500)
    pieces = list(read_pieces(tmp_path / "a.txt", lines=False))
    assert len(pieces) > 10 and b"".join(piece.read() for piece in pieces) == text.encode()
    assert sum(piece.size for piece in pieces) == (tmp_path / "a.txt").stat().st_size
    prepare_corpus([tmp_path / "a.txt"], path, tmp_path / "out")
    tokenizer = load_tokenizer(path)
    assert documents(tmp_path / "out") == [[*tokenizer.encode(text), tokenizer.eos_id]]


@pytest.mark.parametrize("size", [1, 7, 50, 10_000])
def test_pieces_of_lines(tmp_path: Path, size: int) -> None:
    data = b"".join(b"%d" % n * (n % 23) + b"\n" for n in range(200)) + b"no newline at the end"
    (tmp_path / "a.jsonl").write_bytes(data)
    pieces = list(read_pieces(tmp_path / "a.jsonl", True, size))
    assert b"".join(piece.read() for piece in pieces) == data
    for piece in pieces:
        assert data[piece.offset : piece.offset + piece.length] == piece.read()
        assert piece.line == 1 + data.count(b"\n", 0, piece.offset)
        assert piece.last or piece.read().endswith(b"\n")
    assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    os.truncate(tmp_path / "a.jsonl", len(data) - 1)
    with pytest.raises(DataError, match=r"a.jsonl: became shorter while it was read"):
        pieces[-1].read()


@pytest.mark.parametrize("kind", ["prefixes", "marks"])
def test_chat_masks_lie_beside_the_tokens(
    kind: str,
    make_hf: Callable[..., Path],
    templates: dict[str, str],
    tmp_path: Path,
    texts: list[str],
    write_lines: Callable[..., Path],
) -> None:
    directory = make_hf(templates[kind], eos="<|im_end|>")
    conversations = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]} for text in texts
    ]
    prefix = tmp_path / "chat"
    prepare_corpus([write_lines("chat.jsonl", conversations)], directory, prefix, chat=True, workers=2)
    corpus = open_corpus(prefix)
    assert corpus.masks is not None and corpus.num_documents == len(texts)
    tokenizer = load_tokenizer(directory)
    for index, text in enumerate(texts):
        ids, mask = corpus.tokens[index], corpus.masks[index].astype(bool)
        assert tokenizer.decode(ids[mask].tolist()) == text + "<|im_end|>"
    assert corpus.metadata is not None
    assert corpus.metadata.trained_tokens == sum(int(corpus.masks[i].sum()) for i in range(len(texts)))
    assert corpus.metadata.mask_sha256 == sha256(file_of(prefix, ".mask.bin"))


def test_a_given_template_and_conversations_in_several_documents(
    make_hf: Callable[..., Path], tmp_path: Path, write_lines: Callable[..., Path]
) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.content }}{% if loop.last and m.role == 'assistant' %}!{% endif %}|{% endfor %}"
    )
    fox, dog = ({"role": "assistant", "content": name} for name in ("fox", "dog"))
    ask = {"role": "user", "content": "?"}
    lines = write_lines("chat.jsonl", [{"messages": [ask, fox, ask, dog]}, {"messages": [ask, dog]}])
    directory = make_hf("{{ raise_exception('never this one') }}")
    for workers in (1, 2):
        prefix = tmp_path / f"chat{workers}"
        result = prepare_corpus([lines], directory, prefix, chat=True, workers=workers, chat_template=template)
        decode = load_tokenizer(directory).decode
        texts = [decode(document) for document in documents(prefix)]
        assert texts == [f"{text}<|endoftext|>" for text in ("?|fox!|", "?|fox|?|dog!|", "?|dog!|")]
        masks = open_corpus(prefix).masks
        assert masks is not None and result.metadata.documents == len(masks) == 3
        trained = [np.array(ids)[masks[i].astype(bool)].tolist() for i, ids in enumerate(documents(prefix))]
        assert [decode(ids) for ids in trained] == [f"{text}!|<|endoftext|>" for text in ("fox", "dog", "dog")]
    damaged = tmp_path / "damaged.jinja"
    damaged.write_bytes(b"\xff")
    for path, message in ((tmp_path / "none", "none: the chat template cannot be read"), (damaged, "is not UTF-8")):
        with pytest.raises(DataError, match=message):
            prepare_corpus([lines], directory, tmp_path / "no", chat=True, chat_template=path)


@pytest.mark.parametrize("chat", [False, True])
def test_a_token_that_the_model_does_not_have_is_refused_by_name(
    chat: bool, make_hf: Callable[..., Path], tmp_path: Path, write_lines: Callable[..., Path]
) -> None:
    directory = make_hf("{% for m in messages %}{{ m.content }}{% endfor %}")
    size = load_tokenizer(directory).vocab_size
    (directory / "config.json").write_text(json.dumps({"vocab_size": size}))
    (directory / "added_tokens.json").write_text(json.dumps({"<pad>": size}))
    for text in ("fox", "fox<pad>"):
        record = {"messages": [{"role": "assistant", "content": text}]} if chat else {"text": text}
        lines = write_lines("a.jsonl", [record])
        if text == "fox":
            metadata = prepare_corpus([lines], directory, tmp_path / "out", chat=chat).metadata
            assert metadata.vocab_size == size + 1 and metadata.largest_id == max(documents(tmp_path / "out")[0]) < size
            open_corpus(tmp_path / "out").check_vocabulary(size)
        else:
            message = rf"a.jsonl, line 1: token '<pad>' \(id {size}\) is not in the model's vocabulary of {size} tokens"
            with pytest.raises(DataError, match=message):
                prepare_corpus([lines], directory, tmp_path / "other", chat=chat)
    (directory / "config.json").unlink()  # a tokenizer without its model: only the model can tell
    prefix = tmp_path / "other"
    prepare_corpus([lines], directory, prefix, chat=chat)
    with pytest.raises(DataError, match=rf"other: holds token '<pad>' \(id {size}\), which is not in the model's"):
        open_corpus(prefix).check_vocabulary(size)


def test_blank_and_empty_lines_are_passed_over(tmp_path: Path, sp_model: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fox"}\n\n   \n{"text": ""}\n{"text": "dog"}')
    result = prepare_corpus([tmp_path / "a.jsonl"], sp_model, tmp_path / "out")
    assert result.metadata.documents == 2 and result.skipped == 1


def test_beginning_of_text(tmp_path: Path, sp_model: Path, hf_dir: Path, write_lines: Callable[..., Path]) -> None:
    path = write_lines("a.jsonl", [{"text": "fox"}, {"text": "dog"}])
    prepare_corpus([path], sp_model, tmp_path / "out", prepend_bos=True)
    assert [document[0] for document in documents(tmp_path / "out")] == [load_tokenizer(sp_model).bos_id] * 2
    with pytest.raises(DataError, match="no beginning-of-text token"):
        prepare_corpus([path], hf_dir, tmp_path / "other", prepend_bos=True)


BAD_LINES: list[tuple[bytes, str]] = [
    (b'{"text": "fox"}\n{"text": "d\xffg"}\n', r"line 2: invalid UTF-8 at byte 27 .*convert it"),
    (b'{"text": "fox"}\n\n{"text": fox}\n', r"line 3: invalid JSON .*each line must be one JSON object"),
    (b'{"text": "fox"}\n["text"]\n', r"line 2: each line must be one JSON object, not list"),
    (b'{"text": "fox"}\n{"txt": "dog"}\n', r"line 2: no key 'text'; the line has: txt"),
    (b'{"text": "fox"}\n{"text": 3}\n', r"line 2: 'text' must be text, not int"),
    (b'{"text": "fox"}\n{"text": "\\ud800"}\n', r"line 2: holds half a surrogate pair"),
    (b'{"text": ""}\n', r"holds no document"),
    (b"\n\n", r"holds no document"),
    (b"\xef\xbb\xbf", r"holds no text"),
]


@pytest.mark.parametrize(("data", "message"), BAD_LINES)
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_bad_lines(data: bytes, message: str, workers: int, tmp_path: Path, sp_model: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as error:
        prepare_corpus([path], sp_model, tmp_path / "out", workers=workers)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    assert left_behind(tmp_path) == []


def test_line_numbers_hold_beyond_the_first_piece(tmp_path: Path, sp_model: Path) -> None:
    lines = ['{"text": "the quick brown fox"}'] * 50_000
    lines[41_233] = '{"text": "the quick'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match="line 41234: invalid JSON"):
        prepare_corpus([tmp_path / "a.jsonl"], sp_model, tmp_path / "out", workers=2)
    assert left_behind(tmp_path) == []


def test_bad_text(tmp_path: Path, sp_model: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fox\ndog\nd\xc3\nx")
    with pytest.raises(DataError, match=r"a.txt, line 3: invalid UTF-8 at byte 9"):
        prepare_corpus([tmp_path / "a.txt"], sp_model, tmp_path / "out")
    (tmp_path / "a.txt").write_text(" \n ")
    with pytest.raises(DataError, match=r"a.txt: holds only white space"):
        prepare_corpus([tmp_path / "a.txt"], sp_model, tmp_path / "out")


def test_bad_chat(
    tmp_path: Path, chat_dir: Path, hf_dir: Path, sp_model: Path, write_lines: Callable[[str, list[Any]], Path]
) -> None:
    good = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "fox"}]}
    for record, message in (
        ({"text": "fox"}, r"chat.jsonl, line 2: no key 'messages'"),
        ({"messages": good["messages"][:1]}, r"chat.jsonl, line 2: no token of this conversation"),
        ({"messages": "fox"}, r"chat.jsonl, line 2: messages must be a list"),
    ):
        with pytest.raises(DataError, match=message):
            prepare_corpus([write_lines("chat.jsonl", [good, record])], chat_dir, tmp_path / "out", chat=True)
    for tokenizer in (hf_dir, sp_model):
        with pytest.raises(DataError, match="no chat template"):
            prepare_corpus([write_lines("chat.jsonl", [good])], tokenizer, tmp_path / "out", chat=True)
    assert left_behind(tmp_path) == []


def test_bad_inputs(tmp_path: Path, sp_model: Path) -> None:
    good, empty = tmp_path / "good.txt", tmp_path / "empty.txt"
    good.write_text("fox")
    empty.touch()
    for inputs, message in (
        ([good, tmp_path / "gone.txt"], "gone.txt: no such input file"),
        ([good, empty], "empty.txt: the file is empty"),
        ([tmp_path], "not a file"),
        ([], "--input: give at least one file"),
    ):
        with pytest.raises(DataError, match=message):
            prepare_corpus(inputs, sp_model, tmp_path / "out")
    with pytest.raises(ConfigError, match="--workers: must be at least 1, not 0"):
        prepare_corpus([good], sp_model, tmp_path / "out", workers=0)
    with pytest.raises(ConfigError, match="is a directory"):
        prepare_corpus([good], sp_model, tmp_path)
    with pytest.raises(DataError, match=r"good.txt/out: cannot be written: .*File exists"):
        prepare_corpus([good], sp_model, good / "out")
    assert left_behind(tmp_path) == []


def test_an_existing_corpus_is_replaced_only_when_asked(
    tmp_path: Path, chat_dir: Path, sp_model: Path, write_lines: Callable[..., Path]
) -> None:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "fox"}]
    chat = write_lines("chat.jsonl", [{"messages": messages}])
    text = write_lines("text.jsonl", [{"text": "dog"}])
    prepare_corpus([chat], chat_dir, tmp_path / "out", chat=True)
    before = {s: file_of(tmp_path / "out", s).read_bytes() for s in SUFFIXES}
    with pytest.raises(ConfigError, match=r"out.idx: exists already; .*--overwrite"):
        prepare_corpus([text], sp_model, tmp_path / "out")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fox"}\nx')
    with pytest.raises(DataError, match="line 2"):
        prepare_corpus([broken], sp_model, tmp_path / "out", overwrite=True)
    assert before == {s: file_of(tmp_path / "out", s).read_bytes() for s in SUFFIXES}  # a failure leaves the old one
    prepare_corpus([text], sp_model, tmp_path / "out", overwrite=True)
    assert open_corpus(tmp_path / "out").masks is None and not file_of(tmp_path / "out", ".mask.idx").exists()


@pytest.mark.parametrize("name", ["out.json", "out.bin"])
def test_what_others_wrote_is_never_overwritten(
    name: str, tmp_path: Path, sp_model: Path, write_lines: Callable[..., Path]
) -> None:
    text = write_lines("text.jsonl", [{"text": "dog"}])
    (tmp_path / name).write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=rf"{name}: exists, and .*out.json does not say that prepare-data wrote it"):
        prepare_corpus([text], sp_model, tmp_path / "out", overwrite=True)
    assert (tmp_path / name).read_text() == '{"model_type": "llama"}'


def test_a_signal_leaves_nothing(
    tmp_path: Path,
    sp_model: Path,
    write_lines: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = write_lines("text.jsonl", [{"text": "dog"}])
    monkeypatch.setattr(CorpusWriter, "finish", lambda self: signal.raise_signal(signal.SIGTERM))
    output = tmp_path / "new" / "out"
    arguments = ["--input", str(text), "--tokenizer", str(sp_model), "--output", str(output)]
    assert main(["prepare-data", *arguments]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.endswith("megatron-ee prepare-data: interrupted by SIGTERM\n")
    assert list(output.parent.iterdir()) == []


def test_stopping_does_not_wait_for_pieces_being_tokenised(tmp_path: Path, sp_model: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"the dog " * (1 << 20))  # takes seconds
    text = TextPiece(path, False, 0, 8 << 20, 8 << 20, 1, True, True)
    pieces = [replace(text, length=7), *[text] * 4]
    options = EncodeOptions(sp_model, "text", False, False)
    results = _encode_all(pieces, PieceEncoder(options), options, 2)
    next(results)
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 2


def test_an_input_is_never_overwritten(tmp_path: Path, sp_model: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"text": "fox"}))
    with pytest.raises(ConfigError, match="is an input"):
        prepare_corpus([path], sp_model, tmp_path / "data", overwrite=True)
    assert json.loads(path.read_text()) == {"text": "fox"}


@pytest.mark.slow
def test_no_process_outlives_the_command(tmp_path: Path, sp_model: Path) -> None:
    path = tmp_path / "input.jsonl"
    path.write_text('{"text": "fox"}\n' * 300_000)
    script = (
        "import sys, megatron_ee.progress as progress\n"
        "from megatron_ee.data.prepare import prepare_corpus\n"
        "progress.LINE_SECONDS = 0\n"
        f"prepare_corpus([{str(path)!r}] * 1000, {str(sp_model)!r}, {str(tmp_path / 'out')!r}, workers=2)"
    )
    root = Path(read.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
        start_new_session=True,
    )
    assert process.stderr is not None
    process.stderr.readline()  # workers have delivered
    process.kill()
    # The workers hold stderr too: it ends when the last of them has.
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not (tmp_path / "out.idx").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_line(tmp_path: Path, sp_model: Path, texts: list[str]) -> None:
    (tmp_path / "a.txt").write_text("\n".join(texts) * 20)
    (tmp_path / f".out.tmp-{os.getpid()}.bin").symlink_to("/dev/full")
    with pytest.raises(DataError, match="out: cannot be written: .*No space left"):
        prepare_corpus([tmp_path / "a.txt"], sp_model, tmp_path / "out")
    assert left_behind(tmp_path) == []
