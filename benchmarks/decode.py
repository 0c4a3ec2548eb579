"""Decoding against transformers' ``generate``.

On a machine that others use too, measure with ``--busy 1`` and ``--threads`` from 1 up to the number of CPUs: a
parallel product is done when its slowest thread is, so that one thread less than there are CPUs can be several times
faster. Then set ``OMP_NUM_THREADS`` to the best number where you serve.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import AddOption, Result, median_of, run, take_turns
from benchmarks.models import describe_model, exit_layers, model_directory, sample_text, untuned_adapter
from megatron_ee.commands import DTYPES, at_least

DESCRIPTION = """Time greedy decoding in every mode against transformers' generate, plain and with assistant_early_exit
(which takes one row), in one process, in turns. Times include the prompts. The exits of a
random model are untuned: threshold and speculative mode then show only what unused exits cost."""
COLUMNS = (
    ("rows", "rows", "d"),
    ("way", "way", ""),
    ("tokens_per_second", "tokens/s", ",.1f"),
    ("against_transformers", "/ transformers", ".2fx"),
    ("against_full", "/ full", ".2fx"),
    ("layers_per_token", "layers per token", ".1f"),
    ("acceptance", "accepted", ".0%"),
    ("bandwidth_share", "of the memory bandwidth", ".0%"),
)
PLAIN, FULL = "transformers", "full"


def add_options(add: AddOption) -> None:
    """This benchmark's own."""
    count = at_least(1)
    add("--adapter", "tuned exits of --model", type=Path, metavar="DIR")
    add("--exits", "number of untuned exits where there is no adapter", type=count, default=3, metavar="N")
    add("--dtype", "of the model", choices=DTYPES, default="bfloat16")
    add("--compile", "compile the layers of our side", action="store_true")
    add("--rows", "prompts that run together", type=count, nargs="+", default=[1, 8], metavar="N")
    add("--prompts", "at least so many prompts, one group of rows after another", type=count, default=4, metavar="N")
    add("--prompt-tokens", "length of each", type=count, default=32, metavar="N")
    add("--tokens", "emitted for each", type=at_least(2), default=64, metavar="N")
    add("--threshold", "confidence at which threshold mode leaves", type=float, default=0.8, metavar="X")
    add("--text", "file that prompts are cut from, in place of this package's sources", type=Path, metavar="FILE")


def measure(options: argparse.Namespace, directory: Path) -> Result:
    """Compare, in turns, for each number of rows."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    path = model_directory(options, directory, options.dtype)
    settings = describe_model(options, path)
    adapter = options.adapter
    if adapter is None:
        adapter = untuned_adapter(path, exit_layers(options.exits, settings["layers"]), directory)
    import torch

    from benchmarks.limits import read_rate
    from megatron_ee.inference import EngineOptions, open_engine, open_released

    torch.set_num_threads(options.threads)
    text = sample_text() if options.text is None else options.text.read_text(encoding="utf-8")
    started = time.perf_counter()
    released = open_released(path, adapter)
    with open_engine(released, EngineOptions(dtype=options.dtype, compile=options.compile)) as engine:
        assert engine is not None, "this is the first rank"
        opened = time.perf_counter() - started
        peer = Peer(path, options.dtype)
        ids = released.tokenizer.encode(text)
        exits = [spec.layer for spec in released.exits]
        rows: list[dict[str, Any]] = []
        bandwidths: list[float] = []
        for count in options.rows:
            groups = prompt_groups(ids, count, options.prompts, options.prompt_tokens)
            works = ways(engine, peer, groups, options, exits[0])
            found = take_turns({**works, "bandwidth": lambda: {"rate": read_rate()}}, options.repeats)
            bandwidths.append(max(each["rate"] for each in found.pop("bandwidth")))
            emitted = sum(len(prompts) for prompts in groups) * options.tokens
            rows += compare(found, count, emitted, peer.bytes_per_pass / bandwidths[-1])
    settings |= {
        "exits": exits,
        "tuned": options.adapter is not None,
        "dtype": options.dtype,
        "compiled": options.compile,
        "opened_in_seconds": round(opened, 2),
        "prompt_tokens": options.prompt_tokens,
        "tokens": options.tokens,
        "threshold": options.threshold,
    }
    limits = {"memory_GB_per_second": max(bandwidths) / 1e9}
    return Result("Decoding", settings, COLUMNS, limits, rows)


def prompt_groups(ids: Sequence[int], rows: int, least: int, length: int) -> list[list[list[int]]]:
    """Prompts that lie apart in a text, in groups of ``rows``, at least ``least`` of them together."""
    groups = max(1, -(-least // rows))
    apart = max(length, (len(ids) - length) // (groups * rows))
    starts = [number * apart for number in range(groups * rows)]
    prompts = [list(ids[start : start + length]) for start in starts]
    assert len(prompts[-1]) == length, "the text is too short for so many prompts"
    return [prompts[first : first + rows] for first in range(0, len(prompts), rows)]


class Peer:
    """The same model in transformers.

    Attributes:
        bytes_per_pass: of the weights that one token's pass through all layers reads.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        import transformers

        from megatron_ee import platform

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        load = transformers.AutoModelForCausalLM.from_pretrained  # noqa: TID251 - runs no code from the directory
        model = load(path, dtype=platform.DTYPES[dtype], trust_remote_code=False)
        self._model, self._device = model.to(platform.device()).eval(), platform.device()
        weights = {id(parameter): parameter for parameter in self._model.parameters()}
        if not self._model.config.tie_word_embeddings:
            del weights[id(self._model.get_input_embeddings().weight)]  # of which a token reads one row
        self.bytes_per_pass = sum(parameter.nbytes for parameter in weights.values())

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, **options: Any) -> list[list[int]]:
        """Greedy continuations of prompts of one length."""
        import torch

        ids = torch.tensor(prompts, device=self._device)
        lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        mask = torch.ones_like(ids)
        given = self._model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths, **options)
        continued: list[list[int]] = given[:, ids.shape[1] :].tolist()
        return continued


