"""The sides of the tuning benchmark, each for a process of its own: our step, plain PyTorch's, and the bare machine.

Plain PyTorch is what one would write with transformers: the frozen model runs whole under ``no_grad``, the exits are
ordinary modules on what its hooks give, with the logits of the whole sequence; the summed loss is backpropagated once.
It has what a user of PyTorch has: scaled-dot-product attention, the fused AdamW, autocast, no key-value cache, the
final head for one position only.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.limits import matmul_rate, seconds
from benchmarks.processes import serve
from benchmarks.quantised_side import quantised
from benchmarks.streamed_side import streamed
from megatron_ee import platform
from megatron_ee.checkpoint.initialise import initialise_exit
from megatron_ee.checkpoint.loading import load_backbone
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import LossConfig, OptimizerConfig, ScheduleConfig
from megatron_ee.data.loader import Batch
from megatron_ee.exits.stage import Stage
from megatron_ee.model.setup import build_setup
from megatron_ee.parallel.groups import process_groups
from megatron_ee.parallel.optimizer import ExitOptimizer
from megatron_ee.tuning.schedule import one_stage
from megatron_ee.tuning.step import tuning_step

SEED = 1234
STEPS = 1_000_000  # of the learning rate's schedule: never reached


class TuningSide:
    """Runs one step at a time on one batch."""

    def __init__(self, run: Callable[[], tuple[list[float], float]]) -> None:
        """``run``: one step; the loss of each exit before it, and the gradient norm before clipping."""
        self._run = run

    def step(self) -> dict[str, Any]:
        """Forward, backward and update; ``seconds``, ``losses`` and ``grad_norm``."""
        results: list[tuple[list[float], float]] = []
        elapsed = seconds(lambda: results.append(self._run()))
        return {"seconds": elapsed, "losses": results[0][0], "grad_norm": results[0][1]}

    def flops(self) -> int:
        """Multiplications and additions of a step's products of matrices, as torch counts them; without attention's."""
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops})
        with counter:
            self._run()
        counts = counter.get_flop_counts()["Global"]
        return sum(flops for operator, flops in counts.items() if "scaled_dot" not in str(operator))

    def peak_memory(self) -> int:
        """Bytes."""
        return platform.peak_memory()


@contextlib.contextmanager
def ours(directory: str, exits: list[int], dtype: str, tokens: int) -> Iterator[TuningSide]:
    """The step as ``megatron-ee tune`` runs it, on one process."""
    with process_groups() as groups:
        model = open_model(directory)
        setup = build_setup(model.architecture, platform.DTYPES[dtype], groups)
        stage = Stage(setup, range(1, max(exits) + 1), [ExitSpec(layer) for layer in exits])
        load_backbone(stage, model)
        for exit_ in stage.exits:
            initialise_exit(exit_, model, SEED)
        schedule = ScheduleConfig(decay="constant", warmup_fraction=0.0)
        optimizer = ExitOptimizer(stage.exits, setup.config, groups, OptimizerConfig(), schedule, STEPS)
        pipeline, ids = one_stage(stage), random_ids(model.architecture.vocab_size, tokens)
        batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones(1, tokens, dtype=torch.bool), tokens)

        def run() -> tuple[list[float], float]:
            result = tuning_step(pipeline, optimizer, [batch], LossConfig(), 1.0)
            return [exit_.loss for exit_ in result.exits], result.grad_norm

        yield TuningSide(run)


class PlainExit(nn.Module):
    """An ``mlp`` exit with a head of its own, float32, copied from the model: ``W N(r + MLP(n(r)))``."""

    def __init__(self, model: Any, layer: int) -> None:
        super().__init__()
        config, source = model.config, model.model.layers[layer - 1]
        hidden, ffn, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
        self.input_norm, self.norm = nn.RMSNorm(hidden, eps=eps), nn.RMSNorm(hidden, eps=eps)
        self.gate, self.up = (nn.Linear(hidden, ffn, bias=False) for _ in range(2))
        self.down, self.head = nn.Linear(ffn, hidden, bias=False), nn.Linear(hidden, config.vocab_size, bias=False)
        with torch.no_grad():
            for own, copied in (
                (self.input_norm, source.post_attention_layernorm),
                (self.gate, source.mlp.gate_proj),
                (self.up, source.mlp.up_proj),
                (self.down, source.mlp.down_proj),
                (self.norm, model.model.norm),
                (self.head, model.lm_head),
            ):
                own.weight.copy_(copied.weight)
        self.input_norm.requires_grad_(False)

    def forward(self, r: Tensor) -> Tensor:
        """Residual after attention, ``[batch, seq, hidden]`` -> logits ``[batch, seq, vocab]``."""
        r = r.float()
        x = self.input_norm(r)
        logits: Tensor = self.head(self.norm(r + self.down(F.silu(self.gate(x)) * self.up(x))))
        return logits


@contextlib.contextmanager
def plain(directory: str, exits: list[int], dtype: str, tokens: int) -> Iterator[TuningSide]:
    """The same with PyTorch and transformers alone."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    device = platform.device()
    load = transformers.AutoModelForCausalLM.from_pretrained  # noqa: TID251 - runs no code from the directory
    model = load(directory, dtype=platform.DTYPES[dtype], trust_remote_code=False)
    model = model.to(device).eval().requires_grad_(False)
    with torch.device(device):
        modules = nn.ModuleDict({str(layer): PlainExit(model, layer) for layer in exits})
    taps: dict[str, Tensor] = {}
    for layer in modules:
        norm = model.model.layers[int(layer) - 1].post_attention_layernorm
        norm.register_forward_pre_hook(lambda _, inputs, layer=layer: taps.update({layer: inputs[0]}))
    settings = OptimizerConfig()
    trained = [parameter for parameter in modules.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)
    ids = random_ids(model.config.vocab_size, tokens).to(device)

    def run() -> tuple[list[float], float]:
        with torch.no_grad():
            model(ids[:, :-1], use_cache=False, logits_to_keep=1)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = [exit_(taps.pop(layer)) for layer, exit_ in modules.items()]
            losses = torch.stack([F.cross_entropy(each.flatten(0, 1), ids[:, 1:].flatten()) for each in logits])
        losses.sum().backward()
        norm = nn.utils.clip_grad_norm_(trained, settings.clip_grad)
        optimizer.step()
        return losses.tolist(), float(norm)

    yield TuningSide(run)


class Machine:
    """Measures products of matrices in a process that does nothing else."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype

    def matmul_rate(self) -> float:
        """See ``limits.matmul_rate``."""
        return matmul_rate(self._dtype)

    def device(self) -> str:
        """Name of what is computed on."""
        return torch.cuda.get_device_name() if platform.has_accelerator() else "cpu"


@contextlib.contextmanager
def machine(dtype: str) -> Iterator[Machine]:
    """The object above."""
    yield Machine(dtype)


def random_ids(vocab_size: int, tokens: int) -> Tensor:
    """``[1, tokens + 1]`` int64, the same in every process."""
    return torch.randint(vocab_size, (1, tokens + 1), generator=torch.Generator().manual_seed(SEED))


def _addmm_flops(a: Any, b: Any, c: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Of ``addmm_``, which torch does not count: ``b`` and ``c`` are shapes."""
    return int(2 * b[0] * b[1] * c[1])


SIDES: dict[str, Callable[..., contextlib.AbstractContextManager[Any]]] = {
    "ours": ours,
    "plain": plain,
    "machine": machine,
    "quantised": quantised,
    "streamed": streamed,
}

if __name__ == "__main__":
    serve(SIDES[sys.argv[1]], json.loads(sys.argv[2]))
