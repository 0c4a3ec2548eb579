"""Named points in the code where a test can kill the process, to check that the files on disk stay consistent.

A failpoint does nothing unless the environment variable ``MEGATRON_EE_FAILPOINT`` names it, as ``NAME``, or
``NAME:COUNT`` for the COUNT-th time that the process reaches it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter

from megatron_ee.errors import ConfigError

VARIABLE = "MEGATRON_EE_FAILPOINT"
NAMES = (
    "save.thread",  # at the start of a save in the background
    "save.begin",  # before the temporary directory is created
    "save.begun",  # after the temporary directory is created
    "save.shard",  # after each run of bytes of a shard
    "save.shard-done",  # a shard has its final name
    "save.manifest",  # all shards have their final names; the manifest is not written
    "save.manifest-done",  # the manifest is written, in a directory with a temporary name
    "save.renamed",  # the directory has its final name
    "prune.renamed",  # a directory to be deleted is .trash-*
    "replace.ready",  # the new content of a directory is complete, beside the old one
    "replace.between",  # the old directory is .trash-*, the new one is not in its place yet
    "convert.file",  # before each run of bytes of a file
    "convert.file-done",  # a file and its record are complete
    "convert.finish",  # all large files are complete
    "convert.rename",  # everything is complete, under a temporary name
)
_passed: Counter[str] = Counter()
_lock = threading.Lock()  # files are written by several threads


def failpoint(name: str) -> None:
    """Kill this process with SIGKILL if the environment asks for it here.

    Raises:
        ConfigError: the variable names no failpoint.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    point, _, count = wanted.partition(":")
    if point not in NAMES or not (count or "1").isdecimal():
        raise ConfigError(f"{VARIABLE}: unknown failpoint {wanted!r}; give NAME or NAME:COUNT of {', '.join(NAMES)}")
    if point != name:
        return
    with _lock:
        _passed[name] += 1
        if _passed[name] == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)
