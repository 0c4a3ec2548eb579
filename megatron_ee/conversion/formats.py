"""Detects the format of a checkpoint directory, and opens it."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Literal

from megatron_ee.checkpoint.adapter import DESCRIPTION, Adapter, exits_in, exits_with, open_adapter
from megatron_ee.checkpoint.atomic import current_directory
from megatron_ee.checkpoint.contents import Contents
from megatron_ee.checkpoint.hf_directory import released_assets
from megatron_ee.checkpoint.manifest import MANIFEST
from megatron_ee.checkpoint.saved_model import SavedModel, is_parallel, model_in, open_model
from megatron_ee.checkpoint.store import open_checkpoint
from megatron_ee.config.untrusted import open_regular, read_json
from megatron_ee.errors import CheckpointError, ConfigError
from megatron_ee.families.registry import read_architecture
from megatron_ee.platform import DTYPES

DType = Literal["bfloat16", "float32"]


def open_contents(
    path: Path,
    *,
    trust: bool = False,
    config: Path | None = None,
    verify: bool = True,
    dtype: DType | None = None,
) -> Contents:
    """Open a checkpoint of any known format.

    Args:
        path: the directory, or a GGUF file.
        trust: allow the formats that hold pickles.
        config: for these formats: the Hugging Face directory of the model, or its ``config.json``.
        verify: check checksums, if the files have any.
        dtype: of the weights of a GGUF file; None is bfloat16.

    Raises:
        CheckpointError: unknown format, or an unusable file; the message names the file.
        ConfigError: ``dtype`` is given for another format.
    """
    if is_gguf(path):
        return _of_gguf(path, dtype)
    if dtype is not None:
        raise ConfigError(f"--dtype: only weights of GGUF files get a new dtype, and {path} is none")
    path = current_directory(path)
    if not path.is_dir():
        wrong = "is a file" if path.exists() else "no such directory"
        raise CheckpointError(f"{path}: {wrong}; give a checkpoint's directory or a GGUF file")
    if (path / MANIFEST).is_file():
        checkpoint = open_checkpoint(path, verify=verify)
        if is_parallel(checkpoint):
            return _of_model(model_in(checkpoint), "parallel checkpoint", verify)
        return _of_exits(exits_in(checkpoint), "training checkpoint")
    if (path / DESCRIPTION).is_file():
        return _of_exits(open_adapter(path, verify=verify), "adapter")
    if (path / "config.json").is_file():
        return _of_model(open_model(path, verify=verify), "Hugging Face model", verify)
    return _of_megatron(path, trust, config, verify)


def is_gguf(path: Path) -> bool:
    """Whether ``path`` is a file that is named as GGUF files are, or begins as they do."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    with open_regular(path) as fd:
        return os.pread(fd, 4, 0) == b"GGUF"


def _of_gguf(path: Path, dtype: DType | None) -> Contents:
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"{path}: GGUF files are read with the package gguf; pip install 'megatron-ee[gguf]'")
    # Imported only for this format: the package is optional.
    from megatron_ee.importers.gguf.opening import open_gguf

    return open_gguf(path, dtype=DTYPES[dtype or "bfloat16"])


def _of_megatron(path: Path, trust: bool, config: Path | None, verify: bool) -> Contents:
    # Imported only for these formats, to keep their pickles away from all other code.
    if _has(path, ".metadata"):
        from megatron_ee.importers.megatron.torch_dist import open_torch_dist

        return open_torch_dist(path, trust=trust, config=config, verify=verify)
    if _has(path, "mp_rank_*"):
        from megatron_ee.importers.megatron.legacy import open_legacy

        return open_legacy(path, trust=trust, config=config, verify=verify)
    raise CheckpointError(
        f"{path}: no checkpoint of a known format: neither config.json (Hugging Face), {MANIFEST} (parallel or "
        f"training checkpoint), {DESCRIPTION} (adapter), nor Megatron's iter_* directories"
    )


def _has(path: Path, name: str) -> bool:
    """Whether a Megatron directory, or one of its iterations, has such an entry."""
    return any(next(path.glob(f"{place}{name}"), None) for place in ("", "iter_*/", "release/"))


def _of_model(model: SavedModel, kind: str, verify: bool) -> Contents:
    exits = exits_with(model, verify=verify)
    corrected, notes = _corrected_config(model)
    return Contents(
        source=model.path,
        format=kind + (" with exits" if exits else ""),
        architecture=model.architecture,
        backbone=model.weights,
        non_weights=model.non_weights,
        vision=model.vision,
        spelling=model.spelling,
        exits=exits.exits if exits else (),
        exit_tensors=exits.weights if exits else {},
        assets={**released_assets(model.path), **corrected},
        base_model=_origin(model, exits),
        backbone_sha256=exits.backbone_sha256 if exits else None,
        settings=exits.settings if exits else None,
        steps=exits.steps if exits else 0,
        corpora=exits.corpora if exits else None,
        notes=notes,
        quantised=model.quantised,
    )


def _corrected_config(model: SavedModel) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """``config.json`` corrected to the tensors, if it ties a head that differs from the embedding, and a notice.

    transformers compares the tensors, as ``open_model`` does, but others, such as vLLM, use only ``config.json``.
    """
    path = model.path / "config.json"
    if model.architecture.tied or not read_architecture(model.path).tied:
        return {}, ()
    config = {**read_json(path), "tie_word_embeddings": False}
    if model.spelling is not None:
        config["text_config"] = {**(config.get("text_config") or {}), "tie_word_embeddings": False}
    text = json.dumps(config, indent=2) + "\n"
    note = f"{path}: ties a head that differs from the embedding; the output has tie_word_embeddings false"
    return {path.name: text.encode("utf-8")}, (note,)


def _origin(model: SavedModel, exits: Adapter | None) -> str:
    """Path of the backbone to record: the original model if it needs no ``--trust-checkpoint``, else this
    checkpoint."""
    if exits is not None:
        named: object = exits.base_model
    else:
        named = model.checkpoint.metadata.get("base_model") if model.checkpoint is not None else None
    if isinstance(named, str) and named and (Path(named) / "config.json").is_file():
        return named
    return str(model.path.resolve())


def _of_exits(adapter: Adapter, kind: str) -> Contents:
    return Contents(
        source=adapter.path,
        format=kind,
        architecture=None,
        exits=adapter.exits,
        exit_tensors={
            name: tensor
            for spec in adapter.exits
            for name, tensor in adapter.weights.items()
            if name.startswith(f"exits.{spec.layer}.")
        },
        base_model=adapter.base_model,
        backbone_sha256=adapter.backbone_sha256,
        settings=adapter.settings,
        steps=adapter.steps,
        corpora=adapter.corpora,
    )
