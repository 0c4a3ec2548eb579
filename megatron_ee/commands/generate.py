"""``megatron-ee generate``: text from prompts, in any mode, showing the layer that emitted each token."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ee.commands import MODEL, MODEL_DTYPE, MODEL_DTYPES, Parser, at_least
from megatron_ee.errors import ConfigError, UserError

if TYPE_CHECKING:
    from megatron_ee.commands.generate_requests import FileRequest
    from megatron_ee.inference.engine import Engine
    from megatron_ee.inference.loading import Released
    from megatron_ee.inference.offline import ModeResult
    from megatron_ee.inference.requests import Completion, Request

DESCRIPTION = """Continue prompts; each token is coloured by the layer that emitted it. Under torchrun, the model is
spread over --tensor x --pipeline processes."""
FULL, THRESHOLD, SPECULATIVE = "full", "threshold", "speculative"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser("generate", DESCRIPTION)
    add = result.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help=MODEL)
    add("--adapter", type=Path, metavar="DIR", help="exits from tune (default: those with the model)")
    prompts = result.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; may be repeated")
    prompts.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="answer a file of JSON lines, and print as many: each an object with a prompt, or messages for the chat "
        "template; other keys (max_tokens, mode, draft_exit, ...) are settings of this line, in place of the options",
    )
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
    add("--dtype", choices=MODEL_DTYPES, default="auto", help=MODEL_DTYPE)
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
        "--backoff",
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
    add("--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the most probable token")
    add("--top-k", type=at_least(0), default=0, metavar="N", help="draw from the N most probable; 0 (default) from all")
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the most probable that add up to P (default: 1)",
    )
    add("--min-p", type=float, default=0.0, metavar="P", help="none less likely than P times the most probable")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1 says less again (default: 1)")
    add("--seed", type=int, default=0, metavar="N", help="the same seed draws the same (default: 0)")
    add("--samples", type=at_least(1), default=1, metavar="N", help="outputs per prompt (default: 1)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--ignore-eos", action="store_true", help="go on after the end of text")
    add("--echo", action="store_true", help="begin the text with the prompt")
    add("--logprobs", type=at_least(0), metavar="N", help="log-probabilities, with the N most probable tokens (--json)")


def run(arguments: argparse.Namespace) -> int:
    """Generate; text with its legend, or JSON, to stdout."""
    from megatron_ee.inference.compiled import check_compiler
    from megatron_ee.inference.loading import check_parallel, open_engine, open_released
    from megatron_ee.parallel.groups import world_size

    if (arguments.draft_vocabulary is None) != (arguments.draft_corpus is None):
        raise ConfigError("--draft-vocabulary and --draft-corpus belong together: how many tokens, and frequent where")
    if arguments.prompts is not None and (arguments.html is not None or arguments.compare):
        raise ConfigError(f"{'--compare' if arguments.compare else '--html'}: takes no --prompts; give --prompt")
    if arguments.html is not None:
        _check_page(arguments)
    try:
        _check_settings(arguments)
        released = open_released(arguments.model, arguments.adapter, verify=not arguments.no_verify)
        lines = _file_requests(arguments, released)
        requests = [line.request for line in lines] or _requests(arguments, released)
        if arguments.compare and not released.exits:
            raise ConfigError("compare: needs exits; give their adapter with --adapter")
        arch = released.model.architecture
        check_parallel(arch, arguments.tensor, arguments.pipeline, world_size())
        if arguments.compile:
            check_compiler(arguments.tensor)
        candidates = _candidates(arguments, arch.vocab_size)
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
        exits=_used_exits(requests, released, every_mode=arguments.compare),
    ) as engine:
        if engine is None:
            return 0
        if arguments.prompts is not None:
            return _answer_file(arguments, lines, engine)
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


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    from megatron_ee.commands.generate_requests import FIELDS

    return {name: getattr(arguments, name) for name in FIELDS}


def _check_settings(arguments: argparse.Namespace) -> None:
    """What needs no model, at once: opening it may mean to hash it."""
    from megatron_ee.commands.generate_requests import make_request

    make_request("", _settings(arguments), has_exits=False)


def _file_requests(arguments: argparse.Namespace, released: Released) -> list[FileRequest]:
    """What ``--prompts`` asks, checked; nothing without it."""
    from megatron_ee.commands.generate_requests import read_requests

    if arguments.prompts is None:
        return []
    try:
        return read_requests(arguments.prompts, _settings(arguments), released, chat=arguments.chat)
    except ConfigError as error:
        error.common = True
        raise


def _requests(arguments: argparse.Namespace, released: Released) -> list[Request]:
    """What each ``--prompt`` asks, checked."""
    from megatron_ee.commands.generate_requests import check_request, make_request, user_prompt
    from megatron_ee.parallel.groups import launched_rank

    settings = _settings(arguments)
    requests = []
    for text in arguments.prompt:
        prompt = user_prompt(text, released, chat=arguments.chat)
        requests.append(make_request(prompt, settings, has_exits=bool(released.exits)))
        check_request(requests[-1], released)
    if not arguments.compare and launched_rank() == 0:
        mode = requests[0].mode
        for option, of in (("threshold", THRESHOLD), ("draft_exit", SPECULATIVE), ("draft_length", SPECULATIVE)):
            if mode != of and settings[option] is not None:
                print(
                    f"megatron-ee generate: --{option.replace('_', '-')} has no effect in mode {mode}", file=sys.stderr
                )
    return requests


def _used_exits(requests: list[Request], released: Released, *, every_mode: bool) -> set[int]:
    """Layers of the exits that some request may ask: others would only cost time and memory."""
    used: set[int] = set()
    for request in requests:
        if every_mode or request.mode != FULL:
            used |= {spec.layer for spec in released.exits} if request.exits is None else set(request.exits)
    return used


def _as_option(error: ConfigError) -> ConfigError:
    """The same error, naming the command's option in place of the request's field; one of a file's line as it is."""
    if error.common:
        return error
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


def _answer_file(arguments: argparse.Namespace, lines: list[FileRequest], engine: Engine) -> int:
    """Answer a file's requests, one JSON line for each, in its order; status 1 where some failed."""
    from megatron_ee.inference.offline import run_batch
    from megatron_ee.progress import track

    for each in lines:
        try:
            engine.check(each.request)
        except ConfigError as error:
            raise ConfigError(f"{arguments.prompts}:{each.line}: {error}") from None
    failed = 0
    with track(len(lines), "prompts", "answering", "tokens") as bar:
        advance = partial(bar.advance, 1)
        answers = run_batch(engine, [line.request for line in lines], ahead=2 * arguments.max_rows, advance=advance)
        for line, outcomes in zip(lines, answers, strict=True):
            shown = [{"error": each} if isinstance(each, str) else _described(each) for each in outcomes]
            failed += any("error" in each for each in shown)
            named = {} if line.id is None else {"id": line.id}
            print(json.dumps(named | (shown[0] if len(shown) == 1 else {"outputs": shown})), flush=True)
    if failed:
        print(f"megatron-ee generate: {failed} of {len(lines)} prompts failed; their lines say why", file=sys.stderr)
    return 1 if failed else 0


def _compare(arguments: argparse.Namespace, requests: list[Request], engine: Engine) -> None:
    """Answer the requests in every mode and show what each took, beside the text of threshold mode."""
    from megatron_ee.commands.show import print_layers, print_modes
    from megatron_ee.inference.offline import compare_modes
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
