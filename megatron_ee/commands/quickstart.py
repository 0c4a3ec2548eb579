"""``megatron-ee quickstart``: the whole cycle on one model, by running the other commands."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ee.commands import MODEL_DTYPES, Parser, at_least
from megatron_ee.errors import ConfigError, DataError
from megatron_ee.tuning.interrupt import watch_signals

if TYPE_CHECKING:
    from megatron_ee.model.quality import Quality

DESCRIPTION = """Run the other commands in turn and show each: let the model answer prompts, prepare data, probe, fit
and tune exits, evaluate, generate. examples/quickstart/run.sh first fetches a small model, if you have none."""
EXITS = [{"layer": depth, "body": "mlp", "head": "shared"} for depth in (0.33, 0.53, 0.73)]  # of 30: 10, 16 and 22
ANSWER_TOKENS = 64
NUM_SEQS = 32
SEQUENCES = 120
STEPS = 20
PROBE_MINUTES = 2
WANTED_AGREEMENT = 0.995
PROMPTS = 2
REPLACED = ("model", "tuning", "copied", "data")
"""Directories in --out that a run replaces."""
MADE = {
    "model": "the model, from its GGUF file",
    "answers.jsonl": "its answers to the prompts",
    "probe/probe.json": "the forecast before tuning",
    "copied": "the exits as copied, before the fit",
    "tuning/adapter-initial": "the exits as fitted, before tuning",
    "tuning/adapter-best": "the tuned exits with the lowest loss on held-out text",
    "tuning/adapter": "the exits after the last step",
    "tune.yaml": "the tuning configuration",
    "evaluation/evaluation.json": "quality per exit and threshold, and speed",
    "evaluation/evaluation.png": "the same as a plot",
    "evaluation/reliability.png": "confidence against accuracy, per exit",
    "training.png": "loss per exit while tuning",
    "tuning/validation/agreement.png": "agreement per exit against tokens seen",
    "tuning/tensorboard": "the same for TensorBoard",
    "report.json": "this report",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser("quickstart", DESCRIPTION)
    add = result.add_argument
    add("--base", type=Path, required=True, metavar="PATH", help="the model: Hugging Face directory or GGUF file")
    data = result.add_mutually_exclusive_group(required=True)
    about = "prompts as for regenerate: exits are tuned on the model's own answers to them"
    data.add_argument("--prompts", type=Path, metavar="FILE", help=about)
    about = "text, or jsonl of texts or conversations, to tune on. The last tenth is held out"
    data.add_argument("--data", type=Path, metavar="FILE", help=about)
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="output directory: new, empty, or an earlier quickstart's (its results are replaced)",
    )
    add("--steps", type=at_least(1), default=STEPS, metavar="N", help=f"tuning steps (default: {STEPS})")
    about = "dtype of the model (default: auto, the model's own, or float32 if this CPU has no bfloat16 instructions)"
    add("--dtype", choices=MODEL_DTYPES, default="auto", help=about)
    about = "prompt for generate (default: held-out prompts, or the first tokens of held-out texts)"
    add("--prompt", metavar="TEXT", help=about)
    add("--started", type=float, metavar="TIME", help=argparse.SUPPRESS)
    return result


def run(arguments: argparse.Namespace) -> int:
    """Run all commands; print tables, samples and the paths of the results."""
    from megatron_ee.checkpoint.ownership import check_output, claim_output
    from megatron_ee.commands.inputs import check_input

    check_output(arguments.out, "quickstart", "--out")
    check_input("--base", arguments.base)
    check_input("--prompts", arguments.prompts)
    check_input("--data", arguments.data)
    _check_replaced(arguments)
    from megatron_ee import platform
    from megatron_ee.checkpoint.saved_model import open_model
    from megatron_ee.data.read import is_chat

    started = arguments.started or time.time()
    out, base = arguments.out, arguments.base
    if base.is_dir():
        open_model(base)  # a model that is not supported is refused before anything is written
    claim_output(out, "quickstart", "--out")
    tuning, copied = out / "tuning", out / "copied"
    check_output(tuning, "tune", "--out")
    for directory in (tuning, copied, out / "model"):
        if directory.exists():
            shutil.rmtree(directory)  # an earlier quickstart's; these commands never overwrite

    if base.is_file():
        _command("convert", "--input", base, "--output", out / "model", "--to", "hf")
        base = out / "model"
    model = open_model(base)
    dtype = arguments.dtype
    if dtype == "auto":
        dtype = "float32" if platform.is_slow(model.dtype) else model.dtype
    before = model.digest(fresh=True)
    length = min(256, model.architecture.max_positions)

    data = arguments.data
    if data is None:
        data = out / "answers.jsonl"
        answers = ("--prompts", arguments.prompts, "--output", data, "--overwrite")
        limits = ("--max-tokens", ANSWER_TOKENS, "--max-num-seqs", NUM_SEQS)
        _command("regenerate", "--model", base, "--dtype", dtype, *answers, *limits)
    parts = _split(data, out / "data")
    chat = ("--chat",) if is_chat(data) else ()
    for part in parts:
        prepared = ("--input", part, "--tokenizer", base, "--output", part.with_suffix(""))
        _command("prepare-data", *prepared, *chat, "--overwrite")
    train = out / "data" / "train"
    probed = ("--budget", PROBE_MINUTES, "--output", out / "probe")
    _command("probe", "--model", base, "--dtype", dtype, "--data", train, *probed)
    with watch_signals() as interrupt:
        _command("tune", "--config", _write_config(out, base, dtype, length, arguments.steps), "--output", tuning)
    if interrupt.name is not None:
        signal.raise_signal(signal.Signals[interrupt.name])  # tune has saved and ended normally; end quickstart too
    best = tuning / "adapter-best"
    adapter = best if best.exists() else tuning / "adapter"
    exits = ("--model", base, "--adapter", adapter, "--dtype", dtype)
    held_out = ("--data", out / "data" / "held_out", "--sequence-length", length, "--sequences", SEQUENCES)
    compared = ("--speed", "--probe", out / "probe" / "probe.json")
    _command("evaluate", *exits, *held_out, *compared, "--output", out / "evaluation")
    if arguments.prompt:
        texts = [arguments.prompt]
    else:
        texts = _questions(parts[1]) if chat else _beginnings(out / "data" / "held_out", base)
    if texts:
        prompts = [f"--prompt={text}" for text in texts]  # in one word, since a text may begin with a dash
        threshold = _threshold(out / "evaluation" / "evaluation.json")
        shown = ("--max-tokens", ANSWER_TOKENS, "--threshold", threshold, "--compare")
        _command("generate", *exits, *prompts, *chat, *shown)
    else:
        print("\nno held-out text gives a prompt, so generate is left out; give one with --prompt")

    as_copied = json.dumps([{**exit_, "init": "copy"} for exit_ in EXITS])
    _command("convert", "--input", base, "--output", copied, "--to", "adapter", "--exits", as_copied)
    copies = _quality(base, copied, out / "data" / "held_out", length, dtype)
    digests = {"backbone_sha256_before": before, "backbone_sha256_after": model.digest(fresh=True)}
    _report(out, adapter, copies, digests, time.time() - started)
    return 0


def _check_replaced(arguments: argparse.Namespace) -> None:
    """Refuse inputs that this run would replace, and results that are no earlier quickstart's.

    Raises:
        ConfigError: naming the option.
    """
    from megatron_ee.checkpoint.ownership import MARKER, check_new

    out = arguments.out
    replaced = [out / name for name in (*REPLACED, *(["answers.jsonl"] if arguments.prompts is not None else []))]
    for option in ("base", "data", "prompts"):
        path = getattr(arguments, option)
        if path is not None and any(path.resolve().is_relative_to(each.resolve()) for each in replaced):
            raise ConfigError(
                f"--{option}: {path} is among the results in --out, which are replaced; choose another --out"
            )
    if not (out / MARKER).exists():
        for each in replaced:
            check_new(each, "--out")  # such as a run of tune, whose marker check_output accepts


def _command(*words: object) -> None:
    """Show and run one command in this process, since imports take longer than some of the steps."""
    from megatron_ee.commands.main import main

    print(f"\n$ megatron-ee {shlex.join(map(str, words))}", flush=True)
    status = main([str(word) for word in words])
    if status:
        raise SystemExit(status)


def _split(file: Path, directory: Path) -> tuple[Path, Path]:
    """Write all but the last tenth of a file's lines to ``train.*``, and this tenth to ``held_out.*``.

    Raises:
        DataError: there are too few lines.
    """
    # Only "\n" ends a line of jsonl; str.splitlines would also cut at characters that JSON strings may hold.
    lines = _read(file).rstrip("\n").split("\n")
    if len(lines) < 2:
        raise DataError(f"{file}: has one line; give at least two, since a part is held out")
    cut = len(lines) - max(1, len(lines) // 10)
    directory.mkdir(exist_ok=True)
    train, held_out = (directory / f"{part}{file.suffix}" for part in ("train", "held_out"))
    for path, some in ((train, lines[:cut]), (held_out, lines[cut:])):
        path.write_text("".join(f"{line}\n" for line in some), encoding="utf-8", newline="\n")
    return train, held_out


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text: {error}") from None


def _write_config(out: Path, base: Path, dtype: str, length: int, steps: int) -> Path:
    """Write the configuration of the tuning run, as a starting point for the user's own."""
    config: dict[str, Any] = {
        "model": {"path": str(base), "dtype": dtype},
        "exits": EXITS,
        "data": {
            "train": [str(out / "data" / "train")],
            "validation": [str(out / "data" / "held_out")],
            "sequence_length": length,
        },
        "optimizer": {"lr": 3.0e-4, "min_lr": 3.0e-5},
        "loss": {"distillation": {"kl": 1.0, "cross_entropy": 0.0}},
        "tuning": {"steps": steps, "global_batch_size": 4, "micro_batch_size": 4},
        "validation": {"interval": 0, "sequences": SEQUENCES},
        "checkpoint": {"interval": 0},
    }
    path = out / "tune.yaml"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")  # JSON is YAML too
    return path


