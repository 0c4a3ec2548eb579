"""Paths that a command is given to read must exist; otherwise it ends before anything is loaded, with status 2."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from megatron_ee.checkpoint.atomic import current_directory
from megatron_ee.errors import ConfigError


def check_input(option: str, *paths: Path | None) -> None:
    """Refuse files and directories that do not exist. None stands for an option that is not given.

    Raises:
        ConfigError: naming the option and the path.
    """
    for path in paths:
        if path is not None and not os.path.exists(current_directory(path)):
            raise ConfigError(f"{option}: no such file or directory: {path}")


def check_corpus(option: str, prefixes: Iterable[str | Path]) -> None:
    """Refuse corpora of which no file exists.

    Raises:
        ConfigError: naming the option and the prefix.
    """
    for prefix in prefixes:
        if not any(os.path.exists(f"{prefix}{suffix}") for suffix in (".idx", ".bin")):
            raise ConfigError(f"{option}: no such corpus: {prefix}; give the prefix that prepare-data --output wrote")
