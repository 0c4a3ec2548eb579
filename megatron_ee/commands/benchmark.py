"""``megatron-ee benchmark``: tuning, loading, converting against what one would otherwise run, and the plan."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ee.commands import DTYPES, Parser, at_least
from megatron_ee.errors import ConfigError

if TYPE_CHECKING:
    from megatron_ee.benchmark.ranks import ParallelStep
    from megatron_ee.benchmark.shape import Shape

TUNE = """Time the tuning step against plain PyTorch doing the same work (the transformers model frozen, the same exits
as ordinary modules), and the exit loss alone against torch's own, interleaved, on a random model made for this."""
LOAD = """Time loading a released model against reading the same bytes, and the hashing that comes on top."""
PIPELINE = """Run tuning steps on a random model in pipeline stages, one process of one CPU thread each, which this
command starts by itself; report the share of the time in which each stage computes, against M / (M + P - 1) and against
the plan, and the bytes that each link carries, against the least possible."""
MEMORY = """Run tuning steps on a random model over processes that this command starts by itself, and compare what each
holds at its peak with the plan that a run prints before it starts."""
CONVERT = """Make a random bfloat16 model on disk, convert it to a parallel checkpoint and back, each in a process of
its own, and compare time with `cp` and SHA-256 of the same bytes; load both on two tensor-parallel ranks, and compare
with reading the bytes that each needs; save a random state in the background and on the spot."""
GENERATE = """Decode with the engine: in full mode against transformers' generate and the machine's own bandwidth, in
speculative mode against transformers with the same exits, in threshold mode along full mode's output, with decisions
from a trace against its chains timed alone, and in batches. On a released model with tuned exits, or a random one."""
DECODED: dict[str, dict[str, Any]] = {
    "270m": {"hidden": 1024, "layers": 16, "vocab": 32000},
    "1b": {"hidden": 2048, "layers": 20, "vocab": 32000},
}

SMALL = {
    "hidden": 512,
    "layers": 16,
    "vocab": 8000,
    "sequence_length": 512,
    "exits": 4,
    "mlp_exits": 4,
    "head": "own",
    "dtype": "float32",
    "microbatches": 8,
}
SHAPES: dict[str, dict[str, Any]] = {
    "small": {**SMALL, "hidden": 1024, "vocab": 16000, "sequence_length": 256, "microbatches": 2},
    "7b": {
        "hidden": 4096,
        "layers": 32,
        "ffn": 11008,
        "heads": 32,
        "vocab": 32000,
        "sequence_length": 128,
        "exits": 8,
        "mlp_exits": 1,
        "head": "shared",
        "dtype": "bfloat16",
        "microbatches": 2,
    },
}
SHAPES["13b"] = {**SHAPES["7b"], "hidden": 5120, "layers": 40, "ffn": 13824, "heads": 40}
PARTS = ("convert", "load", "save")
DECODING = ("full", "speculative", "threshold", "overhead", "batch")
PLOTS = (".png", ".pdf", ".svg")


class _Nested(Parser):
    """The parser of one kind of measurement, as argparse makes it."""

    def __init__(self, *, prog: str, description: str) -> None:
        super().__init__(prog.removeprefix("megatron-ee "), description)


def parser() -> argparse.ArgumentParser:
    """The command line; ``what`` is the kind of measurement."""
    about = "Compare with what one would otherwise run, or with the plan, on this machine; prints ratios."
    result, names = Parser("benchmark", about), "{tune,load,pipeline,memory,convert}"
    kinds = result.add_subparsers(dest="what", required=True, metavar=names, parser_class=_Nested)
    _tune_options(kinds.add_parser("tune", help="the tuning step and its loss", description=TUNE))
    _load_options(kinds.add_parser("load", help="loading a released model", description=LOAD))
    about = "how busy pipeline stages are, and what travels between them"
    _pipeline_options(kinds.add_parser("pipeline", help=about, description=PIPELINE))
    about = "each rank's memory against the plan's"
    _memory_options(kinds.add_parser("memory", help=about, description=MEMORY))
    about = "conversions and their loading against plain copies and reads"
    _convert_options(kinds.add_parser("convert", help=about, description=CONVERT))
    about = "decoding in every mode against transformers, full mode and the machine"
    _generate_options(kinds.add_parser("generate", help=about, description=GENERATE))
    return result


