"""A file of answers that is written line by line, and continued after an interruption.

While it grows it is ``FILE.partial``, and ``FILE.partial.info.json`` says what it was made from. When all prompts are
answered, both take their final names, ``FILE`` and ``FILE.info.json``.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ee.checkpoint.atomic import fsync_directory, write_all, write_json
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
        done: how many of the prompts are answered.
        answers: number of lines.
        cut: lines whose answer ended at a length limit.
    """

    path: Path
    done: int
    answers: int
    cut: int
    _fd: int
    _synced: float = 0.0

    def append(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """Write the answers to the next prompt, which may be none.

        Raises:
            CheckpointError: the disk is full or the like.
        """
        lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        with storage_errors(_partial(self.path), "write"):
            # Half a surrogate pair has no bytes of its own; JSON spells it as an escape.
            write_all(self._fd, memoryview(lines.encode("utf-8", "backslashreplace")))
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                os.fsync(self._fd)
                self._synced = time.monotonic()
        self.done += 1
        self.answers += len(answers)
        self.cut += sum(answer["finish_reason"] != "eos" for answer in answers)

    def commit(self) -> None:
        """All prompts are answered: give the file its name.

        Raises:
            CheckpointError: it cannot be renamed.
        """
        partial = _partial(self.path)
        with storage_errors(self.path, "write"):
            os.fsync(self._fd)
            os.replace(partial, self.path)
            os.replace(_info(partial), _info(self.path))
            fsync_directory(self.path.parent)


def is_complete(path: Path, about: Mapping[str, Any]) -> bool:
    """Whether ``path`` holds all answers that ``about`` describes."""
    return path.is_file() and not _partial(path).exists() and not _changes(_read_info(path), about)


@contextlib.contextmanager
def open_answers(
    path: Path, about: Mapping[str, Any], samples: Mapping[int, int], *, resume: bool, overwrite: bool
) -> Iterator[AnswerFile]:
    """Begin a file of answers, or continue one.

    Args:
        path: of the finished file.
        about: what the answers are made from: digests, ``settings``, and paths for the reader.
        samples: number of answers to each prompt, by its line number, in order. A line of answers names it as ``line``.
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
        done = answers = cut = 0
        if begun and resume:
            done, answers, cut = _continue(fd, partial, about, samples)
        else:
            with storage_errors(partial, "write"):
                os.ftruncate(fd, 0)
            write_json(_info(partial), about)
        yield AnswerFile(path, done, answers, cut, fd)
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


def _continue(fd: int, partial: Path, about: Mapping[str, Any], samples: Mapping[int, int]) -> tuple[int, int, int]:
    """Cut an unfinished file behind the last prompt that is answered completely.

    Returns:
        The number of prompts that are done, of answers, and of those that were cut.
    """
    info = _read_info(partial)
    if not info:
        raise ConfigError(
            f"--resume: {_info(partial)} is missing or damaged, so {partial} cannot be continued; give --overwrite to "
            "begin again"
        )
    changes = _changes(info, about)
    if changes:
        raise ConfigError(
            f"--resume: {partial} was begun with {', '.join(changes)}; give the same, or --overwrite to begin again"
        )
    last, start, end, answers, cut = 0, 0, 0, 0, 0
    found: list[str] = []  # why the last prompt's answers ended
    with storage_errors(partial, "read"), open(partial, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):  # torn by a kill
                break
            prompt, reason = _read_answer(line, f"{partial}, line {number}", samples)
            if prompt != last:
                last, found, start = prompt, [], end
            found.append(reason)
            end += len(line)
            answers += 1
            cut += reason != "eos"
    order = list(samples)
    done = order.index(last) + 1 if found else 0
    if found and len(found) < samples[last]:  # a kill between two samples, or answers that were left out
        done, end = done - 1, start
        answers, cut = answers - len(found), cut - sum(reason != "eos" for reason in found)
    with storage_errors(partial, "write"):
        os.ftruncate(fd, end)
        os.lseek(fd, end, os.SEEK_SET)
    return done, answers, cut


def _read_answer(line: bytes, where: str, samples: Mapping[int, int]) -> tuple[int, str]:
    """The line number of an answer's prompt, and why it ended."""
    try:
        answer = json.loads(line)
        prompt, reason = answer["line"], answer["finish_reason"]
        if prompt in samples and isinstance(reason, str):
            return prompt, reason
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise CheckpointError(f"{where}: is not an answer to one of the prompts; give --overwrite to begin again")


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
