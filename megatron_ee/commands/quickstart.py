"""``megatron-ee quickstart``: prepare data, tune, evaluate and generate, by running the other commands."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from megatron_ee.commands import MODEL_DTYPES, Parser, at_least
from megatron_ee.tuning.interrupt import watch_signals

DESCRIPTION = """Run the other commands in turn and show each: prepare data, tune exits, evaluate, generate.
examples/quickstart/run.sh first trains a small model, if you have none."""
POSITIONS = (0.25, 0.5, 0.75)
SEQUENCES = 120
AGREEMENT = 0.995
PROMPTS = 4
MADE = {
    "tuning/adapter": "the tuned exits",
    "tune.yaml": "the tuning configuration",
    "evaluation/evaluation.json": "quality per exit and threshold",
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
    result.add_argument("--base", type=Path, required=True, metavar="DIR", help="Hugging Face directory of the model")
    result.add_argument("--data", type=Path, required=True, metavar="FILE", help="text or jsonl to tune on")
    result.add_argument("--held-out", type=Path, required=True, metavar="FILE", help="text or jsonl to evaluate on")
    result.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="output directory: new, empty, or an earlier quickstart's (its results are replaced)",
    )
    result.add_argument("--steps", type=at_least(1), default=160, metavar="N", help="tuning steps (default: 160)")
    about = "dtype of the model (default: auto, the model's own, or float32 if this CPU has no bfloat16 instructions)"
    result.add_argument("--dtype", choices=MODEL_DTYPES, default="auto", help=about)
    result.add_argument(
        "--prompt", metavar="TEXT", help="prompt for generate (default: the first tokens of held-out texts)"
    )
    result.add_argument("--started", type=float, metavar="TIME", help=argparse.SUPPRESS)
    return result


def run(arguments: argparse.Namespace) -> int:
    """Run all commands; print tables, samples and the paths of the results."""
    from megatron_ee.checkpoint.ownership import check_output, claim_output
    from megatron_ee.commands.inputs import check_input

    check_output(arguments.out, "quickstart", "--out")
    check_input("--base", arguments.base)
    check_input("--data", arguments.data)
    check_input("--held-out", arguments.held_out)
    from megatron_ee import platform
    from megatron_ee.checkpoint.saved_model import open_model

    started = arguments.started or time.time()
    out, base = arguments.out, arguments.base
    model = open_model(base)
    if arguments.dtype == "auto":
        arguments.dtype = "float32" if platform.is_slow(model.dtype) else model.dtype
    before = model.digest(fresh=True)
    length = min(256, model.architecture.max_positions)
    claim_output(out, "quickstart", "--out")
    tuning = out / "tuning"
    check_output(tuning, "tune", "--out")
    if tuning.exists():
        shutil.rmtree(tuning)  # an earlier quickstart's; tune itself never overwrites a run

    for file, name in ((arguments.data, "train"), (arguments.held_out, "held_out")):
        _command("prepare-data", "--input", file, "--tokenizer", base, "--output", out / "data" / name, "--overwrite")
    with watch_signals() as interrupt:
        _command("tune", "--config", _write_config(arguments, length), "--output", tuning)
    if interrupt.name is not None:
        signal.raise_signal(signal.Signals[interrupt.name])  # tune has saved and ended normally; end quickstart too
    exits = ("--model", base, "--adapter", tuning / "adapter", "--dtype", arguments.dtype)
    held_out = ("--data", out / "data" / "held_out", "--sequence-length", length, "--sequences", SEQUENCES)
    _command("evaluate", *exits, *held_out, "--output", out / "evaluation")
    texts = [arguments.prompt] if arguments.prompt else _beginnings(out / "data" / "held_out", base)
    prompts = [word for text in texts for word in ("--prompt", text)]
    threshold = _threshold(out / "evaluation" / "evaluation.json")
    _command("generate", *exits, *prompts, "--max-tokens", 60, "--threshold", threshold, "--compare")

    digests = {"backbone_sha256_before": before, "backbone_sha256_after": model.digest(fresh=True)}
    _report(out, digests, time.time() - started)
    return 0


def _command(*words: object) -> None:
    """Show and run one command in this process, since imports take longer than some of the steps."""
    from megatron_ee.commands.main import main

    print(f"\n$ megatron-ee {shlex.join(map(str, words))}", flush=True)
    status = main([str(word) for word in words])
    if status:
        raise SystemExit(status)


def _write_config(arguments: argparse.Namespace, length: int) -> Path:
    """Write the configuration of the tuning run, as a starting point for the user's own."""
    config: dict[str, Any] = {
        "model": {"path": str(arguments.base), "dtype": arguments.dtype},
        "exits": [{"layer": position, "body": "mlp"} for position in POSITIONS],
        "data": {
            "train": [str(arguments.out / "data" / "train")],
            "validation": [str(arguments.out / "data" / "held_out")],
            "sequence_length": length,
        },
        "optimizer": {"lr": 1.0e-3, "min_lr": 1.0e-5},
        "tuning": {"steps": arguments.steps, "global_batch_size": 8, "micro_batch_size": 8},
        "validation": {"interval": 0, "sequences": SEQUENCES},
        "checkpoint": {"interval": 0},
    }
    path = arguments.out / "tune.yaml"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")  # JSON is YAML too
    return path


