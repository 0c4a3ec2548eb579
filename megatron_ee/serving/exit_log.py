"""The exit log: what early exit did with each request, one JSON object per line.

A log is rotated by size and by time. The handlers of the standard library do either, and where the disk is full they
print a traceback per record and may leave half a line. Here the rotation is by UTC hours or days, and a line is in the
log as a whole or not at all. ``exits.jsonl`` is renamed ``exits.2026-11-30.jsonl``, a second one of the day
``exits.2026-11-30.2.jsonl``.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from megatron_ee.checkpoint.atomic import write_all
from megatron_ee.config.untrusted import parse_json
from megatron_ee.config.validation import validated
from megatron_ee.errors import ConfigError, DataError, UserError, storage_errors
from megatron_ee.evaluation.audits import AuditRecord, log_lines
from megatron_ee.inference.requests import Completion, Coverage, Mode

BINS = 10
"""Equal bins of confidences, from 0 to 1."""
MAX_BYTES = 128 * 2**20
"""Default size at which a log is rotated: about 200,000 requests without their text."""
BACKUPS = 90
"""Default number of rotated logs that are kept."""
Period = Literal["hour", "day"]
Status = Literal["ok", "error", "cancelled", "timeout"]
Tier = Literal["default", "important"]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Bins = Annotated[tuple[Count, ...], Field(strict=False, min_length=BINS, max_length=BINS)]
_PERIODS: dict[str, tuple[str, str]] = {
    "hour": ("%Y-%m-%dT%H", r"\d{4}-\d\d-\d\dT\d\d"),
    "day": ("%Y-%m-%d", r"\d{4}-\d\d-\d\d"),
}
"""Name of a period in the name of a rotated log, and what such names look like."""
_NUMBER = re.compile(rb'\{"number":(\d{1,18}),')
_LOGGER = logging.getLogger(__name__)


class ExitRecord(AuditRecord):
    """One request. A request with several outputs has one record, with their sums.

    Attributes:
        number: of the request in the order of admission, from 0. It goes on after a restart of the server.
        id: of the request, as in its answer.
        audit: the result of its audit; None if it was not audited.
        time: of its admission, ISO 8601 in UTC.
        key: name of the API key, never the key; None without keys.
        task: its task.
        mode: it ran in.
        policy: name of the policy or rule that applied; None in full mode.
        tier: ``important`` if it was marked so.
        status: ``ok``; ``error``: the engine failed, or the client read too slowly; ``cancelled``: the client left or
            the server ended; ``timeout``: its deadline came.
        finish_reason: of its first output; None if that has not ended.
        prompt_tokens: of its prompt.
        reused_tokens: of them, those whose KV was copied from another request.
        tokens: of all outputs.
        outputs: their number.
        tokens_by_layer: emitted tokens by the layer that emitted them; the last layer stands for the final exit.
        num_layers: of the model.
        confidences: number of tokens by their confidence, in ``BINS`` equal bins.
        layers_per_token: decoder layers run per token after the first of each output; None without such tokens.
        rounds: of drafting.
        proposed: tokens that exits drafted.
        accepted: of them, those that the model accepted.
        seconds: from admission to the end.
        time_to_first_token: in seconds; None without tokens.
        calibration: what a certificate says of the answer; None without one.
        prompt: text of the prompt, only with ``--log-text``.
        text: of the outputs, only with ``--log-text``.
    """

    model_config = ConfigDict(extra="ignore")

    time: str = Field(pattern=r"^\d{4}-\d\d-\d\dT")
    key: str | None = None
    task: str
    mode: Mode
    policy: str | None = None
    tier: Tier = "default"
    status: Status = "ok"
    finish_reason: str | None = None
    prompt_tokens: Count
    reused_tokens: Count = 0
    tokens: Count = 0
    outputs: int = Field(default=1, ge=1)
    tokens_by_layer: Mapping[str, Count] = Field(default_factory=dict)
    num_layers: int | None = Field(default=None, ge=1)
    confidences: Bins = (0,) * BINS
    layers_per_token: float | None = Field(default=None, ge=0)
    rounds: Count = 0
    proposed: Count = 0
    accepted: Count = 0
    seconds: Seconds
    time_to_first_token: Seconds | None = None
    calibration: Coverage | None = None
    prompt: str | None = None
    text: tuple[str, ...] | None = Field(default=None, strict=False)

    @property
    def day(self) -> str:
        """The UTC day of its admission, such as ``2026-11-30``."""
        return self.time[:10]


def now_utc(seconds: float | None = None) -> str:
    """A time, by default now, as in ``ExitRecord.time``: ISO 8601 in UTC with milliseconds."""
    at = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def confidence_bins(confidences: Sequence[float]) -> tuple[int, ...]:
    """Number of confidences in each of ``BINS`` equal bins from 0 to 1; 1 is in the last one, NaN in none."""
    counts = [0] * BINS
    for confidence in confidences:
        if not math.isnan(confidence):
            counts[min(max(int(confidence * BINS), 0), BINS - 1)] += 1
    return tuple(counts)


def exit_statistics(completions: Sequence[Completion], num_layers: int) -> dict[str, Any]:
    """The fields of an ``ExitRecord`` that the statistics of its request's outputs give.

    Args:
        completions: the outputs that have ended, in their order, also cancelled ones.
        num_layers: of the model.
    """
    statistics = [each.statistics for each in completions]
    by_layer: Counter[str] = Counter()
    for each in statistics:
        by_layer.update(each["tokens_by_layer"])
    later = sum(max(each["tokens"] - 1, 0) for each in statistics)
    runs = sum((each["layers_per_token"] or 0.0) * max(each["tokens"] - 1, 0) for each in statistics)
    waits = [each["time_to_first_token"] for each in statistics if each["time_to_first_token"] is not None]
    return {
        "finish_reason": completions[0].finish_reason if completions else None,
        "prompt_tokens": statistics[0]["prompt_tokens"] if statistics else 0,
        "reused_tokens": statistics[0]["reused_tokens"] if statistics else 0,
        **{key: sum(each[key] for each in statistics) for key in ("tokens", "rounds", "proposed", "accepted")},
        "outputs": max(len(completions), 1),
        "tokens_by_layer": dict(sorted(by_layer.items(), key=lambda item: int(item[0]))),
        "num_layers": num_layers,
        "confidences": confidence_bins([value for each in statistics for value in each["confidences"]]),
        "layers_per_token": runs / later if later else None,
        "time_to_first_token": min(waits) if waits else None,
    }


class ExitLog:
    """A growing log. One thread writes it.

    Attributes:
        path: of the log.
        next_number: one more than the largest number in the log and in the one that was rotated last; 0 if there are
            none. Requests of this server are numbered from it.
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
            ConfigError: the path is no regular file, is no exit log, or another process writes it.
            CheckpointError: it cannot be opened.
        """
        if max_bytes < 1 or backups < 0:
            raise ConfigError("--exit-log: the size must be at least 1 byte, and the number of old logs not negative")
        self.path, self.lost = path, 0
        self._max_bytes, self._backups, self._text, self._clock = max_bytes, backups, text, clock
        self._form, names = _PERIODS[when]
        self._rotated = re.compile(rf"{re.escape(path.stem)}\.({names})(?:\.(\d+))?{re.escape(path.suffix)}(?:\.gz)?")
        self._fd = -1
        self._open(takes_over=True)
        self.next_number = self._next_number()

    def write(self, record: ExitRecord) -> bool:
        """Append a record, after rotating if it is time. The record of an audited request is written after its audit.

        It does not fail: a server answers on while the disk is full.

        Returns:
            Whether it was written. The first failure is logged.
        """
        try:
            line = self._line(record)
            if self._fd < 0:  # it could not be opened after it was rotated
                self._open()
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
        start = os.pread(self._fd, 1, 0)
        first = next(log_lines(self.path), None)
        try:
            if first is not None:
                where, line = first
                validated(ExitRecord, parse_json(line, where), where=where, error=DataError)
            elif start not in (b"", b"{"):
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

    def _rotate_if_due(self, line: bytes) -> None:
        if not self._size:
            return
        full, ended = self._size + len(line) > self._max_bytes, self._period != self._period_of(self._clock())
        if not full and not ended:
            return
        used = [number for period, number, _ in self._old_logs() if period == self._period]
        name = self._period if not used else f"{self._period}.{max(used) + 1}"
        with storage_errors(self.path, "rotate"):
            os.rename(self.path, self.path.with_name(f"{self.path.stem}.{name}{self.path.suffix}"))
            old, self._fd = self._fd, -1
            os.close(old)
        self._open()
        if self._backups:
            for _, _, path in self._old_logs()[: -self._backups]:
                with storage_errors(path, "remove"):
                    path.unlink()

    def _old_logs(self) -> list[tuple[str, int, Path]]:
        """Rotated logs with their period and number in it, from 1, the oldest first. They may be compressed."""
        found = []
        for each in self.path.parent.iterdir():
            if match := self._rotated.fullmatch(each.name):
                found.append((match[1], int(match[2] or 1), each))
        return sorted(found)

    def _next_number(self) -> int:
        logs = [self.path, *(path for _, _, path in self._old_logs()[-1:])]
        found = (_NUMBER.match(line) for path in logs for _, line in log_lines(path))
        return max((int(match[1]) for match in found if match), default=-1) + 1


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
