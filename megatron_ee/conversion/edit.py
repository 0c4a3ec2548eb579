"""Adds, drops and merges exits of a checkpoint, and changes their heads. Pure functions; no tensor is in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ee.checkpoint.contents import Contents
from megatron_ee.checkpoint.derived import copied, low_rank_sum
from megatron_ee.checkpoint.initialise import random_tensor
from megatron_ee.checkpoint.tensors import StoredTensor
from megatron_ee.config.architecture import QUANTISE, Architecture, changed_settings, output_settings
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import Head
from megatron_ee.errors import CheckpointError, ConfigError, shown
from megatron_ee.exits.gate import GATE
from megatron_ee.exits.registry import check_trains
from megatron_ee.exits.tensors import exit_tensors
from megatron_ee.families.weights import head_name


def check_exits(contents: Contents) -> None:
    """Check that the exits have exactly the expected tensors.

    Without an architecture, as in an adapter, check only that every tensor belongs to one of the exits.

    Raises:
        CheckpointError: an exit is outside the model or not in order; the exits are made for other settings of the
            model; a tensor is missing, unknown, mis-shaped or not floating. The message names it.
    """
    layers, arch = [spec.layer for spec in contents.exits], contents.architecture
    made_for = contents.settings
    if arch is not None and made_for is not None and (changed := changed_settings(made_for, output_settings(arch))):
        raise CheckpointError(f"{contents.source}: its exits are made for other settings of the model: {changed}")
    if layers != sorted(set(layers)):
        raise CheckpointError(f"{contents.source}: exits after layers {layers}: expected one each, in their order")
    last = arch.num_layers if arch is not None else max(layers, default=1)
    outside = next((layer for layer in layers if not 1 <= layer <= last), None)
    if outside is not None:
        raise CheckpointError(f"{contents.source}: an exit after layer {outside}, but the model has layers 1 to {last}")
    expected = {} if arch is None else _expected(contents.exits, arch)
    for name, tensor in contents.exit_tensors.items():
        where = f"{tensor.files[-1] if tensor.files else contents.source}: tensor {name!r}"
        if name not in expected if arch is not None else _owner(name, layers) is None:
            raise CheckpointError(f"{where} is unknown: the exits are {_described(contents.exits)}")
        if arch is not None and tensor.shape != expected[name]:
            raise CheckpointError(f"{where} has shape {list(tensor.shape)}, but must have {list(expected[name])}")
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(f"{where} has dtype {tensor.dtype}; expected a floating one")
    for name in expected:
        if name not in contents.exit_tensors:
            raise CheckpointError(f"{contents.source}: tensor {name!r} is missing")


def add_exits(contents: Contents, specs: Sequence[ExitSpec], seed: int) -> Contents:
    """Attach new exits, initialised as in tuning: see ``initialise_exit``. ``init: auto`` copies.

    Args:
        contents: a backbone, maybe with exits.
        specs: resolved (``config.exits.resolve_exits``).
        seed: seed of random weights.

    Raises:
        ConfigError: there is no backbone, a layer is outside the model or has an exit already, no exit would train, or
            ``init`` is ``fit``, for which there is no data.
    """
    if not specs:
        return contents
    arch = _backbone_shape(contents, "new exits start from the model's own weights")
    taken = {spec.layer for spec in contents.exits}
    specs = [replace(spec, init="copy") if spec.init == "auto" else spec for spec in specs]
    for spec in specs:
        if spec.init == "fit":
            raise ConfigError(
                f"exits: the exit after layer {spec.layer} has init fit, which needs data; tune it, or use init copy"
            )
        if spec.gate:
            raise ConfigError(
                f"exits: the exit after layer {spec.layer} has a gate, which needs data; tune it, or leave out gate"
            )
        if not 1 <= spec.layer <= arch.num_layers:
            raise ConfigError(
                f"exits: layer {spec.layer} is outside {contents.source}, which has layers 1 to {arch.num_layers}"
            )
        if spec.layer in taken:
            raise ConfigError(
                f"exits: there is already an exit after layer {spec.layer} in {contents.source}; drop it first, or "
                "choose another layer"
            )
        taken.add(spec.layer)
    exits = _in_order((*contents.exits, *specs))
    check_trains(exits)
    tensors = dict(contents.exit_tensors)
    for spec in specs:
        tensors |= _first_values(contents, spec, arch, seed)
    return replace(contents, exits=exits, exit_tensors=tensors)


def drop_exits(contents: Contents, layers: Collection[int]) -> Contents:
    """Remove the exits after ``layers``.

    Raises:
        ConfigError: there is no exit after a layer, or nothing would be left.
    """
    for layer in layers:
        _exit_after(contents, layer)
    exits = tuple(spec for spec in contents.exits if spec.layer not in layers)
    if not exits and not contents.backbone:
        raise ConfigError(f"{contents.source}: without the exits after {_listed(layers)} nothing is left; keep one")
    tensors = {name: each for name, each in contents.exit_tensors.items() if _owner(name, layers) is None}
    left = replace(contents, exits=exits, exit_tensors=tensors)
    return left if exits else replace(left, backbone_sha256=None, settings=None, steps=0, corpora=None)


def merge_exits(contents: Contents, adapters: Sequence[Contents], backbone_sha256: Callable[[], str]) -> Contents:
    """Add the exits of several adapters to a backbone or to another adapter.

    Args:
        contents: a backbone, an adapter, or both.
        adapters: their exits are added. Their other content is ignored.
        backbone_sha256: computes the hash of the backbone in ``contents``. Called at most once, after all checks that
            do not need it.

    Returns:
        ``contents`` with all exits, and the largest number of tuning steps of any of them.

    Raises:
        CheckpointError: two exits are after the same layer, the exits are for different backbones or do not record
            theirs, or a tensor does not fit (as in ``check_exits``).
    """
    if not adapters:
        return contents
    owners: dict[int, Path] = {}
    for each in (contents, *adapters):
        if not each.exits and each is not contents:
            raise CheckpointError(f"{each.source}: holds no exits; there is nothing to merge")
        for spec in each.exits:
            if spec.layer in owners:
                raise CheckpointError(
                    f"{each.source}: has an exit after layer {spec.layer}, and so has {owners[spec.layer]}; drop one"
                )
            owners[spec.layer] = each.source
    first = _one_backbone(contents, adapters)
    settings = _one_kind_of_settings((contents, *adapters))
    for each in adapters:  # one adapter at a time, so that a tensor of one cannot count for another
        check_exits(replace(each, architecture=contents.architecture or each.architecture))
    if contents.backbone:
        found = backbone_sha256()
        if found != first.backbone_sha256:
            raise CheckpointError(
                f"{_made_for(first)}, but {contents.source} is {found[:16]}...; exits fit only the weights that they "
                "were tuned on"
            )
    parts = (contents, *adapters)
    return replace(
        contents,
        exits=_in_order(spec for each in parts for spec in each.exits),
        exit_tensors={name: tensor for each in parts for name, tensor in each.exit_tensors.items()},
        base_model=contents.base_model or first.base_model,
        backbone_sha256=first.backbone_sha256,
        settings=settings,
        steps=max(each.steps for each in parts if each.exits),
        corpora=_all_corpora(parts),
    )


def _one_backbone(contents: Contents, adapters: Sequence[Contents]) -> Contents:
    """The first part with exits, after a check that all parts are for the same backbone."""
    # Exits that are stored with their backbone do not have to record it.
    silent = bool(contents.backbone) and contents.backbone_sha256 is None
    parts = [*adapters] if silent or not contents.exits else [contents, *adapters]
    for each in parts:
        if each.backbone_sha256 is None:
            raise CheckpointError(
                f"{each.source}: does not record the backbone of its exits; convert it --to adapter first"
            )
        if each.backbone_sha256 != parts[0].backbone_sha256:
            raise CheckpointError(f"{_made_for(each)}, but {_made_for(parts[0])}; exits of two models cannot be merged")
    return parts[0]


def _all_corpora(parts: Sequence[Contents]) -> tuple[tuple[str, str], ...] | None:
    """The corpora of all exits, each once; None if no part records them."""
    recorded = [each.corpora for each in parts if each.exits and each.corpora is not None]
    return tuple(dict.fromkeys(itertools.chain.from_iterable(recorded))) if recorded else None


def _one_kind_of_settings(parts: Sequence[Contents]) -> Mapping[str, Any] | None:
    """The model settings of all exits. Exits without recorded settings fit any.

    Where exits were tuned with different quantisation, it is not recorded any more.
    """
    first: Contents | None = None
    quantised = set()
    for each in parts:
        if not each.exits or each.settings is None:
            continue
        first = first or each
        assert first.settings is not None
        quantised.add(shown(each.settings.get(QUANTISE)))
        if changed := changed_settings(first.settings, each.settings):
            raise CheckpointError(
                f"{each.source}: made for other settings of the model than {first.source}: {changed}; exits of two "
                "models do not mix"
            )
    if first is None or first.settings is None:
        return None
    return {key: value for key, value in first.settings.items() if key != QUANTISE or len(quantised) == 1}


def _made_for(contents: Contents) -> str:
    model = f" ({contents.base_model})" if contents.base_model else ""
    return f"{contents.source}: made for the backbone {str(contents.backbone_sha256)[:16]}...{model}"


def change_heads(contents: Contents, heads: Mapping[int, Head], seed: int) -> Contents:
    """Change the heads of exits.

    A new ``own`` head has the same output as the old head: it is a copy of the backbone's head, or W0 + B A. A new
    ``low_rank`` head, of the exit's ``rank``, starts equal to the backbone's head. A head that becomes ``shared`` is
    removed, with a line in ``notes``.

    Args:
        contents: exits; also their backbone, unless all new heads are ``shared``.
        heads: new head by the exit's layer.
        seed: seed of A in a new ``low_rank`` head.

    Raises:
        ConfigError: there is no such exit, an ``own`` head is to become ``low_rank``, or the backbone is needed.
        CheckpointError: as ``check_exits``.
    """
    check_exits(contents)
    exits, tensors, notes = {spec.layer: spec for spec in contents.exits}, dict(contents.exit_tensors), []
    for layer, head in sorted(heads.items()):
        spec = _exit_after(contents, layer)
        if head == spec.head:
            continue
        new = _new_head(contents, spec, head, seed)
        old = [name for name in tensors if name.startswith(f"exits.{layer}.lm_head.")]
        tensors = {name: tensor for name, tensor in tensors.items() if name not in old} | new
        exits[layer] = replace(spec, head=head)
        if head == "shared":
            notes.append(
                f"the exit after layer {layer} now uses the backbone's head; its tuned {spec.head} head is removed "
                f"({', '.join(old)})"
            )
        if head == "shared" and spec.gate:
            exits[layer] = replace(exits[layer], gate=False)
            tensors = {name: each for name, each in tensors.items() if not name.startswith(f"exits.{layer}.{GATE}.")}
            notes.append(f"the gate of the exit after layer {layer} is removed: it was fitted to the old head")
    return replace(contents, exits=_in_order(exits.values()), exit_tensors=tensors, notes=(*contents.notes, *notes))


def _new_head(contents: Contents, spec: ExitSpec, head: Head, seed: int) -> dict[str, StoredTensor]:
    """Tensors of an exit's new head."""
    if head == "shared":
        return {}
    if spec.head == "own":
        raise ConfigError(
            f"{contents.source}: the exit after layer {spec.layer} has an own head, which cannot become "
            f"{head} without a change of its output; tune a new exit with head {head}"
        )
    arch = _backbone_shape(contents, f"head {head} of the exit after layer {spec.layer} is made from the model's")
    prefix, base = f"exits.{spec.layer}.lm_head", head_name(arch)
    if spec.head == "low_rank":
        a, b = ((name, contents.exit_tensors[name]) for name in (f"{prefix}.a", f"{prefix}.b"))
        return {f"{prefix}.weight": low_rank_sum((base, contents.backbone[base]), b, a, b[1].dtype)}
    values = _first_values(contents, replace(spec, head=head, init="copy"), arch, seed)
    return {name: tensor for name, tensor in values.items() if name.startswith(f"{prefix}.")}


