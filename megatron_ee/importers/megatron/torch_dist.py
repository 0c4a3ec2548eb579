"""Opens Megatron-LM's and Megatron-Bridge's distributed checkpoints (``torch_dist``).

The format is a directory ``iter_*`` or ``release`` with ``metadata.json`` (written last), ``.metadata`` (a pickle with
the location of each tensor), ``*.distcp`` (the boxes of tensors that each rank wrote), and ``common.pt`` or
``run_config.yaml`` (settings). megatron-core 0.19 and later store the content of ``common.pt`` as an object among the
tensors.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import yaml

from megatron_ee.checkpoint.contents import Contents
from megatron_ee.checkpoint.derived import take_layer
from megatron_ee.checkpoint.hf_directory import released_assets
from megatron_ee.checkpoint.tensors import StoredTensor
from megatron_ee.config.untrusted import open_regular, read_json
from megatron_ee.errors import CheckpointError, DamagedError, shown
from megatron_ee.families.weights import expected_tensors
from megatron_ee.importers.megatron.guarded import Inert
from megatron_ee.importers.megatron.legacy_args import Args, check_agreement, derive_config, differing_settings
from megatron_ee.importers.megatron.metadata import (
    METADATA,
    Metadata,
    open_tensor,
    read_metadata,
    read_object,
    tensor_dtype,
)
from megatron_ee.importers.megatron.names import EMBEDDING_KEY, Parameter, fused_shape, parse_key, released_parts
from megatron_ee.importers.megatron.opening import (
    TRACKER,
    ImportedModel,
    derived_model,
    given_model,
    require_trust,
    tracked_iteration,
)
from megatron_ee.importers.megatron.settings import bridge_args
from megatron_ee.importers.megatron.torch_file import TorchFile

FORMAT = "Megatron torch_dist checkpoint"
SETTINGS, COMMON, RUN_CONFIG, CONFIG = "metadata.json", "common.pt", "run_config.yaml", "config.json"
COMMON_STATE = "common_state/shard_0_1"
"""Key of the object that replaces ``common.pt``."""
RELEASED = "huggingface"
"""Directory of ``config.json`` and the tokenizer in our exports."""
TOKENIZER = "tokenizer"
"""Directory of the tokenizer's files in Megatron-Bridge's checkpoints."""
MAX_RUN_CONFIG = 16 * 2**20  # bytes
_WRAPPERS = re.compile(r"^(?:(?:module|model)\.)+")
NOT_WEIGHTS = re.compile(
    r"common_state(?:/.*)?|optimizer\..*|chained_\d+\..*|opt_param_scheduler.*|rng_state.*|rerun_state_machine.*"
    r"|(?:.*\.)?_extra_state(?:/.*)?|(?:.*\.)?rotary_pos_emb\.inv_freq"
)
"""Keys of other state of a training run."""


def open_torch_dist(path: Path, *, trust: bool, config: Path | None, verify: bool = True) -> Contents:
    """Open a distributed checkpoint. No bytes of tensors are read.

    Args:
        path: directory of one iteration, or of all iterations (the latest is then used).
        trust: allow pickles, which the format contains.
        config: the model's Hugging Face directory, or its ``config.json``. None uses the checkpoint's own settings, if
            they are complete.
        verify: check the CRC-32 that ``torch.save`` wrote, once per item.

    Returns:
        The backbone. Other state, such as the optimizer's, is left out.

    Raises:
        CheckpointError: ``trust`` is not given, or the checkpoint is damaged, incomplete, not supported, or does not
            match ``config``. The message names the file and the tensor.
    """
    require_trust(path, trust)
    directory = _latest(path)
    if directory is None:
        raise CheckpointError(
            f"{path}: neither {METADATA} nor {TRACKER} is there; give a Megatron torch_dist directory"
        )
    _check_settings(directory)
    metadata = read_metadata(directory)
    embedding = next((key for key, inner in _model_keys(metadata) if inner == EMBEDDING_KEY), None)
    dtype = embedding and tensor_dtype(metadata, embedding)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{directory / METADATA}: no tensor {EMBEDDING_KEY!r}; not the checkpoint of a GPT model")
    model = _describe(metadata, config, dtype)
    backbone = _backbone(metadata, model, verify)
    return Contents(
        source=directory,
        format=FORMAT,
        architecture=model.architecture,
        backbone=backbone,
        assets=model.assets,
        base_model=str(directory.resolve()),
        notes=model.notes,
    )


def _latest(path: Path) -> Path | None:
    """The iteration's directory: ``path``, or the one that its tracker file names; None if neither exists."""
    if any((path / name).is_file() for name in (SETTINGS, METADATA)):
        return path
    return tracked_iteration(path)


