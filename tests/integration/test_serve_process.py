"""``serve`` as a process: it answers, ends with a signal, starts again on its port, and holds under load."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from megatron_ee.commands.main import main
from megatron_ee.inference.loading import open_engine
from megatron_ee.inference.options import EngineOptions
from megatron_ee.inference.released import open_released
from megatron_ee.inference.requests import Request
from megatron_ee.testing.command import Command
from megatron_ee.testing.project import Project
from megatron_ee.testing.ranks import free_port

SECONDS = 60.0
GROWTH = 32e6
"""Bytes by which memory may grow in the second part of the soak."""


class Served:
    """A server process and its address."""

    def __init__(
        self, project: Project, port: int, *options: object, key: str | None = None, seconds: float = SECONDS
    ) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.command: Command = project.start(
            "serve", "--model", project.model, "--dtype", "float32", "--port", port, "--kv-memory", "0.2", *options
        )
        deadline = time.monotonic() + seconds
        while self.ready() != 200:
            assert self.command.running, self.command.wait().stderr
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def ready(self) -> int:
        try:
            return httpx.get(self.url + "/ready", headers=self.headers, timeout=SECONDS).status_code
        except httpx.TransportError:
            return 0

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        response = httpx.post(self.url + "/v1/completions", json=body, timeout=SECONDS)
        assert response.status_code == 200, response.text
        return dict(response.json())

    def end(self, number: signal.Signals = signal.SIGTERM) -> str:
        """Send a signal, and wait for the end; what was said."""
        self.command.send(number)
        done = self.command.wait(SECONDS)
        assert done.returncode == 0, done.stderr
        return done.stderr


@pytest.fixture
def start(project: Project) -> Iterator[Callable[..., Served]]:
    """Starts servers; none is left over."""
    servers: list[Served] = []

    def start(*options: object, port: int | None = None, **settings: Any) -> Served:
        servers.append(Served(project, port or free_port(), *options, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.command.__exit__()


def text(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["text"])


BODY = {"prompt": "import os", "max_tokens": 12, "temperature": 0}


def test_a_server_answers_as_the_engine_and_ends_with_a_signal(start: Callable[..., Served], project: Project) -> None:
    server = start("--default-temperature", 0, "--max-body", 1, "--max-connections", 1)
    with open_engine(open_released(project.model), EngineOptions(dtype="float32", kv_memory=10**8)) as engine:
        assert engine is not None
        [[alone]] = engine.generate([Request(prompt="import os", max_tokens=12)])
    for body in (BODY, {key: value for key, value in BODY.items() if key != "temperature"}):
        assert text(server.complete(body)) == alone.text
    large = httpx.post(server.url + "/v1/completions", json={"prompt": "x" * 2**20}, timeout=SECONDS)
    assert large.status_code == 413

    def get(path: str) -> httpx.Response:
        return httpx.get(server.url + path, timeout=SECONDS)

    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        client.sendall(b"Content-Length: 9\r\n\r\n")
        deadline = time.monotonic() + SECONDS
        while (full := get("/v1/models")).status_code == 200:
            assert time.monotonic() < deadline
        assert full.status_code == 503 and full.json()["error"]["code"] == "too_many_requests"
        assert get("/health").status_code == 200
    assert "listens on " + server.url in server.end()


@pytest.mark.slow
def test_a_server_starts_again_on_its_port(start: Callable[..., Served]) -> None:
    port = free_port()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        server = start(port=port)
        server.complete(BODY)
        server.end(number)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a C++ compiler")
def test_a_server_with_compiled_layers_answers_the_same(
    start: Callable[..., Served], project: Project, tmp_path: Path
) -> None:
    exits = '[{"layer": 1, "init": "copy"}]'  # one, since each adds a part to compile
    adapter = tmp_path / "adapter"
    project.run("convert", "--input", project.model, "--to", "adapter", "--exits", exits, "--output", adapter)
    modes = ({"mode": "full"}, {"mode": "threshold", "threshold": 0.2}, {"mode": "speculative"})
    bodies = [{**BODY, "max_tokens": 40, "ignore_eos": True, "early_exit": mode} for mode in modes]
    answers = []
    for options in ([], ["--compile"]):
        server = start("--adapter", adapter, *options, seconds=600)
        answers.append([[choice_of(server.complete(body)) for body in bodies] for _ in range(2)])
        assert ("compiling" in server.end()) == bool(options)
    assert answers[0] == answers[1]


def choice_of(answer: dict[str, Any]) -> tuple[str, list[int]]:
    """The text of an answer, and the layers that wrote its tokens."""
    return text(answer), answer["choices"][0]["early_exit"]["layers"]


def test_what_cannot_be_served_is_refused_before_the_model_is_loaded(
    project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options, message in (
            (["--host", "0.0.0.0"], "--host: 0.0.0.0 can be reached from other machines; give the keys"),
            (["--port", port], f"--port: cannot listen on 127.0.0.1, port {port}: Address already in use"),
            (["--calibration", tmp_path / "none.json"], "--calibration: no such file or directory"),
            (["--audit", "0.1"], "--audit: needs --calibration"),
            (["--log-text"], "--log-text: has an effect with --exit-log only"),
            (["--port", "70000"], "argument --port: must be a port from 0 to 65535"),
            (["--default-temperature", "3"], "argument --default-temperature: must be a number from 0 to 2, not '3'"),
        ):
            status = main(["serve", "--model", str(project.model), *map(str, options)])
            said = capsys.readouterr().err
            assert status == 2 and message in said and said.count("\n") == 1, said


@pytest.mark.slow
def test_a_signal_under_load_lets_every_stream_end(start: Callable[..., Served]) -> None:
    server = start()
    begun: list[int] = []

    async def client(http: httpx.AsyncClient) -> str:
        body = {"prompt": "def ", "max_tokens": 60, "temperature": 0, "ignore_eos": True, "stream": True}
        lines = []
        async with http.stream("POST", server.url + "/v1/completions", json=body) as response:
            begun.append(response.status_code)
            async for line in response.aiter_lines():
                lines.append(line)
        return next(line for line in reversed(lines) if line)

    async def load() -> list[str]:
        async with httpx.AsyncClient(timeout=SECONDS, limits=httpx.Limits(max_connections=None)) as http:
            clients = [asyncio.create_task(client(http)) for _ in range(64)]
            while len(begun) < 64:
                await asyncio.sleep(0.01)
            os.kill(server.command.pid, signal.SIGTERM)
            return await asyncio.gather(*clients)

    assert asyncio.run(load()) == ["data: [DONE]"] * 64
    assert server.command.wait(SECONDS).returncode == 0


@pytest.mark.slow
def test_a_withdrawn_key_is_refused_while_its_request_runs_on(start: Callable[..., Served], tmp_path: Path) -> None:
    keys, entry = tmp_path / "keys.yaml", '{name}: {{key: "{name}-0123456789abcdef"}}\n'
    keys.write_text(entry.format(name="one") + entry.format(name="two"))
    keys.chmod(0o600)
    server = start("--api-key-file", keys, key="two-0123456789abcdef")

    def status(name: str) -> int:
        headers = {"Authorization": f"Bearer {name}-0123456789abcdef"}
        return httpx.post(server.url + "/v1/completions", json=BODY, headers=headers, timeout=SECONDS).status_code

    assert (status("one"), status("two"), status("three")) == (200, 200, 401)
    assert httpx.get(server.url + "/health").status_code == 200
    headers = {"Authorization": "Bearer one-0123456789abcdef"}
    long = {**BODY, "max_tokens": 110, "n": 16, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=long, headers=headers, timeout=SECONDS) as response:
        lines = response.iter_lines()
        next(lines)
        keys.write_text(entry.format(name="two"))
        server.command.send(signal.SIGHUP)
        deadline = time.monotonic() + SECONDS
        while status("one") != 401:
            assert time.monotonic() < deadline
        assert status("two") == 200
        assert [line for line in lines if line][-1] == "data: [DONE]"
    keys.write_text("two: [")
    server.command.send(signal.SIGHUP)
    time.sleep(0.5)
    assert status("two") == 200
    said = server.end()
    assert "has read its keys and rules again" in said and "reload failed: " in said
    assert "0123456789abcdef" not in said


READER = """
import sys, urllib.request
body = sys.argv[2].encode()
request = urllib.request.Request(sys.argv[1], body, {"Content-Type": "application/json"})
with urllib.request.urlopen(request) as response:
    print(len(response.read(1)), flush=True)
    response.read()