def run(arguments: argparse.Namespace) -> int:
    """Measure; a table or JSON to stdout."""
    kinds = {
        "tune": _run_tune,
        "load": _run_load,
        "pipeline": _run_pipeline,
        "memory": _run_memory,
        "convert": _run_convert,
        "generate": _run_generate,
    }
    return kinds[arguments.what](arguments)


def _tune_options(options: argparse.ArgumentParser) -> None:
    whole = at_least(1)
    options.add_argument("--hidden", type=whole, default=768, metavar="N", help="hidden size (default: 768)")
    options.add_argument("--layers", type=whole, default=12, metavar="N", help="layers (default: 12)")
    options.add_argument("--ffn", type=whole, metavar="N", help="MLP size (default: 8/3 of the hidden size)")
    options.add_argument("--heads", type=whole, metavar="N", help="attention heads (default: one per 64 of hidden)")
    options.add_argument("--vocab", type=at_least(2), default=32000, metavar="N", help="vocabulary (default: 32000)")
    options.add_argument(
        "--sequence-length", type=at_least(2), default=2048, metavar="N", help="tokens per step (default: 2048)"
    )
    options.add_argument(
        "--exits",
        type=whole,
        nargs="+",
        default=[4, 8],
        metavar="N",
        help="numbers of exits, spread over 3/4 of the depth (default: 4 8)",
    )
    options.add_argument(
        "--dtype", choices=DTYPES, nargs="+", default=["bfloat16", "float32"], help="dtypes (default: both)"
    )
    options.add_argument(
        "--chunk-tokens",
        type=whole,
        default=512,
        metavar="N",
        help="tokens whose logits exist at once (default: 512; ours takes 256 at most on a CPU)",
    )
    _common_options(options)


def _load_options(options: argparse.ArgumentParser) -> None:
    source = options.add_mutually_exclusive_group()
    source.add_argument("--model", type=Path, metavar="DIR", help="Hugging Face directory")
    source.add_argument(
        "--size-mb", type=at_least(1), default=1000, metavar="N", help="or a random one of this size (default: 1000)"
    )
    options.add_argument("--dtype", choices=DTYPES, help="dtype to load in (default: as it is stored)")
    _common_options(options)


def _common_options(options: argparse.ArgumentParser) -> None:
    options.add_argument(
        "--repeats",
        type=at_least(1),
        default=5,
        metavar="N",
        help="measurements of each, the median counts (default: 5)",
    )
    _json_option(options)


def _json_option(options: argparse.ArgumentParser) -> None:
    options.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def _pipeline_options(options: argparse.ArgumentParser) -> None:
    options.add_argument("--stages", type=at_least(1), default=2, metavar="N", help="pipeline stages (default: 2)")
    options.add_argument(
        "--simulated",
        action="store_true",
        help="measure each stage's work alone first, then let it wait that long instead: for more stages than cores",
    )
    options.add_argument(
        "--plot", type=_picture, metavar="FILE", help="draw what each stage does in a step: .png, .pdf or .svg"
    )
    _step_options(options, SMALL)


def _memory_options(options: argparse.ArgumentParser) -> None:
    options.add_argument(
        "--shape", choices=SHAPES, default="small", help="what the options below start from (default: small)"
    )
    options.add_argument("--tensor", type=at_least(1), default=1, metavar="N", help="ranks per layer (default: 1)")
    options.add_argument("--pipeline", type=at_least(1), default=1, metavar="N", help="pipeline stages (default: 1)")
    options.add_argument("--sequence-parallel", action="store_true", help="on top of --tensor")
    options.add_argument(
        "--resident",
        action="store_true",
        help="also count freed memory that the C library keeps, which depends on the sizes of single tensors",
    )
    _step_options(options, None)


def _convert_options(options: argparse.ArgumentParser) -> None:
    options.add_argument(
        "--parts", choices=PARTS, nargs="+", default=list(PARTS), help="what to measure (default: everything)"
    )
    options.add_argument(
        "--directory", type=Path, metavar="DIR", help="on the disk to measure (default: where temporary files go)"
    )
    options.add_argument(
        "--shape", choices=SHAPES, default="small", help="what the options below start from (default: small)"
    )
    _shape_options(_adder(options, None))
    options.add_argument(
        "--load-layers",
        type=at_least(2),
        metavar="N",
        help="layers of the model that is loaded (default: all, or as many as fit the memory twice)",
    )
    options.add_argument(
        "--save-mb", type=at_least(1), default=500, metavar="N", help="size of the state that is saved (default: 500)"
    )
    options.add_argument(
        "--repeats",
        type=at_least(1),
        metavar="N",
        help="measurements of each, the median counts (default: 3 for --shape small, else 1)",
    )
    _json_option(options)


