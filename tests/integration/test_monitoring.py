"""``examples/monitoring``: rules and their tests, and the dashboard's queries against a Prometheus that scrapes us."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from megatron_ee.evaluation.drift.monitor import new_monitor
from megatron_ee.inference.requests import Coverage
from megatron_ee.serving.engine_loop import LoopState
from megatron_ee.serving.exit_log import read_logs
from megatron_ee.serving.exit_record import ExitRecord, now_utc
from megatron_ee.serving.metrics import Metrics, RequestFigures
from megatron_ee.testing.project import Project
from megatron_ee.testing.ranks import free_port

MONITORING = Path(__file__).resolve().parents[2] / "examples/monitoring"
DASHBOARD = MONITORING / "grafana/dashboards/megatron_ee.json"
FIGURES = RequestFigures(
    samples=1,
    max_tokens=64,
    most_tokens=8,
    queue_time=0.01,
    decode_time=0.35,
    intervals=(0.05,) * 7,
    drafts=2,
    accepted_per_position=(3, 1),
)
NAME = re.compile(r"\b(?:(?:vllm|megatron_ee|task):|process_)\w+(?::\w+)?")


def promtool(*arguments: str) -> str:
    """Run promtool in the folder of the examples; its output."""
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("no promtool: install Debian's package prometheus")
    done = subprocess.run([tool, *arguments], cwd=MONITORING, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def busy_metrics() -> Metrics:
    """Metrics in which every series exists."""
    metrics = Metrics(CollectorRegistry(), [4, 8], 12, ["inquiries"], "tiny")
    work(metrics, 0)
    return metrics


def work(metrics: Metrics, number: int) -> None:
    """What a server would tell its metrics: requests of two tasks and modes, an audit, a refusal."""
    coverage = Coverage(status="certified", task="inquiries", certificate="c" * 64)
    common: dict[str, Any] = {"number": number, "id": f"cmpl-{number}", "time": now_utc(), "prompt_tokens": 20}
    common |= {"num_layers": 12, "seconds": 0.4, "time_to_first_token": 0.03, "finish_reason": "eos"}
    early = {"task": "inquiries", "mode": "threshold", "calibration": coverage, "tokens": 8, "layers_per_token": 6.0}
    early |= {"tokens_by_layer": {"4": 6, "12": 2}, "confidences": (0,) * 9 + (8,), "reused_tokens": 10}
    drafted = {"task": "mine", "mode": "speculative", "tokens": 8, "tokens_by_layer": {"8": 4, "12": 4}}
    drafted |= {
        "layers_per_token": 9.0,
        "rounds": 2,
        "proposed": 6,
        "accepted": 4,
        "confidences": (0,) * 5 + (8,) + (0,) * 4,
    }
    metrics.request(ExitRecord(**common, **early), FIGURES)
    metrics.request(ExitRecord(**common, **drafted), FIGURES)
    metrics.audit("inquiries", 0.0, agrees=True)
    metrics.refused(429)
    metrics.loop(LoopState(2, 1, 0.3, ready=True, num_preempted=number))
    metrics.drift("c" * 64, "inquiries", new_monitor(0.1), fallback=False, restarts=0)


def rules() -> list[dict[str, Any]]:
    content = yaml.safe_load((MONITORING / "rules.yml").read_text())
    return [rule for group in content["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def queries() -> list[tuple[str, str]]:
    """Title and query of each target of the dashboard."""
    return [(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]]


def test_the_rules_pass_promtool() -> None:
    assert "is valid" in promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "rules.yml")
    promtool("test", "rules", "rules_test.yml")


def test_every_alert_has_a_test() -> None:
    tested = {
        alert["alertname"]
        for test in yaml.safe_load((MONITORING / "rules_test.yml").read_text())["tests"]
        for alert in test.get("alert_rule_test", ())
        if alert["exp_alerts"]
    }
    assert {rule["alert"] for rule in rules() if "alert" in rule} == tested


def test_rules_and_dashboard_use_metrics_that_exist() -> None:
    families = text_string_to_metric_families(busy_metrics().exposition()[0].decode())
    known = {sample.name for family in families for sample in family.samples}
    known |= {rule["record"] for rule in rules() if "record" in rule}
    used = {name for _, expr in queries() for name in NAME.findall(expr)}
    used |= {name for rule in rules() for name in NAME.findall(rule["expr"])}
    assert len(used) > 25
    assert used <= known
    board = json.loads(DASHBOARD.read_text())
    for variable in board["templating"]["list"][1:]:
        assert set(NAME.findall(variable["query"]["query"])) <= known
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_what_compose_mounts_is_there() -> None:
    services = yaml.safe_load((MONITORING / "compose.yaml").read_text())["services"]
    mounted = [volume.split(":") for service in services.values() for volume in service["volumes"]]
    sources = {source: target for source, target, *_ in mounted if source.startswith(".")}
    assert len(sources) == 4
    assert all((MONITORING / source).exists() for source in sources)
    provider = yaml.safe_load((MONITORING / "grafana/provisioning/dashboards/megatron_ee.yaml").read_text())
    assert provider["providers"][0]["options"]["path"] == sources["./grafana/dashboards"]
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    assert sources["./rules.yml"] == f"/etc/prometheus/{config['rule_files'][0]}"


@contextmanager
def endpoint(metrics: Metrics) -> Iterator[int]:
    """Answer ``/metrics`` as the server does; the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body, content_type = metrics.exposition(self.headers.get("Accept"))
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def prometheus(directory: Path, target: int) -> Iterator[str]:
    """A Prometheus with the example's configuration that scrapes this port every half second; its address."""
    tool = shutil.which("prometheus")
    if tool is None:
        pytest.skip("no prometheus: install Debian's package prometheus")
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{target}"]
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(MONITORING / "rules.yml", directory)
    port = free_port()
    arguments = ["--config.file", "prometheus.yml", "--storage.tsdb.path", "data"]
    process = subprocess.Popen(
        [tool, *arguments, f"--web.listen-address=127.0.0.1:{port}"],
        cwd=directory,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.communicate()


def ask(url: str, **parameters: str) -> Any:
    """The data of an answer of Prometheus' API; None where it is not up yet."""
    try:
        with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode(parameters)}", timeout=10) as answer:
            return json.load(answer)["data"]
    except urllib.error.HTTPError as error:
        if error.code == 503:
            return None
        raise AssertionError(f"{parameters}: {error.read().decode()}") from None
    except urllib.error.URLError:
        return None


