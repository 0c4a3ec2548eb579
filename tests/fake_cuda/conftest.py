"""The process that runs cases: one for each process of tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from . import shim
from .worker import Worker


@pytest.fixture(scope="session")
def worker() -> Iterator[Worker]:
    """Skips where the shim cannot be built; in CI that is a failure."""
    reason = shim.unavailable()
    if reason is not None and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if reason is not None:
        pytest.skip(reason)
    shim.build()
    with Worker() as worker:
        yield worker
