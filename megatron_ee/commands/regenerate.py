"""``megatron-ee regenerate``: the model's own answers to prompts, as data to tune its exits on."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import sys
from functools import partial
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
from megatron_ee.errors import UserError, common_error

if TYPE_CHECKING:
    from megatron_ee.commands.answer_file import AnswerFile
    from megatron_ee.commands.generate_requests import FileRequest
    from megatron_ee.data.tokenizer import Tokenizer
    from megatron_ee.inference.engine import Engine
    from megatron_ee.inference.released import Released
    from megatron_ee.inference.requests import Completion, Request

DESCRIPTION = """Answer a file of prompts with all layers of the model, and write the answers as jsonl for prepare-data:
conversations for --chat, or texts if the model has no chat template. Under torchrun the model is split over
--tensor x --pipeline processes."""
_CUT = ("length", "context")  # reasons to end that are not the model's own


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser("regenerate", DESCRIPTION)
    add = result.add_argument
    add_model(result)
    add(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="prompts as JSON lines, as for generate. Each line has messages, or a prompt, which is a user's message "
        "if the model has a chat template. Sampling options, samples and max_tokens can be given per line",
    )
    add("--output", type=Path, required=True, metavar="FILE", help="jsonl file to write")
    add("--max-tokens", type=at_least(1), default=512, metavar="N", help="largest number of new tokens (default: 512)")
    add(
        "--drop-cut",
        action="store_true",
        help="leave out answers that --max-tokens or the end of the context cut. By default they are kept, and "
        "prepare-data --chat trains no end of turn after them",
    )
    existing = result.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue an unfinished --output")
    existing.add_argument("--overwrite", action="store_true", help="replace an existing file that regenerate wrote")
    add_sampling(result.add_argument_group("output"))
    add_engine(result.add_argument_group("engine"))
    return result


def run(arguments: argparse.Namespace) -> int:
    """Answer the prompts. Return status 1 if some failed."""
    from megatron_ee.commands.answer_file import is_complete, open_answers
    from megatron_ee.commands.generate_requests import SAMPLING, make_request
    from megatron_ee.commands.inputs import check_input
    from megatron_ee.inference.loading import open_engine
    from megatron_ee.inference.released import open_released
    from megatron_ee.parallel.groups import launched_rank

    settings = {name: getattr(arguments, name) for name in (*SAMPLING, "samples", "max_tokens")}
    with errors_of_options():
        make_request("", settings, has_exits=False)  # before the model is opened
        check_input("model", arguments.model)
        check_input("prompts", arguments.prompts)
        verify, quantise = not arguments.no_verify, arguments.quantise
        released = open_released(arguments.model, verify=verify, quantise=quantise)
        released = dataclasses.replace(released, adapter=None)
        lines = _prompts(arguments.prompts, settings, released)
        options = engine_options(arguments, released)
        about = _about(arguments, settings, released)
    first = launched_rank() == 0
    if arguments.resume and is_complete(arguments.output, about):
        if first:
            print(f"megatron-ee regenerate: {arguments.output} is complete already", file=sys.stderr)
        return 0
    prompts = [line.line for line in lines]
    open_output = partial(
        open_answers, arguments.output, about, prompts, resume=arguments.resume, overwrite=arguments.overwrite
    )
    with (
        open_output() if first else contextlib.nullcontext() as answers,
        open_engine(released, options) as engine,
    ):
        if engine is None or answers is None:
            return 0
        return _answer(arguments, lines, engine, released.tokenizer, answers)


def _prompts(path: Path, settings: dict[str, Any], released: Released) -> list[FileRequest]:
    """The checked prompts, each with random numbers of its own."""
    from megatron_ee.commands.generate_requests import read_requests

    lines = read_requests(path, settings, released, chat=bool(released.tokenizer.templates))
    for line in lines:
        problem = _problem(line)
        if problem:
            raise common_error(f"{path}:{line.line}: {problem}")
    return [dataclasses.replace(line, request=_with_own_seed(line.request, index)) for index, line in enumerate(lines)]


def _problem(line: FileRequest) -> str | None:
    """Why a prompt cannot be answered usefully."""
    last = {"role": "user", "content": line.request.prompt} if line.messages is None else line.messages[-1]
    if last["role"] == "assistant":
        return "messages: end with the assistant's answer; leave it out, since the model is to give its own"
    if last["role"] == "user" and isinstance(last["content"], str) and not last["content"].strip():
        return "the prompt is blank; write a question, or remove the line"
    if line.request.samples > 1 and line.request.sampling.greedy:
        return f"samples: all {line.request.samples} would be equal at temperature 0; give a temperature"
    return None


def _with_own_seed(request: Request, index: int) -> Request:
    """The request with a seed that depends on its own one and on its place in the file.

    So equal prompts get different answers, and no answer depends on what else runs. The engine adds the number of the
    sample.
    """
    digest = hashlib.sha256(f"{request.sampling.seed} {index}".encode()).digest()
    seed = int.from_bytes(digest[:8], "little") >> 2  # leaves room for the samples below 2**63
    return request.model_copy(update={"sampling": request.sampling.model_copy(update={"seed": seed})})


def _about(arguments: argparse.Namespace, settings: dict[str, Any], released: Released) -> dict[str, Any]:
    """What the answers depend on. How many processes and sequences run changes them by rounding only."""
    from megatron_ee.checkpoint.digest import file_sha256
    from megatron_ee.commands.answer_file import MADE_BY
    from megatron_ee.commands.engine_options import rounding_settings
    from megatron_ee.inference.released import released_digests
    from megatron_ee.parallel.groups import launched_rank

    return {
        "made_by": MADE_BY,
        "model": str(arguments.model),
        "prompts": str(arguments.prompts),
        **released_digests(released, show=launched_rank() == 0),
        "prompts_sha256": file_sha256(arguments.prompts),
        "settings": {**settings, "drop_cut": arguments.drop_cut, **rounding_settings(arguments, released)},
    }


def _answer(
    arguments: argparse.Namespace,
    lines: list[FileRequest],
    engine: Engine,
    tokenizer: Tokenizer,
    answers: AnswerFile,
) -> int:
    from megatron_ee.commands.generate_requests import check_memory
    from megatron_ee.inference.offline import run_batch
    from megatron_ee.progress import track

    check_memory(lines, engine, arguments.prompts)
    rest = [line for line in lines if line.line not in answers.done]
    failed: list[tuple[int, str]] = []
    try:
        with track(len(lines), "prompts", "answering", "tokens", completed=len(answers.done)) as bar:
            requests = [line.request for line in rest]
            results = run_batch(engine, requests, ahead=2 * arguments.max_num_seqs, advance=partial(bar.advance, 1))
            for index, outcomes in results:
                line, records = rest[index], []
                for sample, outcome in enumerate(outcomes):
                    if isinstance(outcome, str):
                        failed.append((line.line, outcome))
                    elif not (arguments.drop_cut and outcome.finish_reason in _CUT):
                        records += _record(line, sample, outcome, tokenizer)
                answers.append(line.line, records)
        answers.commit()
    except (KeyboardInterrupt, UserError):
        print(
            f"megatron-ee regenerate: {len(answers.done)} of {len(lines)} prompts are answered; the same command with "
            "--resume continues",
            file=sys.stderr,
        )
        raise
    left_out = sum(line.request.samples for line in lines) - answers.answers
    cut = f", {answers.cut} cut at the length limit" if answers.cut else ""
    print(
        f"{arguments.output}: {answers.answers} answers to {len(lines)} prompts{cut}"
        + (f", {left_out} left out" if left_out else "")
    )
    for number, reason in sorted(failed):
        print(f"megatron-ee regenerate: {arguments.prompts}:{number}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def _record(line: FileRequest, sample: int, completion: Completion, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The line of an answer; none for one that was cut before its first character."""
    cut = completion.finish_reason in _CUT
    text = completion.text.rstrip("\ufffd") if cut else completion.text  # a character may be cut, too
    if cut and not text:
        return []
    named = {} if line.id is None else {"id": line.id}
    record = {**named, "line": line.line, "sample": sample}
    if line.messages is None:
        return [{**record, "text": f"{line.request.prompt}{text}", "finish_reason": completion.finish_reason}]
    return [
        {
            **record,
            "messages": [*line.messages, {"role": "assistant", "content": text}],
            "finish_reason": completion.finish_reason,
            "end_token": None if cut else tokenizer.name_of(completion.tokens[-1].id),
        }
    ]
