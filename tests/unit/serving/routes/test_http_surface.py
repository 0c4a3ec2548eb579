"""What a client without a library sees: bodies that are wrong, keys, headers, and what is written down."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.inference.engine import Engine
from megatron_ee.inference.requests import Request
from megatron_ee.serving.api.translate import RequestLimits
from megatron_ee.serving.engine_loop import LoopLimits
from megatron_ee.serving.exit_log import read_logs
from megatron_ee.serving.exit_record import ExitRecord

BODY = {"model": "tiny", "prompt": "abc", "max_tokens": 2, "temperature": 0}
KEYS = {"website": "5c1f" * 8, "staff": "77b0" * 8}
Serve = Callable[..., contextlib.AbstractContextManager[Any]]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text("".join(f'{name}: {{key: "{key}"}}\n' for name, key in KEYS.items()))
    path.chmod(0o600)
    return path


def wait_until(true: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


def records(server: Any) -> list[ExitRecord]:
    return list(read_logs([server.log]))


def raw(server: Any, request: bytes, *, half: bool = False) -> bytes:
    """The answer to bytes; with ``half``, the connection's sending side is closed after them."""
    with socket.create_connection(server.address, timeout=30) as connection:
        with contextlib.suppress(ConnectionError):  # the server may refuse it before its end
            connection.sendall(request)
        if half:
            connection.shutdown(socket.SHUT_WR)
        parts = []
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                parts.append(part)
    return b"".join(parts)


def posted(content: bytes, *headers: str, path: str = "/v1/completions", length: int | None = None) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Connection: close",
        f"Content-Length: {len(content) if length is None else length}",
        *(headers or ("Content-Type: application/json",)),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + content


def test_routes_that_do_not_generate(server: Any) -> None:
    http = server.plain
    assert http.get("/health").json() == {"status": "ok"}
    assert http.head("/health").status_code == 200
    assert http.get("/ready").json() == {"status": "ready"}
    exits = http.get("/v1/exits").json()
    assert [each["layer"] for each in exits["exits"]] == [1, 2] and exits["num_layers"] == 4
    assert exits["modes"] == ["full", "threshold", "speculative"] and exits["max_tokens"] == 4096
    metrics = http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert "vllm:num_requests_running" in metrics.text


