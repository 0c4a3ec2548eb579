"""Tokenises text, JSON lines and chat JSON lines into an indexed corpus, with several processes."""

from __future__ import annotations

import itertools
import json
import multiprocessing  # noqa: TID251  with the processes it starts
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor  # noqa: TID251  with the processes it starts
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from megatron_ee.children import follow
from megatron_ee.data.encode import Encoded, EncodeOptions, PieceEncoder
from megatron_ee.data.fingerprint import tokenizer_digests
from megatron_ee.data.indexed import CorpusMetadata, file_of
from megatron_ee.data.read import JSON_LINES, TextPiece, check_inputs, read_pieces
from megatron_ee.data.tokenizer_files import read_template
from megatron_ee.data.write import SUFFIXES, CorpusWriter
from megatron_ee.errors import ConfigError, DataError
from megatron_ee.progress import Progress, track

SIGNAL_SECONDS = 0.5
"""Seconds to wait for a signal after a worker ended: a signal to the whole job may reach the worker first."""
_PER_WORKER = 4  # pieces in flight per process: enough to keep it busy, few enough to save memory
_ONE_PROCESS_BYTES = 4 << 20  # below this size, starting processes takes longer than the work


@dataclass(frozen=True)
class PrepareResult:
    """Result of ``prepare_corpus``.

    Attributes:
        metadata: contents of ``PREFIX.json``.
        skipped: JSON lines whose text was empty.
        files: the files written.
    """

    metadata: CorpusMetadata
    skipped: int
    files: tuple[Path, ...]


def prepare_corpus(
    inputs: Sequence[str | Path],
    tokenizer_path: str | Path,
    output_prefix: str | Path,
    text_key: str = "text",
    chat: bool = False,
    workers: int | None = None,
    prepend_bos: bool = False,
    overwrite: bool = False,
    chat_template: str | Path | None = None,
) -> PrepareResult:
    """Tokenise files into ``OUTPUT_PREFIX.bin/.idx/.json`` (and ``.mask.bin/.idx`` for chat data).

    Files named ``*.jsonl``, ``*.ndjson`` or ``*.json`` hold one JSON object per line, each a document; any other file
    is one document of UTF-8 text. With ``chat`` every file holds one ``{"messages": [...]}`` per line. Documents keep
    their order and each ends with the tokenizer's end-of-text token. The output files appear only when everything is
    done.

    Args:
        text_key: key of the text in JSON lines; chat data has ``messages``.
        workers: number of processes; default: one per core, or one for small inputs. It does not change the result.
        prepend_bos: begin each document with the beginning-of-text token (chat templates write their own).
        overwrite: replace an existing corpus.
        chat_template: a jinja file that chat data is rendered with instead of the tokenizer's own template.

    Raises:
        DataError: an input or the tokenizer is unusable, or the output cannot be written. The message names the file
            and the line, if there is one.
        ConfigError: ``workers`` is not positive, or the output is there already, a directory or an input.
    """
    paths = [Path(path) for path in inputs]
    prefix = Path(output_prefix)
    total = check_inputs(paths)
    for path in paths:
        if path.resolve() in {file_of(prefix, suffix).resolve() for suffix in SUFFIXES}:
            raise ConfigError(f"{path}: is an input, and --output {prefix} would overwrite it; choose another --output")
    template = None if chat_template is None else read_template(Path(chat_template))
    options = EncodeOptions(Path(tokenizer_path), text_key, chat, prepend_bos, template)
    encoder = PieceEncoder(options)  # an unusable tokenizer is reported before anything is read
    if workers is None:
        workers = _cores() if total >= _ONE_PROCESS_BYTES else 1
    if workers < 1:
        raise ConfigError(f"--workers: must be at least 1, not {workers}")
    with CorpusWriter(prefix, encoder.tokenizer.vocab_size, chat, overwrite) as writer:
        pieces = (piece for path in paths for piece in read_pieces(path, chat or path.suffix in JSON_LINES))
        with track(total, "B", f"tokenising to {prefix}") as progress:
            skipped = _add_all(writer, _encode_all(pieces, encoder, options, workers), progress)
        metadata = CorpusMetadata(
            tokenizer=str(tokenizer_path),
            vocab_size=encoder.tokenizer.vocab_size,
            eos_id=encoder.eos_id,
            largest_id=writer.largest_id,
            largest_token=encoder.tokenizer.name_of(writer.largest_id),
            tokenizer_sha256=next(iter(tokenizer_digests(Path(tokenizer_path))), None),
            **writer.finish(),
        )
        files = writer.commit(json.dumps(metadata.model_dump(), indent=2) + "\n")
    return PrepareResult(metadata, skipped, files)


def _add_all(writer: CorpusWriter, results: Iterable[tuple[TextPiece, Encoded]], progress: Progress) -> int:
    """Write the results in order; the number of lines skipped."""
    skipped = 0
    for path, group in itertools.groupby(results, key=lambda result: result[0].path):
        before = writer.documents
        for piece, encoded in group:
            writer.add(encoded, str(path))
            skipped += encoded.skipped
            progress.advance(piece.size)
        if writer.documents == before:
            raise DataError(f"{path}: holds no document; leave it out, or give another")
    return skipped


def _encode_all(
    pieces: Iterable[TextPiece], encoder: PieceEncoder, options: EncodeOptions, workers: int
) -> Iterator[tuple[TextPiece, Encoded]]:
    """Each piece with its tokens, in order. The number of pieces in flight, and so the memory, is bounded."""
    if workers == 1:
        for piece in pieces:
            yield piece, encoder(piece)
        return
    # Not forked from this process, since the tokenizer library's threads do not survive a fork. The server imports once
    # for all workers.
    context = multiprocessing.get_context("forkserver")
    slow_imports = [
        "tokenizers",
        "sentencepiece",
        *(["transformers.utils.chat_template_utils"] if options.chat else []),
    ]
    context.set_forkserver_preload([__name__, *slow_imports])
    others = set(multiprocessing.active_children())  # the caller's own
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(options,))
    waiting: deque[tuple[TextPiece, Future[Encoded]]] = deque()
    try:
        for piece in pieces:
            waiting.append((piece, pool.submit(_encode, piece)))
            if len(waiting) >= _PER_WORKER * workers:
                oldest, future = waiting.popleft()
                yield oldest, future.result()
        for oldest, future in waiting:
            yield oldest, future.result()
    except BrokenProcessPool:
        time.sleep(SIGNAL_SECONDS)
        raise DataError("a tokenising process died, perhaps for lack of memory; try fewer --workers") from None
    except BaseException:  # the pieces in flight are not needed, and finishing them takes seconds
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: PieceEncoder | None = None  # of this worker process


def _start_worker(options: EncodeOptions) -> None:
    global _encoder
    follow(multiprocessing.parent_process())
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = PieceEncoder(options)


def _encode(piece: TextPiece) -> Encoded:
    assert _encoder is not None
    return _encoder(piece)


def _cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