def _check_settings(directory: Path) -> None:
    path = directory / SETTINGS
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing: the checkpoint is incomplete, or of another format than torch_dist")
    settings = read_json(path)
    backend = settings.get("sharded_backend") if isinstance(settings, dict) else None
    if backend != "torch_dist":
        raise CheckpointError(
            f"{path}: the format is {shown(backend)}; only torch_dist is read; save it in this format"
        )


def _describe(metadata: Metadata, config: Path | None, dtype: torch.dtype) -> ImportedModel:
    """The model, from ``config``, from our exported copy of it, or from the checkpoint's settings.

    Raises a ``CheckpointError`` if they contradict each other.
    """
    directory = metadata.path
    if config is None and (directory / RELEASED / CONFIG).is_file():
        config = directory / RELEASED
    args = _stated_args(metadata)
    if config is not None:
        model = given_model(config)
        if args is not None:
            check_agreement(args, model.architecture, model.where)
            return dataclasses.replace(model, notes=differing_settings(args, model.architecture, model.where))
        return model
    if args is None:
        raise CheckpointError(
            f"{directory}: does not describe its model; give the model's Hugging Face directory with --config DIR"
        )
    model = derived_model(derive_config(args, dtype), args.where)
    tokenizer = directory / TOKENIZER
    assets = released_assets(tokenizer) if tokenizer.is_dir() else {}
    return dataclasses.replace(model, assets={**assets, **model.assets})


def _stated_args(metadata: Metadata) -> Args | None:
    """The checkpoint's settings as Megatron-LM's arguments; None if it has none."""
    directory = metadata.path
    path = directory / RUN_CONFIG
    if path.is_file():
        with open_regular(path) as fd:
            data = os.read(fd, MAX_RUN_CONFIG + 1)
        if len(data) > MAX_RUN_CONFIG:
            raise CheckpointError(f"{path}: more than {MAX_RUN_CONFIG} bytes are too many for this file")
        try:
            return bridge_args(yaml.safe_load(data), str(path))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise DamagedError(f"{path}: not readable as YAML: {error}") from None
    path, common = directory / COMMON, None
    if path.is_file():
        common = TorchFile(path).content
    elif COMMON_STATE in metadata.tensors:
        path, state = directory / METADATA, read_object(metadata, COMMON_STATE)
        common = state[0] if isinstance(state, list) and len(state) == 1 else state
    args = common.get("args") if isinstance(common, dict) else None
    return Args(str(path), args.state) if isinstance(args, Inert) and isinstance(args.state, dict) else None


def _backbone(metadata: Metadata, model: ImportedModel, verify: bool) -> dict[str, StoredTensor]:
    arch, where = model.architecture, metadata.path / METADATA
    expected = expected_tensors(arch)
    found: dict[str, StoredTensor] = {}
    for key, inner in _model_keys(metadata):
        parameter = parse_key(inner, arch.num_layers)
        if parameter is None or any(name not in expected for source in parameter.sources for name in source.names):
            raise CheckpointError(f"{where}: unknown tensor {shown(key)} for the {arch.family} model of {model.where}")
        if metadata.tensors[key] is None:
            raise DamagedError(f"{where}: {shown(key)} is not a tensor")
        tensor = open_tensor(metadata, key, verify=verify)
        _check_shape(tensor, parameter, model, expected)
        for index, source in enumerate(parameter.sources):
            part = take_layer(tensor, index) if parameter.stacked else tensor
            parts = released_parts(source, part, expected, arch)
            if twice := found.keys() & parts:
                raise CheckpointError(f"{where}: {shown(key)} holds {min(twice)}, and so does another tensor")
            found |= parts
    missing = next((name for name in expected if name not in found), None)
    if missing is not None:
        raise CheckpointError(f"{where}: no tensor there holds {missing}, which {model.where} expects")
    return {name: found[name] for name in expected}


def _model_keys(metadata: Metadata) -> Iterator[tuple[str, str]]:
    """Yield every key of a model's tensor, with and without the prefixes of wrappers."""
    for key in metadata.tensors:
        inner = _WRAPPERS.sub("", key)
        if not NOT_WEIGHTS.fullmatch(inner):
            yield key, inner


def _check_shape(
    tensor: StoredTensor, parameter: Parameter, model: ImportedModel, expected: Mapping[str, tuple[int, ...]]
) -> None:
    where, source = f"{tensor.files[0]}: tensor {shown(tensor.made)}", parameter.sources[0]
    if not tensor.dtype.is_floating_point:
        raise CheckpointError(f"{where} has dtype {tensor.dtype}; expected a floating one")
    shape = fused_shape(source, expected)
    if parameter.stacked:
        shape = (len(parameter.sources), *shape)
    found = tensor.shape
    if source.kind == "vocabulary" and len(found) == 2 and found[0] > shape[0]:
        found = (shape[0], found[1])  # rows that pad it
    if found != shape:
        raise CheckpointError(f"{where} has shape {list(tensor.shape)}, but {model.where} makes it {list(shape)}")
