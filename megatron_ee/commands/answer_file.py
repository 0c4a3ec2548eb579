"""A file of answers that survives an interruption: a journal while prompts are answered, in their order at the end.

The journal is ``FILE.partial``. Each line holds the answers to one prompt, in the order in which they were finished, so
that no finished answer is lost while an earlier prompt still runs. ``FILE.partial.info.json`` says what it was made
from. When all prompts are answered, the answers are written to ``FILE``, one per line in the order of the prompts, and
the info to ``FILE.info.json``.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ee.checkpoint.atomic import new_file, write_all, write_json
from megatron_ee.config.untrusted import read_json
from megatron_ee.errors import CheckpointError, ConfigError, storage_errors

SYNC_SECONDS = 10.0
MADE_BY = "megatron-ee regenerate"
_DIGESTS = {"model_sha256": "model", "tokenizer_sha256": "tokenizer or chat template", "prompts_sha256": "prompts"}


@dataclass
class AnswerFile:
    """The growing file. ``open_answers`` makes it.

    Attributes:
        path: final name.
        about: what the answers are made from.
        prompts: line numbers of the prompts, in order.
        done: by line number of each answered prompt, the position of its line in the journal.
        answers: number of answers.
        cut: answers that ended at a length limit.
    """

    path: Path
    about: Mapping[str, Any]
    prompts: Sequence[int]
    done: dict[int, tuple[int, int]]
    answers: int
    cut: int
    _fd: int
    _size: int
    _synced: float = 0.0

    def append(self, prompt: int, answers: Sequence[Mapping[str, Any]]) -> None:
        """Write the answers to the prompt of this line number, which may be none.

        Raises:
            CheckpointError: the disk is full or the like.
        """
        line = _encoded({"line": prompt, "answers": answers})
        with storage_errors(_partial(self.path), "write"):
            write_all(self._fd, memoryview(line))
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                os.fsync(self._fd)
                self._synced = time.monotonic()
        self.done[prompt] = self._size, len(line)
        self._size += len(line)
        self.answers += len(answers)
        self.cut += sum(answer["finish_reason"] != "eos" for answer in answers)

    def commit(self) -> None:
        """All prompts are answered: write the file, then remove the journal.

        Raises:
            CheckpointError: the file cannot be written.
        """
        partial = _partial(self.path)
        with new_file(self.path) as fd:
            for prompt in self.prompts:
                position, size = self.done[prompt]
                for answer in json.loads(os.pread(self._fd, size, position))["answers"]:
                    write_all(fd, memoryview(_encoded(answer)))
        write_json(_info(self.path), self.about)
        # Until here a rerun with --resume would write the file again.
        with storage_errors(partial, "remove"):
            partial.unlink()
            _info(partial).unlink()


def _encoded(value: Mapping[str, Any]) -> bytes:
    """A line of JSON. Half a surrogate pair has no bytes of its own; JSON spells it as an escape."""
    return f"{json.dumps(value, ensure_ascii=False)}\n".encode("utf-8", "backslashreplace")


def is_complete(path: Path, about: Mapping[str, Any]) -> bool:
    """Whether ``path`` holds all answers that ``about`` describes."""
    return path.is_file() and not _partial(path).exists() and not _changes(_read_info(path), about)


@contextlib.contextmanager
def open_answers(
    path: Path, about: Mapping[str, Any], prompts: Sequence[int], *, resume: bool, overwrite: bool
) -> Iterator[AnswerFile]:
    """Begin a file of answers, or continue one.

    Args:
        path: of the finished file.
        about: what the answers are made from: digests, ``settings``, and paths for the reader.
        prompts: line numbers of the prompts, in order.
        resume: continue an unfinished file if there is one.
        overwrite: replace a finished file that this command wrote, and an unfinished one.

    Raises:
        ConfigError: there is such a file, and neither ``resume`` nor ``overwrite`` is given; or it was begun with
            something else.
        CheckpointError: it cannot be read or written, or another process writes it.
    """
    partial = _partial(path)
    if path.is_dir() or not path.name:
        raise ConfigError(f"--output: {path} is a directory; name a file")
    begun = partial.is_file() and partial.stat().st_size > 0
    if begun and not (resume or overwrite):
        raise ConfigError(
            f"--output: {partial} is unfinished; give --resume to continue it, or --overwrite to begin again"
        )
    if not (begun and resume):
        _check_replaceable(path, overwrite)
    with storage_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _lock(fd, partial)
        file = AnswerFile(path, about, prompts, {}, 0, 0, fd, 0)
        if begun and resume:
            _continue(file, partial)
        else:
            with storage_errors(partial, "write"):
                os.ftruncate(fd, 0)
            write_json(_info(partial), about)
        yield file
    finally:
        os.close(fd)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _info(path: Path) -> Path:
    return path.with_name(f"{path.name}.info.json")


def _read_info(path: Path) -> dict[str, Any]:
    """What lies beside a file of answers; empty if there is nothing of this command's."""
    with contextlib.suppress(CheckpointError):
        info = read_json(_info(path))
        if isinstance(info, dict) and info.get("made_by") == MADE_BY:
            return info
    return {}


