"""The gate of an exit: a linear probe before the head that predicts whether the exit agrees with the final exit.

Its probability is calibrated by logistic regression on the agreement of top-1 tokens, fitted by Newton's method
(iteratively reweighted least squares). It costs one dot product, a head one for each token of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.exits.body import ExitPart
from megatron_ee.families.family import Source

GATE = "gate"
"""The module of an exit, and the first part of its tensors' names in an adapter after ``exits.<layer>.``."""
RIDGES = (0.001, 0.01, 0.1)
"""Tried in the fit of a gate."""
STEPS = 10
"""Newton steps at most."""
TOLERANCE = 1e-12
"""Expected decrease of the loss by a further step, relative to the loss, at which the fit ends."""
CHUNK = 4096
"""Tokens in float64 at a time."""


class Gate(nn.Module):
    """``sigmoid(w z + b)``, the same on every tensor-parallel rank. In float32, and never trained by the optimizer."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float32), requires_grad=False)

    def forward(self, z: Tensor) -> Tensor:
        """Features ``[..., hidden]`` -> probability of agreement ``[...]`` float32."""
        return (F.linear(z.float(), self.weight) + self.bias).sigmoid()

    @torch.no_grad()
    def place(self, solution: Tensor) -> None:
        """Set the weights to a solution of ``logistic_regression``."""
        self.weight.copy_(solution[:-1])
        self.bias.copy_(solution[-1:])


def gate_parts(spec: ExitSpec, architecture: Architecture) -> Iterator[ExitPart]:
    """The parameters of an exit's gate; none without a gate. They are saved, but not trained or copied."""
    if spec.gate:
        for name, size in (("weight", architecture.hidden_size), ("bias", 1)):
            saved = Source((f"exits.{spec.layer}.{GATE}.{name}",), "whole")
            yield ExitPart(f"{GATE}.{name}", saved, ((size,),), None)


def logistic_regression(
    z: Tensor,
    agrees: Tensor,
    ridge: float,
    device: torch.device | None = None,
    reduce: Callable[[Tensor], None] = lambda sums: None,
) -> Tensor:
    """Minimise the cross-entropy of ``sigmoid(w z + b)`` by damped Newton steps.

    The penalty is ``ridge / 2`` times the mean square of the features times ``|w|^2``, per token. It makes the minimum
    unique and finite, also where the classes can be separated. b has no penalty, but a prior of a token of each class.

    Args:
        z: ``[tokens, hidden]``.
        agrees: ``[tokens]`` bool: the class.
        ridge: see above; above 0.
        device: where pieces of the tokens are computed on; None for the device of z.
        reduce: adds a tensor of sums on that device over the ranks that hold other tokens, in place.

    Returns:
        ``[hidden + 1]`` float64 on the CPU: w, then b.
    """
    problem = _Problem(z, agrees, ridge, device or z.device, reduce)
    solution = torch.zeros(z.shape[1] + 1, dtype=torch.float64)
    loss, gradient, hessian = problem.sums(solution)
    for _ in range(STEPS):
        step = torch.cholesky_solve(gradient[:, None], torch.linalg.cholesky(hessian))[:, 0]
        expected, size = float(gradient @ step) / 2, 1.0
        if expected <= TOLERANCE * loss:
            break
        following = problem.sums(solution - step)
        while following[0] > loss and size > 2.0**-STEPS:
            size /= 2
            following = problem.sums(solution - size * step)
        if following[0] > loss:  # as low as float64 resolves
            break
        solution, (loss, gradient, hessian) = solution - size * step, following
    return solution


def newton_bytes(hidden_size: int) -> int:
    """Bytes on the device of a Newton step: the sums, and three copies of a piece of the tokens, in float64."""
    return 8 * (hidden_size**2 + 3 * CHUNK * hidden_size)


class _Problem:
    """The penalised loss of all tokens and its derivatives."""

    def __init__(
        self, z: Tensor, agrees: Tensor, ridge: float, device: torch.device, reduce: Callable[[Tensor], None]
    ) -> None:
        self._z, self._agrees, self._device, self._reduce = z, agrees, device, reduce
        squares = torch.zeros(1, dtype=torch.float64, device=device)
        for part, _ in self._pieces():
            squares += part.square().sum()
        reduce(squares)
        size = z.shape[1]
        scale = float(squares) / size or 1.0  # without tokens the gate is a constant
        self._penalty = torch.full((size + 1,), ridge * scale, dtype=torch.float64)
        self._penalty[-1] = 0.0

    def sums(self, solution: Tensor) -> tuple[float, Tensor, Tensor]:
        """Loss, gradient and Hessian at a solution, over all ranks, on the CPU."""
        size, there = len(solution), solution.to(self._device)
        sums = torch.zeros(1 + size + size * size, dtype=torch.float64, device=self._device)
        loss, gradient, hessian = sums.split((1, size, size * size))
        for part, target in self._pieces():
            rows = F.pad(part, (0, 1), value=1.0)
            logits = rows @ there
            loss += F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
            chance = logits.sigmoid()
            gradient += rows.t() @ (chance - target)
            hessian.view(size, size).addmm_((rows * (chance * (1 - chance))[:, None]).t(), rows)
        self._reduce(sums)
        loss, gradient, hessian = sums.cpu().split((1, size, size * size))
        hessian = hessian.view(size, size) + self._penalty.diag()
        gradient = gradient + self._penalty * solution
        # The prior of b, at z = 0: b stays finite if all tokens are of one class.
        chance = solution[-1].sigmoid()
        prior = F.softplus(solution[-1]) + F.softplus(-solution[-1])
        gradient[-1] += 2 * chance - 1
        hessian[-1, -1] += 2 * chance * (1 - chance)
        return float(loss + self._penalty @ solution.square() / 2 + prior), gradient, hessian

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """z ``[tokens, hidden]`` and the class ``[tokens]`` of some tokens, both float64."""
        for part, agrees in zip(self._z.split(CHUNK), self._agrees.split(CHUNK), strict=True):
            yield part.to(self._device).double(), agrees.to(self._device).double()
