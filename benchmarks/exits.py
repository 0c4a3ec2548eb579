"""What fitting and tuning make of exits: agreement with the final exit and loss, against the tokens seen."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from benchmarks.common import adder, describe_machine
from megatron_ee.commands import DTYPES, at_least
from megatron_ee.config.schema import Body, Head
from megatron_ee.errors import UserError
from megatron_ee.tables import add_columns, make_console, new_table

DESCRIPTION = """Tune exits for every combination of training corpus, body, head and first values, in one run of
megatron-ee tune each. Print each exit's agreement with the final exit and its loss on held-out text against the tokens
seen. Tokens that exits are fitted on are not counted. The runs stay in --output: the same command continues them.
Further options such as --fit.tokens 5000 go to tune."""
POLICIES = {"gate": ("gate", 0), "threshold": ("threshold", 4), "threshold, no back-off": ("threshold", 0)}
"""By name: the policy and its back-off."""
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Combination:
    """What one run tunes: every exit alike."""

    train: str
    body: str
    head: str
    init: str

    @property
    def name(self) -> str:
        """Of the run's directory."""
        return "-".join((Path(self.train).name, self.body, self.head, self.init))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.exits", description=DESCRIPTION, allow_abbrev=False)
    add, count = adder(result), at_least(1)
    add("--model", "Hugging Face directory", type=Path, required=True, metavar="DIR")
    add("--train", "corpora from prepare-data; each is tuned on alone", nargs="+", required=True, metavar="PREFIX")
    add("--validation", "held-out corpus", required=True, metavar="PREFIX")
    add("--output", "directory for the runs", type=Path, required=True, metavar="DIR")
    add("--layers", "of the exits", type=count, nargs="+", required=True, metavar="K")
    add("--bodies", "of the exits", choices=get_args(Body), nargs="+", default=["mlp"])
    add("--heads", "of the exits", choices=get_args(Head), nargs="+", default=["shared"])
    add("--inits", "first values", choices=("copy", "fit"), nargs="+", default=["copy", "fit"])
    add("--copy-lr", "learning rate from copies", type=float, default=1e-3, metavar="X")
    add("--fit-lr", "learning rate from fits", type=float, default=3e-4, metavar="X")
    add("--labels", "learn from the text, in place of the final exit's distribution", action="store_true")
    add("--steps", "of tuning", type=at_least(0), default=200, metavar="N")
    add("--interval", "steps between validations", type=count, default=50, metavar="N")
    add("--sequence-length", "tokens of a sequence", type=count, default=256, metavar="N")
    add("--sequences", "of a step", type=count, default=4, metavar="N")
    add("--validation-sequences", "at most", type=count, default=64, metavar="N")
    add("--dtype", "of the model", choices=DTYPES, default="float32")
    add("--gate-prompts", "fit gates, and decode these prompts with and without", type=Path, metavar="FILE")
    add("--gate-tokens", "emitted for each prompt", type=at_least(2), default=64, metavar="N")
    add("--json", "also write the figures to this file", type=Path, metavar="FILE")
    return result


def combinations(options: argparse.Namespace) -> Iterator[Combination]:
    """Those that can be tuned: a shared head behind an ``embedding`` trains nothing, and that body is not fitted."""
    for values in itertools.product(options.train, options.bodies, options.heads, options.inits):
        each = Combination(*values)
        if each.body != "embedding" or (each.head != "shared" and each.init == "copy"):
            yield each


