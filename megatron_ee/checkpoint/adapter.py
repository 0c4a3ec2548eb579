"""The adapter format: only the exits, under released names, independent of the layout of the training run.

``exits.safetensors`` holds the trained tensors and fitted gates, as ``exits.<layer>.<released name>``. ``exits.json``
lists the exits and records the hash of their backbone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from megatron_ee.checkpoint.atomic import current_directory
from megatron_ee.checkpoint.digest import file_sha256
from megatron_ee.checkpoint.manifest import MANIFEST, encode
from megatron_ee.checkpoint.safetensors_file import read_header
from megatron_ee.checkpoint.saved_model import EXITS, SavedModel
from megatron_ee.checkpoint.store import Checkpoint, open_checkpoint
from megatron_ee.checkpoint.tensors import StoredTensor, stored
from megatron_ee.config.architecture import MAX_LAYERS, QUANTISE, Architecture, changed_settings, output_settings
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import Head, Init
from megatron_ee.config.untrusted import allowed_root, check_confined, read_json
from megatron_ee.config.validation import Strict, validated
from megatron_ee.errors import CheckpointError, DamagedError, printable, shown
from megatron_ee.exits.gate import GATE
from megatron_ee.exits.registry import BODIES, bodies_with
from megatron_ee.exits.tensors import saved_parts
from megatron_ee.parallel.groups import launched_rank

VERSION = 1
WEIGHTS, DESCRIPTION = "exits.safetensors", "exits.json"
INCLUDED = "adapter"
"""Subdirectory of a Hugging Face directory that holds an adapter."""
SETTINGS = "model_settings"
"""Key, in a description or a checkpoint's metadata, of the backbone's settings that affect its outputs."""
DATA = "data"
"""Key of the corpora that exits were tuned on, as ``describe_data`` gives them."""
MAX_DESCRIPTION = 2**20  # bytes


@dataclass(frozen=True)
class Adapter:
    """An adapter's checked description. Its weights stay on disk.

    Attributes:
        path: the directory.
        exits: in the order of their layers.
        backbone_sha256: hash of its backbone.
        base_model: path of its backbone.
        steps: number of tuning steps.
        weights: every tensor by name.
        settings: ``SavedModel.settings`` of the backbone; None if they are not recorded.
        corpora: path and fingerprint of each corpus that it was tuned on; None if they are not recorded.
    """

    path: Path
    exits: tuple[ExitSpec, ...]
    backbone_sha256: str
    base_model: str
    steps: int
    weights: dict[str, StoredTensor]
    settings: Mapping[str, Any] | None = None
    corpora: tuple[tuple[str, str], ...] | None = None


def describe_exits(
    specs: Sequence[ExitSpec],
    base_model: str,
    backbone_sha256: str | None,
    steps: int,
    weights_sha256: str,
    settings: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build the content of an adapter's ``exits.json``, with its own digest.

    Args:
        specs: the exits, in the order of their layers.
        base_model: path of the backbone.
        backbone_sha256: its hash.
        steps: number of tuning steps.
        weights_sha256: digest of ``exits.safetensors``.
        settings: ``SavedModel.settings`` of the backbone; None if they are not known.
        extra: further entries.
    """
    content = {
        "version": VERSION,
        "base_model": base_model,
        "backbone_sha256": backbone_sha256,
        **({SETTINGS: dict(settings)} if settings is not None else {}),
        "steps": steps,
        "exits": [dataclasses.asdict(spec) for spec in specs],
        "files": {WEIGHTS: weights_sha256},
        **(extra or {}),
    }
    return {**content, "sha256": _own_digest(content)}


def _own_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(encode(content, Path(DESCRIPTION))).hexdigest()


