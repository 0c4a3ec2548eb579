"""The grid: ranks, fits, exit bodies and heads, distillation, sequence parallelism, and modes of inference."""

from __future__ import annotations

from .runs import Fitting, Inference, Tuning

BODIES = ("embedding", "norm", "mlp", "layer")
HEADS = ("own", "shared", "low_rank")
LARGE = ("llama2_70b", 64, ("--parallel.tensor", "8", "--parallel.pipeline", "4"))
"""70B on eight machines: tensor 8, four stages, two replicas."""


def exits(body: str, head: str, *layers: int) -> tuple[str, str]:
    """The override that gives each layer such an exit."""
    return "--exits", "[" + ", ".join(f"{{layer: {layer}, body: {body}, head: {head}}}" for layer in layers) + "]"


def large(rank: int, *overrides: str) -> Tuning:
    """A rank of the large run, with two exits at the depths where an eighth and half of the layers have run."""
    name, processes, layout = LARGE
    return Tuning(name, rank, processes, (*layout, *overrides))


def tuning_grid() -> list[Tuning]:
    """Each thing that changes what a step does or holds, on the ranks that it changes."""
    first, middle, last = 0, 27, 63
    cases = [large(rank) for rank in (first, middle, last)]
    cases += [large(rank, "--parallel.sequence", "false") for rank in (middle, last)]
    # Distillation: every stage runs, and the last one teaches.
    taught = ("--loss.distillation.kl", "1.0")
    cases += [large(rank, *taught) for rank in (first, middle, last)]
    cases.append(large(last, *taught, "--loss.distillation.temperature", "2.0"))
    # Bodies and heads, on one process with two exits.
    for body in BODIES:
        for head in HEADS:
            if (body, head) != ("embedding", "shared"):  # trains nothing
                cases.append(Tuning("llama2_7b", overrides=exits(body, head, 2, 4)))
    # The same on ranks that share the sequence.
    for body, head in (("embedding", "low_rank"), ("norm", "shared"), ("layer", "own"), ("layer", "low_rank")):
        cases.append(Tuning("llama3.1_8b", 1, overrides=exits(body, head, 2, 4)))
    few = exits("mlp", "own", 2, 4)
    cases.append(Tuning("llama2_7b", overrides=(*few, "--model.dtype", "float32")))
    cases.append(Tuning("llama2_7b", overrides=(*few, "--loss.dynamic_token_weights", "true")))
    cases.append(Tuning("llama2_7b", overrides=(*few, "--loss.chunk_tokens", "256")))
    cases.append(Tuning("llama2_7b", rank=3, processes=4, overrides=few))
    initial = (*few, "--optimizer.decay_towards", "initial")
    cases.append(Tuning("llama2_7b", overrides=initial))
    cases.append(Tuning("llama2_7b", rank=3, processes=4, overrides=initial))
    # A window shorter than the sequence, with key-value heads that queries share.
    cases.append(Tuning("llama2_70b", overrides=exits("layer", "own", 2, 4), window=512))
    # A stage of exits alone.
    places = "[{layers: [1, 2], exits: [2]}, {layers: [3, 4]}, {exits: [4]}]"
    alone = ("--parallel.pipeline", "3", "--parallel.layout", places)
    cases += [Tuning("llama2_7b", rank, 3, (*few, *alone)) for rank in (1, 2)]
    return cases


def fitting_grid() -> list[Fitting]:
    """Ranks of the large run and of one without sequence parallelism, and each body that can be fitted."""
    name, processes, layout = LARGE
    cases = [Fitting(name, rank, processes, layout) for rank in (0, 1, 24, 56)]
    cases.append(Fitting(name, 0, processes, (*layout, "--parallel.sequence", "false")))
    for body, head in (("mlp", "shared"), ("mlp", "low_rank"), ("layer", "own")):
        cases.append(Fitting("llama2_7b", overrides=exits(body, head, 2, 4)))
    norms = ("--exits", "[{layer: 2, body: norm, head: shared, init: fit}]")
    cases.append(Fitting("llama3.1_8b", 1, overrides=norms))
    return cases


def inference_grid() -> list[Inference]:
    """Modes, rows that run together, and rows that sample, on one process and on tensor-parallel ranks."""
    cases = []
    for mode in ("full", "threshold", "speculative"):
        cases.append(Inference("llama2_7b", mode, exits("mlp", "own", 8, 16)))
        cases.append(Inference("llama2_7b", mode, exits("mlp", "own", 8, 16), rows=3))
        cases.append(Inference("llama2_7b", mode, exits("mlp", "own", 8, 16), sampled=True))
        cases.append(Inference("llama3.1_8b", mode, exits("mlp", "own", 8, 16), rows=2, sampled=True))
    cases.append(Inference("llama2_7b", "threshold", exits("mlp", "own", 8, 16), window=256))
    cases.append(Inference("llama2_7b", "threshold", exits("mlp", "own", 8, 16), rows=3, gates=True))
    for body, head in (("embedding", "own"), ("norm", "shared"), ("layer", "low_rank")):
        cases.append(Inference("llama2_7b", "threshold", exits(body, head, 8, 16)))
        cases.append(Inference("llama2_7b", "speculative", exits(body, head, 8, 16)))
    return cases
