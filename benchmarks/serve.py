"""The server against ``transformers serve``, and against our engine without HTTP.

Each client sends its next request when its last one has ended, so that always as many requests are in flight as there
are clients. ``transformers serve`` answers one request after another; ``--continuous-batching`` adds a row in which it
batches them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import AddOption, Result, run, take_turns
from benchmarks.models import describe_model, exit_layers, model_directory, sample_text, untuned_adapter
from benchmarks.processes import child_environment, free_port, megatron_ee_command
from megatron_ee.commands import DTYPES, at_least
from megatron_ee.errors import UserError

DESCRIPTION = """Stream greedy answers to several clients at once from megatron-ee serve, from transformers serve, and
from our engine in this process without HTTP, in turns. The exits of a random model are untuned: threshold mode then
shows only what unused exits cost."""
COLUMNS = (
    ("clients", "clients", "d"),
    ("way", "way", ""),
    ("tokens_per_second", "tokens/s", ",.1f"),
    ("against_transformers", "/ transformers", ".2fx"),
    ("against_engine", "/ engine", ".3fx"),
    ("first_token", "first token s", ".3f"),
    ("per_token", "per token s", ".4f"),
    ("memory", "server MB", ",.0f"),
)
PEER, ENGINE, OURS, EARLY = "transformers serve", "engine, no HTTP", "serve", "serve, threshold"
BATCHING = f"{PEER} --continuous-batching"
START_SECONDS = 300.0
SAMPLE_SECONDS = 1.0


@dataclass(frozen=True)
class Answered:
    """One request as its client saw it; times in seconds.

    Attributes:
        tokens: emitted.
        first: until the first token.
        rest: from there to the end.
    """

    tokens: int
    first: float
    rest: float


@dataclass
class Load:
    """Requests of several clients.

    Attributes:
        seconds: from the first request to the last answer.
        answered: each request.
    """

    seconds: float
    answered: list[Answered]


def add_options(add: AddOption) -> None:
    """This benchmark's own."""
    count = at_least(1)
    add("--adapter", "tuned exits of --model", type=Path, metavar="DIR")
    add("--exits", "number of untuned exits where there is no adapter", type=count, default=3, metavar="N")
    add("--dtype", "of the model", choices=DTYPES, default="bfloat16")
    add("--clients", "requests in flight", type=count, nargs="+", default=[1, 4, 16], metavar="N")
    add("--requests", "of each client", type=count, default=2, metavar="N")
    add("--prompt-characters", "length of a prompt", type=count, default=128, metavar="N")
    add("--tokens", "emitted for each at most", type=at_least(2), default=64, metavar="N")
    add("--threshold", "confidence at which threshold mode leaves", type=float, default=0.8, metavar="X")
    add("--continuous-batching", "measure transformers serve with it, too", action="store_true")
    add("--minutes", "afterwards, watch the server's memory under load so long", type=float, default=0.0, metavar="M")


