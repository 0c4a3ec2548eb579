"""What needs torch but is no side of a comparison: making the models, the batch, and the machine's matmul rate."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_ee import platform
from megatron_ee.benchmark.shape import Shape
from megatron_ee.data.loader import Batch

SEED = 1234
_SHORTEST = 0.05  # seconds that a matmul is repeated for, so that a clock and a launch do not count


@contextlib.contextmanager
def machine() -> Iterator[Machine]:
    """For a worker: the object below."""
    yield Machine()


class Machine:
    """Makes models and measures matrix products."""

    def __init__(self) -> None:
        self._products: dict[tuple[str, tuple[int, int, int]], Callable[[], float]] = {}

    def describe(self) -> dict[str, Any]:
        """Device, threads and library, as they stand beside the figures."""
        device = torch.cuda.get_device_name() if platform.has_accelerator() else "cpu"
        return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}

    def make_model(self, directory: str, shape: Shape, dtype: str, positions: int) -> None:
        """Save a random model with its ``config.json``, as transformers saves one."""
        import transformers

        transformers.utils.logging.disable_progress_bar()
        config = transformers.LlamaConfig(
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            intermediate_size=shape.ffn,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            vocab_size=shape.vocab,
            max_position_embeddings=positions,
            tie_word_embeddings=True,
            # Products keep the size of what goes in, so a wrong layer or tap would show in the loss.
            initializer_range=shape.hidden**-0.5,
        )
        torch.manual_seed(SEED)
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=platform.DTYPES[dtype], trust_remote_code=False
        )
        model.save_pretrained(directory)

    def matmul_rate(self, dtype: str, shape: tuple[int, int, int]) -> float:
        """Operations per second of one product ``[m, k] [k, n]`` now; operands are kept for the next time."""
        key = (dtype, shape)
        if key not in self._products:
            self._products[key] = _product(platform.DTYPES[dtype], *shape)
        return self._products[key]()

    def forget(self) -> None:
        """Free the operands."""
        self._products.clear()


def _product(dtype: torch.dtype, m: int, k: int, n: int) -> Callable[[], float]:
    left = torch.randn(m, k, device=platform.device()).to(dtype)
    right = torch.randn(k, n, device=platform.device()).to(dtype)
    out = torch.empty(m, n, device=platform.device(), dtype=dtype)

    def run(count: int) -> float:
        return seconds(lambda: [torch.mm(left, right, out=out) for _ in range(count)])

    run(1)
    count = max(1, round(_SHORTEST / run(1)))
    return lambda: 2 * m * k * n * count / run(count)


def seconds(work: Callable[[], Any]) -> float:
    """How long ``work`` takes, queued device work included."""
    platform.synchronize()
    start = time.perf_counter()
    work()
    platform.synchronize()
    return time.perf_counter() - start


def random_batch(vocab: int, tokens: int) -> Batch:
    """One sequence of random ids; the same in every process."""
    ids: Tensor = torch.randint(vocab, (1, tokens + 1), generator=torch.Generator().manual_seed(SEED))
    return Batch(ids[:, :-1], ids[:, 1:], torch.ones(1, tokens, dtype=torch.bool), tokens)