def _generate_options(options: argparse.ArgumentParser) -> None:
    whole = at_least(1)
    options.add_argument("--parts", choices=DECODING, nargs="+", default=["full"], help="what to measure")
    options.add_argument("--model", type=Path, metavar="DIR", help="Hugging Face directory (default: a random model)")
    options.add_argument("--adapter", type=Path, metavar="DIR", help="its exits (default: untuned ones)")
    options.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help="cut prompts from these files (default: random tokens)"
    )
    options.add_argument("--shape", choices=DECODED, default="270m", help="of a random model (default: 270m)")
    options.add_argument("--exits", type=whole, default=3, metavar="N", help="untuned exits (default: 3)")
    options.add_argument(
        "--batches", type=whole, nargs="+", default=[1, 8], metavar="N", help="for full (default: 1 8)"
    )
    options.add_argument("--prompts", type=whole, default=4, metavar="N", help="one after another (default: 4)")
    options.add_argument("--prompt-tokens", type=whole, default=64, metavar="N", help="of each prompt (default: 64)")
    options.add_argument("--tokens", type=at_least(2), default=96, metavar="N", help="to emit for each (default: 96)")
    options.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype (default: bfloat16)")
    options.add_argument("--compile", action="store_true", help="compile our layers, as generate --compile does")
    _common_options(options)


def _adder(options: argparse.ArgumentParser, defaults: dict[str, Any] | None) -> Callable[..., None]:
    """Adds an option by its key in ``defaults``; None: they come from ``--shape``."""

    def add(name: str, what: str, kind: Any = None, **settings: Any) -> None:
        default = None if defaults is None else defaults.get(name)
        shown = f"{what} (default: {'as --shape' if defaults is None else default})" if "(" not in what else what
        options.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=shown, **settings)

    return add


def _shape_options(add: Callable[..., None]) -> None:
    add("hidden", "hidden size", at_least(1), metavar="N")
    add("layers", "layers", at_least(1), metavar="N")
    add("ffn", "MLP size (default: 8/3 of the hidden size)", at_least(1), metavar="N")
    add("heads", "attention heads (default: one per 64 of hidden)", at_least(1), metavar="N")
    add("vocab", "vocabulary", at_least(2), metavar="N")


def _step_options(options: argparse.ArgumentParser, defaults: dict[str, Any] | None) -> None:
    """A random model and its exits; ``defaults`` None: they come from ``--shape``."""
    add, number = _adder(options, defaults), at_least(1)
    _shape_options(add)
    add("sequence_length", "tokens per microbatch", at_least(2), metavar="N")
    add("microbatches", "microbatches per step", number, metavar="N")
    add("exits", "exits, spread over 3/4 of the depth", number, metavar="N")
    add("mlp_exits", "how many of the deepest have an MLP, the others a norm alone", at_least(0), metavar="N")
    add("head", "head of the exits", choices=("own", "shared"))
    add("dtype", "dtype of the weights", choices=DTYPES)
    options.add_argument("--distillation", action="store_true", help="let the exits learn from the final exit too")
    options.add_argument("--steps", type=number, default=3, metavar="N", help="measured steps (default: 3)")
    _json_option(options)


def _picture(text: str) -> Path:
    """An argparse type: a file that a plot can be saved to."""
    if not text.lower().endswith(PLOTS):
        raise argparse.ArgumentTypeError(f"must end in one of {', '.join(PLOTS)}, not {text!r}")
    return Path(text)