def _beginnings(corpus: Path, base: Path) -> list[str]:
    """The first tokens of some held-out documents, as prompts."""
    from megatron_ee.data.indexed import open_corpus
    from megatron_ee.data.tokenizer import load_tokenizer

    opened = open_corpus(corpus)  # kept open: documents are views of its memory map
    tokenizer = load_tokenizer(base)
    documents = [opened.tokens[number] for number in range(min(PROMPTS, len(opened.tokens)))]
    # A short document may end within these tokens. Its end-of-text token is not part of the prompt.
    beginnings = [[int(token) for token in document[:24] if token != tokenizer.eos_id] for document in documents]
    return [tokenizer.decode(tokens) for tokens in beginnings if tokens]


def _threshold(evaluation: Path) -> float:
    """The lowest threshold of the sweep with at least ``AGREEMENT`` with the full model."""
    sweep = json.loads(evaluation.read_text(encoding="utf-8"))["sweep"]
    good = [point["threshold"] for point in sweep if point["agreement"] >= AGREEMENT]
    return min(good, default=max(point["threshold"] for point in sweep))


def _report(out: Path, digests: dict[str, str], seconds: float) -> None:
    """Report what tuning changed, as a table, as ``report.json`` and as loss curves, and list all results."""
    from megatron_ee.config.exits import ExitSpec
    from megatron_ee.evaluation.plots import plot_training
    from megatron_ee.evaluation.report import comparison_dict, print_comparison
    from megatron_ee.model.quality import Quality

    tuning = out / "tuning"
    described = json.loads((tuning / "adapter" / "exits.json").read_text(encoding="utf-8"))
    exits = [ExitSpec(**fields) for fields in described["exits"]]
    files = (tuning / "validation" / "step-0.json", out / "evaluation" / "evaluation.json")
    initial, tuned = (Quality.from_dict(json.loads(file.read_text(encoding="utf-8"))) for file in files)
    report = {**comparison_dict(initial, tuned, exits), **digests, "seconds": round(seconds, 1)}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    plot_training(tuning / "log.jsonl", out / "training.png")
    print()
    print_comparison(initial, tuned, exits)
    same = digests["backbone_sha256_before"] == digests["backbone_sha256_after"]
    print(f"\nbackbone {'unchanged' if same else 'CHANGED'}, sha256 {digests['backbone_sha256_after'][:16]}...")
    print(f"{seconds:.0f} s in all. Made:")
    for name, what in MADE.items():
        print(f"  {out / name}  {what}")