def test_tokenize(server: Any) -> None:
    found = server.post("/tokenize", {"prompt": "abc", "return_token_strs": True}).json()
    assert found == {
        "count": 4,
        "max_model_len": 256,
        "tokens": [0, *found["tokens"][1:]],
        "token_strs": ["<s>", *"abc"],
    }
    plain = server.post("/tokenize", {"prompt": "abc", "add_special_tokens": False}).json()
    assert plain["tokens"] == found["tokens"][1:] and "token_strs" not in plain
    chat = server.post("/tokenize", {"messages": [{"role": "user", "content": "hello"}]}).json()
    assert chat["count"] == len("user: hello\nassistant: ")
    assert server.post("/tokenize", {"prompt": "x" * 1000}).json()["count"] == 1001
    assert server.post("/tokenize", {}).status_code == 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"prompt": "a", "prompt": "b"}', "appears twice"),
        (b'{"prompt": "a", "temperature": NaN}', "not JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', "too large"),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "prompt"),
        (b'{"prompt": ' + b"[" * 100000 + b"]" * 100000 + b"}", "body"),
        (b'{"prompt": null}', "prompt"),
        (b'{"prompt": "a", "max_tokens": "many"}', "max_tokens"),
        (b'{"prompt": "a", "max_tokens": true}', "max_tokens"),
        (b'{"prompt": "a", "seed": 1e400}', "too large"),
        (b"\x00\x01\x02", "not valid JSON"),
    ],
)
def test_malformed_bodies(server: Any, content: bytes, message: str) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        response = server.plain.post(path, content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 400, (path, response.text)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    response = server.plain.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert message in response.json()["error"]["message"]


def test_texts_with_half_a_surrogate_pair_are_refused(server: Any) -> None:
    content = b'{"messages": [{"role": "user", "content": "a\\ud83d"}]}'
    for path in ("/v1/chat/completions", "/tokenize"):
        response = server.plain.post(path, content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 400 and response.json()["error"]["param"] == "messages"


@pytest.mark.parametrize(
    "header", ["", "text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1"]
)
def test_wrong_content_types(server: Any, header: str) -> None:
    headers = {"Content-Type": header} if header else {}
    response = server.plain.post("/v1/completions", content=json.dumps(BODY).encode(), headers=headers)
    assert response.status_code == 415 and "error" in response.json()
    assert re.search(r'refused_requests_total\{status="415"\} [1-9]', server.plain.get("/metrics").text)


@pytest.mark.parametrize("header", ["APPLICATION/JSON", 'application/json;charset="UTF-8"'])
def test_spellings_of_the_content_type(server: Any, header: str) -> None:
    response = server.plain.post("/tokenize", content=b'{"prompt": "a"}', headers={"Content-Type": header})
    assert response.status_code == 200


def test_compressed_bodies_are_refused(server: Any) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert server.plain.post("/v1/completions", content=b"x", headers=headers).status_code == 415


def test_oversized_bodies(server: Any) -> None:
    limit = server.service.limits.max_body
    answer = raw(server, posted(b"{}", length=limit + 1))
    assert answer.startswith(b"HTTP/1.1 413 ") and b"body_too_large" in answer
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"  # chunked: no length says it beforehand
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    answer = raw(server, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * (limit // 0x10000 + 1))
    assert answer.startswith(b"HTTP/1.1 413 ") or answer == b""  # a reset may come before the answer is read


def test_truncated_requests_do_no_harm(server: Any) -> None:
    content = json.dumps(BODY).encode()
    assert raw(server, posted(content, length=len(content) + 10), half=True) == b""
    assert raw(server, b"POST /v1/completions HTTP/1.1\r\nHost", half=True) == b""
    refusal = raw(server, b"\x16\x03\x01 not HTTP\r\n\r\n")
    assert refusal.startswith(b"HTTP/1.1 400 ") and b'"type":"invalid_request_error"' in refusal
    assert server.post("/v1/completions", BODY).status_code == 200


def test_header_floods(server: Any) -> None:
    flood = [f"X-Header-{number}: {'x' * 1000}" for number in range(200)]
    answer = raw(server, posted(b"{}", "Content-Type: application/json", *flood))
    assert answer == b"" or answer.split(b" ")[1] in (b"400", b"431")
    assert server.post("/v1/completions", BODY).status_code == 200


def test_unknown_paths_and_methods(server: Any) -> None:
    http = server.plain
    for path in ("/nothing", "/v1/embeddings", "/docs", "/../etc/passwd", "/v1/completions/"):
        response = http.get(path)
        assert response.status_code == 404 and response.json()["error"]["type"] == "invalid_request_error", path
    response = http.get("/v1/completions")
    assert response.status_code == 405 and response.headers["allow"] == "POST"
    assert http.request("OPTIONS", "/v1/completions").status_code == 405  # no CORS


def test_security_headers_and_no_cors(server: Any) -> None:
    response = server.post("/v1/completions", BODY, Origin="https://elsewhere.example")
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert response.headers["cache-control"] == "no-store"
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert "x-content-type-options" in server.plain.get("/nothing").headers


def test_every_route_but_health_needs_a_key(serve: Serve, key_file: Path) -> None:
    with serve(keys=key_file, key=KEYS["website"]) as server:
        with server.http() as http:
            paths = list(http.get("/openapi.json").json()["paths"])
            assert {"/v1/completions", "/v1/models", "/metrics", "/ready", "/v1/exits", "/tokenize"} <= set(paths)
        with server.http(follow_redirects=False) as http:
            http.headers.pop("Authorization")
            for path in [*paths, "/openapi.json", "/nothing", "/"]:
                expected = 200 if path == "/health" else 401
                assert http.get(path).status_code == expected, path
            assert http.post("/v1/completions", json=BODY).status_code == 401
            for header in ("Bearer wrong", "Bearer", "Basic ????", f"Token {KEYS['website']}", "Bearer \xe9"):
                response = http.get("/v1/models", headers={"Authorization": header.encode("latin-1")})
                assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
                # One header each: Chromium takes a list in one header for a scheme that it does not know.
                assert response.headers.get_list("www-authenticate") == ["Bearer", 'Basic realm="API key"']
            basic = base64.b64encode(f"me:{KEYS['staff']}".encode()).decode()
            assert http.get("/v1/models", headers={"Authorization": f"Basic {basic}"}).status_code == 200
        assert server.post("/v1/completions", BODY).status_code == 200
        wait_until(lambda: bool(server.log.read_text()))
        [record] = records(server)
        assert record.key == "website"
        key_file.write_text(f'staff: {{key: "{KEYS["staff"]}"}}\n')
        server.service.access.use(server.service.access.read())  # as SIGHUP does
        assert server.post("/v1/completions", BODY).status_code == 401


def test_a_key_has_its_minute(serve: Serve, key_file: Path) -> None:
    key_file.write_text(f'website: {{key: "{KEYS["website"]}", requests_per_minute: 2}}\n')
    with serve(keys=key_file, key=KEYS["website"]) as server:
        answers = [server.post("/v1/completions", BODY) for _ in range(3)]
        assert [each.status_code for each in answers] == [200, 200, 429]
        assert 0 < int(answers[2].headers["retry-after"]) <= 60
        assert answers[2].json()["error"]["type"] == "rate_limit_error"
        assert server.post("/tokenize", {"prompt": "abc"}).status_code == 429


def test_what_is_not_used_is_given_back(serve: Serve, key_file: Path) -> None:
    key_file.write_text(f'website: {{key: "{KEYS["website"]}", tokens_per_minute: 100}}\n')
    with serve(keys=key_file, key=KEYS["website"]) as server:
        text = server.post("/v1/completions", {**BODY, "max_tokens": 5}).json()["choices"][0]["text"]
        early = server.post("/v1/completions", {**BODY, "max_tokens": 60, "stop": text[0]})
        assert early.json()["usage"]["completion_tokens"] < 5
        wait_until(lambda: len(records(server)) == 2)
        assert server.post("/v1/completions", {**BODY, "max_tokens": 60}).status_code == 200
        refused = server.post("/v1/completions", {**BODY, "max_tokens": 60})
        assert refused.status_code == 429 and 0 < int(refused.headers["retry-after"]) <= 60
        assert server.post("/v1/completions", {**BODY, "max_tokens": 99}).status_code == 400  # more than any minute's
        chat = {"messages": [{"role": "user", "content": "a"}]}
        assert server.post("/v1/chat/completions", chat).status_code == 429  # it asks for no more than fits


def test_a_full_queue(serve: Serve, key_file: Path) -> None:
    key_file.write_text(f'website: {{key: "{KEYS["website"]}", tokens_per_minute: 100}}\n')
    with serve(keys=key_file, key=KEYS["website"], queue=LoopLimits(max_queue=0)) as server:
        for fields in [{"prompt": "x" * 80}] * 2 + [{"prompt": "x" * 80, "echo": True, "logprobs": 0}]:
            response = server.post("/v1/completions", {**BODY, **fields})
            assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["code"] == "queue_full", (
                "what was refused has used none of the key's tokens"
            )
            wait_until(lambda: not server.service.background_tasks)


def test_a_request_of_many_prompts_does_not_fill_the_queue_for_itself(serve: Serve) -> None:
    with serve(queue=LoopLimits(max_queue=1)) as server:
        for fields in ({}, {"echo": True, "logprobs": 0}):
            response = server.post("/v1/completions", {**BODY, "prompt": ["abc", "de", "f"], **fields})
            assert response.status_code == 200 and len(response.json()["choices"]) == 3, response.text


def test_open_requests_are_limited(serve: Serve, key_file: Path) -> None:
    content, key = json.dumps(BODY).encode(), f"Authorization: Bearer {KEYS['website']}"
    with serve(keys=key_file, key=KEYS["website"], max_requests=1) as server:
        with socket.create_connection(server.address, timeout=30) as slow:
            slow.sendall(posted(content[:5], "Content-Type: application/json", key, length=len(content)))
            wait_until(lambda: server.plain.get("/ready").status_code == 503)
            refused = server.post("/v1/completions", BODY)
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "too_many_requests"
            assert refused.headers["x-content-type-options"] == "nosniff"
            assert server.plain.get("/health").status_code == 200
            assert 'refused_requests_total{status="503"} 1.0' in server.plain.get("/metrics").text
            strange = server.plain.get("/v1/models", headers={"Authorization": "Bearer unknown"})
            assert strange.status_code == 401
            slow.sendall(content[5:])
            assert slow.recv(100).startswith(b"HTTP/1.1 200 ")
        wait_until(lambda: server.post("/v1/completions", BODY).status_code == 200)


def test_limits_of_a_request(serve: Serve) -> None:
    limits = RequestLimits(max_body=2000, max_prompt_tokens=10, max_tokens=5, max_outputs=3, default_temperature=0.0)
    with serve(limits=limits) as server:
        for body, param in (
            ({"prompt": "x" * 10}, "prompt"),
            ({"max_tokens": 6}, "max_tokens"),
            ({"n": 4}, "n"),
            ({"prompt": ["x", "y"], "n": 2}, "n"),
            ({"prompt": ["x"] * 4}, "prompt"),
            ({"stop": ["x"] * 17}, "stop"),
            ({"stop": "x" * 257}, "stop"),
            ({"stop_token_ids": [5] * 17}, "stop_token_ids"),
        ):
            response = server.post("/v1/completions", {**BODY, **body})
            assert response.json()["error"]["param"] == param, response.text
        unsaid = server.post("/v1/completions", {"prompt": "abc", "ignore_eos": True}).json()
        assert unsaid["usage"]["completion_tokens"] == 5, "the default, 16, is more than the server allows"
        assert server.post("/v1/completions", {"prompt": "x" * 2000}).status_code == 413
        chat = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}], "temperature": 0})
        assert chat.status_code == 400  # the template alone has more than 10 tokens
        drawn = {key: value for key, value in BODY.items() if key != "temperature"}
        texts = {
            server.post("/v1/completions", {**drawn, "seed": seed}).json()["choices"][0]["text"] for seed in range(8)
        }
        assert len(texts) == 1  # greedy