def ways(
    engine: Any, peer: Peer, groups: Sequence[Any], options: argparse.Namespace, assistant: int
) -> dict[str, Callable[[], dict[str, Any]]]:
    """By name, what answers all groups, one after another: ``seconds``, the tokens' ``ids``, our ``statistics``."""
    from megatron_ee.inference.policy import ThresholdPolicy
    from megatron_ee.inference.requests import Request

    def ours(**mode: Any) -> dict[str, Any]:
        started = time.perf_counter()
        done = []
        for prompts in groups:
            requests = [
                Request(prompt=prompt, max_tokens=options.tokens, ignore_eos=True, **mode) for prompt in prompts
            ]
            done += [outputs[0] for outputs in engine.generate(requests)]
        elapsed = time.perf_counter() - started
        ids = [[token.id for token in each.tokens] for each in done]
        return {"seconds": elapsed, "ids": ids, "statistics": [each.statistics for each in done]}

    def theirs(**given: Any) -> dict[str, Any]:
        started = time.perf_counter()
        ids = [row for prompts in groups for row in peer.generate(prompts, options.tokens, **given)]
        return {"seconds": time.perf_counter() - started, "ids": ids, "statistics": []}

    found: dict[str, Callable[[], dict[str, Any]]] = {
        PLAIN: theirs,
        FULL: ours,
        "threshold": lambda: ours(mode="threshold", policy=ThresholdPolicy(threshold=options.threshold)),
        "speculative": lambda: ours(mode="speculative"),
    }
    if all(len(prompts) == 1 for prompts in groups):
        found[f"{PLAIN}, assistant_early_exit={assistant}"] = lambda: theirs(assistant_early_exit=assistant)
    return found


def compare(found: Mapping[str, list[dict[str, Any]]], rows: int, emitted: int, reading: float) -> list[dict[str, Any]]:
    """Figures of each way.

    Args:
        found: what its rounds gave.
        emitted: tokens of all prompts together.
        reading: seconds that the machine needs to read all weights once.
    """
    elapsed = {name: median_of(each, "seconds") for name, each in found.items()}
    table = []
    for name, rounds in found.items():
        statistics_ = rounds[-1]["statistics"]
        layers = [each["layers_per_token"] for each in statistics_]
        proposed, accepted = (sum(each[key] for each in statistics_) for key in ("proposed", "accepted"))
        same = [a == b for a, b in zip(rounds[-1]["ids"], found[FULL][-1]["ids"], strict=True)]
        table.append(
            {
                "rows": rows,
                "way": name,
                "tokens_per_second": emitted / elapsed[name],
                "against_transformers": elapsed[PLAIN] / elapsed[name],
                "against_full": elapsed[FULL] / elapsed[name],
                "layers_per_token": statistics.fmean(layers) if layers else None,
                "acceptance": accepted / proposed if proposed else None,
                "same_outputs": statistics.fmean(same),
                # Every token of a row takes a pass of its own in these, whatever number of rows share it.
                "bandwidth_share": reading * emitted / rows / elapsed[name] if name in (PLAIN, FULL) else None,
                "seconds": [each["seconds"] for each in rounds],
            }
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    return run("decode", DESCRIPTION, add_options, measure, argv, repeats=3)


if __name__ == "__main__":
    sys.exit(main())