def tune(each: Combination, options: argparse.Namespace, overrides: Sequence[str]) -> Path:
    """Run ``tune``, or continue it, unless that is done; the run's directory."""
    from megatron_ee.checkpoint.adapter import open_adapter
    from megatron_ee.tuning.status import is_finished

    output = options.output / each.name
    if is_finished(output) and (options.gate_prompts is None or open_adapter(output / "adapter").exits[0].gate):
        return output
    rate = options.fit_lr if each.init == "fit" else options.copy_lr
    exit_ = {"body": each.body, "head": each.head, "init": each.init, "gate": options.gate_prompts is not None}
    config = {
        "model": {"path": str(options.model), "dtype": options.dtype},
        "exits": [{"layer": layer, **exit_} for layer in options.layers],
        "data": {
            "train": [each.train],
            "validation": [options.validation],
            "sequence_length": options.sequence_length,
        },
        "optimizer": {"lr": rate, "min_lr": rate / 10},
        "loss": {"distillation": {"kl": 0.0 if options.labels else 1.0, "cross_entropy": float(options.labels)}},
        "tuning": {
            "steps": options.steps,
            "global_batch_size": options.sequences,
            "micro_batch_size": options.sequences,
        },
        "validation": {"interval": options.interval, "sequences": options.validation_sequences},
        "checkpoint": {"interval": options.interval},
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = output.with_suffix(".json")
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    print(f"tuning {output}; its log: {output.with_suffix('.log')}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "megatron_ee", "tune", "--config", str(path), "--output", str(output), *overrides]
    with output.with_suffix(".log").open("a") as log:
        status = subprocess.run([*command, "--resume"], stdout=log, stderr=log, check=False).returncode
    if status or not is_finished(output):
        raise UserError(f"{output.with_suffix('.log')}: tune ended with status {status}")
    return output


def quality(each: Combination, run: Path) -> list[dict[str, Any]]:
    """A row of figures for each exit and validation."""
    from megatron_ee.evaluation.history import read_validations

    return [
        {
            **asdict(each),
            "layer": layer,
            "tokens_seen": found.tokens_seen,
            "agreement": agreement,
            "loss": found.losses[layer],
            "acceptance_length": found.acceptance.get(layer),
            "final_loss": found.final_loss,
        }
        for found in read_validations(run / "log.jsonl")
        for layer, agreement in found.agreements.items()
    ]


def gates(each: Combination, run: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of figures for each policy and threshold. The full model's tokens are forced, so that all read the same."""
    from megatron_ee.commands.generate_requests import read_requests
    from megatron_ee.inference import EngineOptions, GatePolicy, ThresholdPolicy, open_engine, open_released

    released = open_released(options.model, run / "adapter")
    chat = bool(released.tokenizer.templates)
    settings = {"max_tokens": options.gate_tokens, "mode": "full"}
    requests = [line.request for line in read_requests(options.gate_prompts, settings, released, chat=chat)]
    rows = []
    with open_engine(released, EngineOptions(dtype=options.dtype)) as engine:
        assert engine is not None, "there is one rank"
        full = [[token.id for token in outputs[0].tokens] for outputs in engine.generate(requests)]
        for (name, (kind, backoff)), threshold in itertools.product(POLICIES.items(), THRESHOLDS):
            policy = (GatePolicy if kind == "gate" else ThresholdPolicy)(threshold=threshold, backoff=backoff)
            forced = [
                request.model_copy(update={"mode": "threshold", "policy": policy, "forced_ids": tuple(ids)})
                for request, ids in zip(requests, full, strict=True)
            ]
            outputs = [found[0] for found in engine.generate(forced)]
            pairs = [
                (token.id == wanted, token.layer < released.model.architecture.num_layers)
                for output, ids in zip(outputs, full, strict=True)
                for token, wanted in zip(output.tokens[1:], ids[1:], strict=True)  # the first one never leaves
            ]
            row = {"policy": name, "threshold": threshold, "tokens": len(pairs)}
            row |= {"agreement": _mean([agrees for agrees, _ in pairs]), "early": _mean([early for _, early in pairs])}
            for key in ("heads_per_token", "layers_per_token"):
                runs = [(o.statistics[key] or 0.0) * (len(o.tokens) - 1) for o in outputs]
                row[key] = sum(runs) / len(pairs)
            rows.append(asdict(each) | row)
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def show(rows: Sequence[dict[str, Any]], gated: Sequence[dict[str, Any]]) -> None:
    """Print a table of agreement and loss, and one of the policies."""
    console = make_console()
    points = sorted({row["tokens_seen"] for row in rows})
    table = new_table("Agreement with the final exit, and loss (nats), against the tokens seen", console)
    add_columns(table, "corpus", "body", "head", "init", words=True)
    add_columns(table, "exit", *(f"{point:,}" for point in points))
    cells: dict[tuple[str, ...], dict[int, str]] = {}
    for row in rows:
        exit_ = tuple(map(str, (Path(row["train"]).name, *(row[key] for key in ("body", "head", "init", "layer")))))
        cells.setdefault(exit_, {})[row["tokens_seen"]] = f"{row['agreement']:.3f} ({row['loss']:.2f})"
    for exit_, found in cells.items():
        table.add_row(*exit_, *(found.get(point, "-") for point in points))
    console.print(table)
    if gated:
        table = new_table("Decoding with gates and without, along the full model's tokens", console)
        add_columns(table, "exits", "policy", words=True)
        figures = ("threshold", "agreement", "early", "heads_per_token", "layers_per_token")
        add_columns(table, *(name.replace("_", " ") for name in figures))
        for row in gated:
            name = f"{row['body']}, {row['head']}, {row['init']}"
            table.add_row(name, row["policy"], *(f"{row[figure]:.3f}" for figure in figures))
        console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    options, overrides = parser().parse_known_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows, gated = [], []
    try:
        for each in combinations(options):
            run = tune(each, options, overrides)
            rows += quality(each, run)
            gated += gates(each, run, options) if options.gate_prompts else []
    except UserError as error:
        print(f"python -m benchmarks.exits: error: {error}", file=sys.stderr)
        return 1
    show(rows, gated)
    if options.json:
        given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        machine = describe_machine(len(os.sched_getaffinity(0)), 0)
        found = {"benchmark": "exits", "machine": machine, "settings": given | {"overrides": overrides}}
        options.json.write_text(json.dumps(found | {"rows": rows, "gates": gated}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
