"""A server of a tiny model in this process: all of it but signals and the command line."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from prometheus_client import CollectorRegistry

from megatron_ee.config.exits import ExitSpec
from megatron_ee.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.certificate import Calibration
from megatron_ee.inference.engine import Engine
from megatron_ee.inference.loading import DEFAULTS, make_engine
from megatron_ee.inference.options import EngineOptions
from megatron_ee.inference.requests import Completion, Request
from megatron_ee.serving.access import Access
from megatron_ee.serving.api.translate import RequestLimits
from megatron_ee.serving.app import build_app
from megatron_ee.serving.audits.audit_file import begin_audits, state_path
from megatron_ee.serving.audits.auditor import Auditor
from megatron_ee.serving.connection import ClientConnection
from megatron_ee.serving.engine_loop import EngineLoop, LoopLimits
from megatron_ee.serving.exit_log import ExitLog
from megatron_ee.serving.metrics import Metrics
from megatron_ee.serving.rules.rules import Rules
from megatron_ee.serving.service import Service

MODEL = "tiny"
POSITIONS = 256
EXITS = [ExitSpec(1), ExitSpec(2)]
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' and message.content == 'refuse' %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory, save_tokenizer: Callable[..., None]) -> Path:
    """A model of 4 layers whose tokens are bytes, with a chat template."""
    from megatron_ee.testing.models import save_tiny_model

    path = tmp_path_factory.mktemp("chat_model")
    save_tiny_model("llama2", path, vocab_size=258, max_position_embeddings=POSITIONS, bos_token_id=0, eos_token_id=1)
    save_tokenizer(path, template=TEMPLATE)
    return path


@pytest.fixture(scope="module")
def tokenizer(chat_model: Path) -> Tokenizer:
    return load_tokenizer(chat_model)


@pytest.fixture(scope="module")
def make_engines(chat_model: Path, tokenizer: Tokenizer, load_stage: Callable[..., Stage]) -> Callable[..., Engine]:
    """Makes equal engines, each with weights of its own, so that they may run at the same time."""

    def make(options: EngineOptions = DEFAULTS) -> Engine:
        stage = load_stage(chat_model, EXITS)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for exit_ in stage.exits:
                for parameter in exit_.parameters():
                    if parameter.requires_grad:
                        parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
                exit_.head.matrix.weight *= 3
        return make_engine(stage, options, tokenizer=tokenizer, eos=frozenset({1}))

    return make


@pytest.fixture(scope="module")
def alone(make_engines: Callable[[], Engine]) -> Callable[..., Completion]:
    """Runs one request in an engine of its own."""
    engine = make_engines()

    def run(**fields: Any) -> Completion:
        [[completion]] = engine.generate([Request(**fields)])
        return completion

    return run


@dataclass
class Server:
    """A running server.

    Attributes:
        url: of the server.
        service: its parts. Only the server's thread may change them.
        log: its exit log.
    """

    url: str
    service: Service
    log: Path
    key: str | None = None
    _clients: list[Any] = field(default_factory=list)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def client(self, **settings: Any) -> openai.OpenAI:
        """The official client."""
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0, **settings)
        self._clients.append(client)
        return client

    @functools.cached_property
    def plain(self) -> httpx.Client:
        """A client that all requests share: making one takes longer than a request."""
        return self.http()

    def http(self, **settings: Any) -> httpx.Client:
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        client = httpx.Client(base_url=self.url, headers=headers, timeout=60, **settings)
        self._clients.append(client)
        return client

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return self.plain.post(path, json=body, headers=headers)


@pytest.fixture(scope="module")
def serve(
    make_engines: Callable[..., Engine], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., contextlib.AbstractContextManager[Server]]:
    """Starts servers."""

    @contextlib.contextmanager
    def start(
        *,
        keys: Path | None = None,
        key: str | None = None,
        rules: Path | None = None,
        limits: RequestLimits | None = None,
        queue: LoopLimits | None = None,
        engine: EngineOptions = DEFAULTS,
        text: bool = False,
        calibrations: Sequence[Calibration] = (),
        audits: float | None = None,
        max_requests: int = 512,
    ) -> Iterator[Server]:
        engine_loop = EngineLoop(make_engines(engine), queue or LoopLimits())
        log = tmp_path_factory.mktemp("log") / "exits.jsonl"
        access = Access(keys)
        opened = Rules(rules, calibrations, exits=engine_loop.exits, num_layers=engine_loop.num_layers)
        layers = [spec.layer for spec in engine_loop.exits]
        auditor = None
        if audits is not None:
            content = begin_audits(state_path(log), calibrations, audits)
            auditor = Auditor(opened, engine_loop, state_path(log), content, audits)
        service = Service(
            engine_loop=engine_loop,
            tokenizer=tokenizer,
            model_name=MODEL,
            created=1,
            access=access,
            rules=opened,
            auditor=auditor,
            exit_log=ExitLog(log, text=text),
            metrics=Metrics(CollectorRegistry(), layers, engine_loop.num_layers, opened.tasks, MODEL),
            limits=limits or RequestLimits(),
            max_requests=max_requests,
        )
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(build_app(service), http=ClientConnection, loop="asyncio", ws="none", log_config=None)
        server = uvicorn.Server(config)

        async def run() -> None:
            engine_loop.start()
            try:
                await server.serve([listener])
            finally:
                await service.close()
                await engine_loop.stop()

        thread = threading.Thread(target=lambda: asyncio.run(run()))
        thread.start()
        found = Server(f"http://127.0.0.1:{listener.getsockname()[1]}", service, log, key)
        try:
            yield found
        finally:
            for client in found._clients:
                client.close()
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()

    return start


@pytest.fixture(scope="module")
def server(serve: Callable[..., contextlib.AbstractContextManager[Server]]) -> Iterator[Server]:
    with serve() as found:
        yield found