def open_adapter(path: str | Path, *, verify: bool = True) -> Adapter:
    """Read the description and headers of exits, and by default check the weights' digest.

    Args:
        path: an adapter, a parallel or training checkpoint with exits, or a Hugging Face directory with an adapter in
            ``adapter/``.
        verify: check the weights: in an adapter at once, in a checkpoint as they are read.

    Raises:
        CheckpointError: there are no exits, or their version is unknown, or they are incomplete or damaged. The message
            names the file.
    """
    directory = current_directory(path)
    if os.path.isfile(directory / MANIFEST):
        return exits_in(open_checkpoint(directory, verify=verify))
    root = allowed_root(directory)
    if not os.path.lexists(directory / DESCRIPTION) and os.path.lexists(directory / INCLUDED / DESCRIPTION):
        directory = directory / INCLUDED
    where = directory / DESCRIPTION
    if not os.path.lexists(where):
        raise CheckpointError(f"{directory}: no {DESCRIPTION}; give an adapter directory as tune writes it")
    for name in (DESCRIPTION, WEIGHTS):
        check_confined(directory / name, root)
    content = read_json(where, MAX_DESCRIPTION)
    if not isinstance(content, dict):
        raise DamagedError(f"{where}: expected a JSON object")
    if content.get("version") != VERSION:
        raise CheckpointError(f"{where}: version {shown(content.get('version'))}; this version reads {VERSION}")
    own = content.pop("sha256", None)  # the first adapters had no digest
    if verify and own is not None and own != _own_digest(content):
        raise DamagedError(f"{where}: damaged: its SHA-256 is not the one it states")
    weights = {name: stored(entry) for name, entry in read_header(directory / WEIGHTS).items()}
    files = content.get("files")
    digest = files.get(WEIGHTS) if isinstance(files, dict) else None
    if verify and file_sha256(directory / WEIGHTS) != digest:
        raise DamagedError(f"{directory / WEIGHTS}: damaged: its SHA-256 is not the one in {DESCRIPTION}")
    return _describe(directory, where, content, content.get("steps"), weights)


def exits_in(checkpoint: Checkpoint) -> Adapter:
    """Open the exits in a parallel or training checkpoint.

    Raises:
        CheckpointError: there are no exits, or their description is invalid.
    """
    where, metadata = checkpoint.path / MANIFEST, checkpoint.metadata
    if not metadata.get("exits"):
        raise CheckpointError(f"{where}: holds no exits; give an adapter directory as tune writes it")
    progress = metadata.get("progress")
    steps = progress.get("step") if isinstance(progress, dict) else metadata.get("steps")
    weights = {key: tensor for key, tensor in checkpoint.tensors().items() if key.startswith(EXITS)}
    return _describe(checkpoint.path, where, metadata, steps, weights)


def _known_body(name: Any) -> str:
    if not isinstance(name, str) or name not in BODIES:
        raise ValueError(f"must be one of {', '.join(BODIES)}, not {shown(name)}")
    return name


class _Exit(Strict):
    """One entry of a description's ``exits``: an ``ExitSpec``."""

    layer: int = Field(ge=1, le=MAX_LAYERS)
    body: Annotated[str, BeforeValidator(_known_body)] = "mlp"
    head: Head = "own"
    weight: float = Field(1.0, gt=0)
    rank: int = Field(64, ge=1)
    init: Init = "copy"
    gate: bool = False


class _Description(Strict, extra="ignore"):
    """The description of exits in an adapter's ``exits.json`` and in a checkpoint's metadata."""

    exits: list[_Exit] = Field(min_length=1)
    base_model: str
    backbone_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    steps: int = Field(ge=0)
    model_settings: dict[str, Any] | None = None


def _describe(
    directory: Path, where: Path, content: dict[str, Any], steps: Any, weights: dict[str, StoredTensor]
) -> Adapter:
    found = validated(_Description, {**content, "steps": steps}, where=str(where), error=CheckpointError)
    exits = tuple(ExitSpec(**entry.model_dump()) for entry in found.exits)
    try:
        if [spec.layer for spec in exits] != sorted({spec.layer for spec in exits}):
            raise ValueError("exits must be listed once each, in the order of their layers")
        _check_kinds(exits, weights)
    except ValueError as error:
        raise CheckpointError(f"{where}: not a description of exits: {error}") from None
    base_model = printable(found.base_model)
    return Adapter(
        directory,
        exits,
        found.backbone_sha256,
        base_model,
        found.steps,
        weights,
        found.model_settings,
        _corpora(content.get(DATA)),
    )