def measure(options: argparse.Namespace, directory: Path) -> Result:
    """Compare, in turns, for each number of clients."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    path = model_directory(options, directory, options.dtype)
    settings = describe_model(options, path)
    layers = exit_layers(options.exits, settings["layers"])
    adapter = options.adapter or untuned_adapter(path, layers, directory)
    import torch

    from benchmarks.limits import read_rate
    from megatron_ee.inference import EngineOptions, open_engine, open_released

    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        servers = {OURS: stack.enter_context(our_server(path, adapter, options.dtype))}
        servers[PEER] = stack.enter_context(their_server(path, options.dtype))
        if options.continuous_batching:
            servers[BATCHING] = stack.enter_context(their_server(path, options.dtype, "--continuous-batching"))
        released = open_released(path, adapter)
        engine = stack.enter_context(open_engine(released, EngineOptions(dtype=options.dtype)))
        assert engine is not None, "this is the first rank"
        for clients in options.clients:
            prompts = sample_prompts(clients * options.requests, options.prompt_characters)
            works: dict[str, Callable[[], Load]] = {
                name: partial(http_load, server, prompts, clients, body_of(name, options))
                for name, server in (*servers.items(), (EARLY, servers[OURS]))
            }
            works[ENGINE] = partial(engine_load, engine, prompts, clients, options.tokens)
            found = take_turns(works, options.repeats)
            rows += compare(found, clients, {name: server.memory() for name, server in servers.items()})
        if options.minutes:
            prompts = sample_prompts(max(options.clients), options.prompt_characters)
            settings["memory"] = soak(servers[OURS], prompts, options)
    settings |= {
        "exits": [spec.layer for spec in released.exits],
        "dtype": options.dtype,
        "prompt_characters": options.prompt_characters,
        "tokens": options.tokens,
        "requests_per_client": options.requests,
        "threshold": options.threshold,
    }
    return Result("Serving", settings, COLUMNS, {"memory_GB_per_second": read_rate() / 1e9}, rows)


def sample_prompts(count: int, length: int) -> list[str]:
    """So many different prompts."""
    text = sample_text()
    apart = max(1, (len(text) - length) // count)
    return [text[number * apart : number * apart + length] for number in range(count)]


def body_of(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """The request's body, without its prompt."""
    body: dict[str, Any] = {"max_tokens": options.tokens, "temperature": 0, "stream": True}
    if way in (OURS, EARLY):
        early = {"mode": "threshold", "threshold": options.threshold} if way == EARLY else {"mode": "full"}
        return {**body, "early_exit": early, "stream_options": {"include_usage": True}}
    return body


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        url: of its API.
        model: as it calls the model.
        pid: of its process.
    """

    url: str
    model: str
    pid: int

    def memory(self) -> float:
        """Resident bytes of its process."""
        import psutil

        return float(psutil.Process(self.pid).memory_info().rss)


@contextlib.contextmanager
def our_server(path: Path, adapter: Path, dtype: str) -> Iterator[Server]:
    """``megatron-ee serve``."""
    port = free_port()
    line = megatron_ee_command("serve", "--model", str(path), "--adapter", str(adapter), "--dtype", dtype)
    with running([*line, "--port", str(port)], port, "/ready") as process:
        url = f"http://127.0.0.1:{port}"
        with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
            model = json.load(answer)["data"][0]["id"]
        yield Server(url, model, process.pid)


@contextlib.contextmanager
def their_server(path: Path, dtype: str, *options: str) -> Iterator[Server]:
    """``transformers serve`` with this model alone."""
    port = free_port()
    code = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    line = [sys.executable, "-c", code, "serve", str(path), "--dtype", dtype, "--host", "127.0.0.1"]
    with running([*line, "--port", str(port), *options], port, "/health") as process:
        yield Server(f"http://127.0.0.1:{port}", str(path), process.pid)


@contextlib.contextmanager
def running(line: Sequence[str], port: int, ready: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that answers HTTP, from when it is ready; ended afterwards.

    Raises:
        UserError: it ended, or was not ready in time; says what it wrote last.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(line, env=child_environment(), stdout=errors, stderr=errors)
        try:
            until = time.monotonic() + START_SECONDS
            while not _answers(f"http://127.0.0.1:{port}{ready}"):
                if process.poll() is not None or time.monotonic() > until:
                    errors.seek(0)
                    raise UserError(f"{' '.join(line)[:160]} did not start: {errors.read().strip()[-2000:]}")
                time.sleep(0.2)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def http_load(server: Server, prompts: Sequence[str], clients: int, body: dict[str, Any]) -> Load:
    """Send all prompts, ``clients`` at a time, and read the answers as they are streamed."""
    return asyncio.run(_http_load(server, prompts, clients, {**body, "model": server.model}))


async def _http_load(server: Server, prompts: Sequence[str], clients: int, body: dict[str, Any]) -> Load:
    import httpx

    waiting, answered = deque(prompts), []
    async with httpx.AsyncClient(base_url=server.url, timeout=None, trust_env=False) as client:

        async def one_client() -> None:
            while waiting:
                answered.append(await _stream(client, {**body, "prompt": waiting.popleft()}))

        started = time.perf_counter()
        await asyncio.gather(*(one_client() for _ in range(clients)))
        return Load(time.perf_counter() - started, answered)


async def _stream(client: Any, body: dict[str, Any]) -> Answered:
    """Send one request.

    Raises:
        UserError: it is refused, or its answer ends early.
    """
    started = time.perf_counter()
    first = last = 0.0
    tokens = 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise UserError(f"{answer.url}: status {answer.status_code}: {(await answer.aread()).decode()[:500]}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise UserError(f"{answer.url}: {chunk['error']}")
            if chunk["choices"]:  # also without text: a token may end in the middle of a character
                last = time.perf_counter() - started
                first = first or last
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    if not tokens:
        raise UserError(f"{answer.url}: an answer has no usage")
    return Answered(tokens, first, last - first)


def engine_load(engine: Any, prompts: Sequence[str], clients: int, tokens: int) -> Load:
    """The same requests given to an engine in this process."""
    from megatron_ee.inference.requests import Request

    waiting, answered = deque(prompts), []
    open_: dict[int, tuple[float, float]] = {}
    started = time.perf_counter()

    def submit() -> None:
        if waiting:
            begun = time.perf_counter()
            open_[engine.submit(Request(prompt=waiting.popleft(), max_tokens=tokens))] = begun, 0.0

    for _ in range(clients):
        submit()
    while open_:
        for event in engine.step():
            now = time.perf_counter()
            begun, first = open_[event.request]
            if event.tokens and not first:
                first = now - begun
                open_[event.request] = begun, first
            if event.error is not None:
                raise UserError(event.error)
            if event.completion is not None:
                answered.append(Answered(len(event.completion.tokens), first, now - begun - first))
                del open_[event.request]
                submit()
    return Load(time.perf_counter() - started, answered)


def compare(found: dict[str, list[Load]], clients: int, memory: dict[str, float]) -> list[dict[str, Any]]:
    """Figures of each way: medians over the rounds of the rate, over all requests of the times."""
    rates = {
        name: statistics.median(sum(each.tokens for each in load.answered) / load.seconds for load in loads)
        for name, loads in found.items()
    }
    table = []
    for name, loads in found.items():
        answered = [each for load in loads for each in load.answered]
        memory_of = memory.get(OURS if name == EARLY else name)
        table.append(
            {
                "clients": clients,
                "way": name,
                "tokens_per_second": rates[name],
                "against_transformers": rates[name] / rates[PEER],
                "against_engine": rates[name] / rates[ENGINE],
                "first_token": statistics.median(each.first for each in answered),
                "per_token": statistics.median(each.rest / max(each.tokens - 1, 1) for each in answered),
                "memory": None if memory_of is None else memory_of / 1e6,
            }
        )
    return table


def soak(server: Server, prompts: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Load a server for ``--minutes``; its resident MB at the start, the end and the peak, and how they grow in the
    second half."""
    samples: list[tuple[float, float]] = []
    started, over = time.monotonic(), threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLE_SECONDS):
            samples.append(((time.monotonic() - started) / 60, server.memory() / 1e6))

    watcher = threading.Thread(target=watch)
    watcher.start()
    requests = 0
    try:
        while time.monotonic() - started < 60 * options.minutes:
            body = body_of(EARLY if requests % 2 else OURS, options)
            requests += len(http_load(server, prompts, max(options.clients), body).answered)
    finally:
        over.set()
        watcher.join()
    if len(samples) < 4:
        raise UserError(f"--minutes: {options.minutes} is too short to see how memory grows")
    half = samples[len(samples) // 2 :]
    slope = statistics.linear_regression([at for at, _ in half], [size for _, size in half]).slope
    sizes = [size for _, size in samples]
    return {
        "minutes": options.minutes,
        "requests": requests,
        "start_mb": round(sizes[0], 1),
        "end_mb": round(sizes[-1], 1),
        "peak_mb": round(max(sizes), 1),
        "growth_mb_per_minute": round(slope, 3),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    return run("serve", DESCRIPTION, add_options, measure, argv, repeats=3)


if __name__ == "__main__":
    sys.exit(main())
