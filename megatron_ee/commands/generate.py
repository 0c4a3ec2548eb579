"""``megatron-ee generate``: text from prompts, in any mode, showing the layer that emitted each token."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ee.commands import DTYPES, MODEL, Parser, at_least
from megatron_ee.errors import ConfigError, UserError

if TYPE_CHECKING:
    from megatron_ee.inference.compare import ModeResult
    from megatron_ee.inference.engine import Engine
    from megatron_ee.inference.loading import Released
    from megatron_ee.inference.policy import ExitPolicy
    from megatron_ee.inference.requests import Completion, Request
    from megatron_ee.inference.sampling import Sampling

DESCRIPTION = """Continue prompts; each token is coloured by the layer that emitted it. Under torchrun, the model is
spread over --tensor x --pipeline processes."""
FULL, THRESHOLD, SPECULATIVE = "full", "threshold", "speculative"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser("generate", DESCRIPTION)
    add = result.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help=MODEL)
    add("--adapter", type=Path, metavar="DIR", help="exits from tune (default: those with the model)")
    add("--prompt", required=True, action="append", metavar="TEXT", help="text to continue; may be repeated")
    add("--chat", action="store_true", help="each prompt is a user's message, put into the model's chat template")
    add(
        "--mode",
        choices=(FULL, THRESHOLD, SPECULATIVE),
        help="full: every token runs all layers; threshold: a token leaves at the first exit that is confident enough "
        "(default where there are exits); speculative: an exit drafts and the full model verifies, with its output",
    )
    add("--compare", action="store_true", help="answer in every mode, several times, and show them side by side")
    add("--max-tokens", type=at_least(1), default=64, metavar="N", help="at most so many (default: 64)")
    add("--json", action="store_true", help="print one JSON object instead of coloured text")
    add("--html", type=Path, metavar="FILE", help="also write a page that shows the layer of each token")
    add("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the model (default: bfloat16)")
    add("--no-verify", action="store_true", help="do not check what is read against its checksums")
    _add_exits(result.add_argument_group("exits"))
    _add_sampling(result.add_argument_group("output"))
    engine = result.add_argument_group("engine")
    engine.add_argument("--tensor", type=at_least(1), default=1, metavar="N", help="processes that share each layer")
    engine.add_argument("--pipeline", type=at_least(1), default=1, metavar="N", help="stages of layers")
    engine.add_argument(
        "--kv-memory",
        type=_gigabytes,
        metavar="GB",
        help="for keys and values, per process (default: half of what is free)",
    )
    engine.add_argument(
        "--compile",
        action="store_true",
        help="compile the layers first, which takes up to minutes: a single row is then faster, above all on a GPU or "
        "with a small model",
    )
    engine.add_argument("--max-rows", type=at_least(1), default=16, metavar="N", help="outputs in work at a time")
    return result


def _add_exits(group: Any) -> None:
    add = group.add_argument
    add("--threshold", type=float, metavar="X", help="confidence to leave at (default: 0.9)")
    add("--thresholds", type=_by_layer, default={}, metavar="K=X,...", help="other ones for some exits: 8=0.8,16=0.95")
    add("--measure", default="probability", metavar="M", help="of confidence: probability (default), margin or entropy")
    add("--exits", type=_layers, metavar="K,...", help="layers of the exits to use (default: all)")
    add("--max-deferred", type=at_least(0), default=15, metavar="N", help="early tokens in a row (default: 15)")
    add("--min-full", type=at_least(1), default=1, metavar="N", help="tokens at the start that run all layers")
    add(
        "--patience",
        type=at_least(0),
        default=4,
        metavar="N",
        help="tokens in a row that stay before an exit is asked less; 0 asks always (default: 4)",
    )
    add("--draft-exit", type=at_least(1), metavar="K", help="exit that drafts (default: chosen while it runs)")
    add("--draft-length", type=at_least(0), metavar="N", help="proposals at a time (default: chosen while it runs)")
    add(
        "--draft-vocabulary",
        type=at_least(1),
        metavar="N",
        help="propose only the N most frequent tokens (a cheaper head)",
    )
    add("--draft-corpus", type=Path, metavar="PREFIX", help="corpus from prepare-data that they are counted in")


def _add_sampling(group: Any) -> None:
    add = group.add_argument
    add("--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the likeliest token")
    add("--top-k", type=at_least(0), default=0, metavar="N", help="draw from the N likeliest; 0 (default) from all")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that add up to P (default: 1)")
    add("--min-p", type=float, default=0.0, metavar="P", help="none less likely than P times the likeliest")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1 says less again (default: 1)")
    add("--seed", type=int, default=0, metavar="N", help="the same seed draws the same (default: 0)")
    add("--samples", type=at_least(1), default=1, metavar="N", help="outputs per prompt (default: 1)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--ignore-eos", action="store_true", help="go on after the end of text")
    add("--echo", action="store_true", help="begin the text with the prompt")
    add("--logprobs", type=at_least(0), metavar="N", help="log-probabilities, with the N likeliest tokens (--json)")


def run(arguments: argparse.Namespace) -> int:
    """Generate; text with its legend, or JSON, to stdout."""
    from megatron_ee.inference.compiled import check_compiler
    from megatron_ee.inference.loading import check_parallel, open_engine, open_released
    from megatron_ee.inference.prompts import prompt_ids
    from megatron_ee.parallel.groups import world_size

    if (arguments.draft_vocabulary is None) != (arguments.draft_corpus is None):
        raise ConfigError("--draft-vocabulary and --draft-corpus belong together: how many tokens, and frequent where")
    if arguments.html is not None:
        _check_page(arguments)
    try:
        policy, sampling = _policy(arguments), _sampling(arguments)
        for settings in (policy, sampling):
            settings.check()  # at once: opening the model may mean to hash it
        released = open_released(arguments.model, arguments.adapter, verify=not arguments.no_verify)
        requests = [_request(arguments, prompt, released, policy, sampling) for prompt in arguments.prompt]
        if arguments.compare and not released.exits:
            raise ConfigError("compare: needs exits; give their adapter with --adapter")
        arch = released.model.architecture
        check_parallel(arch, arguments.tensor, arguments.pipeline, world_size())
        if arguments.compile:
            check_compiler(arguments.tensor)
        candidates = _candidates(arguments, arch.vocab_size)
        for request in requests:
            request.check([spec.layer for spec in released.exits], arch.num_layers)
            prompt_ids(request, released.tokenizer, arch.vocab_size, arch.max_positions)
    except ConfigError as error:
        raise _as_option(error) from None
    except UserError as error:
        error.common = True  # every rank has read the same
        raise
    memory = None if arguments.kv_memory is None else int(arguments.kv_memory * 1e9)
    with open_engine(
        released,
        dtype=arguments.dtype,
        tensor=arguments.tensor,
        pipeline=arguments.pipeline,
        memory=memory,
        max_rows=arguments.max_rows,
        candidates=candidates,
        compiled=arguments.compile,
    ) as engine:
        if engine is not None:
            (_compare if arguments.compare else _show)(arguments, requests, engine)
    return 0


def _check_page(arguments: argparse.Namespace) -> None:
    """Refuse ``--html`` where there is not one output to show, or no file can be written to."""
    from megatron_ee.checkpoint.ownership import check_file
    from megatron_ee.parallel.groups import launched_rank

    page: Path = arguments.html
    if len(arguments.prompt) > 1 or arguments.samples > 1 or arguments.compare:
        raise ConfigError("--html: shows one output; give one --prompt, one sample and one mode")
    if launched_rank() > 0:  # maybe on another machine, where nothing is written
        return
    check_file(page, "--html")
    if not (page.parent.is_dir() and os.access(page.parent, os.W_OK)):
        raise ConfigError(f"--html: {page} cannot be written: {page.parent} is no directory that may be written to")


def _candidates(arguments: argparse.Namespace, vocab_size: int) -> list[int] | None:
    """Tokens that drafts are chosen from."""
    from megatron_ee.data.indexed import frequent_tokens

    count = arguments.draft_vocabulary
    return None if count is None else frequent_tokens(arguments.draft_corpus, count, vocab_size)


def _policy(arguments: argparse.Namespace) -> ExitPolicy:
    from megatron_ee.inference.policy import ExitPolicy

    threshold = 0.9 if arguments.threshold is None else arguments.threshold
    names = ("thresholds", "measure", "max_deferred", "min_full", "patience")
    return ExitPolicy(threshold, **{name: getattr(arguments, name) for name in names})


def _sampling(arguments: argparse.Namespace) -> Sampling:
    from megatron_ee.inference.sampling import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return Sampling(**{name: getattr(arguments, name) for name in names})


def _request(
    arguments: argparse.Namespace, text: str, released: Released, policy: ExitPolicy, sampling: Sampling
) -> Request:
    from megatron_ee.inference.prompts import encode_chat
    from megatron_ee.inference.requests import Draft, Request

    mode: Any = arguments.mode or (THRESHOLD if released.exits else FULL)
    if mode != THRESHOLD and arguments.threshold is not None:
        print(f"megatron-ee generate: --threshold has no effect in mode {mode}", file=sys.stderr)
    names = ("samples", "max_tokens", "stop", "ignore_eos", "echo", "logprobs", "exits")
    chat = [{"role": "user", "content": text}]
    return Request(
        encode_chat(released.tokenizer, chat) if arguments.chat and text else text,
        mode=mode,
        policy=policy,
        draft=Draft(arguments.draft_exit, arguments.draft_length),
        sampling=sampling,
        **{name: getattr(arguments, name) for name in names},
    )


def _as_option(error: ConfigError) -> ConfigError:
    """The same error, naming the command's option in place of the request's field."""
    field, colon, rest = str(error).partition(":")
    named = ConfigError(f"--{field.replace('_', '-').replace('.', '-')}:{rest}" if colon else str(error))
    named.common = True
    return named


def _show(arguments: argparse.Namespace, requests: list[Request], engine: Engine) -> None:
    """Answer the requests and show what came."""
    from rich.console import Console

    from megatron_ee.commands.show import html_layers, print_layers

    try:
        answers = engine.generate(requests)
    except ConfigError as error:
        raise _as_option(error) from None
    shown = [(prompt, one) for prompt, outputs in zip(arguments.prompt, answers, strict=True) for one in outputs]
    for _, output in shown:
        if output.finish_reason == "context":
            print("megatron-ee generate: stopped at the end of the model's context", file=sys.stderr)
    if arguments.json:
        outputs = [_described(output) for _, output in shown]
        print(json.dumps(outputs[0] if len(outputs) == 1 else {"outputs": outputs, "statistics": engine.statistics()}))
    else:
        for prompt, output in shown:
            print_layers(Console(highlight=False), prompt, output.pieces, [token.layer for token in output.tokens])
    if arguments.html is not None:  # last: where it fails, the answer is there
        from megatron_ee.checkpoint.atomic import write_file

        prompt, output = shown[0]
        tokens = output.tokens
        page = html_layers(prompt, output.pieces, [t.layer for t in tokens], [t.confidence for t in tokens])
        write_file(arguments.html, page.encode())


def _compare(arguments: argparse.Namespace, requests: list[Request], engine: Engine) -> None:
    """Answer the requests in every mode and show what each took, beside the text of threshold mode."""
    from megatron_ee.commands.show import print_layers, print_modes
    from megatron_ee.inference.compare import compare_modes
    from megatron_ee.tables import make_console

    results = compare_modes(engine, requests)
    if arguments.json:
        print(json.dumps({each.mode: _mode(each) for each in results}))
        return
    console = make_console()
    for prompt, output in zip(arguments.prompt, results[1].outputs, strict=True):
        print_layers(console, prompt, output.pieces, [token.layer for token in output.tokens])
    print_modes(console, results)


def _mode(result: ModeResult) -> dict[str, Any]:
    names = ("seconds", "tokens_per_second", "mean_exit_layer", "layers_per_token", "agreement")
    figures = {name: getattr(result, name) for name in names}
    return {**figures, "outputs": [_described(output) for output in result.outputs]}


def _described(output: Completion) -> dict[str, Any]:
    tokens = output.tokens
    described = {
        "text": output.text,
        "token_ids": [token.id for token in tokens],
        "layers": [token.layer for token in tokens],
        "statistics": output.statistics,
    }
    if any(token.logprobs is not None for token in tokens):
        described["logprobs"] = [
            None if token.logprobs is None else {"emitted": token.logprobs.emitted, "top": token.logprobs.top}
            for token in tokens
        ]
    return described


def _gigabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be layers such as 8,16, not {text!r}") from None


def _by_layer(text: str) -> dict[int, float]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {int(layer): float(value) for layer, value in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be like 8=0.8,16=0.95, not {text!r}") from None