@pytest.mark.slow
def test_the_dashboards_queries_have_answers(tmp_path: Path) -> None:
    metrics = busy_metrics()
    filled = {
        expr: expr.replace("$__rate_interval", "10s")
        .replace("[5m]", "[10s]")
        .replace("$instance", ".*")
        .replace("$task", ".*")
        for _, expr in queries()
    }
    assert not any("$" in expr for expr in filled.values())
    values: dict[str, list[float]] = {}
    with endpoint(metrics) as port, prometheus(tmp_path, port) as url:
        until = time.monotonic() + 90
        number = 0
        while len(values) < len(filled) and time.monotonic() < until:
            number += 1
            work(metrics, number)
            time.sleep(0.3)
            for expr, query in filled.items():
                if expr not in values and (found := ask(f"{url}/api/v1/query", query=query)) and found["result"]:
                    values[expr] = [float(series["value"][1]) for series in found["result"]]
        silent = [title for title, expr in queries() if expr not in values]
        assert not silent, f"no data: {silent}"
        assert all(math.isfinite(each) for found in values.values() for each in found), values
        expected = {"Layers per token": 7.5, "Tokens that left early": 10 / 16, "Drift": 0.0, "Requests": 2.0}
        for title, expr in queries():
            if title in expected:
                assert values[expr][0] == pytest.approx(expected.pop(title), rel=0.05), title
        assert not expected
        monitor = new_monitor(0.1)
        for _ in range(40):
            monitor = monitor.updated(1.0)
        metrics.drift("c" * 64, "inquiries", monitor, fallback=True, restarts=monitor.restarts)
        firing: set[str] = set()
        while not firing and time.monotonic() < until:
            time.sleep(0.3)
            found = ask(f"{url}/api/v1/alerts") or {"alerts": []}
            firing = {each["labels"]["alertname"] for each in found["alerts"] if each["state"] == "firing"}
        assert {"MegatronEEDrift", "MegatronEEFallback"} <= firing


@pytest.mark.slow
def test_a_servers_requests_reach_prometheus_and_the_exit_log(project: Project, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "logs" / "exits.jsonl"
    adapter = project.model.with_name("monitored")
    if not adapter.exists():
        exits = ("--exits", '[{"layer": 1, "init": "copy"}]')
        project.run("convert", "--input", project.model, "--to", "adapter", *exits, "--output", adapter)
    options = ("--adapter", adapter, "--dtype", "float32", "--port", port, "--exit-log", log)
    with project.start("serve", "--model", project.model, *options) as server, prometheus(tmp_path, port) as url:
        until = time.monotonic() + 120
        while ask(f"http://127.0.0.1:{port}/v1/models") is None and time.monotonic() < until:
            time.sleep(0.3)
        for early in ({"mode": "full"}, {"mode": "threshold", "threshold": 0.001}):
            body = {"model": "model", "prompt": "import ", "max_tokens": 8, "ignore_eos": True, "early_exit": early}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions",
                json.dumps(body | {"temperature": 0}).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] == 8
        wanted = {"final": 8.0 + 1, "1": 7.0}  # the prompt's pass never exits
        query, found = "sum by (exit) (megatron_ee:exit_tokens_total)", {}
        while found != wanted and time.monotonic() < until:
            time.sleep(0.5)
            data = ask(f"{url}/api/v1/query", query=query) or {"result": []}
            found = {each["metric"]["exit"]: float(each["value"][1]) for each in data["result"]}
        assert found == wanted
        server.send(signal.SIGTERM)
        assert server.wait(60).returncode == 0
    records = list(read_logs([log]))
    assert [(each.number, each.mode, each.task, each.tokens) for each in records] == [
        (0, "full", "other", 8),
        (1, "threshold", "other", 8),
    ]
    assert "import" not in log.read_text()
