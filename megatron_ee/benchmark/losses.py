"""The exit loss alone, forward and backward, against the ways that PyTorch has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_ee import platform
from megatron_ee.benchmark.machine import SEED, random_batch, seconds
from megatron_ee.benchmark.shape import Step
from megatron_ee.checkpoint.loading import open_model
from megatron_ee.model.backbone import VocabHead
from megatron_ee.model.exit_loss import exit_loss
from megatron_ee.model.setup import build_setup
from megatron_ee.parallel.groups import process_groups
from megatron_ee.parallel.tiles import Tiles


@contextlib.contextmanager
def losses(step: Step) -> Iterator[Losses]:
    """For a worker: the object below."""
    with process_groups() as groups:
        architecture = open_model(step.directory).architecture
        setup = build_setup(architecture, platform.DTYPES[step.dtype], groups)
        with torch.device(platform.device()):
            head = VocabHead(setup)
        yield Losses(step, head, groups.tensor, setup.tiles)


class Losses:
    """The mean cross-entropy of ``z head^T`` and its gradients for both, in several ways.

    ``z`` is ``[tokens, hidden]`` and the head ``[vocab, hidden]``, both in the step's dtype; each way leaves its
    gradients in ``.grad``.
    """

    def __init__(self, step: Step, head: VocabHead, group: dist.ProcessGroup, tiles: Tiles) -> None:
        device, hidden = platform.device(), step.shape.hidden
        generator = torch.Generator().manual_seed(SEED)
        self._step, self._head, self._group, self._tiles = step, head, group, tiles
        with torch.no_grad():
            weight = torch.randn(step.shape.vocab, hidden, generator=generator) * hidden**-0.5
            head.weight.zero_()[: step.shape.vocab].copy_(weight)
        z = torch.randn(step.tokens, hidden, generator=generator)
        self._z = z.to(device, head.weight.dtype).requires_grad_()
        # The peers get a head without padding.
        self._weight = head.weight.detach()[: step.shape.vocab].clone().requires_grad_()
        self._labels = random_batch(step.shape.vocab, step.tokens).labels.flatten().to(device)
        self._ways: dict[str, Callable[[], Tensor]] = {"ours": self._ours, "plain": self._plain}
        if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
            self._ways["linear_cross_entropy"] = self._linear_cross_entropy

    def ways(self) -> list[str]:
        """Names that ``run`` takes; torch before 2.13 has no ``linear_cross_entropy``."""
        return list(self._ways)

    def run(self, way: str) -> dict[str, Any]:
        """``seconds`` and ``loss`` of one forward and backward."""
        for tensor in (self._z, self._weight, self._head.weight):
            tensor.grad = None
        results: list[Tensor] = []

        def work() -> None:
            loss = self._ways[way]()
            loss.backward()
            results.append(loss.detach())

        elapsed = seconds(work)
        return {"seconds": elapsed, "loss": float(results[0])}

    def gradients(self, way: str) -> dict[str, float]:
        """Norms of the gradients for ``z`` and the head, so that the ways can be compared."""
        self.run(way)
        weight = self._head.weight if way == "ours" else self._weight
        assert self._z.grad is not None and weight.grad is not None
        return {"z": float(self._z.grad.float().norm()), "head": float(weight.grad.float().norm())}

    def _ours(self) -> Tensor:
        coefficient = torch.full((self._step.tokens,), 1 / self._step.tokens, device=self._z.device)
        group, chunk = self._group, self._step.chunk_tokens
        given = {"chunk_tokens": chunk, "tiles": self._tiles}
        return exit_loss(self._z, self._head, self._labels, coefficient, group, **given)[0]  # type: ignore[arg-type]

    def _plain(self) -> Tensor:
        # Float32 logits, as every trainer takes the loss of a bf16 model.
        return F.cross_entropy(F.linear(self._z, self._weight).float(), self._labels)

    def _linear_cross_entropy(self) -> Tensor:
        # Without a chunk size of its own choosing: that is several times slower on a CPU.
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=self._step.chunk_tokens)
        return F.linear_cross_entropy(self._z, self._weight, self._labels, options=options)
