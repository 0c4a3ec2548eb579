"""A file of answers that survives an interruption: a journal while prompts are answered, in their order at the end.

The journal is ``FILE.partial``. Each line holds the answers to one prompt, in the order in which they were finished, so
that no finished answer is lost while an earlier prompt still runs. When all prompts are answered, the answers are
written to ``FILE``, one per line in the order of the prompts, and what they were made from to ``FILE.info.json``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ee.checkpoint.atomic import new_file, write_all, write_json
from megatron_ee.checkpoint.journal import (
    Entry,
    Journal,
    changes,
    check_journal,
    encoded_line,
    info_file,
    open_journal,
    read_info,
)
from megatron_ee.errors import ConfigError, storage_errors

MADE_BY = "megatron-ee regenerate"


@dataclass
class AnswerFile:
    """The growing file. ``open_answers`` makes it.

    Attributes:
        path: final name.
        about: what the answers are made from.
        prompts: line numbers of the prompts, in order.
        journal: the answers to each prompt.
        answers: number of answers.
        cut: answers that ended at a length limit.
    """

    path: Path
    about: Mapping[str, Any]
    prompts: Sequence[int]
    journal: Journal
    answers: int = 0
    cut: int = 0

    @property
    def done(self) -> Collection[Hashable]:
        """Line numbers of the answered prompts."""
        return self.journal.places

    def append(self, prompt: int, answers: Sequence[Mapping[str, Any]]) -> None:
        """Write the answers to the prompt of this line number, which may be none.

        Raises:
            CheckpointError: the disk is full or the like.
        """
        self.journal.append({"line": prompt, "answers": answers})
        self._count(answers)

    def commit(self) -> None:
        """All prompts are answered: write the file, then remove the journal.

        Raises:
            CheckpointError: the file cannot be written.
        """
        partial = self.journal.path
        with new_file(self.path) as fd:
            for prompt in self.prompts:
                for answer in self.journal.read(prompt)["answers"]:
                    write_all(fd, memoryview(encoded_line(answer)))
        write_json(info_file(self.path), self.about)
        # Until here a rerun with --resume would write the file again.
        with storage_errors(partial, "remove"):
            partial.unlink()
            info_file(partial).unlink()

    def _count(self, answers: Sequence[Mapping[str, Any]]) -> None:
        self.answers += len(answers)
        self.cut += sum(answer["finish_reason"] != "eos" for answer in answers)


def is_complete(path: Path, about: Mapping[str, Any]) -> bool:
    """Whether ``path`` holds all answers that ``about`` describes."""
    return path.is_file() and not _partial(path).exists() and not changes(read_info(path, MADE_BY), about)


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
    partial, wanted = _partial(path), set(prompts)
    if path.is_dir() or not path.name:
        raise ConfigError(f"--output: {path} is a directory; name a file")
    if not (check_journal(partial, resume=resume, overwrite=overwrite) and resume):
        _check_replaceable(path, overwrite)

    def line_of(entry: Entry) -> int:
        if entry["line"] not in wanted or not all(isinstance(each["finish_reason"], str) for each in entry["answers"]):
            raise ValueError
        return int(entry["line"])

    with open_journal(partial, about, line_of, resume=resume, overwrite=overwrite) as journal:
        file = AnswerFile(path, about, prompts, journal)
        for entry in journal.entries():
            file._count(entry["answers"])
        yield file


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _check_replaceable(path: Path, overwrite: bool) -> None:
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise ConfigError(f"--output: {path} exists already; choose another name or give --overwrite")
    if not read_info(path, MADE_BY):
        raise ConfigError(
            f"--output: {path} exists, and {info_file(path)} does not say that {MADE_BY} wrote it; choose another name"
        )