def test_the_deadline(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = Engine.submit

    def slow(engine: Engine, request: Request) -> int:
        number = submit(engine, request)
        time.sleep(0.1)  # so that it is cancelled before its first step, which scores a whole prompt
        return number

    monkeypatch.setattr(Engine, "submit", slow)
    with serve(limits=RequestLimits(deadline=0.0)) as server:
        response = server.post("/v1/completions", {**BODY, "max_tokens": 200, "ignore_eos": True})
        assert response.status_code == 504 and response.headers["x-should-retry"] == "false"
        chat = {"messages": [{"role": "user", "content": "a"}], "stream": True, "max_tokens": 200, "ignore_eos": True}
        streamed = server.post("/v1/chat/completions", chat)
        if streamed.status_code == 200:
            assert '"code":"timeout"' in streamed.text and "[DONE]" not in streamed.text
        scored = server.post(
            "/v1/completions", {**BODY, "prompt": "x" * 200, "max_tokens": 0, "echo": True, "logprobs": 0}
        )
        assert scored.status_code == 504
        wait_until(lambda: len(records(server)) == 2 + (streamed.status_code == 200))
        assert {record.status for record in records(server)} == {"timeout"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(stream: bool, server: Any) -> None:
    wait_until(lambda: not server.service.background_tasks)
    before = len(records(server))
    body = {**BODY, "max_tokens": 240, "ignore_eos": True, "n": 8, "stream": stream}
    with socket.create_connection(server.address, timeout=30) as connection:
        connection.sendall(posted(json.dumps(body).encode()))
        wait_until(lambda: server.service.engine_loop.state().num_running > 0)
    wait_until(lambda: server.service.engine_loop.state().num_running == 0)
    wait_until(lambda: len(records(server)) == before + 1)
    assert records(server)[-1].status == "cancelled"


def test_the_exit_log_and_the_metrics(serve: Serve) -> None:
    secret = "zebra crossing"
    with serve() as server:
        body = {**BODY, "prompt": [secret, "abc"], "max_tokens": 8, "n": 2, "early_exit": {"threshold": 0.3}}
        answer = server.post("/v1/completions", body).json()
        wait_until(lambda: len(records(server)) == 2)
        first, second = records(server)
        assert [first.number, second.number] == [0, 1]
        assert first.id == f"{answer['id']}-0" and second.id == f"{answer['id']}-1"
        assert first.mode == "threshold" and first.status == "ok" and first.tokens == 16 and first.outputs == 2
        assert sum(first.tokens_by_layer.values()) == sum(first.confidences) == 16
        assert first.prompt is None and secret not in server.log.read_text()
        metrics = server.plain.get("/metrics").text
        for sample in ("generation_tokens_total", "inter_token_latency_seconds_count", "request_params_n_sum"):
            expected = {"g": 32.0, "i": 4 * 7.0, "r": 4.0}[sample[0]]
            assert f'vllm:{sample}{{engine="0",model_name="tiny"}} {expected}' in metrics
        assert server.post("/v1/completions", {**BODY, "n": 0}).status_code == 400
        assert 'megatron_ee:refused_requests_total{status="400"} 1.0' in server.plain.get("/metrics").text


def test_prompts_without_an_answer_are_recorded_too(serve: Serve) -> None:
    with serve() as server:
        for fields in ({}, {"logprobs": 0}):
            body = {**BODY, "prompt": ["abc", "de"], "max_tokens": 0, "echo": True, **fields}
            assert server.post("/v1/completions", body).status_code == 200
        wait_until(lambda: len(records(server)) == 4)
        found = records(server)
        assert [each.number for each in found] == [0, 1, 2, 3]
        assert {(each.status, each.finish_reason, each.tokens) for each in found} == {("ok", "length", 0)}
        assert [each.prompt_tokens for each in found] == [4, 3] * 2
        metrics = server.plain.get("/metrics").text
        assert 'request_success_total{engine="0",finished_reason="length",model_name="tiny"} 4.0' in metrics


def test_text_is_logged_only_if_asked_for(serve: Serve) -> None:
    with serve(text=True) as server:
        text = server.post("/v1/completions", BODY).json()["choices"][0]["text"]
        wait_until(lambda: len(records(server)) == 1)
        [record] = records(server)
        assert record.prompt == "abc" and record.text == (text,)


def test_no_prompt_in_logs_of_failures(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = " ".join(["zebra", "crossing"])  # a traceback shows lines of code

    def fail(*arguments: object, **settings: object) -> None:
        raise RuntimeError(f"failed on: {prompt}")

    monkeypatch.setattr("megatron_ee.serving.routes.generate.admit", fail)
    with serve() as server, caplog.at_level(logging.DEBUG):
        response = server.post("/v1/completions", {**BODY, "prompt": prompt})
        assert response.status_code == 500 and response.json()["error"]["code"] == "internal_error"
        assert "zebra" not in response.text
    assert "RuntimeError in request" in caplog.text and "zebra" not in caplog.text


def test_paths_stay_inside(server: Any) -> None:
    body = {"messages": [{"role": "user", "content": "refuse"}]}
    response = server.post("/v1/chat/completions", body)
    assert "roles must alternate" in response.text and "/" not in response.json()["error"]["message"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(server: Any) -> None:
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3})
    command = ["curl", "-sS", "-N", f"{server.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d"]
    whole = json.loads(subprocess.run([*command, body], capture_output=True, check=True, timeout=60).stdout)
    assert whole["usage"]["completion_tokens"] == 3
    streamed = json.dumps({**json.loads(body), "stream": True})
    lines = (
        subprocess.run([*command, streamed], capture_output=True, check=True, timeout=60).stdout.decode().split("\n\n")
    )
    assert all(line.startswith("data: ") for line in lines if line)
    assert lines[-2] == "data: [DONE]"
