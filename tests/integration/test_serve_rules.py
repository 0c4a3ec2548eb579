"""``serve`` with keys, rules, a certificate and audits, as its operator uses it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from megatron_ee.inference.released import open_released, released_digests
from megatron_ee.serving.audits.audit_file import state_path
from megatron_ee.testing.command import Command
from megatron_ee.testing.project import Project
from megatron_ee.testing.ranks import free_port

pytestmark = pytest.mark.slow
SECONDS = 60.0
WEBSITE, OFFICE = "w" * 32, "o" * 32
KEYS = f"website: {{key: {WEBSITE}}}\noffice: {{key: {OFFICE}}}\n"
RULES = "default: {task: inquiries}\nkeys: {office: {priority: important}}\nmay_choose: false\n"


@pytest.fixture(scope="module")
def certificate(project: Project, tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It promises a risk of 0.2, but all tokens after the first leave at the first exit."""
    digests = released_digests(open_released(project.model, tuned / "adapter"), show=False)
    content = {
        **{"made_by": "megatron-ee calibrate", "version": 1, "task": "inquiries", "loss": "disagreement"},
        **{"risk": 0.2, "delta": 0.1, "p_value": "betting", "n": 200, "n_fit": 50, "full_layers": 4},
        "policy": {"name": "threshold", "threshold": 2.0, "thresholds": {"1": 1e-6}},
        **digests,
        "data_sha256": "0" * 64,
        "decoding": {
            **{"chat": False, "max_tokens": 24, "sampling": {}, "dtype": "float32", "weights": "packed"},
            "quantise": "none",
        },
        **{"overlap": "none", "seed": 0, "date": "2026-01-01T00:00:00+00:00"},
    }
    path = tmp_path_factory.mktemp("certificate") / "inquiries.json"
    path.write_text(json.dumps(content))
    return path


class Desk:
    """A running server and its files."""

    def __init__(self, project: Project, tuned: Path, certificate: Path, folder: Path, *options: object) -> None:
        self.keys, self.rules, self.log = folder / "keys.yaml", folder / "rules.yaml", folder / "exits.jsonl"
        if not self.keys.exists():
            self.keys.write_text(KEYS)
            self.keys.chmod(0o600)
            self.rules.write_text(RULES)
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        fixed = ["serve", "--model", project.model, "--adapter", tuned / "adapter", "--dtype", "float32"]
        fixed += ["--kv-memory", "0.2", "--port", port, "--api-key-file", self.keys, "--rules", self.rules]
        fixed += ["--calibration", certificate, "--exit-log", self.log]
        self.command: Command = project.start(*fixed, *options)
        self.until(lambda: self.ready)

    @property
    def ready(self) -> bool:
        assert self.command.running, self.command.wait().stderr
        try:
            return httpx.get(self.url + "/health", timeout=SECONDS).status_code == 200
        except httpx.TransportError:
            return False

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def ask(self, key: str | None, prompt: str = "import os", **fields: Any) -> httpx.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        important = {"X-Priority": "important"} if fields.pop("important", False) else {}
        body = {"prompt": prompt, "max_tokens": 24, **fields}
        return httpx.post(self.url + "/v1/completions", json=body, headers=headers | important, timeout=SECONDS)

    def exits(self, key: str | None = WEBSITE, prompt: str = "import os", **fields: Any) -> Any:
        response = self.ask(key, prompt, **fields)
        assert response.status_code == 200, response.text
        return response.json()["early_exit"]

    def reload(self) -> None:
        os.kill(self.command.pid, signal.SIGHUP)

    def end(self) -> str:
        self.command.send(signal.SIGTERM)
        done = self.command.wait(SECONDS)
        assert done.returncode == 0, done.stderr
        return done.stderr


Open = Callable[..., Desk]


@pytest.fixture
def start(project: Project, tuned: Path, certificate: Path, tmp_path: Path) -> Iterator[Open]:
    """Starts servers on the same files, one after the other."""
    desks: list[Desk] = []

    def start(*options: object) -> Desk:
        desks.append(Desk(project, tuned, certificate, tmp_path, *options))
        return desks[-1]

    yield start
    for desk in desks:
        desk.command.__exit__()