def _check_replaceable(path: Path, overwrite: bool) -> None:
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise ConfigError(f"--output: {path} exists already; choose another name or give --overwrite")
    if not _read_info(path):
        raise ConfigError(
            f"--output: {path} exists, and {_info(path)} does not say that {MADE_BY} wrote it; choose another name"
        )


def _lock(fd: int, partial: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(
            f"{partial}: another process is writing it; wait for it or choose another output"
        ) from None
    except OSError:  # a file system without locks
        pass


def _continue(file: AnswerFile, partial: Path) -> None:
    """Take over a journal, up to a line that a kill has torn."""
    info = _read_info(partial)
    if not info:
        raise ConfigError(
            f"--resume: {_info(partial)} is missing or damaged, so {partial} cannot be continued; give --overwrite to "
            "begin again"
        )
    changes = _changes(info, file.about)
    if changes:
        raise ConfigError(
            f"--resume: {partial} was begun with {', '.join(changes)}; give the same, or --overwrite to begin again"
        )
    left = set(file.prompts)
    with storage_errors(partial, "read"), open(partial, "rb") as journal:
        for number, line in enumerate(journal, start=1):
            if not line.endswith(b"\n"):
                break
            prompt, reasons = _read_line(line, f"{partial}, line {number}", left)
            left.remove(prompt)
            file.done[prompt] = file._size, len(line)
            file._size += len(line)
            file.answers += len(reasons)
            file.cut += sum(reason != "eos" for reason in reasons)
    with storage_errors(partial, "write"):
        os.ftruncate(file._fd, file._size)
        os.lseek(file._fd, file._size, os.SEEK_SET)


def _read_line(line: bytes, where: str, left: Collection[int]) -> tuple[int, list[str]]:
    """The line number of the prompt of a journal's line, and why its answers ended."""
    try:
        found = json.loads(line)
        prompt, reasons = found["line"], [answer["finish_reason"] for answer in found["answers"]]
        if prompt in left and all(isinstance(reason, str) for reason in reasons):
            return prompt, reasons
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise CheckpointError(f"{where}: does not answer one of the prompts that are left; give --overwrite to begin again")


def _changes(recorded: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    """What differs between two descriptions, in words."""
    changes = [f"another {name}" for key, name in _DIGESTS.items() if recorded.get(key) != about[key]]
    before, now = recorded.get("settings"), about["settings"]
    if not isinstance(before, dict):
        return [*changes, "unknown settings"]
    return changes + [
        f"{key} {json.dumps(before.get(key))}, not {json.dumps(value)}"
        for key, value in now.items()
        if before.get(key) != value
    ]