def _run_tune(arguments: argparse.Namespace) -> int:
    from megatron_ee.benchmark.report import print_tune
    from megatron_ee.benchmark.shape import Shape, default_ffn
    from megatron_ee.benchmark.tune import benchmark_tune

    shape = Shape(
        hidden=arguments.hidden,
        layers=arguments.layers,
        ffn=arguments.ffn or default_ffn(arguments.hidden),
        heads=arguments.heads or max(1, arguments.hidden // 64),
        vocab=arguments.vocab,
    )
    result = benchmark_tune(
        shape,
        tokens=arguments.sequence_length,
        exits=arguments.exits,
        dtypes=arguments.dtype,
        repeats=arguments.repeats,
        chunk_tokens=arguments.chunk_tokens,
    )
    return _show(result, print_tune, arguments.json)


def _run_load(arguments: argparse.Namespace) -> int:
    from megatron_ee.benchmark.load import benchmark_load
    from megatron_ee.benchmark.report import print_load

    result = benchmark_load(
        arguments.model, megabytes=arguments.size_mb, dtype=arguments.dtype, repeats=arguments.repeats
    )
    return _show(result, print_load, arguments.json)


def _run_pipeline(arguments: argparse.Namespace) -> int:
    from megatron_ee.benchmark.pipeline import benchmark_pipeline
    from megatron_ee.benchmark.report import print_pipeline

    step = _step(arguments, SMALL, stages=arguments.stages)
    result = benchmark_pipeline(step, steps=arguments.steps, simulated=arguments.simulated)
    if arguments.plot is not None:
        from megatron_ee.benchmark.timeline import plot_timeline

        plot_timeline(result, arguments.plot)
    return _show(result, print_pipeline, arguments.json)


def _run_memory(arguments: argparse.Namespace) -> int:
    from megatron_ee.benchmark.memory import benchmark_memory
    from megatron_ee.benchmark.report import print_memory

    step = _step(
        arguments,
        SHAPES[arguments.shape],
        stages=arguments.pipeline,
        tensor=arguments.tensor,
        sequence_parallel=arguments.sequence_parallel,
    )
    result = benchmark_memory(step, steps=arguments.steps, resident=arguments.resident)
    return _show(result, print_memory, arguments.json)


def _run_convert(arguments: argparse.Namespace) -> int:
    from megatron_ee.benchmark.convert import benchmark_convert
    from megatron_ee.benchmark.report import print_convert

    result = benchmark_convert(
        _shape(arguments, SHAPES[arguments.shape]),
        parts=arguments.parts,
        directory=arguments.directory,
        load_layers=arguments.load_layers,
        save_megabytes=arguments.save_mb,
        repeats=arguments.repeats or (3 if arguments.shape == "small" else 1),
    )
    return _show(result, print_convert, arguments.json)


def _run_generate(arguments: argparse.Namespace) -> int:
    from megatron_ee.benchmark.generate import Load, benchmark_generate
    from megatron_ee.benchmark.generate_report import print_generate

    if arguments.adapter is not None and arguments.model is None:
        raise ConfigError("--adapter: belongs to a model; give it with --model")
    for text in arguments.text:
        if not Path(text).is_file():
            raise ConfigError(f"--text: {text}: no such file")
    if arguments.text and arguments.model is None:
        raise ConfigError("--text: a random model has no tokenizer; give a --model")
    if arguments.compile:
        from megatron_ee.inference.compiled import check_compiler

        check_compiler(1)
    result = benchmark_generate(
        arguments.model,
        arguments.adapter,
        _shape(argparse.Namespace(), DECODED[arguments.shape]),
        Load(tuple(arguments.text), arguments.prompts, arguments.prompt_tokens, arguments.tokens, arguments.repeats),
        parts=arguments.parts,
        batches=arguments.batches,
        exits=arguments.exits,
        dtype=arguments.dtype,
        compiled=arguments.compile,
    )
    return _show(result, print_generate, arguments.json)


def _step(arguments: argparse.Namespace, defaults: dict[str, Any], **spread: Any) -> ParallelStep:
    """What ``_step_options`` and the options of how it is spread describe."""
    from megatron_ee.benchmark.ranks import exit_specs, parallel_step

    chosen = {**defaults, **_given(arguments)}
    shape = _shape(arguments, defaults)
    return parallel_step(
        shape,
        exit_specs(chosen["exits"], shape.layers, mlp=chosen["mlp_exits"], head=chosen["head"]),
        distillation=chosen["distillation"],
        dtype=chosen["dtype"],
        tokens=chosen["sequence_length"],
        microbatches=chosen["microbatches"],
        **spread,
    )


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(arguments).items() if value is not None}


def _shape(arguments: argparse.Namespace, defaults: dict[str, Any]) -> Shape:
    """What ``_shape_options`` describe."""
    from megatron_ee.benchmark.shape import Shape, default_ffn

    given = _given(arguments)
    chosen = {"ffn": default_ffn(given.get("hidden", defaults["hidden"])), **defaults, **given}
    hidden = chosen["hidden"]
    heads = chosen.get("heads", max(1, hidden // 64))
    return Shape(hidden, chosen["layers"], chosen["ffn"], heads, chosen["vocab"])


def _show(result: Any, print_tables: Any, as_json: bool) -> int:
    if as_json:
        print(json.dumps(dataclasses.asdict(result)))
        return 0
    from megatron_ee.tables import make_console

    print_tables(result, make_console())
    return 0