def _questions(conversations: Path) -> list[str]:
    """The first user's messages of some held-out conversations, as prompts. Some conversations have none in text."""
    lines = (line for line in _read(conversations).split("\n") if line.strip())
    turns = ([turn for turn in json.loads(line)["messages"] if turn["role"] == "user"] for line in lines)
    asked = (users[0].get("content") for users in turns if users)
    return list(islice((text for text in asked if isinstance(text, str) and text.strip()), PROMPTS))


def _beginnings(corpus: Path, base: Path) -> list[str]:
    """The first tokens of some held-out documents, as prompts."""
    from megatron_ee.data.indexed import open_corpus
    from megatron_ee.data.tokenizer import load_tokenizer

    opened = open_corpus(corpus)  # kept open: documents are views of its memory map
    tokenizer = load_tokenizer(base)
    documents = [opened.tokens[number] for number in range(min(PROMPTS, len(opened.tokens)))]
    # A short document may end within these tokens. Its end-of-text token is not part of the prompt.
    beginnings = [[int(token) for token in document[:24] if token != tokenizer.eos_id] for document in documents]
    texts = [tokenizer.decode(tokens) for tokens in beginnings]
    return [text for text in texts if text.strip()]


def _threshold(evaluation: Path) -> float:
    """The lowest threshold of the sweep with at least ``WANTED_AGREEMENT`` with the full model."""
    sweep = json.loads(evaluation.read_text(encoding="utf-8"))["sweep"]
    good = [point["threshold"] for point in sweep if point["agreement"] >= WANTED_AGREEMENT]
    return min(good, default=max(point["threshold"] for point in sweep))


