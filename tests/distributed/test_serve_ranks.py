"""A server over several ranks: it outlasts idle times, ends with a signal to all ranks, and names a lost rank."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch.distributed as dist

from megatron_ee.errors import UserError
from megatron_ee.inference.options import EngineOptions
from megatron_ee.inference.released import open_released
from megatron_ee.parallel import groups
from megatron_ee.serving.engine_loop import LoopLimits
from megatron_ee.serving.launch import serve_model
from megatron_ee.serving.server import ServerOptions
from megatron_ee.testing.ranks import Ranks, free_port, run_command
from megatron_ee.testing.serving import stream_app

pytestmark = pytest.mark.slow
SECONDS = 60.0
TIMEOUT, HEARTBEAT = 4.0, 1.0
"""Seconds that ranks wait for a message, and between heartbeats."""


def serve_rank(folder: Path, model: Path, tensor: int, pipeline: int, port: int, heartbeat: float) -> None:
    """Serve on this rank, whose waits for the others are short."""
    os.dup2(os.open(folder / f"stderr-{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)

    def short_waits(group: dist.ProcessGroup, control: dist.ProcessGroup) -> dist.ProcessGroup:
        ranks = dist.get_process_group_ranks(group)
        return groups._group_of(ranks, control, timedelta(seconds=TIMEOUT), "gloo")

    groups._host_group = short_waits
    options = EngineOptions(dtype="float32", tensor=tensor, pipeline=pipeline, kv_memory=10**8)
    limits = LoopLimits(idle_heartbeat=heartbeat)
    try:
        released, server = open_released(model), ServerOptions()
        serve_model(released, options, "127.0.0.1", port, lambda: stream_app, limits=limits, server=server)
    except UserError as error:
        os.write(2, f"error: {error}\n".encode())
        os._exit(1)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        os._exit(1)


class Server:
    """Ranks that serve a model together."""

    def __init__(self, folder: Path, model: Path, tensor: int, pipeline: int, heartbeat: float = HEARTBEAT) -> None:
        self.folder, port = folder, free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.ranks = Ranks(tensor * pipeline, serve_rank, folder, model, tensor, pipeline, port, heartbeat)
        self.pids: list[int] = [process.pid for process in self.ranks.processes]
        self.until(lambda: "listens on" in self.said())

    def said(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("stderr-*")))

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def stream(self, tokens: int) -> Iterator[dict[str, Any]]:
        body = {"prompt": [5, 17, 99], "max_tokens": tokens, "ignore_eos": True}
        with httpx.stream("POST", self.url + "/stream", json=body, timeout=SECONDS) as response:
            assert response.status_code == 200, response.read()
            yield from map(json.loads, response.iter_lines())

    def statuses(self) -> list[int | None]:
        for process in self.ranks.processes:
            process.join(SECONDS)
        return [process.exitcode for process in self.ranks.processes]


@pytest.fixture
def start(tmp_path: Path, byte_positions: Path) -> Iterator[Callable[..., Server]]:
    """Starts a server; its processes end with the test."""
    servers: list[Server] = []

    def start(*sizes: int, **settings: Any) -> Server:
        servers.append(Server(tmp_path, byte_positions, *sizes, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.ranks.__exit__()


@pytest.fixture(scope="module")
def byte_positions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with many positions, and a tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from megatron_ee.testing.models import save_tiny_model

    path = tmp_path_factory.mktemp("served")
    save_tiny_model("llama3.1", path, vocab_size=258, max_position_embeddings=4096)
    names = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return path


def test_what_the_first_rank_refuses_ends_all_before_the_model_is_loaded(tmp_path: Path, byte_positions: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = ["serve", "--model", str(byte_positions), "--tensor", "2", "--port", str(port)]
        environment = {"MEGATRON_EE_CACHE": str(tmp_path / "cache")}
        with Ranks(2, run_command, command, environment, str(tmp_path / "stderr"), timeout=SECONDS) as ranks:
            assert ranks.results() == [2, 2]
    said = [(tmp_path / f"stderr-{rank}").read_text() for rank in range(2)]
    assert said[0].count("error: ") == 1 and f"--port: cannot listen on 127.0.0.1, port {port}" in said[0]
    assert "error" not in said[1] and "loading" not in said[0] + said[1]


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
def test_idle_ranks_do_not_time_out(tensor: int, pipeline: int, start: Callable[..., Server]) -> None:
    server = start(tensor, pipeline)
    before = list(server.stream(20))
    time.sleep(2.5 * TIMEOUT)
    assert list(server.stream(20)) == before and before[-1]["end"] == "length"
    os.kill(server.pids[0], signal.SIGTERM)
    assert server.statuses() == [0] * (tensor * pipeline), server.said()


def test_ranks_time_out_without_heartbeats(start: Callable[..., Server]) -> None:
    server = start(1, 2, heartbeat=1000.0)
    list(server.stream(5))
    time.sleep(2.5 * TIMEOUT)
    assert server.statuses() != [0, 0]


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_a_signal_to_all_ranks_lets_running_requests_end(
    tensor: int, pipeline: int, start: Callable[..., Server]
) -> None:
    server = start(tensor, pipeline)
    streams = [server.stream(300) for _ in range(4)]
    for each in streams:
        next(each)
    for pid in reversed(server.pids):  # as torchrun does
        os.kill(pid, signal.SIGTERM)
    for each in streams:
        assert list(each)[-1]["end"] == "length"
    assert server.statuses() == [0, 0], server.said()


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("idle", [False, True])
def test_a_lost_rank_is_named_and_every_client_gets_an_error(
    tensor: int, pipeline: int, idle: bool, start: Callable[..., Server]
) -> None:
    server = start(tensor, pipeline)
    ends: list[dict[str, Any]] = []

    begun = threading.Semaphore(0)

    def client() -> None:
        events = server.stream(4000)
        next(events)
        begun.release()
        ends.append(list(events)[-1])

    threads = [threading.Thread(target=client) for _ in range(0 if idle else 6)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert begun.acquire(timeout=SECONDS)
    os.kill(server.pids[1], signal.SIGKILL)
    for thread in threads:
        thread.join(SECONDS)
    assert [end["error"] for end in ends] == ["the engine has failed; the server's log says why"] * len(threads)
    status = server.statuses()[0]
    said = server.said()
    assert status != 0 and re.search(r"^error: rank 1 \(.*\) is gone: it was killed or crashed", said, re.M), said
    assert "Traceback" not in said
