"""``megatron-ee generate``: text from prompts, in any mode, with the layer that emitted each token."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ee.commands import Parser, at_least
from megatron_ee.commands.engine_options import (
    add_engine,
    add_model,
    add_sampling,
    engine_options,
    errors_of_options,
)
from megatron_ee.errors import ConfigError, common_error

if TYPE_CHECKING:
    from megatron_ee.commands.generate_requests import FileRequest
    from megatron_ee.inference.certificate import Calibration
    from megatron_ee.inference.released import Released
    from megatron_ee.inference.requests import Request

DESCRIPTION = """Continue prompts. The terminal colours each token by the layer that emitted it. Under torchrun the
model is split over --tensor x --pipeline processes."""
FULL, THRESHOLD, SPECULATIVE = "full", "threshold", "speculative"
OF_MODES = (
    ("policy", THRESHOLD),
    ("threshold", THRESHOLD),
    ("thresholds", THRESHOLD),
    ("min_full", THRESHOLD),
    ("max_deferred", THRESHOLD),
    ("backoff", THRESHOLD),
    ("draft_exit", SPECULATIVE),
    ("draft_length", SPECULATIVE),
)
"""Options, each with the only mode in which it has an effect."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser("generate", DESCRIPTION)
    add = result.add_argument
    add_model(result, adapter="exits to use (default: those in the model's directory)")
    prompts = result.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; repeatable")
    prompts.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="read requests from JSON lines, and print one JSON line per answer. Each line has a prompt, or messages "
        "for the chat template. Other keys (max_tokens, mode, draft_exit, ...) override the options for this line",
    )
    add("--chat", action="store_true", help="treat each prompt as a user's message: apply the chat template")
    add(
        "--mode",
        choices=(FULL, THRESHOLD, SPECULATIVE),
        help="full: every token runs all layers (default without exits). threshold: a token leaves at the first exit "
        "that is confident enough (default with exits). speculative: an exit drafts, the full model verifies; the "
        "output is the full model's",
    )
    add("--compare", action="store_true", help="run every mode several times, and compare speed and output")
    add("--max-tokens", type=at_least(1), default=64, metavar="N", help="largest number of new tokens (default: 64)")
    add("--json", action="store_true", help="print one JSON object instead of coloured text")
    add("--html", type=Path, metavar="FILE", help="also write a page of the answers that shows the layer of each token")
    add(
        "--explain",
        action="store_true",
        help="say for each token what every other exit would have said, and where the answer departs from full mode's: "
        "in --json, in the page of --html, else in short. Takes an answer in full mode and one more pass",
    )
    _add_exits(result.add_argument_group("exits"))
    output = result.add_argument_group("output")
    add_sampling(output)
    _add_output(output)
    engine = result.add_argument_group("engine")
    add_engine(engine)
    engine.add_argument(
        "--compile",
        action="store_true",
        help="compile the layers with torch.compile first, which can take minutes. Speeds up a single sequence, most "
        "with a small model",
    )
    return result


def _add_exits(group: Any) -> None:
    add = group.add_argument
    add(
        "--policy",
        choices=("threshold", "gate"),
        default="threshold",
        help="what decides in mode threshold: the head's confidence (threshold, default), or before the head runs the "
        "probability that the exit agrees with the full model (gate; for exits that were tuned with gate: true)",
    )
    add("--threshold", type=float, metavar="X", help="confidence at which a token leaves (default: 0.9)")
    add("--thresholds", type=_by_layer, default={}, metavar="K=X,...", help="thresholds of single exits: 8=0.8,16=0.95")
    add(
        "--measure",
        default="probability",
        metavar="M",
        help="measure of confidence: probability (default), margin or entropy",
    )
    add("--exits", type=_layers, metavar="K,...", help="use only the exits after these layers (default: all)")
    add(
        "--max-deferred",
        type=at_least(0),
        default=15,
        metavar="N",
        help="after N early tokens in a row the next runs all layers (default: 15)",
    )
    add("--min-full", type=at_least(1), default=1, metavar="N", help="the first N tokens run all layers (default: 1)")
    add(
        "--backoff",
        type=at_least(0),
        metavar="N",
        help="after N tokens in a row that did not leave at an exit, use it less often; 0: always use it (default: 4; "
        "0 with --policy gate)",
    )
    add(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="take the thresholds from a certificate of calibrate. A request outside its settings runs in full mode",
    )
    add("--calibration-group", metavar="NAME", help="the prompts' group, for a certificate with thresholds by group")
    add("--uncertified", action="store_true", help="use the certificate's thresholds outside its settings, too")
    add("--draft-exit", type=at_least(1), metavar="K", help="layer of the drafting exit (default: chosen at run time)")
    add("--draft-length", type=at_least(0), metavar="N", help="tokens per draft (default: chosen at run time)")
    add(
        "--draft-vocabulary",
        type=at_least(1),
        metavar="N",
        help="draft only from the N most frequent tokens, which makes the head cheaper",
    )
    add(
        "--draft-corpus",
        type=Path,
        metavar="PREFIX",
        help="corpus from prepare-data in which --draft-vocabulary counts them",
    )