def test_two_tiers_and_a_key_that_is_revoked(start: Open) -> None:
    desk = start()
    for key in (None, "x" * 32, WEBSITE[:-1]):
        assert desk.ask(key).status_code == 401
        assert httpx.get(desk.url + "/v1/exits", headers={"Authorization": f"Bearer {key}"}).status_code == 401
    early = desk.exits()
    assert early["calibration"]["status"] == "certified" and early["task"] == "inquiries"
    assert early["tokens_by_layer"]["1"] > 10
    for found in (desk.exits(important=True), desk.exits(priority="important"), desk.exits(OFFICE)):
        assert found["mode"] == "full" and found["tier"] == "important" and found["reason"] == "priority: important"
    assert desk.exits(temperature=1.0)["calibration"]["reason"].startswith("temperature: 1.0")
    refused = desk.ask(WEBSITE, early_exit={"threshold": 0.1})
    assert refused.status_code == 400 and refused.json()["error"]["param"].startswith("early_exit")

    desk.rules.write_text("default: {task: nothing}\n")
    desk.keys.write_text(f"office: {{key: {OFFICE}}}\n")
    desk.reload()
    desk.until(lambda: desk.ask(WEBSITE).status_code == 401)
    assert desk.exits(OFFICE)["tier"] == "important", "the old rules stay"
    desk.rules.write_text("default: {mode: full}\n")
    desk.reload()
    desk.until(lambda: desk.exits(OFFICE)["tier"] == "default")
    errors = desk.end()
    assert "default.task: there is no task 'nothing'" in errors
    for secret in (WEBSITE, OFFICE, "import os"):
        assert secret not in errors and secret not in desk.log.read_text()


def test_an_alarm_lasts_over_a_restart_until_it_is_ended_on_purpose(
    start: Open, project: Project, certificate: Path
) -> None:
    desk = start("--audit", "1.0")
    asked = 0
    while not (reason := desk.exits(prompt=f"def f{asked}(")["reason"] or "").startswith("drift"):
        asked += 1
        assert asked < 200, reason
    errors = desk.end()
    assert errors.count("ALARM") == 1 and "its requests now run in full mode" in errors
    state = json.loads(state_path(desk.log).read_text())
    [audits] = state["certificates"].values()
    tests = json.loads(project.run("drift", desk.log, "--calibration", certificate, "--json").stdout)
    assert tests["from_start"]["alarm"]["audit"] == audits["monitors"][0]["alarm"]
    assert tests["from_start"]["alarm"]["number"] == audits["alarms"][0]["number"]

    again = start()  # without audits
    found = again.exits()
    assert found["mode"] == "full" and found["reason"].startswith("drift") and found["calibration"]["status"] == "full"
    assert "still in full mode after the alarm" in again.end()
    reset = start("--audit", "1.0", "--reset-audits")
    assert reset.exits()["calibration"]["status"] == "certified"
    reset.end()


def test_wrong_audits_and_rules_are_refused_before_the_model_is_loaded(
    project: Project, tuned: Path, certificate: Path, tmp_path: Path
) -> None:
    keys, rules = tmp_path / "keys.yaml", tmp_path / "rules.yaml"
    keys.write_text(KEYS)
    rules.write_text("keys: {nobody: {priority: important}}\n")
    model = ["serve", "--model", project.model, "--adapter", tuned / "adapter", "--dtype", "float32"]
    certified = ["--calibration", certificate, "--exit-log", tmp_path / "exits.jsonl"]
    for mode, options, message in (
        (0o600, [*certified, "--audit", "1.5"], "--audit: must be from 0 to 1, not 1.5"),
        (0o644, ["--api-key-file", keys], "others may read it (mode 0644); run: chmod 600"),
        (0o600, ["--api-key-file", keys, "--rules", rules], "keys.nobody: there is no API key of this name"),
    ):
        keys.chmod(mode)
        done = project.run(*model, *options, check=False)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert "loading" not in done.stderr


def test_a_certificate_for_another_engine_is_named_at_the_start(start: Open) -> None:
    desk = start("--dtype", "bfloat16")
    assert desk.exits()["mode"] == "full"
    said = desk.end()
    assert "task inquiries: the certificate covers no request of this server" in said and "dtype: 'bfloat16'" in said
