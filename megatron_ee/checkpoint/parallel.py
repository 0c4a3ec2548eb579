"""The parallel checkpoint: a backbone, and maybe exits, in the native format under their released names.

Its manifest's ``metadata`` has ``kind`` ("parallel"), ``assets`` (SHA-256 by name of the files that lie beside it:
``config.json``, the tokenizer), and what an adapter's description has: ``exits``, ``base_model``,
``backbone_sha256``, ``steps``. The shards are cut as the ranks of one layout hold them, which says nothing about where
it can be loaded.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from megatron_ee.checkpoint.digest import file_sha256
from megatron_ee.checkpoint.store import Checkpoint
from megatron_ee.errors import CheckpointError, DamagedError

KIND = "parallel"
EXITS = "exits."  # what the names of exits' tensors begin with


def is_parallel(checkpoint: Checkpoint) -> bool:
    """Whether it holds a backbone, and is not a training checkpoint."""
    return bool(checkpoint.metadata.get("kind") == KIND)


def check_parallel(checkpoint: Checkpoint) -> None:
    """Check that it is a parallel checkpoint, and the files beside its shards.

    Raises:
        CheckpointError: it is a training checkpoint.
        DamagedError: a file is missing or changed.
    """
    path = checkpoint.path
    if not is_parallel(checkpoint):
        raise CheckpointError(
            f"{path}: is a training checkpoint, which holds exits but no backbone; give the model it was tuned on"
        )
    assets = checkpoint.metadata.get("assets")
    if not isinstance(assets, dict) or "config.json" not in assets:
        raise DamagedError(f"{path}: its manifest does not list its files")
    for name, digest in assets.items():
        if not _is_plain_file(path, name):
            raise DamagedError(f"{path}/{name}: missing, or not a plain file; the checkpoint is not complete")
        if checkpoint.verify and file_sha256(path / name) != digest:
            raise DamagedError(f"{path / name}: damaged: its SHA-256 is not the one in the manifest")


def _is_plain_file(directory: Path, name: str) -> bool:
    """Whether ``name`` is a file in the directory or a folder of it, reached without links and detours."""
    pure = PurePosixPath(name)
    if str(pure) != name or pure.is_absolute() or ".." in pure.parts or not os.path.isfile(directory / name):
        return False
    return os.path.realpath(directory / name) == os.path.join(os.path.realpath(directory), name)
