"""One conversion: open, edit, and write in another format, or list what would be written."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_ee.checkpoint.contents import Contents
from megatron_ee.checkpoint.digest import hash_backbone
from megatron_ee.checkpoint.outputs import OutputDirectory
from megatron_ee.config.architecture import output_settings
from megatron_ee.config.exits import resolve_exits
from megatron_ee.config.schema import ExitConfig, Head
from megatron_ee.conversion.copy import write_output
from megatron_ee.conversion.edit import add_exits, change_heads, check_exits, drop_exits, merge_exits
from megatron_ee.conversion.expansion import expanded
from megatron_ee.conversion.formats import DType, open_contents
from megatron_ee.conversion.shallow import shallow_model, text_only
from megatron_ee.conversion.to_adapter import to_adapter
from megatron_ee.conversion.to_hf import SHARD, to_hf
from megatron_ee.conversion.to_parallel import even_stages, to_parallel
from megatron_ee.errors import CheckpointError, ConfigError
from megatron_ee.progress import track

Target = Literal["hf", "parallel", "adapter", "megatron"]


@dataclass(frozen=True)
class Conversion:
    """A request for a conversion.

    Attributes:
        input: a checkpoint of any format: its directory, or a GGUF file.
        to: format to write.
        model: the backbone, for an input that holds only exits; None to use the path that the exits record.
        config: for a Megatron checkpoint: the Hugging Face directory of its model, or its ``config.json``.
        trust: allow formats that hold pickles.
        verify: check checksums, if the files have any.
        dtype: of the weights of a GGUF file; None is bfloat16.
        tensor: tensor-parallel size of a parallel checkpoint's shards.
        pipeline: number of stages of a parallel checkpoint, with layers spread evenly.
        stages: number of layers of each stage, instead of ``pipeline``.
        exit: layer of the exit to write as a plain model.
        drop: layers of exits to remove.
        adapters: adapters whose exits are merged.
        add: new exits, to be initialised.
        heads: new heads by layer of the exit.
        all_heads: new head of all exits that are not in ``heads``.
        seed: seed of random weights.
        shard: bytes of tensors per file of a Hugging Face directory.
        expand: write quantised weights expanded.
    """

    input: Path
    to: Target
    model: Path | None = None
    config: Path | None = None
    trust: bool = False
    verify: bool = True
    dtype: DType | None = None
    tensor: int = 1
    pipeline: int = 1
    stages: Sequence[int] = ()
    exit: int | None = None
    drop: Sequence[int] = ()
    adapters: Sequence[Path] = ()
    add: Sequence[ExitConfig] = ()
    heads: Mapping[int, Head] = field(default_factory=dict)
    all_heads: Head | None = None
    seed: int = 1
    shard: int = SHARD
    expand: bool = False


def prepare(request: Conversion) -> tuple[Contents, Contents]:
    """The contents of the input, and the contents to write. No tensor is read into memory.

    Raises:
        CheckpointError: an input is invalid, or inputs do not match each other.
        ConfigError: an option is invalid.
    """
    _check(request)
    found = open_contents(
        request.input, trust=request.trust, config=request.config, verify=request.verify, dtype=request.dtype
    )
    contents = _with_backbone(found, request) if _needs_backbone(found, request) else found
    check_exits(contents)
    if request.drop:
        contents = drop_exits(contents, request.drop)
    if request.adapters:
        others = [open_contents(path, trust=request.trust, verify=request.verify) for path in request.adapters]
        contents = merge_exits(contents, others, lambda: backbone_hash(contents))
    if request.add:
        assert contents.architecture is not None
        contents = add_exits(contents, resolve_exits(request.add, contents.architecture.num_layers), request.seed)
    if request.heads or request.all_heads:
        layers = [spec.layer for spec in contents.exits]
        heads = {layer: request.all_heads for layer in layers} if request.all_heads else {}
        contents = change_heads(contents, {**heads, **request.heads}, request.seed)
    check_exits(contents)
    if request.to == "megatron" and contents.exits:
        note = f"{contents.source}: its exits are left out: Megatron's format cannot hold them; use --to adapter"
        contents = dataclasses.replace(contents, notes=(*contents.notes, note))
    if request.expand or request.exit is not None:
        contents = expanded(contents)
    elif request.to == "megatron" and contents.quantised:
        raise CheckpointError(
            f"{contents.source}: Megatron's format cannot hold quantised weights; write their values with --expand, or "
            "use --to hf or --to parallel"
        )
    if request.exit is not None:
        contents = shallow_model(contents, request.exit)
    elif contents.exits and contents.backbone_sha256 is None and request.to in ("adapter", "hf", "parallel"):
        # Recorded so that a later load can check that the exits fit the model.
        settings = output_settings(contents.architecture) if contents.architecture is not None else None
        contents = dataclasses.replace(contents, backbone_sha256=backbone_hash(contents), settings=settings)
    return found, _without_vision(contents, request)


def _without_vision(contents: Contents, request: Conversion) -> Contents:
    """Remove vision tensors unless the output is a Hugging Face directory."""
    if request.to in ("parallel", "megatron"):
        return text_only(contents)
    if request.to == "hf" and contents.vision:
        line = f"{contents.source}: its {len(contents.vision)} vision tensors are copied unchanged"
        return dataclasses.replace(contents, notes=(*contents.notes, line))
    return contents


def plan_output(contents: Contents, request: Conversion) -> OutputDirectory:
    """The files to write.

    Raises:
        CheckpointError: ``contents`` lacks what the format needs.
        ConfigError: the model cannot be split as requested.
    """
    if request.to == "hf":
        return to_hf(contents, shard=request.shard)
    if request.to == "adapter":
        return to_adapter(contents)
    if request.to == "megatron":
        # Imported late: it imports torch's distributed checkpoints, and with them pickle.
        from megatron_ee.importers.megatron.export import to_torch_dist

        return to_torch_dist(contents)
    arch = contents.architecture
    stages = request.stages or (even_stages(arch.num_layers, request.pipeline) if arch is not None else ())
    return to_parallel(contents, tensor=request.tensor, stages=stages)


def write(contents: Contents, request: Conversion, output: Path) -> None:
    """Write ``contents`` to the new directory ``output``, with progress on stderr.

    Raises:
        CheckpointError: something cannot be read or written. The same request then continues where this one stopped.
    """
    plan = plan_output(contents, request)
    with track(plan.nbytes, "B", f"writing {output}") as bar:
        write_output(plan, output, advance=bar.advance, report=bar.note)


def backbone_hash(contents: Contents) -> str:
    """The hash of the backbone in ``contents``, from the cache or computed with progress on stderr."""
    return hash_backbone(contents.stored_backbone, enabled=sys.stderr.isatty())


def _check(request: Conversion) -> None:
    if request.exit is not None and request.to != "hf":
        raise ConfigError(f"--exit: writes an exit as a Hugging Face model; use --to hf, not --to {request.to}")
    if request.to != "parallel" and (request.tensor, request.pipeline, tuple(request.stages)) != (1, 1, ()):
        raise ConfigError(
            f"--tensor, --pipeline and --stages have no effect with --to {request.to}; use them with --to parallel"
        )
    if request.expand and request.to == "adapter":
        raise ConfigError("--expand: has no effect with --to adapter, which holds no backbone")
    if request.stages and request.pipeline not in (1, len(request.stages)):
        raise ConfigError(
            f"--stages: {list(request.stages)} contradicts --pipeline {request.pipeline}; give one of the two"
        )


def _needs_backbone(found: Contents, request: Conversion) -> bool:
    wanted = request.to != "adapter" or request.exit is not None or request.add or request.heads or request.all_heads
    return found.architecture is None and bool(wanted)


def _with_backbone(found: Contents, request: Conversion) -> Contents:
    """Add the backbone that the exits were made for."""
    place = request.model or Path(found.base_model)
    if request.model is None and not place.is_dir():
        raise CheckpointError(
            f"{found.source}: its model {found.base_model!r} does not exist; give its path with --model"
        )
    model = open_contents(place, trust=request.trust, config=request.config, verify=request.verify)
    if not model.backbone:
        raise CheckpointError(f"{place}: holds no backbone; give the model with --model")
    plain = dataclasses.replace(model, exits=(), exit_tensors={}, backbone_sha256=None, settings=None)
    merged = merge_exits(plain, [found], lambda: backbone_hash(plain))
    return dataclasses.replace(merged, base_model=model.base_model)  # the model may have moved
