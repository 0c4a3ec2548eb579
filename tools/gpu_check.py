"""The checks of gpu_check.sh. Each runs in its own process with a time limit. A failed check does not stop the others.

A check writes one JSON line per finding. ``--small`` runs everything at toy size, and ``--device cpu`` without a GPU:
both test this script, not the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHAPE_7B = {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
SHAPE_SMALL = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
FAMILIES = ("llama3.1", "qwen3", "mistral")
"""Tiny models for parity: with grouped heads and scaled RoPE, with q/k norms, with a sliding window."""
PROMPTS = [[5, 17, 99], list(range(30, 60))]
NEW_TOKENS = 40


@dataclass(frozen=True)
class Finding:
    """One row of the table; ``good`` is None for a figure without a limit."""

    what: str
    figure: str
    limit: str
    good: bool | None


def tune(small: bool, folder: Path) -> Iterator[Finding]:
    """A few tuning steps of a 7B model's shape with random weights: losses, speed, memory against the plan."""
    import torch

    from megatron_ee import platform
    from megatron_ee.config.exits import ExitSpec
    from megatron_ee.config.schema import LossConfig, OptimizerConfig, ParallelConfig, ScheduleConfig
    from megatron_ee.data.loader import Batch
    from megatron_ee.exits.stage import build_stage
    from megatron_ee.model.setup import build_setup
    from megatron_ee.parallel.groups import process_groups
    from megatron_ee.parallel.optimizer import ExitOptimizer
    from megatron_ee.planning.balance import resolve_layout
    from megatron_ee.planning.memory import stage_memory
    from megatron_ee.planning.workload import Workload
    from megatron_ee.tuning.schedule import Pipeline
    from megatron_ee.tuning.step import tuning_step

    arch, sequence, microbatches, loss = _architecture(small), 64 if small else 2048, 2, LossConfig()
    depth = arch.num_layers // 2
    specs = [ExitSpec(depth // 2), ExitSpec(depth)]
    layout = resolve_layout(ParallelConfig(), specs, arch, sequence)
    workload = Workload(
        itemsize=2,
        micro_batch_size=1,
        sequence_length=sequence,
        microbatches=microbatches,
        chunk_tokens=loss.chunk_tokens,
    )
    plan = stage_memory(layout, 0, arch, specs, workload).total
    with process_groups() as groups:
        stage = build_stage(build_setup(arch, torch.bfloat16, groups), layout, specs)
        _fill(stage)
        optimizer = ExitOptimizer(
            stage.exits, stage.setup.config, groups, OptimizerConfig(lr=1e-4), ScheduleConfig(), 100
        )
        pipeline = Pipeline(stage, layout, specs)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(arch.vocab_size, (1, sequence + 1), generator=generator)
        mask = torch.ones(1, sequence, dtype=torch.bool)
        batches = [Batch(ids[:, :-1], ids[:, 1:], mask, sequence, range(1))] * microbatches
        losses, seconds = [], []
        for _ in range(5):
            platform.synchronize()
            started = time.perf_counter()
            result = tuning_step(pipeline, optimizer, batches, loss, 1.0)
            losses.append([exit_.loss for exit_ in result.exits])
            platform.synchronize()
            seconds.append(time.perf_counter() - started)
    rate = sequence * microbatches / statistics.median(seconds[1:])
    yield Finding("tuning speed", f"{rate:,.0f} tokens/s", "", None)
    finite = all(value == value and abs(value) < float("inf") for step in losses for value in step)
    fell = all(last < first for first, last in zip(losses[0], losses[-1], strict=True))
    figure = ", ".join(f"{a:.2f} -> {b:.2f}" for a, b in zip(losses[0], losses[-1], strict=True))
    yield Finding("loss of each exit over 5 steps", figure, "finite, and falls", finite and fell)
    peak = platform.peak_memory()
    figure = f"{peak / 1e9:.2f} of {plan / 1e9:.2f} GB"
    yield Finding("memory against plan", figure, "within 5%", _here(small, abs(peak / plan - 1) <= 0.05))


def decode(small: bool, folder: Path) -> Iterator[Finding]:
    """A 7B model's shape with random weights in every mode, and transformers' ``generate`` beside full mode."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: TID251  trust_remote_code=False below

    from megatron_ee import platform
    from megatron_ee.config.exits import ExitSpec
    from megatron_ee.exits.stage import Stage
    from megatron_ee.inference.loading import make_engine
    from megatron_ee.inference.policy import ThresholdPolicy
    from megatron_ee.inference.requests import Draft, Request
    from megatron_ee.inference.sampling import Sampling
    from megatron_ee.model.setup import build_setup
    from megatron_ee.parallel.groups import process_groups

    arch, tokens = _architecture(small), 12 if small else 64
    prompts = [[3 + (7 * row + 5 * i) % 200 for i in range(16 + row)] for row in range(16)]
    quarter = arch.num_layers // 4
    drawn = Sampling(temperature=0.8, top_k=50, top_p=0.9, seed=1)
    modes: dict[str, dict[str, Any]] = {
        "full": {},
        "threshold": {"mode": "threshold", "policy": ThresholdPolicy(threshold=1e-6)},
        "speculative": {"mode": "speculative"},
        "speculative, 3 drafts": {"mode": "speculative", "draft": Draft(exit=quarter, length=3)},
    }
    with process_groups() as groups:
        specs = [ExitSpec(quarter), ExitSpec(2 * quarter, "norm", "shared")]
        stage = Stage(build_setup(arch, torch.bfloat16, groups), range(1, arch.num_layers + 1), specs, final_exit=True)
        _fill(stage)
        engine = make_engine(stage)
        full = 0.0
        for name, settings in modes.items():
            for sampling in (Sampling(), drawn):
                for rows in (1, 16):
                    requests = [
                        Request(prompt=prompt, max_tokens=tokens, ignore_eos=True, sampling=sampling, **settings)
                        for prompt in prompts[:rows]
                    ]
                    engine.generate(requests)  # the first run of each shape loads kernels
                    seconds, done = _timed(engine.generate, requests)
                    made = [len(one.tokens) for each in done for one in each]
                    how = f"{name}, {'greedy' if sampling.greedy else 'drawn'}, {rows} rows"
                    rate = sum(made) / seconds
                    yield Finding(how, f"{rate:,.1f} tokens/s", "all tokens", made == [tokens] * rows)
                    if (name, sampling.greedy, rows) == ("full", True, 1):
                        full = rate
        engine.close()
        del engine, stage
        if platform.has_accelerator():
            torch.cuda.empty_cache()
        config = LlamaConfig(**_config(small))
        with torch.device(platform.device()):
            theirs = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False).eval()
        ids = torch.tensor(prompts[:1], device=platform.device())
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        theirs.generate(ids, **options)
        seconds, _ = _timed(theirs.generate, ids, **options)
        ratio = full * seconds / tokens
        yield Finding("full mode against transformers", f"{ratio:.2f}x", "at least 0.9x", _here(small, ratio >= 0.9))


def parity(small: bool, folder: Path) -> Iterator[Finding]:
    """Tiny models in float32: logits and tokens of every mode against transformers on this device and on the CPU."""
    import torch

    from megatron_ee import platform
    from megatron_ee.inference.loading import make_engine
    from megatron_ee.inference.options import EngineOptions
    from megatron_ee.parallel.groups import process_groups
    from megatron_ee.testing.models import save_tiny_model

    for family in FAMILIES:
        theirs = save_tiny_model(family, folder / family)
        with process_groups() as groups, torch.no_grad():
            stage = _tiny_stage(folder / family, groups)
            ids = torch.tensor([PROMPTS[1]])
            positions = stage.backbone.positions(len(PROMPTS[1]))
            h = stage.backbone.embed(ids.to(platform.device()))
            h, _ = stage.run_layers(h, positions, to_end=True)
            ours = stage.final_logits(stage.final_features(h))[:, 0].cpu()
            engine = make_engine(stage, EngineOptions(kv_memory=2**28))
            found = _tokens_of_modes(engine)
            engine.close()
            for place in dict.fromkeys((torch.device("cpu"), platform.device())):
                theirs.to(place)
                error = float((theirs(ids.to(place)).logits[0].cpu() - ours).abs().max())
                where = f"transformers on {place.type}"
                yield Finding(f"{family} logits against {where}", f"{error:.1e}", "at most 1e-4", error <= 1e-4)
                expected = [
                    theirs.generate(
                        torch.tensor([p], device=place),
                        max_new_tokens=NEW_TOKENS,
                        min_new_tokens=NEW_TOKENS,
                        do_sample=False,
                        eos_token_id=10_000,
                        pad_token_id=0,
                    )[0, len(p) :].tolist()
                    for p in PROMPTS
                ]
                same = [name for name, tokens in found.items() if tokens == expected]
                figure = f"{len(same)} of {len(found)} modes"
                yield Finding(f"{family} tokens against {where}", figure, "all", len(same) == len(found))


def compiled(small: bool, folder: Path) -> Iterator[Finding]:
    """A tiny model in float32 with compiled layers: the tokens of every mode equal those without compilation."""
    import torch

    from megatron_ee.inference.loading import make_engine
    from megatron_ee.inference.options import EngineOptions
    from megatron_ee.parallel.groups import process_groups
    from megatron_ee.testing.models import save_tiny_model

    save_tiny_model(FAMILIES[0], folder / "model")
    with process_groups() as groups, torch.no_grad():
        stage = _tiny_stage(folder / "model", groups)
        expected = _tokens_of_modes(make_engine(stage, EngineOptions(kv_memory=2**28)))
        seconds, engine = _timed(make_engine, stage, EngineOptions(kv_memory=2**28, compile=True))
        yield Finding("compiling a tiny model", f"{seconds:.0f} s", "", None)
        found = _tokens_of_modes(engine)
    same = [name for name in expected if found[name] == expected[name]]
    yield Finding("tokens of compiled layers", f"{len(same)} of {len(expected)} modes", "all", found == expected)


def commands(small: bool, folder: Path) -> Iterator[Finding]:
    """The commands, as a user runs them: tune with saves in the background, resume, evaluate, generate in every
    mode."""
    from megatron_ee.testing.project import make_project

    project = make_project(folder)
    config, output = project.config(folder / "run.yaml", checkpoint={"asynchronous": True}), folder / "run"
    adapter = ("--adapter", output / "adapter")
    lines = {
        "tune": ("tune", "--config", config, "--output", output),
        "tune --resume": ("tune", "--config", config, "--output", output, "--resume", "--tuning.steps", "16"),
        "evaluate": ("evaluate", "--model", project.model, *adapter, "--data", project.held_out, "--json"),
    }
    for mode in ("full", "threshold", "speculative"):
        prompt = ("--prompt", "def main(", "--max-tokens", 8, "--dtype", "float32", "--json")
        lines[f"generate {mode}"] = ("generate", "--model", project.model, *adapter, "--mode", mode, *prompt)
    for name, line in lines.items():
        seconds, done = _timed(project.run, *line, check=False)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
        figure = f"status {done.returncode} in {seconds:.0f} s"
        yield Finding(f"megatron-ee {name}", figure, "status 0", done.returncode == 0)


def tests(small: bool, folder: Path) -> Iterator[Finding]:
    """The tests that are marked ``gpu``."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or ["nothing"])[-1].strip("= ")
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
    yield Finding("tests marked gpu", last.split(" in ")[0], "none fails", done.returncode == 0)


CHECKS: dict[str, tuple[Callable[[bool, Path], Iterator[Finding]], int]] = {
    "parity": (parity, 60),
    "tune": (tune, 90),
    "decode": (decode, 150),
    "commands": (commands, 130),
    "compiled": (compiled, 100),
    "tests": (tests, 60),
}
"""Function and time limit in seconds of each check; together less than ten minutes."""


def _config(small: bool) -> dict[str, Any]:
    shape = SHAPE_SMALL if small else SHAPE_7B
    return {**shape, "vocab_size": 256 if small else 32000, "max_position_embeddings": 4096}


def _architecture(small: bool) -> Any:
    from megatron_ee.families.registry import parse_architecture

    return parse_architecture({"architectures": ["LlamaForCausalLM"], **_config(small)})


def _tiny_stage(directory: Path, groups: Any) -> Any:
    """A released model in float32 with three exits that are copies of its own parts."""
    import torch

    from megatron_ee.checkpoint.initialise import initialise_exit
    from megatron_ee.checkpoint.loading import load_backbone
    from megatron_ee.checkpoint.saved_model import open_model
    from megatron_ee.config.exits import ExitSpec
    from megatron_ee.exits.stage import Stage
    from megatron_ee.model.setup import build_setup

    specs = [ExitSpec(1), ExitSpec(2, "layer", "shared"), ExitSpec(3, "norm", "low_rank", rank=4)]
    model = open_model(directory)
    setup = build_setup(model.architecture, torch.float32, groups)
    stage = Stage(setup, range(1, model.architecture.num_layers + 1), specs, final_exit=True)
    load_backbone(stage, model)
    for exit_ in stage.exits:
        initialise_exit(exit_, model, 1)
    return stage


def _tokens_of_modes(engine: Any) -> dict[str, list[list[int]]]:
    """Tokens that each mode generates from ``PROMPTS``. No exit is confident enough, so all equal full mode's."""
    from megatron_ee.inference.policy import ThresholdPolicy
    from megatron_ee.inference.requests import Draft, Request

    modes: dict[str, dict[str, Any]] = {
        "full": {},
        "threshold": {"mode": "threshold", "policy": ThresholdPolicy(threshold=2.0)},
        "speculative": {"mode": "speculative", "draft": Draft(exit=1, length=3)},
    }
    return {
        name: [
            [token.id for token in one.tokens]
            for [one] in engine.generate(
                [Request(prompt=prompt, max_tokens=NEW_TOKENS, ignore_eos=True, **settings) for prompt in PROMPTS]
            )
        ]
        for name, settings in modes.items()
    }


def _fill(stage: Any) -> None:
    """Random weights; norms at 1."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in stage.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02)


def _here(small: bool, good: bool) -> bool | None:
    """The verdict on a limit that applies only at full size on a GPU."""
    from megatron_ee import platform

    return good if platform.has_accelerator() and not small else None


def _timed(work: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[float, Any]:
    """Seconds until the device has finished the work, and the work's result."""
    from megatron_ee import platform

    platform.synchronize()
    started = time.perf_counter()
    result = work(*arguments, **options)
    platform.synchronize()
    return time.perf_counter() - started, result


def run_here(name: str, small: bool, folder: Path, findings: Path) -> None:
    """Run one check in this process. Write its findings to a file as they come, one JSON object per line."""
    with findings.open("a") as file:
        for finding in CHECKS[name][0](small, folder):
            print(json.dumps(asdict(finding)), file=file, flush=True)


def run_check(name: str, arguments: argparse.Namespace, folder: Path) -> list[Finding]:
    """Run one check in its own process. A failure of the process is a finding too."""
    found, limit, folder = folder / f"{name}.jsonl", arguments.seconds or CHECKS[name][1], folder / name
    folder.mkdir()
    found.touch()
    command = [sys.executable, __file__, "--run", name, "--out", str(folder), "--device", arguments.device]
    command += ["--small"] if arguments.small else []
    started = time.monotonic()
    with _child([*command, "--findings", str(found)], folder.with_suffix(".log"), arguments.device) as child:
        try:
            status: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
    rows = [Finding(**json.loads(line)) for line in found.read_text().splitlines()]
    if status != 0:
        what = f"took more than {limit} s" if status is None else f"ended with status {status}"
        rows.append(Finding("runs to its end", what, f"within {limit} s", False))
        print("".join(folder.with_suffix(".log").read_text(errors="replace")[-4000:]), file=sys.stderr)
    print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    return rows


@contextmanager
def _child(command: list[str], log: Path, device: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process, and end its children with it. Its output goes to ``log``."""
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def show(rows: Sequence[tuple[str, Finding]]) -> None:
    """Print the table of findings."""
    from megatron_ee.tables import add_columns, make_console, new_table

    console = make_console()
    table = new_table("What was found", console)
    add_columns(table, "check", "what", "result", "figure", "limit", words=True)
    results = {True: "good", False: "FAILED", None: "-"}
    for name, finding in rows:
        table.add_row(name, finding.what, results[finding.good], finding.figure, finding.limit)
    console.print(table)


def main() -> int:
    """Exit status: 0 all checks passed, 1 a check failed, 2 there is no CUDA device, or a wrong argument."""
    parser = argparse.ArgumentParser(prog="gpu_check", description="Try everything that needs a GPU, on one GPU.")
    parser.add_argument("--skip", action="append", default=[], choices=CHECKS, help="leave a check out")
    parser.add_argument("--out", type=Path, help="where logs and models go (default: a temporary folder)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--run", choices=CHECKS, help=argparse.SUPPRESS)
    parser.add_argument("--findings", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run_here(arguments.run, arguments.small, arguments.out, arguments.findings)
        return 0
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("gpu_check: torch finds no CUDA device here; no check was run", file=sys.stderr)
            return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            (name, finding)
            for name in CHECKS
            if name not in arguments.skip
            for finding in run_check(name, arguments, folder)
        ]
        show(rows)
    return int(any(finding.good is False for _, finding in rows))


if __name__ == "__main__":
    sys.exit(main())
