"""What outputs took: tokens by layer, layers per token, acceptance, times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from megatron_ee.inference.sequence import Sequence


def row_statistics(output: Sequence) -> dict[str, Any]:
    """Figures of one output as JSON takes them; None where it is too short to tell.

    ``mean_exit_layer`` is over all tokens. ``layers_per_token`` is what was paid: decoder layers run per token after
    the first, for deferred tokens and rejected proposals too; a ``layer`` exit's own layer counts where it was asked.
    ``acceptance_rate`` is the share of proposals that stood, of those that were judged. ``reused_tokens`` are those
    whose keys and values came from another request. Times are in seconds; ``tokens_per_second`` leaves out the prompt
    and the first token.
    """
    count = len(output.tokens)
    first, last = output.first_at, output.last_at
    spent = last - first if first is not None and last is not None else 0.0
    return {
        "prompt_tokens": len(output.settings.prompt),
        "reused_tokens": output.reused,
        "tokens": count,
        "tokens_by_layer": _by_layer(Counter(token.layer for token in output.tokens)),
        "mean_exit_layer": sum(token.layer for token in output.tokens) / count if count else None,
        "layers_per_token": output.products / (count - 1) if count > 1 else None,
        "deferred_tokens": sum(output.deferred.values()),
        "rounds": output.rounds,
        "proposed": output.proposed,
        "accepted": output.stood,
        "acceptance_rate": output.stood / output.proposed if output.proposed else None,
        "time_to_first_token": None if first is None else first - output.submitted_at,
        "tokens_per_second": (count - 1) / spent if count > 1 and spent > 0 else None,
        "confidences": [token.confidence for token in output.tokens],
    }


@dataclass
class Totals:
    """Sums over the outputs that have ended; ``later``: tokens after the first of each."""

    outputs: int = 0
    tokens: int = 0
    later: int = 0
    prompt_tokens: int = 0
    reused: int = 0
    products: int = 0
    proposed: int = 0
    stood: int = 0
    by_layer: Counter[int] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)

    def add(self, outputs: Iterable[Sequence]) -> None:
        """Count these."""
        for output in outputs:
            self.outputs += 1
            self.tokens += len(output.tokens)
            self.later += max(len(output.tokens) - 1, 0)
            self.prompt_tokens += len(output.settings.prompt)
            self.reused += output.reused
            self.products += output.products
            self.proposed += output.proposed
            self.stood += output.stood
            self.by_layer.update(token.layer for token in output.tokens)
            if output.first_at is not None:
                self.waits.append(output.first_at - output.submitted_at)

    def to_dict(self, seconds: float) -> dict[str, Any]:
        """Figures as JSON takes them; ``seconds``: in which the engine had work."""
        return {
            "outputs": self.outputs,
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused,
            "tokens": self.tokens,
            "tokens_by_layer": _by_layer(self.by_layer),
            "mean_exit_layer": self.by_layer.total() and sum(k * n for k, n in self.by_layer.items()) / self.tokens,
            "layers_per_token": self.products / self.later if self.later else None,
            "proposed": self.proposed,
            "accepted": self.stood,
            "acceptance_rate": self.stood / self.proposed if self.proposed else None,
            "seconds": seconds,
            "tokens_per_second": self.tokens / seconds if seconds > 0 else None,
            "mean_time_to_first_token": sum(self.waits) / len(self.waits) if self.waits else None,
        }


def _by_layer(counts: Counter[int]) -> dict[str, int]:
    return {str(layer): number for layer, number in sorted(counts.items())}
