"""The worker of ``benchmark generate``: our engine and transformers' ``generate`` on the same model, in one process."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_ee import platform
from megatron_ee.benchmark.chains import Recorder, TracePolicy, seconds_alone
from megatron_ee.benchmark.machine import SEED, seconds
from megatron_ee.checkpoint.initialise import initialise_exit
from megatron_ee.checkpoint.loading import load_backbone
from megatron_ee.config.exits import ExitSpec
from megatron_ee.data.tokenizer import load_tokenizer
from megatron_ee.inference.assembly import SLACK, make_engine
from megatron_ee.inference.compiled import CompiledStage, compile_stage
from megatron_ee.inference.core import PASS_TOKENS
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.loading import build_operations, load_stage, open_released
from megatron_ee.inference.passes import StageRunner
from megatron_ee.inference.policy import MAX_DEFERRED, ExitPolicy
from megatron_ee.inference.requests import Completion, Draft, Request
from megatron_ee.model import kernels
from megatron_ee.model.backbone import VocabHead
from megatron_ee.model.linear import ColumnLinear, RowLinear
from megatron_ee.model.setup import build_setup
from megatron_ee.model.stage import Stage
from megatron_ee.parallel.balance import even_layout
from megatron_ee.parallel.groups import process_groups

MEMORY = 2 * 2**30  # bytes of keys and values
MATVEC_BYTES = 256 * 2**20  # of a matrix that no cache holds


@contextlib.contextmanager
def decoding(
    directory: str, adapter: str | None, layers: Sequence[int], dtype: str, compiled: bool
) -> Iterator[Decoding]:
    """For a worker: the object below. Without ``adapter``, random heads after ``layers`` are its exits."""
    with process_groups() as groups:
        if adapter is not None:
            released = open_released(directory, adapter)
            layout = even_layout(released.model.architecture.num_layers, 1)
            stage = load_stage(released, released.exits, layout, dtype, groups)
        else:
            stage = _random_exits(directory, layers, dtype, groups)
        compiled_stage = compile_stage(stage) if compiled else None
        yield Decoding(
            directory, stage, make_engine(stage, memory=MEMORY, compiled_stage=compiled_stage), compiled_stage
        )


def _random_exits(directory: str, layers: Sequence[int], dtype: str, groups: Any) -> Stage:
    """The model with ``mlp`` exits that are copies of its own parts, as before any tuning."""
    from megatron_ee.checkpoint.loading import open_model

    model = open_model(directory)
    setup = build_setup(model.architecture, platform.DTYPES[dtype], groups)
    build_operations(setup)
    specs = [ExitSpec(layer, "mlp", "own") for layer in layers]
    stage = Stage(setup, range(1, model.architecture.num_layers + 1), specs, final_exit=True)
    load_backbone(stage, model)
    for exit_ in stage.exits:
        initialise_exit(exit_, model, SEED)
    return stage


class Decoding:
    """Runs and times one thing at a time. Prompts are lists of token ids."""

    def __init__(self, directory: str, stage: Stage, engine: Engine, compiled_stage: CompiledStage | None) -> None:
        self._directory, self._stage, self._engine, self._compiled = directory, stage, engine, compiled_stage
        self._peers: dict[str, Any] = {}

    def describe(self) -> dict[str, Any]:
        """The model: parameters, exits, and the bytes of weights that one token reads in full mode."""
        arch, backbone = self._stage.setup.architecture, self._stage.backbone
        parts = (backbone.layers, backbone.final_norm, backbone.head)
        weights = [parameter for part in parts if part is not None for parameter in part.parameters()]
        return {
            "path": self._directory,
            "compiled": self._compiled is not None,
            "layers": arch.num_layers,
            "hidden": arch.hidden_size,
            "vocab": arch.vocab_size,
            "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
            "exits": [exit_.spec.layer for exit_ in self._stage.exits],
            "max_deferred": MAX_DEFERRED,
            "bytes_per_token": sum(parameter.numel() * parameter.element_size() for parameter in weights),
        }

    def prompts(self, texts: Sequence[str], count: int, length: int) -> list[list[int]]:
        """Token ids of the beginnings of texts, in turn and further in for later ones; random ids without texts."""
        if not texts:
            generator = torch.Generator().manual_seed(SEED)
            vocab = self._stage.setup.architecture.vocab_size
            return torch.randint(vocab, (count, length), generator=generator).tolist()
        tokenizer = load_tokenizer(self._directory)
        streams = [tokenizer.encode(Path(text).read_text(encoding="utf-8")) for text in texts]
        found = []
        for number in range(count):
            ids, turn = streams[number % len(streams)], number // len(streams)
            start = turn * 2 * length
            found.append(ids[start : start + length])
        return [ids for ids in found if len(ids) == length]

    def matvec_rates(self) -> tuple[float, float]:
        """Bytes of a large matrix per second that a bare product with one vector reads now, in the model's dtype.

        Returns:
            of ``torch.mv``, and of the fastest product that this package knows here.
        """
        if "matrix" not in self._peers:
            rows = MATVEC_BYTES // (4096 * self._stage.setup.dtype.itemsize)
            matrix = torch.randn(rows, 4096, device=platform.device()).to(self._stage.setup.dtype)
            self._peers["matrix"] = matrix
        matrix = self._peers["matrix"]
        vector = torch.randn(1, 4096, device=platform.device()).to(matrix.dtype)
        plain = statistics.median(seconds(lambda: torch.mv(matrix, vector[0])) for _ in range(5))
        ours = statistics.median(seconds(lambda: kernels.product(vector, matrix)) for _ in range(5))
        return MATVEC_BYTES / plain, MATVEC_BYTES / min(plain, ours)

    def products_seconds(self) -> float:
        """Seconds that the products of one token in full mode take now, one after another with nothing between."""
        backbone = self._stage.backbone
        assert backbone.head is not None
        modules = (*backbone.layers.modules(), backbone.head)
        linears = [module for module in modules if isinstance(module, (ColumnLinear, RowLinear, VocabHead))]
        vectors = {
            size: torch.randn(1, size, device=platform.device()).to(self._stage.setup.dtype)
            for size in {linear.weight.shape[1] for linear in linears}
        }

        @torch.inference_mode()
        def run() -> None:
            for linear in linears:
                kernels.product(vectors[linear.weight.shape[1]], linear.weight)

        return statistics.median(seconds(run) for _ in range(3))

    def ours(self, prompts: Sequence[Sequence[int]], tokens: int, **options: Any) -> dict[str, Any]:
        """One batch through the engine; options of ``Request``. Times in seconds, ``decode`` without the prompts."""
        return self._run([Request(prompt, max_tokens=tokens, ignore_eos=True, **options) for prompt in prompts])

    def full(self, prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, Any]:
        """Full mode."""
        return self.ours(prompts, tokens)

    def threshold(self, prompts: Sequence[Sequence[int]], tokens: int, threshold: float) -> dict[str, Any]:
        """Threshold mode, going its own way."""
        return self.ours(prompts, tokens, mode="threshold", policy=ExitPolicy(threshold))

    def following(
        self, prompts: Sequence[Sequence[int]], follow: Sequence[Sequence[int]], threshold: float | None
    ) -> dict[str, Any]:
        """Threshold mode, or full mode without a threshold, along given outputs: what it says at each position."""
        mode: Any = "full" if threshold is None else "threshold"
        policy = ExitPolicy(threshold or 1.0)
        return self._run(
            [
                Request(prompt, mode=mode, policy=policy, follow=tuple(given), max_tokens=len(given))
                for prompt, given in zip(prompts, follow, strict=True)
            ]
        )

    def speculative(
        self, prompts: Sequence[Sequence[int]], tokens: int, exit_: int | None = None, length: int | None = None
    ) -> dict[str, Any]:
        """Speculative mode; the exit and the length are chosen online unless given."""
        return self.ours(prompts, tokens, mode="speculative", draft=Draft(exit_, length))

    def mixed(self, prompts: Sequence[Sequence[int]], tokens: int, layers: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Threshold mode with decisions from traces: by prompt and token, the layer that emits it."""
        exits = [exit_.spec.layer for exit_ in self._stage.exits]
        return self._run(
            [
                Request(prompt, mode="threshold", policy=TracePolicy(trace, exits), max_tokens=tokens, ignore_eos=True)
                for prompt, trace in zip(prompts, layers, strict=True)
            ]
        )

    def transformers(
        self, prompts: Sequence[Sequence[int]], tokens: int, early_exit: int | None = None, assistant: str | None = None
    ) -> dict[str, Any]:
        """transformers' ``generate``: plain, with ``assistant_early_exit``, or with a model that drafts."""
        options: dict[str, Any] = {}
        if early_exit is not None:
            options["assistant_early_exit"] = early_exit
        if assistant is not None:
            options["assistant_model"] = self._peer(assistant)
        ids = torch.tensor(prompts, device=platform.device())
        model, found = self._peer(self._directory), []

        def work() -> None:
            found.append(
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=tokens,
                    min_new_tokens=tokens,
                    do_sample=False,
                    pad_token_id=0,
                    **options,
                )
            )

        elapsed = seconds(work)
        return {"seconds": elapsed, "ids": found[0][:, ids.shape[1] :].tolist()}

    def export(self, adapter: str, layer: int, place: str) -> None:
        """Write an exit as a model of its own."""
        from megatron_ee.checkpoint.conversion.convert import Request as Conversion
        from megatron_ee.checkpoint.conversion.convert import prepare, write

        request = Conversion(Path(adapter), "hf", model=Path(self._directory), exit=layer)
        write(prepare(request)[1], request, Path(place))

    def overhead(self, prompt: Sequence[int], trace: Sequence[int]) -> dict[str, Any]:
        """Replay a trace, then time each of its chains alone.

        Returns:
            ``seconds`` of decoding, ``chains`` (the sum over chains of each one's time alone), ``count`` of chains.
        """
        recorder = Recorder(self._engine._core.links[0])  # type: ignore[arg-type, union-attr]
        self._engine._core.links = [recorder]  # type: ignore[misc, union-attr, list-item]
        try:
            done = self.mixed([prompt], len(trace), [trace])
        finally:
            self._engine._core.links = [recorder.runner]  # type: ignore[misc, union-attr]
        chains = Counter({key: count for key, count in recorder.seen.items() if key[3] < len(prompt)})
        runner = StageRunner(self._stage, SLACK, PASS_TOKENS, compiled=self._compiled)
        alone = seconds_alone(runner, len(prompt) + len(trace) // 2, list(chains))
        total = sum(count * alone[key] for key, count in chains.items())
        return {"seconds": done["decode"], "chains": total, "count": chains.total()}

    def _run(self, requests: Sequence[Request]) -> dict[str, Any]:
        started = time.perf_counter()
        done = [outputs[0] for outputs in self._engine.generate(requests)]
        elapsed = time.perf_counter() - started
        return {"seconds": elapsed, **_figures(done, elapsed)}

    def _peer(self, directory: str) -> Any:
        """A model of transformers, loaded when it is first needed."""
        if directory not in self._peers:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
            import transformers

            transformers.utils.logging.disable_progress_bar()
            transformers.utils.logging.set_verbosity_error()
            model = transformers.AutoModelForCausalLM.from_pretrained(
                directory, dtype=self._stage.setup.dtype, trust_remote_code=False
            )
            self._peers[directory] = model.to(platform.device()).eval()
        return self._peers[directory]


def _figures(done: Sequence[Completion], elapsed: float) -> dict[str, Any]:
    """What a batch said and took."""
    figures = [each.statistics for each in done]
    proposed, accepted = (sum(each[name] for each in figures) for name in ("proposed", "accepted"))
    waits = [each["time_to_first_token"] for each in figures]
    return {
        "ids": [[token.id for token in each.tokens] for each in done],
        "layers": [[token.layer for token in each.tokens] for each in done],
        "decode": elapsed - max(waits),
        "layers_per_token": statistics.fmean(each["layers_per_token"] or 0.0 for each in figures),
        "acceptance": accepted / proposed if proposed else None,
    }
