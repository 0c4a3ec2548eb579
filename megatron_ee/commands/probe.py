"""``megatron-ee probe``: what exits would gain on a model, a text and this machine, before tuning."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ee.commands import Parser
from megatron_ee.commands.engine_options import add_model, add_parallel
from megatron_ee.data.read import JSON_LINES
from megatron_ee.errors import ConfigError

if TYPE_CHECKING:
    from megatron_ee.evaluation.probe.shape import Shape

TEXTS = (".txt", *JSON_LINES)
DESCRIPTION = """Before tuning: fit exits after the layers of a model on your text, measure how often they agree with
the final exit and how long a layer and a head take here, and forecast the speed of threshold and speculative mode.
Prints the exits to tune as a block of a configuration, or why exits will not pay. Under torchrun the model is split
over --tensor x --pipeline processes."""
GPU = "h100"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser("probe", DESCRIPTION)
    add_model(result)
    result.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="text like that to be generated: corpus from prepare-data, or a .txt or .jsonl file (text or chat)",
    )
    result.add_argument(
        "--budget", type=float, default=5.0, metavar="MINUTES", help="time to take, loading aside (default: 5)"
    )
    result.add_argument(
        "--as-shape",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="also forecast what a model of another shape would gain on a GPU with the agreements measured here: its "
        "config.json, or a directory with one; repeatable",
    )
    result.add_argument("--gpu", metavar="NAME", help=f"the GPU for --as-shape (default: {GPU})")
    add_parallel(result)
    result.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    result.add_argument(
        "--output", type=Path, metavar="DIR", help="write probe.json to this directory: new, or an earlier probe's"
    )
    return result


def run(arguments: argparse.Namespace) -> int:
    """Probe. Print tables or JSON to stdout, and write the requested file."""
    from megatron_ee.checkpoint.atomic import write_json
    from megatron_ee.checkpoint.ownership import check_output, claim_output
    from megatron_ee.commands.inputs import check_corpus, check_input
    from megatron_ee.parallel.groups import launched_rank

    if arguments.gpu is not None and not arguments.as_shape:
        raise ConfigError("--gpu: has no effect without --as-shape, since this machine is measured; leave it out")
    if arguments.output is not None:
        check_output(arguments.output, "probe")
    check_input("--model", arguments.model)
    check_input("--as-shape", *arguments.as_shape)
    if arguments.data.suffix in TEXTS:
        check_input("--data", arguments.data)
    elif not arguments.data.is_file():
        check_corpus("--data", [arguments.data])
    shapes = [_shape(path, arguments.gpu or GPU) for path in arguments.as_shape]
    from megatron_ee.evaluation.probe.report import print_probe, probe_dict
    from megatron_ee.evaluation.probe.run import probe

    found = probe(
        model=arguments.model,
        data=arguments.data,
        budget_minutes=arguments.budget,
        dtype=arguments.dtype,
        tensor=arguments.tensor,
        pipeline=arguments.pipeline,
        weights=arguments.weights,
        quantise=arguments.quantise,
        verify=not arguments.no_verify,
        shapes=shapes,
    )
    if launched_rank() > 0:
        return 0
    if arguments.json:
        print(json.dumps(probe_dict(found)))
    else:
        print_probe(found)
    if arguments.output is not None:
        claim_output(arguments.output, "probe")
        write_json(arguments.output / "probe.json", probe_dict(found))
    return 0


def _shape(path: Path, gpu: str) -> Shape:
    """The model of a ``config.json``, named after its directory."""
    from megatron_ee.config.untrusted import read_json
    from megatron_ee.evaluation.probe.shape import Shape
    from megatron_ee.families.registry import parse_architecture
    from megatron_ee.planning.devices import find_device

    device = find_device(gpu)
    file = path / "config.json" if path.is_dir() else path
    config = read_json(file)
    if not isinstance(config, dict):
        raise ConfigError(f"--as-shape: {file} is no config.json: expected a JSON object")
    return Shape(str(path), parse_architecture(config, str(file)), device)