def _quality(base: Path, adapter: Path, data: Path, length: int, dtype: str) -> Quality:
    """The quality of some exits on the held-out text."""
    from megatron_ee.evaluation.evaluate import evaluate

    settings = {"sequence_length": length, "sequences": SEQUENCES, "dtype": dtype, "thresholds": ()}
    return evaluate(model=base, adapter=adapter, data=data, **settings).quality  # type: ignore[arg-type]


def _report(out: Path, adapter: Path, copied: Quality, digests: dict[str, str], seconds: float) -> None:
    """Report what fit and tuning changed, as a table, as ``report.json`` and as loss curves, and list all results."""
    from megatron_ee.config.exits import ExitSpec
    from megatron_ee.evaluation.plots import plot_training
    from megatron_ee.evaluation.report import comparison_dict, print_comparison
    from megatron_ee.model.quality import Quality

    tuning = out / "tuning"
    described = json.loads((adapter / "exits.json").read_text(encoding="utf-8"))
    exits = [ExitSpec(**fields) for fields in described["exits"]]
    files = (tuning / "validation" / "step-0.json", out / "evaluation" / "evaluation.json")
    initial, tuned = (Quality.from_dict(json.loads(file.read_text(encoding="utf-8"))) for file in files)
    evaluated = {"adapter": str(adapter), "steps": described["steps"]}
    report = {**comparison_dict(initial, tuned, exits, copied), **evaluated, **digests, "seconds": round(seconds, 1)}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    plot_training(tuning / "log.jsonl", out / "training.png")
    print()
    print_comparison(initial, tuned, exits, copied)
    kept = "with the lowest loss on held-out text" if adapter.name == "adapter-best" else "after the last step"
    print(f"\ntuned exits: {adapter}, those {kept} (step {described['steps']})")
    same = digests["backbone_sha256_before"] == digests["backbone_sha256_after"]
    print(f"backbone {'unchanged' if same else 'CHANGED'}, sha256 {digests['backbone_sha256_after'][:16]}...")
    print(f"{seconds:.0f} s in all. Made:")
    for name, what in MADE.items():
        if (out / name).exists():
            print(f"  {out / name}  {what}")