"""


@pytest.mark.slow
def test_a_stopped_client_holds_up_nobody(start: Callable[..., Served]) -> None:
    server = start("--max-num-seqs", 64)
    body = {"prompt": "x", "max_tokens": 120, "n": 30, "ignore_eos": True, "stream": True}
    line = [sys.executable, "-c", READER, server.url + "/v1/completions", json.dumps(body)]
    with subprocess.Popen(line, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None and client.stdout.readline() == b"1\n"
        client.send_signal(signal.SIGSTOP)
        for _ in range(3):
            answer = server.complete({"prompt": "x", "max_tokens": 20, "ignore_eos": True})
            assert answer["usage"]["completion_tokens"] == 20
        server.command.send(signal.SIGTERM)
        assert server.command.wait(SECONDS).returncode == 0
        client.kill()


class Soak:
    """Clients that send the same few requests, and compare answers with those of each request alone."""

    def __init__(self, server: Served, bodies: list[dict[str, Any]], alone: list[list[str]]) -> None:
        self.server, self.bodies, self.alone = server, bodies, alone
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def client(self, http: httpx.AsyncClient, seed: int, until: float) -> None:
        source = random.Random(seed)
        while time.monotonic() < until:
            index, how = source.randrange(len(self.bodies)), source.choice(["read"] * 5 + ["slow", "leave"])
            async with http.stream(
                "POST", self.server.url + "/v1/completions", json={**self.bodies[index], "stream": True}
            ) as response:
                if response.status_code == 429:
                    self.ends["refused"] += 1
                    await asyncio.sleep(0.1)
                    continue
                assert response.status_code == 200, await response.aread()
                await self.read(response, index, how, source)

    async def read(self, response: httpx.Response, index: int, how: str, source: random.Random) -> None:
        texts = [""] * len(self.alone[index])
        async for line in response.aiter_lines():
            if how == "leave" and source.random() < 0.05:
                self.ends["left"] += 1
                return
            if how == "slow":
                await asyncio.sleep(0.02)
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                for choice in chunk["choices"]:
                    texts[choice["index"]] += choice["text"]
            elif line == "data: [DONE]":
                self.ends["done"] += 1
                if texts != self.alone[index]:
                    self.wrong.append(f"request {index}: {texts} is not {self.alone[index]}")
                return
        self.wrong.append(f"request {index}: the answer broke off")


def soak_bodies(count: int) -> list[dict[str, Any]]:
    """Of every mode, greedy and drawn."""
    source, found = random.Random(7), []
    for number in range(count):
        body: dict[str, Any] = {
            "prompt": source.choice(["import ", "def f(", "class A", "for x in", "return "]) * source.randint(1, 3),
            "max_tokens": source.choice([1, 8, 25, 40]),
            "n": source.choice([1, 1, 1, 2]),
            "temperature": 0 if number % 3 else 0.8,
            "seed": number,
            "ignore_eos": number % 2 == 0,
        }
        mode = ("full", "threshold", "speculative")[number % 3]
        body["early_exit"] = {"mode": mode, **({"threshold": 0.2} if mode == "threshold" else {})}
        found.append(body)
    return found


@pytest.mark.slow
def test_two_minutes_of_64_clients_over_http(start: Callable[..., Served], tuned: Path) -> None:
    server = start("--adapter", tuned / "adapter", "--max-queue", 40)
    bodies = soak_bodies(24)
    alone = []
    for body in bodies:
        choices = sorted(server.complete(body)["choices"], key=lambda choice: choice["index"])
        alone.append([choice["text"] for choice in choices])
    soak, sizes, process = Soak(server, bodies, alone), [], psutil.Process(server.command.pid)

    async def run(seconds: float) -> None:
        asyncio.get_running_loop().call_later(seconds / 3, lambda: sizes.append(process.memory_info().rss))
        until = time.monotonic() + seconds
        async with httpx.AsyncClient(timeout=SECONDS, limits=httpx.Limits(max_connections=None)) as http:
            await asyncio.gather(*(soak.client(http, seed, until) for seed in range(64)))
        sizes.append(process.memory_info().rss)

    asyncio.run(run(120))
    print(dict(soak.ends), sizes)
    assert not soak.wrong, "\n".join(soak.wrong[:10])
    assert soak.ends["done"] > 200 and soak.ends["left"] > 10
    assert sizes[1] - sizes[0] < GROWTH, sizes
    assert "socket.send" not in server.end(), "clients that leave are no news"
