"""The exit log: what early exit did with each request, one JSON object per line.

A log is rotated by size and by time. The handlers of the standard library do either, and where the disk is full they
print a traceback per record and may leave half a line. Here the rotation is by UTC hours or days, and a line is in the
log as a whole or not at all. ``exits.jsonl`` is renamed ``exits.2026-11-30.jsonl``, a second one of the day
``exits.2026-11-30.2.jsonl``. The next request's number is kept beside it, in ``exits-jsonl.number``.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from megatron_ee.checkpoint.atomic import write_all
from megatron_ee.config.untrusted import parse_json
from megatron_ee.config.validation import validated
from megatron_ee.errors import ConfigError, DataError, UserError, storage_errors
from megatron_ee.evaluation.drift.audits import log_lines
from megatron_ee.serving.exit_record import ExitRecord

MAX_BYTES = 128 * 2**20
"""Default size at which a log is rotated: about 200,000 requests without their text."""
BACKUPS = 90
"""Default number of rotated logs that are kept."""
Period = Literal["hour", "day"]
_PERIODS: dict[str, tuple[str, str]] = {
    "hour": ("%Y-%m-%dT%H", r"\d{4}-\d\d-\d\dT\d\d"),
    "day": ("%Y-%m-%d", r"\d{4}-\d\d-\d\d"),
}
"""Name of a period in the name of a rotated log, and what such names look like."""
_START = b'{"number":'
"""How each line begins."""
_NUMBER = re.compile(rb'\{"number":(\d{1,18}),')
_KEPT = re.compile(rb"\d{18}\n")
"""Content of the file with the next number."""
_LOGGER = logging.getLogger(__name__)


class ExitLog:
    """A growing log. One thread writes it.

    Attributes:
        path: of the log.
        next_number: one more than the largest number so far, also in logs that somebody else has moved away; 0 if
            there was none. Requests of a new server are numbered from it.
        lost: records that could not be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int = MAX_BYTES,
        when: Period = "day",
        backups: int = BACKUPS,
        text: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the log, and take over one of an earlier server. Half a line at its end is removed.

        Args:
            path: of the log.
            max_bytes: size above which it is rotated; a larger record has a log of its own.
            when: it is rotated at the end of each UTC hour or day in which something was written.
            backups: rotated logs that are kept; the oldest are removed. 0 keeps all.
            text: write prompts and texts; otherwise they are left out, wherever a record has them.
            clock: seconds since 1970.

        Raises:
            ConfigError: the path is no regular file, is no exit log, or another process writes it; or the file with the
                next number is damaged.
            CheckpointError: one of the files cannot be opened.
        """
        if max_bytes < 1 or backups < 0:
            raise ConfigError("--exit-log: the size must be at least 1 byte, and the number of old logs not negative")
        self.path, self.lost, self._said = path, 0, False
        self._max_bytes, self._backups, self._text, self._clock = max_bytes, backups, text, clock
        self._form, names = _PERIODS[when]
        self._rotated = re.compile(rf"{re.escape(path.stem)}\.({names})(?:\.(\d+))?{re.escape(path.suffix)}(?:\.gz)?")
        self._fd = -1
        self._open(takes_over=True)
        self._number_file = beside(path, "number")
        try:
            with storage_errors(self._number_file, "open"):
                self.next_number = max(self._number_in_logs(), self._kept_number())
                self._keep_number()
        except BaseException:
            self.close()
            raise

    def write(self, record: ExitRecord) -> bool:
        """Append a record, after rotating if it is time. The record of an audited request is written after its audit.

        It does not fail: a server answers on while the disk is full.

        Returns:
            Whether it was written. The first failure is logged.
        """
        if record.number >= self.next_number:
            self.next_number = record.number + 1
            try:
                self._keep_number()
            except OSError as error:
                self._say_once(f"{self._number_file.name} cannot be written: {error.strerror}")
        try:
            line = self._line(record)
            if self._fd >= 0 and self._moved():
                self.close()
            if self._fd < 0:  # also if it could not be opened after it was rotated
                self._open(takes_over=True)
            self._rotate_if_due(line)
            try:
                write_all(self._fd, memoryview(line))
            except OSError:
                os.ftruncate(self._fd, self._size)  # half a line would make the next one unreadable
                raise
        except (OSError, UserError) as error:
            self.lost += 1
            if self.lost == 1:
                reason = error.strerror if isinstance(error, OSError) else error
                _LOGGER.error("%s: cannot be written: %s; records of requests are lost", self.path, reason)
            return False
        self._size += len(line)
        self._period = self._period_of(self._clock())
        return True

    def close(self) -> None:
        """Close the log."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _line(self, record: ExitRecord) -> bytes:
        if not self._text:
            coverage = record.calibration
            if coverage is not None and coverage.reason is not None:  # it may quote the request's stop strings
                coverage = coverage.model_copy(update={"reason": coverage.reason.partition(":")[0]})
            record = record.model_copy(update={"prompt": None, "text": None, "calibration": coverage})
        left_out = None if self._text else {"prompt", "text"}
        return record.model_dump_json(exclude=left_out).encode() + b"\n"

    def _open(self, *, takes_over: bool = False) -> None:
        with storage_errors(self.path, "open"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and not self.path.is_file():
                raise ConfigError(f"--exit-log: {self.path} is no regular file; name another one")
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._fd = os.open(self.path, flags, 0o600)  # it may hold text
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.close()
                raise ConfigError(f"--exit-log: another process writes {self.path}; name another one") from None
            except OSError:  # a file system without locks
                pass
            found = os.fstat(self._fd)
            self._size = found.st_size
            if takes_over:
                try:
                    self._take_over()
                except BaseException:
                    self.close()
                    raise
        self._period = self._period_of(found.st_mtime if self._size else self._clock())

    def _take_over(self) -> None:
        """Check that the file is an exit log, and remove half a line, with which a killed server ended it."""
        start = os.pread(self._fd, len(_START), 0)
        first = next(log_lines(self.path), None)
        try:
            if first is not None:
                where, line = first
                validated(ExitRecord, parse_json(line, where), where=where, error=DataError)
            elif not _START.startswith(start):  # otherwise it would be taken for half a line, and removed
                raise DataError(f"{self.path}: has no record")
        except UserError as error:
            raise ConfigError(f"--exit-log: {error}; is it an exit log? name another one") from None
        end = self._size
        while end:
            block = os.pread(self._fd, min(end, 2**16), end - min(end, 2**16))
            if b"\n" in block:
                end += block.rindex(b"\n") + 1 - len(block)
                break
            end -= len(block)
        if end < self._size:
            os.ftruncate(self._fd, end)
            self._size = end

    def _period_of(self, seconds: float) -> str:
        return time.strftime(self._form, time.gmtime(seconds))

    def _moved(self) -> bool:
        """Whether somebody else has removed or renamed the log, so that nobody would find what is written."""
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        except FileNotFoundError:
            return True

    def _rotate_if_due(self, line: bytes) -> None:
        """Rotate the log if it is time. If that fails, the log goes on growing, which is logged once."""
        if not self._size:
            return
        full, ended = self._size + len(line) > self._max_bytes, self._period != self._period_of(self._clock())
        if not full and not ended:
            return
        used = [number for period, number, _ in self._old_logs() if period == self._period]
        name = self._period if not used else f"{self._period}.{max(used) + 1}"
        try:
            os.rename(self.path, self.path.with_name(f"{self.path.stem}.{name}{self.path.suffix}"))
        except OSError as error:
            self._say_once(f"cannot be rotated: {error.strerror}; it goes on growing")
            return
        self.close()
        self._open()
        for _, _, path in self._old_logs()[: -self._backups] if self._backups else ():
            try:
                path.unlink()
            except OSError as error:
                self._say_once(f"{path.name} cannot be removed: {error.strerror}; old logs are left")

    def _say_once(self, problem: str) -> None:
        """Log a problem, the first one only: it comes back with each record."""
        if not self._said:
            _LOGGER.error("%s: %s", self.path, problem)
        self._said = True

    def _old_logs(self) -> list[tuple[str, int, Path]]:
        """Rotated logs with their period and number in it, from 1, the oldest first. They may be compressed."""
        found = []
        for each in self.path.parent.iterdir():
            if match := self._rotated.fullmatch(each.name):
                found.append((match[1], int(match[2] or 1), each))
        return sorted(found)

    def _keep_number(self) -> None:
        """Write the next number. One small write in place, so that a kill leaves the old number or the new one."""
        fd = os.open(self._number_file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(fd, b"%018d\n" % self.next_number, 0)
        finally:
            os.close(fd)

    def _kept_number(self) -> int:
        """The next number as an earlier server kept it. In the logs it is missing if somebody else moved them."""
        try:
            content = self._number_file.read_bytes()
        except FileNotFoundError:
            return 0
        if content and not _KEPT.fullmatch(content):
            raise ConfigError(
                f"--exit-log: {self._number_file} does not hold the number of the next request; remove it, then "
                "numbers go on from the logs"
            )
        return int(content or 0)

    def _number_in_logs(self) -> int:
        """One more than the largest number in the log and in the one that was rotated last; 0 if there are none."""
        logs = [self.path, *(path for _, _, path in self._old_logs()[-1:])]
        found = (_NUMBER.match(line) for path in logs for _, line in log_lines(path))
        return max((int(match[1]) for match in found if match), default=-1) + 1


def beside(exit_log: Path, name: str) -> Path:
    """A file beside an exit log, such as ``exits-jsonl.NAME``: ``exits*.jsonl*`` is to match logs alone."""
    return exit_log.with_name(f"{exit_log.name.replace('.', '-')}.{name}")


def read_logs(paths: Sequence[Path]) -> Iterator[ExitRecord]:
    """The records of exit logs, one log after the other. ``log_lines`` says what is left out.

    Args:
        paths: logs, plain or compressed with gzip.

    Raises:
        DataError: a log cannot be read, or a line is no record.
        DamagedError: a line is not JSON. Both name file and line.
    """
    for path in paths:
        for where, line in log_lines(path):
            yield validated(ExitRecord, parse_json(line, where), where=where, error=DataError)
