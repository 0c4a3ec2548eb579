"""Ten thousand requests to a full queue, over HTTP: each is told when to come back, and nothing is left over."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from megatron_ee.inference.engine import Engine
from megatron_ee.inference.requests import Event
from megatron_ee.serving.engine_loop import LoopLimits

REQUESTS, CLIENTS, QUEUE = 10_000, 32, 3
SECONDS = 120.0
BODY = {"prompt": "abc", "max_tokens": 4, "temperature": 0}


@pytest.mark.slow
def test_ten_thousand_requests_to_a_full_queue(
    serve: Callable[..., contextlib.AbstractContextManager[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_step, step = threading.Event(), Engine.step

    def held(engine: Engine) -> list[Event]:
        assert may_step.wait(SECONDS)
        return step(engine)

    monkeypatch.setattr(Engine, "step", held)
    with (
        serve(queue=LoopLimits(max_queue=QUEUE)) as server,
        ThreadPoolExecutor(QUEUE + CLIENTS) as pool,
    ):
        try:
            url = f"{server.url}/v1/completions"
            queued = [pool.submit(httpx.post, url, json=BODY, timeout=SECONDS) for _ in range(QUEUE)]
            while server.service.engine_loop.state().num_waiting < QUEUE:
                assert not any(each.done() for each in queued)
            shares = [range(first, REQUESTS, CLIENTS) for first in range(CLIENTS)]
            counts = sum(pool.map(lambda share: refusals(server.address, len(share)), shares), Counter())
        finally:
            may_step.set()
        assert counts == {(429, "queue_full", True): REQUESTS}
        assert [each.result().status_code for each in queued] == [200] * QUEUE
        assert server.post("/v1/completions", BODY).status_code == 200
        assert f'refused_requests_total{{status="429"}} {REQUESTS}.0' in server.plain.get("/metrics").text


def refusals(address: tuple[str, int], count: int) -> Counter[tuple[int, str, bool]]:
    """Send requests over one connection; status and code of the answers, and whether they say when to come back."""
    connection, found = http.client.HTTPConnection(*address, timeout=SECONDS), Counter[tuple[int, str, bool]]()
    for _ in range(count):
        connection.request("POST", "/v1/completions", json.dumps(BODY), {"Content-Type": "application/json"})
        response = connection.getresponse()
        code = json.loads(response.read())["error"]["code"]
        found[response.status, code, int(response.headers["Retry-After"]) >= 1] += 1
    connection.close()
    return found