def describe_corpora(corpora: Sequence[tuple[str, str]] | None) -> dict[str, Any]:
    """The entry of a description for ``Adapter.corpora``; empty if they are not recorded."""
    return {} if corpora is None else {DATA: {"train": [{"path": path, "sha256": sha256} for path, sha256 in corpora]}}


def _corpora(data: Any) -> tuple[tuple[str, str], ...] | None:
    """Path and fingerprint of each corpus in ``describe_data``'s form; None if there is no such thing."""
    train = data.get("train") if isinstance(data, dict) else None
    if not isinstance(train, list):
        return None
    pairs = [(each.get("path"), each.get("sha256")) for each in train if isinstance(each, dict)]
    return tuple((path, digest) for path, digest in pairs if isinstance(path, str) and isinstance(digest, str))


def _check_kinds(exits: Sequence[ExitSpec], weights: Mapping[str, StoredTensor]) -> None:
    """Check that the weights fit the described exits, as far as this is possible without the model."""
    stray = set(weights)
    for spec in exits:
        prefix = f"{EXITS}{spec.layer}."
        own = {name.removeprefix(prefix) for name in weights if name.startswith(prefix)}
        stray -= {prefix + name for name in own}
        kinds = {name.partition(".")[0] for name in own}
        bodies = bodies_with(kinds - {"lm_head", GATE})
        head = "own" if "lm_head.weight" in own else "low_rank" if "lm_head.a" in own else "shared"
        if spec.body not in bodies or head != spec.head:
            raise ValueError(
                f"the exit after layer {spec.layer} is said to be {spec.body} with head {spec.head}, "
                f"but its weights are those of {' or '.join(bodies) or 'no body known'} with head {head}"
            )
        if spec.gate != (GATE in kinds):
            has, lacks = ("a", "no") if spec.gate else ("no", "a")
            raise ValueError(f"the exit after layer {spec.layer} is said to have {has} gate, but there is {lacks} gate")
        if head == "low_rank" and weights[f"{prefix}lm_head.a"].shape[:1] != (spec.rank,):
            raise ValueError(
                f"the head after layer {spec.layer} is said to have rank {spec.rank}, but its weights differ"
            )
    if stray:
        raise ValueError(f"tensor {shown(min(stray))} does not belong to a described exit")


def find_exits(model: SavedModel, path: str | Path | None, *, verify: bool = True) -> Adapter | None:
    """Open the exits at ``path``, or without a path those in the model's directory, if there are any.

    They are checked against the model, except for the backbone's hash, which ``check_hash`` checks. A line on stderr
    says if they were tuned with other quantisation.

    Raises:
        CheckpointError: the exits are invalid, or do not fit the model or its settings.
    """
    adapter = exits_with(model, verify=verify) if path is None else open_adapter(path, verify=verify)
    if adapter is None:
        return None
    check_settings(adapter, model)
    check_fits(adapter, adapter.exits, model.architecture)
    say_quantisation(adapter, model, "--quantise")
    return adapter


def check_hash(adapter: Adapter, model: SavedModel, digest: Callable[[], str]) -> None:
    """Refuse exits of another backbone. ``digest`` computes the model's hash if it is needed.

    Raises:
        CheckpointError: the hashes differ.
    """
    if adapter.path != model.path:  # a parallel checkpoint's manifest covers both
        check_backbone(adapter, digest(), model.path)


def exits_with(model: SavedModel, *, verify: bool = True) -> Adapter | None:
    """Open the exits in a model's parallel checkpoint or in ``adapter/`` of its directory; None if there are none.

    Raises:
        CheckpointError: the exits are invalid.
    """
    if model.checkpoint is not None:
        return exits_in(model.checkpoint) if model.checkpoint.metadata.get("exits") else None
    return open_adapter(model.path, verify=verify) if (model.path / INCLUDED / DESCRIPTION).is_file() else None