def _add_output(group: Any) -> None:
    add = group.add_argument
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    add("--ignore-eos", action="store_true", help="continue after an end-of-text token")
    add("--echo", action="store_true", help="include the prompt in the text")
    add(
        "--logprobs",
        type=at_least(0),
        metavar="N",
        help="with --json: log-probabilities, and the N most probable tokens",
    )


def run(arguments: argparse.Namespace) -> int:
    """Generate. Print text with a legend, or JSON, to stdout."""
    from megatron_ee.commands.generate_output import answer_file, show_answers, show_modes
    from megatron_ee.commands.inputs import check_corpus, check_input
    from megatron_ee.inference.loading import open_engine
    from megatron_ee.inference.released import open_released

    if (arguments.draft_vocabulary is None) != (arguments.draft_corpus is None):
        raise ConfigError("--draft-vocabulary and --draft-corpus: give both, or neither")
    if arguments.explain and arguments.compare:
        raise ConfigError("--explain: explains the answers of one mode; leave out --compare, or explain each mode")
    if arguments.prompts is not None and arguments.compare:
        raise ConfigError("--compare: cannot be used with --prompts; give --prompt")
    if arguments.calibration is None and (arguments.uncertified or arguments.calibration_group is not None):
        option = "--uncertified" if arguments.uncertified else "--calibration-group"
        raise ConfigError(f"{option}: has an effect with --calibration only")
    if arguments.calibration is not None and arguments.compare:
        raise ConfigError("--compare: cannot be used with --calibration, which chooses the mode")
    if arguments.html is not None:
        _check_page(arguments)
    with errors_of_options():
        _check_settings(arguments)
        if arguments.logprobs is not None and not arguments.json and arguments.prompts is None:
            raise ConfigError("logprobs: are shown in JSON only; give --json or --prompts, or leave it out")
        check_input("model", arguments.model)
        check_input("adapter", arguments.adapter)
        check_input("prompts", arguments.prompts)
        check_input("calibration", arguments.calibration)
        if arguments.draft_corpus is not None:
            check_corpus("draft_corpus", [arguments.draft_corpus])
        released = open_released(
            arguments.model, arguments.adapter, verify=not arguments.no_verify, quantise=arguments.quantise
        )
        calibration = _calibration(arguments, released)
        lines = _file_requests(arguments, released, calibration)
        requests = [line.request for line in lines] or _requests(arguments, released, calibration)
        if arguments.compare:
            _check_compare(arguments, requests, released)
        else:
            _note_without_effect(arguments, requests)
        if arguments.explain and not released.exits:
            raise ConfigError("explain: needs exits; give their adapter with --adapter")
        options = engine_options(
            arguments,
            released,
            exits=None if arguments.explain else _used_exits(requests, released, every_mode=arguments.compare),
            candidates=_candidates(arguments, released.model.architecture.vocab_size),
            compile=arguments.compile,
        )
    with open_engine(released, options) as engine:
        if engine is None:
            return 0
        if arguments.prompts is not None:
            return answer_file(arguments, lines, engine, released.tokenizer)
        if arguments.compare:
            show_modes(arguments, requests, engine)
        else:
            show_answers(arguments, requests, engine, released.tokenizer)
    return 0


def _check_compare(arguments: argparse.Namespace, requests: list[Request], released: Released) -> None:
    """Refuse ``--compare`` unless every mode can answer, with one output for each prompt."""
    from megatron_ee.commands.generate_requests import check_request

    if not released.exits:
        raise ConfigError("compare: needs exits; give their adapter with --adapter")
    if arguments.samples > 1:
        raise ConfigError("samples: --compare compares one output per prompt; leave it out")
    for mode in (THRESHOLD, SPECULATIVE):
        check_request(requests[0].model_copy(update={"mode": mode}), released)