def _first_values(contents: Contents, spec: ExitSpec, arch: Architecture, seed: int) -> dict[str, StoredTensor]:
    """Tensors of a new exit, each in the dtype of the backbone's corresponding tensor."""
    values = {}
    for name, (shape, origin) in exit_tensors(spec, arch).items():
        like = origin or head_name(arch)
        if origin is not None and spec.init != "random":
            values[name] = copied(origin, contents.backbone[origin])
        else:
            values[name] = random_tensor(name, shape, spec.layer, seed, contents.backbone[like].dtype, arch)
    return values


def _backbone_shape(contents: Contents, why: str) -> Architecture:
    if contents.architecture is None or not contents.backbone:
        raise ConfigError(f"{contents.source}: holds no backbone, but {why}; give the model as well")
    return contents.architecture


def _exit_after(contents: Contents, layer: int) -> ExitSpec:
    for spec in contents.exits:
        if spec.layer == layer:
            return spec
    there = f"it has them after {_listed(spec.layer for spec in contents.exits)}" if contents.exits else "it has none"
    raise ConfigError(f"{contents.source}: no exit after layer {layer}; {there}")


def _expected(exits: Iterable[ExitSpec], arch: Architecture) -> dict[str, tuple[int, ...]]:
    return {name: shape for spec in exits for name, (shape, _) in exit_tensors(spec, arch).items()}


def _owner(name: str, layers: Iterable[int]) -> int | None:
    """The layer of the exit that a tensor belongs to."""
    return next((layer for layer in layers if name.startswith(f"exits.{layer}.")), None)


def _in_order(exits: Iterable[ExitSpec]) -> tuple[ExitSpec, ...]:
    return tuple(sorted(exits, key=lambda spec: spec.layer))


def _described(exits: Iterable[ExitSpec]) -> str:
    return ", ".join(f"{spec.layer} (body {spec.body}, head {spec.head})" for spec in exits) or "none"


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(layers)))
