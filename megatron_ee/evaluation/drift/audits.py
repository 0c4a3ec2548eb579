"""Audited requests: a share of the requests also runs in full mode, which shows what early exit has cost each of them.

Requests are drawn at admission, by their number alone: neither their content nor the load decides. A drawn request may
wait for an idle moment, but is never left out. The exit log keeps the result of each audit.
"""

from __future__ import annotations

import gzip
import itertools
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from pydantic import ConfigDict, Field

from megatron_ee.config.untrusted import parse_json
from megatron_ee.config.validation import Strict, validated
from megatron_ee.errors import DataError
from megatron_ee.inference.sampling import uniform

MAX_LINE = 16 * 2**20
"""Bytes of a line of an exit log, with prompt and text."""
_GZIP = b"\x1f\x8b"


class Audit(Strict):
    """The result of one audit.

    Attributes:
        loss: of the early answer against full mode's, in [0, 1], as the certificate defines it.
        certificate: SHA-256 of the certificate's file; None if the request ran in a safer setting after an alarm.
    """

    loss: float = Field(ge=0, le=1)
    certificate: str | None = None


class AuditRecord(Strict):
    """What the exit log says of a request's audit. The log has one JSON object per line. Further keys are ignored.

    Attributes:
        number: of the request in the order of admission, from 0. It goes on after a restart of the server.
        id: of the request.
        audit: None if the request was not audited.
    """

    model_config = ConfigDict(extra="ignore")

    number: int = Field(ge=0, lt=2**63)
    id: str
    audit: Audit | None = None


def audited(number: int, seed: int, share: float) -> bool:
    """Whether a request is audited. The same arguments give the same result on every machine.

    Args:
        number: of the request in the order of admission.
        seed: of the draw.
        share: share of the requests to audit, in [0, 1].
    """
    return uniform(seed, number, "audit") < share


def read_audits(logs: Sequence[Path]) -> list[AuditRecord]:
    """The audited requests of exit logs, in the order of admission. See ``log_lines`` for what is left out.

    Args:
        logs: all logs of one server, in any order.

    Raises:
        DataError: a log cannot be read, a line is no record, or two records have one number.
        DamagedError: a line is not JSON. Both name file and line.
    """
    # Nearly all requests are not audited. Their numbers alone are kept.
    found, numbers = [], array("q")
    for path in logs:
        for _, record in _read(path):
            numbers.append(record.number)
            if record.audit is not None:
                found.append(record)
    ascending = np.sort(np.array(numbers, np.int64))
    twice = ascending[1:][ascending[1:] == ascending[:-1]]
    if len(twice):
        other, where, *_ = (where for path in logs for where, record in _read(path) if record.number == twice[0])
        raise DataError(f"{where}: number {twice[0]} is in {other} too; give each log of one server once")
    return sorted(found, key=lambda record: record.number)


def certificates(audits: Iterable[AuditRecord]) -> list[str]:
    """Digests of the certificates of audited requests, without repetition."""
    return sorted({each.audit.certificate for each in audits if each.audit and each.audit.certificate is not None})


def log_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each line of an exit log that is not blank, with its file and number. The log may be compressed with gzip.

    A last line without an end is left out, and what a cut-off gzip file lacks: the server is writing it, or was killed.

    Raises:
        DataError: the log cannot be read, or a line is too long; the message names the file.
    """
    try:
        with path.open("rb") as plain:
            compressed = plain.peek(2)[:2] == _GZIP
            file: IO[bytes] = gzip.GzipFile(fileobj=plain) if compressed else plain  # type: ignore[assignment]
            for number in itertools.count(1):
                line = file.readline(MAX_LINE + 1)
                if len(line) > MAX_LINE:
                    raise DataError(f"{path}:{number}: is longer than {MAX_LINE} bytes; it is no exit log")
                if not line.endswith(b"\n"):
                    return
                if line.strip():
                    yield f"{path}:{number}", line
    except EOFError:
        return
    except (OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _read(path: Path) -> Iterator[tuple[str, AuditRecord]]:
    """Each record with its file and line."""
    for where, line in log_lines(path):
        yield where, validated(AuditRecord, parse_json(line, where), where=where, error=DataError)