def check_backbone(adapter: Adapter, backbone_sha256: str, model: str | Path) -> None:
    """Refuse a backbone that is not the adapter's.

    Raises:
        CheckpointError: the hashes differ.
    """
    if adapter.backbone_sha256 != backbone_sha256:
        raise CheckpointError(
            f"{adapter.path}: made for the backbone {adapter.backbone_sha256[:16]}... ({adapter.base_model}), "
            f"but {model} is {backbone_sha256[:16]}...; exits fit only the weights they were tuned on"
        )


def check_settings(adapter: Adapter, model: SavedModel) -> None:
    """Refuse a model whose settings differ from those that the adapter records.

    An adapter that does not record them is accepted.

    Raises:
        CheckpointError: settings differ; the message names them.
    """
    if adapter.settings is None:
        return
    if changed := changed_settings(adapter.settings, output_settings(model.architecture)):
        raise CheckpointError(
            f"{adapter.path}: made for other settings of the model than those in {model.path / 'config.json'}: "
            f"{changed}; restore that file, or tune exits for the new settings"
        )


def say_quantisation(adapter: Adapter, model: SavedModel, key: str) -> None:
    """Print one line to stderr, on the first rank, if the exits were tuned with other quantisation of a plain model.

    They work with any, but agree best with the hidden states that they were tuned on. An adapter that does not record
    it is taken to fit.

    Args:
        adapter: of the model.
        model: as it will be loaded.
        key: of the setting that quantises the model.
    """
    tuned = (adapter.settings or {}).get(QUANTISE, model.rounding)
    if tuned != model.rounding and launched_rank() == 0:
        print(
            f"{key}: {model.rounding}, but the exits in {adapter.path} were tuned with {shown(tuned)}; they work, but "
            "their agreement with the final exit may be lower",
            file=sys.stderr,
            flush=True,
        )


def check_fits(adapter: Adapter, specs: Iterable[ExitSpec], architecture: Architecture) -> None:
    """Refuse an adapter without these exits, or with tensors that do not fit the model. Reads no weights.

    Raises:
        CheckpointError: something does not fit; the message names the exit or the tensor.
    """
    known = {spec.layer: spec for spec in adapter.exits}
    for spec in specs:
        check_same_kind(spec, known.get(spec.layer), adapter)
        for part in saved_parts(spec, architecture):
            for name, shape in zip(part.saved.names, part.shapes, strict=True):
                if not part.optional or name in adapter.weights:
                    named_tensor(adapter, name, shape)


def named_tensor(adapter: Adapter, name: str, shape: tuple[int, ...]) -> StoredTensor:
    """Look up the adapter's tensor ``name``. Raises ``CheckpointError`` if it is missing or has another shape."""
    tensor = adapter.weights.get(name)
    if tensor is None:
        raise CheckpointError(f"{adapter.path}: tensor {name!r} is missing")
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.files[-1]}: tensor {name!r} has shape {list(tensor.shape)}, but this model makes it {list(shape)}"
        )
    return tensor


def check_same_kind(wanted: ExitSpec, found: ExitSpec | None, adapter: Adapter) -> None:
    """Refuse an exit that the adapter lacks, or has with another body, head or rank."""
    where = adapter.path / DESCRIPTION
    if found is None:
        layers = ", ".join(str(spec.layer) for spec in adapter.exits)
        raise CheckpointError(f"{where}: no exit after layer {wanted.layer}; it has them after {layers}")
    for name in ("body", "head") + (("rank",) if wanted.head == "low_rank" else ()):
        if getattr(found, name) != getattr(wanted, name):
            raise CheckpointError(
                f"{where}: the exit after layer {wanted.layer} has {name} {getattr(found, name)!r}, "
                f"not {getattr(wanted, name)!r}"
            )
