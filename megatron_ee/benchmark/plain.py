"""The other side: the same work as one would write it with PyTorch and transformers.

The transformers model is frozen and runs whole under ``no_grad``; the exits are ordinary modules on what its hooks
give, with the logits of the whole sequence; the summed loss is backpropagated once. Nothing is held back that a user
of plain PyTorch has: scaled-dot-product attention, the fused AdamW, no key-value cache, the final head for one
position only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ee import platform
from megatron_ee.benchmark.machine import random_batch, seconds
from megatron_ee.benchmark.shape import Step, plain_flops
from megatron_ee.config.schema import OptimizerConfig


class PlainExit(nn.Module):
    """An ``mlp`` exit with a head of its own, float32, copied from the model: ``W N(r + MLP(n(r)))``."""

    def __init__(self, model: Any, layer: int) -> None:
        super().__init__()
        config, source = model.config, model.model.layers[layer - 1]
        hidden, ffn = config.hidden_size, config.intermediate_size
        self.input_norm = nn.RMSNorm(hidden, eps=config.rms_norm_eps)
        self.gate = nn.Linear(hidden, ffn, bias=False)
        self.up = nn.Linear(hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)
        self.norm = nn.RMSNorm(hidden, eps=config.rms_norm_eps)
        self.head = nn.Linear(hidden, config.vocab_size, bias=False)
        copies = (
            (self.input_norm, source.post_attention_layernorm),
            (self.gate, source.mlp.gate_proj),
            (self.up, source.mlp.up_proj),
            (self.down, source.mlp.down_proj),
            (self.norm, model.model.norm),
            (self.head, model.lm_head),
        )
        with torch.no_grad():
            for own, copied in copies:
                own.weight.copy_(copied.weight)
        self.input_norm.requires_grad_(False)

    def forward(self, r: Tensor) -> Tensor:
        """Residual after attention, ``[batch, seq, hidden]`` -> logits ``[batch, seq, vocab]``."""
        r = r.float()
        x = self.input_norm(r)
        return self.head(self.norm(r + self.down(F.silu(self.gate(x)) * self.up(x))))


@contextlib.contextmanager
def plain(step: Step) -> Iterator[Plain]:
    """For a worker: model, exits and optimizer, ready for the first step."""
    yield Plain(step)


class Plain:
    """Runs one step at a time."""

    def __init__(self, step: Step) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self._step, self._dtype, self._device = step, platform.DTYPES[step.dtype], platform.device()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            step.directory,
            dtype=self._dtype,
            attn_implementation="sdpa",
            trust_remote_code=False,
            local_files_only=True,
        )
        self._model = self._model.to(self._device).eval().requires_grad_(False)
        with torch.device(self._device):
            self._exits = nn.ModuleDict({str(layer): PlainExit(self._model, layer) for layer in step.exits})
        self._taps: dict[int, Tensor] = {}
        for layer in step.exits:
            norm = self._model.model.layers[layer - 1].post_attention_layernorm
            norm.register_forward_pre_hook(lambda _, inputs, layer=layer: self._taps.update({layer: inputs[0]}))
        self._optimizer = _optimizer(self._exits)
        self._batch = random_batch(step.shape.vocab, step.tokens)

    def step(self) -> dict[str, Any]:
        """Forward, backward and update: ``seconds``, ``losses`` per exit before it, ``grad_norm`` before clipping."""
        results: list[tuple[list[float], float]] = []
        elapsed = seconds(lambda: results.append(self._run()))
        return {"seconds": elapsed, "losses": results[0][0], "grad_norm": results[0][1]}

    def _run(self) -> tuple[list[float], float]:
        tokens, labels = self._batch.tokens.to(self._device), self._batch.labels.to(self._device).flatten()
        with torch.no_grad():
            self._model(tokens, use_cache=False, logits_to_keep=1)
        self._optimizer.zero_grad(set_to_none=True)
        losses = []
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            for layer, exit_ in self._exits.items():
                logits = exit_(self._taps.pop(int(layer)))
                losses.append(F.cross_entropy(logits.flatten(0, 1), labels))
        torch.stack(losses).sum().backward()
        trained = [parameter for parameter in self._exits.parameters() if parameter.requires_grad]
        norm = nn.utils.clip_grad_norm_(trained, OptimizerConfig.clip_grad)
        self._optimizer.step()
        return torch.stack(losses).tolist(), float(norm)

    def peak_memory(self) -> int:
        """Bytes."""
        return platform.peak_memory()

    def flops(self) -> int:
        """Counted operations of one step."""
        return plain_flops(self._step).total


def _optimizer(exits: nn.Module) -> torch.optim.AdamW:
    """With our defaults; norms have no weight decay."""
    settings = OptimizerConfig()
    trained = [parameter for parameter in exits.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)
