"""What ``generate`` prints and writes: answers with the layers of their tokens, explanations, and modes compared."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_ee.checkpoint.atomic import write_file
from megatron_ee.commands.engine_options import errors_of_options
from megatron_ee.commands.generate_layers import ShownAnswer, html_layers, print_explanation, print_layers, print_modes
from megatron_ee.commands.generate_requests import FileRequest, check_memory
from megatron_ee.data.tokenizer import Tokenizer
from megatron_ee.errors import UserError
from megatron_ee.evaluation.explain import Explanation, explain
from megatron_ee.evaluation.explain_page import explanation_page
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.offline import ModeResult, compare_modes, in_order, run_batch
from megatron_ee.inference.requests import Completion, Request
from megatron_ee.progress import track
from megatron_ee.tables import make_console


def show_answers(arguments: argparse.Namespace, requests: list[Request], engine: Engine, tokenizer: Tokenizer) -> None:
    """Answer the requests and show the outputs."""
    with errors_of_options():
        answers = engine.generate(requests)
    statistics = engine.statistics()
    shown = [(prompt, one) for prompt, outputs in zip(arguments.prompt, answers, strict=True) for one in outputs]
    for _, output in shown:
        coverage = output.statistics.get("calibration")
        if coverage is not None:
            print(f"megatron-ee generate: {_covered(coverage)}", file=sys.stderr)
        if output.finish_reason == "context":
            print("megatron-ee generate: stopped at the end of the model's context", file=sys.stderr)
    if not arguments.json:  # before the explanations, so that a failure does not lose the answers
        for prompt, output in shown:
            print_layers(Console(highlight=False), prompt, output.pieces, [token.layer for token in output.tokens])
    explanations: list[Explanation] = []
    if arguments.explain:
        with errors_of_options():
            explanations = [one for some in explain(engine, tokenizer, requests, answers) for one in some]
    if arguments.json:
        outputs = [_described(output) for _, output in shown]
        for described, explanation in zip(outputs, explanations, strict=False):
            described["explanation"] = explanation.to_dict()
        print(json.dumps(outputs[0] if len(outputs) == 1 else {"outputs": outputs, "statistics": statistics}))
    else:
        for explanation in explanations:
            print_explanation(make_console(), explanation)
    if arguments.html is not None:
        _write_page(arguments.html, shown, explanations)


def _write_page(path: Path, shown: list[tuple[str, Completion]], explanations: list[Explanation]) -> None:
    """Write the page of ``--html``."""
    if explanations:
        prompts = [prompt for prompt, _ in shown]
        page = explanation_page(list(zip(prompts, explanations, strict=True)))
    else:
        answers = []
        for prompt, output in shown:
            layers, confidences = ([getattr(t, name) for t in output.tokens] for name in ("layer", "confidence"))
            answers.append(ShownAnswer(prompt, output.pieces, layers, confidences))
        page = html_layers(answers)
    write_file(path, page.encode())


def answer_file(arguments: argparse.Namespace, lines: list[FileRequest], engine: Engine, tokenizer: Tokenizer) -> int:
    """Answer a file's requests in order, with one JSON line each. Return status 1 if some failed."""
    check_memory(lines, engine, arguments.prompts)
    failed = 0
    answered: list[tuple[str, Completion]] = []  # for the page
    explanations: list[Explanation] = []
    with track(len(lines), "prompts", "answering", "tokens") as bar:
        advance = partial(bar.advance, 1)
        requests = [line.request for line in lines]
        answers = in_order(run_batch(engine, requests, ahead=2 * arguments.max_num_seqs, advance=advance))
        for line, outcomes in zip(lines, answers, strict=True):
            shown = [{"error": each} if isinstance(each, str) else _described(each) for each in outcomes]
            own = [each for each in outcomes if not isinstance(each, str)]
            explained: list[Explanation] = []
            if arguments.explain and len(own) == len(outcomes):
                try:  # while other requests run
                    [explained] = explain(engine, tokenizer, [line.request], [own])
                except UserError as error:
                    shown = [{"error": str(error)}]
                else:
                    shown = [{**one, "explanation": e.to_dict()} for one, e in zip(shown, explained, strict=True)]
            if arguments.html is not None and not any("error" in each for each in shown):
                answered += [(line.text, each) for each in own]
                explanations += explained
            failed += any("error" in each for each in shown)
            named = {} if line.id is None else {"id": line.id}
            print(json.dumps(named | (shown[0] if len(shown) == 1 else {"outputs": shown})), flush=True)
    if arguments.html is not None:
        _write_page(arguments.html, answered, explanations)
    if failed:
        print(f"megatron-ee generate: {failed} of {len(lines)} prompts failed; their lines say why", file=sys.stderr)
    return 1 if failed else 0


def show_modes(arguments: argparse.Namespace, requests: list[Request], engine: Engine) -> None:
    """Answer the requests in every mode. Show the text of threshold mode, and time and agreement of each mode."""
    with errors_of_options():
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


def _covered(coverage: Mapping[str, Any]) -> str:
    """What a certificate says of an answer, from its statistics."""
    if coverage["status"] == "certified":
        return f"ran under the certificate for {coverage['task']}"
    meaning = "answered as full mode does" if coverage["status"] == "full" else "not certified"
    return f"{meaning}: {coverage['reason']}"


def _described(output: Completion) -> dict[str, Any]:
    tokens = output.tokens
    described = {
        "text": output.text,
        "token_ids": [token.id for token in tokens],
        "layers": [token.layer for token in tokens],
        "statistics": output.statistics,
    }
    if "calibration" in output.statistics:
        described["calibration"] = output.statistics["calibration"]
    if any(token.logprobs is not None for token in tokens):
        described["logprobs"] = [
            None if token.logprobs is None else {"emitted": token.logprobs.emitted, "top": token.logprobs.top}
            for token in tokens
        ]
    return described
