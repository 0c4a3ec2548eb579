"""The random models that are measured: their shape, where their exits stand, and what a step computes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ee.errors import ConfigError

WIDTHS = (4096, 1024, 256, 64)  # hidden sizes of models made to a size in bytes


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model whose head is its input embedding, without grouped queries."""

    hidden: int
    layers: int
    ffn: int
    heads: int
    vocab: int

    def check(self) -> None:
        """Raises ConfigError: no such model exists."""
        if self.hidden % self.heads or self.hidden // self.heads % 2:
            raise ConfigError(
                f"--heads: {self.heads} heads do not share a hidden size of {self.hidden} in even parts; change either"
            )

    @property
    def parameters(self) -> int:
        """Number of weights."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.ffn + 2 * self.hidden
        return self.vocab * self.hidden + self.layers * layer + self.hidden


def default_ffn(hidden: int) -> int:
    """Llama's 8/3 of the hidden size, in steps of 64."""
    return max(64, round(hidden * 8 / 3 / 64) * 64)


def shape_of_size(megabytes: int, itemsize: int) -> Shape:
    """The widest shape of about that many 10^6 bytes that still has four layers, or the narrowest with one or more."""
    for hidden in WIDTHS:
        shape = Shape(hidden, 1, default_ffn(hidden), hidden // min(64, hidden // 2), 16 * hidden)
        embedding = Shape(hidden, 0, shape.ffn, shape.heads, shape.vocab).parameters
        layers = round((megabytes * 1e6 / itemsize - embedding) / (shape.parameters - embedding))
        if layers >= 4 or hidden == WIDTHS[-1]:
            return Shape(hidden, max(1, layers), shape.ffn, shape.heads, shape.vocab)
    raise AssertionError("unreachable")


def spread_exits(count: int, layers: int) -> tuple[int, ...]:
    """Layers of ``count`` exits, evenly from the bottom to 3/4 of the depth.

    Raises:
        ConfigError: there are fewer layers than exits up to there.
    """
    deepest = max(1, round(0.75 * layers))
    if count > deepest:
        raise ConfigError(f"--exits: {count} exits do not fit {deepest} layers, 3/4 of the depth; give more --layers")
    return tuple(max(1, round(number * deepest / count)) for number in range(1, count + 1))


@dataclass(frozen=True)
class Step:
    """One step to be measured: micro-batch 1, every label counts.

    Attributes:
        directory: the model, as saved by transformers.
        exits: layers with an ``mlp`` exit and a head of its own.
        dtype: ``float32`` or ``bfloat16``.
        tokens: sequence length.
        chunk_tokens: tokens whose logits exist at one time in our loss.
    """

    directory: str
    shape: Shape
    exits: tuple[int, ...]
    dtype: str
    tokens: int
    chunk_tokens: int = 512


@dataclass(frozen=True)
class Flops:
    """Multiplications and additions of one step, each counted as one operation.

    A product of ``[m, k]`` and ``[k, n]`` is ``2 m k n``. Attention's two products are counted over the visible half,
    ``T (T + 1) / 2`` pairs, so that no share of the matmul rate is claimed for the masked half. Norms, activations,
    softmax and the optimizer are not counted.
    """

    linear: int
    attention: int

    @property
    def total(self) -> int:
        """Both."""
        return self.linear + self.attention


def our_flops(step: Step, padded_vocab: int) -> Flops:
    """What our step runs: layers up to the deepest exit, whose own MLP is left out, and the exits.

    Per exit, with T tokens: MLP ``6 T h f`` forward, ``2 T h f`` for each of its three weight gradients, and
    ``2 T h f`` for the one input gradient that is needed, of the down projection; head ``2 T h V`` each for logits,
    input gradient and weight gradient.
    """
    shape, deepest = step.shape, max(step.exits)
    attention_half, mlp_half, pairs = _layer(shape, step.tokens)
    linear = deepest * attention_half + (deepest - 1) * mlp_half + len(step.exits) * _exit(step, padded_vocab)
    return Flops(linear, deepest * pairs)


def plain_flops(step: Step) -> Flops:
    """What plain PyTorch runs: every layer, the final head for one position, and the same exits."""
    shape = step.shape
    attention_half, mlp_half, pairs = _layer(shape, step.tokens)
    final = 2 * shape.hidden * shape.vocab
    linear = shape.layers * (attention_half + mlp_half) + final + len(step.exits) * _exit(step, shape.vocab)
    return Flops(linear, shape.layers * pairs)


def loss_flops(step: Step) -> int:
    """Forward and backward of one exit's head."""
    return 6 * step.tokens * step.shape.hidden * step.shape.vocab


def _layer(shape: Shape, tokens: int) -> tuple[int, int, int]:
    """Forward of one backbone layer: attention's projections, the MLP, and attention itself."""
    projections = 2 * tokens * shape.hidden * 4 * shape.hidden
    pairs = tokens * (tokens + 1) // 2
    return projections, 6 * tokens * shape.hidden * shape.ffn, 4 * pairs * shape.hidden


def _exit(step: Step, vocab: int) -> int:
    shape = step.shape
    return step.tokens * shape.hidden * (14 * shape.ffn + 6 * vocab)


def matmul_shapes(step: Step) -> tuple[tuple[int, int, int], ...]:
    """The step's large products ``[m, k] [k, n]``: projections, MLP, logits, their input and weight gradients."""
    shape, chunk = step.shape, min(step.chunk_tokens, step.tokens)
    return (
        (step.tokens, shape.hidden, 3 * shape.hidden),
        (step.tokens, shape.hidden, 2 * shape.ffn),
        (step.tokens, shape.ffn, shape.hidden),
        (chunk, shape.hidden, shape.vocab),
        (chunk, shape.vocab, shape.hidden),
        (shape.vocab, chunk, shape.hidden),
        (step.tokens, shape.hidden, shape.vocab),
    )