def _check_page(arguments: argparse.Namespace) -> None:
    """Refuse ``--html`` unless the file can be written and there is one mode."""
    from megatron_ee.checkpoint.ownership import check_file
    from megatron_ee.parallel.groups import launched_rank

    page: Path = arguments.html
    if arguments.compare:
        raise ConfigError("--html: shows the answers of one mode; leave out --compare")
    if launched_rank() > 0:  # this rank may be on another machine, and writes nothing
        return
    check_file(page, "--html")
    if not (page.parent.is_dir() and os.access(page.parent, os.W_OK)):
        raise ConfigError(f"--html: {page} cannot be written: {page.parent} is not a writable directory")


def _candidates(arguments: argparse.Namespace, vocab_size: int) -> list[int] | None:
    """The token ids that drafts are limited to."""
    from megatron_ee.data.indexed import frequent_tokens

    count = arguments.draft_vocabulary
    return None if count is None else frequent_tokens(arguments.draft_corpus, count, vocab_size)


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    from megatron_ee.commands.generate_requests import FIELDS

    return {name: getattr(arguments, name) for name in FIELDS}


def _check_settings(arguments: argparse.Namespace) -> None:
    """Check the settings that need no model first, since opening a model may hash it."""
    from megatron_ee.commands.generate_requests import make_request

    make_request("", _settings(arguments), has_exits=False)


def _calibration(arguments: argparse.Namespace, released: Released) -> Calibration | None:
    """The certificate of ``--calibration``, if it is given and fits the model."""
    from megatron_ee.inference.certificate import open_calibration

    if arguments.calibration is None:
        return None
    options = engine_options(arguments, released)
    calibration = open_calibration(arguments.calibration, released, options, quantise=arguments.quantise)
    calibration.check_group(arguments.calibration_group)
    return calibration


def _certified(arguments: argparse.Namespace, calibration: Calibration | None, request: Request, chat: bool) -> Request:
    """The request under the certificate, if there is one."""
    if calibration is None:
        return request
    return calibration.apply(request, chat=chat, group=arguments.calibration_group, uncertified=arguments.uncertified)


def _file_requests(
    arguments: argparse.Namespace, released: Released, calibration: Calibration | None
) -> list[FileRequest]:
    """The checked requests of ``--prompts``; empty without it."""
    from megatron_ee.commands.generate_requests import read_requests

    if arguments.prompts is None:
        return []
    lines = read_requests(arguments.prompts, _settings(arguments), released, chat=arguments.chat)
    certified = []
    for line in lines:
        try:
            request = _certified(arguments, calibration, line.request, line.messages is not None)
        except ConfigError as error:
            raise common_error(f"{arguments.prompts}:{line.line}: {error}") from None
        certified.append(dataclasses.replace(line, request=request))
    return certified


def _requests(arguments: argparse.Namespace, released: Released, calibration: Calibration | None) -> list[Request]:
    """The checked request of each ``--prompt``."""
    from megatron_ee.commands.generate_requests import check_request, make_request, user_prompt

    settings = _settings(arguments)
    requests = []
    for text in arguments.prompt:
        prompt = user_prompt(text, released, chat=arguments.chat)
        request = make_request(prompt, settings, has_exits=bool(released.exits))
        requests.append(_certified(arguments, calibration, request, arguments.chat))
        check_request(requests[-1], released)
    return requests


def _note_without_effect(arguments: argparse.Namespace, requests: Sequence[Request]) -> None:
    """Name the options that have no effect in the modes of the requests."""
    from megatron_ee.parallel.groups import launched_rank

    if launched_rank() > 0:
        return
    modes, options = {request.mode for request in requests}, parser()
    for option, mode in OF_MODES:
        if mode not in modes and getattr(arguments, option) != options.get_default(option):
            shown = f"--{option.replace('_', '-')} has no effect in mode {' or '.join(sorted(modes))}"
            print(f"megatron-ee generate: {shown}", file=sys.stderr)


def _used_exits(requests: list[Request], released: Released, *, every_mode: bool) -> set[int]:
    """Layers of the exits that some request may use. Others would only cost time and memory."""
    used: set[int] = set()
    for request in requests:
        if every_mode or request.mode != FULL:
            used |= {spec.layer for spec in released.exits} if request.exits is None else set(request.exits)
    return used


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be layers such as 8,16, not {text!r}") from None


def _by_layer(text: str) -> dict[int, float]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        thresholds = [(int(layer), float(value)) for layer, value in pairs]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be like 8=0.8,16=0.95, not {text!r}") from None
    layers = [layer for layer, _ in thresholds]
    for layer in layers:
        if layers.count(layer) > 1:
            raise argparse.ArgumentTypeError(f"names layer {layer} twice: {text!r}")
    return dict(thresholds)
