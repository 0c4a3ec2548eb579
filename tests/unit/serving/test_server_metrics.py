"""Metrics: names as in vLLM, labels that clients cannot grow, and the figures that they show."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from megatron_ee.evaluation.drift.monitor import new_monitor
from megatron_ee.inference.requests import Coverage, Request
from megatron_ee.serving.engine_loop import LoopState
from megatron_ee.serving.exit_record import ExitRecord, now_utc
from megatron_ee.serving.metrics import Metrics, RequestFigures, layer_buckets, request_figures

# From vllm/v1/metrics/loggers.py and vllm/v1/spec_decode/metrics.py.
VLLM = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "vllm:request_success": "counter",
    "vllm:num_preemptions": "counter",
    "vllm:spec_decode_num_drafts": "counter",
    "vllm:spec_decode_num_draft_tokens": "counter",
    "vllm:spec_decode_num_accepted_tokens": "counter",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "counter",
    "vllm:request_prompt_tokens": "histogram",
    "vllm:request_generation_tokens": "histogram",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:request_time_per_output_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_prefill_time_seconds": "histogram",
    "vllm:request_decode_time_seconds": "histogram",
    "vllm:request_inference_time_seconds": "histogram",
    "vllm:request_prefill_kv_computed_tokens": "histogram",
    "vllm:request_max_num_generation_tokens": "histogram",
    "vllm:request_params_max_tokens": "histogram",
    "vllm:request_params_n": "histogram",
}
FIGURES = RequestFigures(
    samples=2,
    max_tokens=64,
    most_tokens=3,
    queue_time=0.04,
    decode_time=0.3,
    intervals=(0.01, 0.29),
    drafts=3,
    accepted_per_position=(2, 1, 1),
)


def make() -> Metrics:
    return Metrics(CollectorRegistry(), [4, 8], 12, ["inquiries", "summaries"], "tiny", max_positions=512)


def record(**changes: Any) -> ExitRecord:
    values: dict[str, Any] = {
        **{"number": 0, "id": "cmpl-0", "time": now_utc(), "task": "inquiries", "mode": "threshold"},
        **{"finish_reason": "eos", "prompt_tokens": 12, "reused_tokens": 5, "tokens": 5, "num_layers": 12},
        **{"tokens_by_layer": {"4": 3, "12": 2}, "confidences": (0,) * 8 + (1, 4), "layers_per_token": 6.5},
        **{"seconds": 0.5, "time_to_first_token": 0.1, "rounds": 2, "proposed": 6, "accepted": 4},
    }
    return ExitRecord(**{**values, **changes})


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """All samples of a scrape by name and labels, without the labels that all of vLLM's have."""
    text, content_type = metrics.exposition()
    assert content_type.startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for each in family.samples:
            labels = {key: value for key, value in each.labels.items() if key not in ("model_name", "engine")}
            found[each.name, tuple(sorted(labels.items()))] = each.value
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, tuple(sorted(labels.items()))]


def test_names_and_types_are_vllms() -> None:
    text = make().exposition()[0].decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    found = {name: family.type for name, family in families.items() if name.startswith("vllm:")}
    assert found == VLLM
    assert all(each.labels["model_name"] == "tiny" for each in families["vllm:num_requests_running"].samples)
    assert "_created" not in text
    assert all(name.startswith(("vllm:", "megatron_ee:", "process_")) for name in families)


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",  # Prometheus 2
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8,text/plain;version=1.0.0;q=0.5",  # 3
        "text/plain;version=0.0.4",
    ],
)
def test_prometheus_gets_the_names_as_they_are(accept: str) -> None:
    content, content_type = make().exposition(accept)
    assert content_type.startswith(accept.partition(";")[0])
    assert b"\nvllm:num_requests_running{" in content and b"\nmegatron_ee:exit_tokens_total{" in content
    assert content.endswith(b"# EOF\n") is accept.startswith("application")


def test_a_request_moves_the_counters() -> None:
    metrics = make()
    assert value(metrics, "megatron_ee:exit_tokens_total", exit="4", task="inquiries") == 0  # there from the start
    coverage = Coverage(status="certified", task="inquiries", certificate="c")
    metrics.request(record(calibration=coverage), FIGURES)
    metrics.request(record(tokens_by_layer={"12": 5}, mode="full", tier="important", finish_reason="length"), FIGURES)
    for name, expected in {
        "vllm:prompt_tokens_total": 24,
        "vllm:generation_tokens_total": 10,
        "vllm:prefix_cache_hits_total": 10,
        "vllm:spec_decode_num_drafts_total": 6,
        "vllm:spec_decode_num_draft_tokens_total": 12,
        "vllm:spec_decode_num_accepted_tokens_total": 8,
        "vllm:time_to_first_token_seconds_count": 2,
        "vllm:request_time_per_output_token_seconds_sum": 2 * 0.4 / 4,
        "vllm:e2e_request_latency_seconds_sum": 1.0,
        "vllm:inter_token_latency_seconds_sum": 2 * 0.3,
        "vllm:inter_token_latency_seconds_count": 4,
        "vllm:request_queue_time_seconds_sum": 2 * 0.04,
        "vllm:request_prefill_time_seconds_sum": 2 * 0.06,
        "vllm:request_decode_time_seconds_sum": 2 * 0.3,
        "vllm:request_inference_time_seconds_sum": 2 * 0.36,
        "vllm:request_prefill_kv_computed_tokens_sum": 2 * 7,
        "vllm:request_max_num_generation_tokens_sum": 2 * 3,
        "vllm:request_params_max_tokens_sum": 2 * 64,
        "vllm:request_params_n_sum": 2 * 2,
    }.items():
        assert value(metrics, name) == pytest.approx(expected), name
    per_position = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    assert [value(metrics, per_position, position=str(place)) for place in range(4)] == [4, 2, 2, 0]
    assert value(metrics, "vllm:request_success_total", finished_reason="stop") == 1
    assert value(metrics, "vllm:request_success_total", finished_reason="length") == 1
    assert value(metrics, "megatron_ee:exit_tokens_total", exit="4", task="inquiries") == 3
    assert value(metrics, "megatron_ee:exit_tokens_total", exit="final", task="inquiries") == 7
    labels = {"task": "inquiries", "status": "ok"}
    assert (
        value(metrics, "megatron_ee:requests_total", mode="threshold", tier="default", coverage="certified", **labels)
        == 1
    )
    assert value(metrics, "megatron_ee:requests_total", mode="full", tier="important", coverage="none", **labels) == 1


def test_histograms_of_confidences_and_layers() -> None:
    metrics = make()
    metrics.request(record(), FIGURES)
    metrics.request(record(layers_per_token=None, confidences=(2, *(0,) * 9)), FIGURES)
    buckets = {
        bound: value(metrics, "megatron_ee:exit_confidence_bucket", le=bound, task="inquiries")
        for bound in ("0.1", "0.8", "0.9", "1.0", "+Inf")
    }
    assert buckets == {"0.1": 2, "0.8": 2, "0.9": 3, "1.0": 7, "+Inf": 7}
    assert value(metrics, "megatron_ee:exit_confidence_sum", task="inquiries") == pytest.approx(
        2 * 0.05 + 0.85 + 4 * 0.95
    )
    assert value(metrics, "megatron_ee:layers_per_token_count", task="inquiries") == 1
    assert value(metrics, "megatron_ee:layers_per_token_bucket", le="6.0", task="inquiries") == 0
    assert value(metrics, "megatron_ee:layers_per_token_bucket", le="7.0", task="inquiries") == 1
    for depth in (1, 2, 12, 30, 80):
        bounds = layer_buckets(depth)
        assert bounds == sorted(set(bounds)) and depth in bounds and bounds[-1] == 2 * depth


def test_clients_cannot_make_series() -> None:
    metrics = make()
    before = len(samples(metrics))
    for number in range(50):
        metrics.request(record(task=f"mine-{number}"), FIGURES)
        metrics.audit(f"mine-{number}", 0.0, agrees=True)
        metrics.refused(1000 + number)
    added = len(samples(metrics)) - before
    assert added == 1  # of requests, whose labels are made when they are needed
    assert value(metrics, "megatron_ee:exit_tokens_total", exit="4", task="other") == 150
    assert value(metrics, "megatron_ee:refused_requests_total", status="other") == 50
    metrics.configure(["mine-0"])
    metrics.request(record(task="mine-0"), FIGURES)
    metrics.request(record(task="inquiries"), FIGURES)  # no longer configured
    assert value(metrics, "megatron_ee:exit_tokens_total", exit="4", task="mine-0") == 3
    assert value(metrics, "megatron_ee:exit_tokens_total", exit="4", task="inquiries") == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"status": "error", "finish_reason": None}, "error"),
        ({"status": "timeout", "finish_reason": "cancelled"}, "abort"),
        ({"status": "cancelled", "finish_reason": None}, "abort"),
        ({"finish_reason": "context"}, "length"),
    ],
)
def test_requests_that_do_not_end_by_themselves(changes: dict[str, Any], reason: str) -> None:
    metrics = make()
    never_ran = request_figures(Request(prompt="x"), (), ())
    metrics.request(record(**changes, tokens=0, time_to_first_token=None), never_ran)
    assert value(metrics, "vllm:request_success_total", finished_reason=reason) == 1
    for name in ("time_to_first_token_seconds", "request_queue_time_seconds", "request_decode_time_seconds"):
        assert value(metrics, f"vllm:{name}_count") == 0


def test_the_loop_audits_drift_and_losses_are_shown() -> None:
    metrics = make()
    for preempted in (2, 5):
        metrics.loop(LoopState(3, 2, 0.25, ready=True, num_preempted=preempted))
    assert value(metrics, "vllm:num_preemptions_total") == 5
    assert value(metrics, "vllm:num_requests_running") == 3 and value(metrics, "vllm:num_requests_waiting") == 2
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0.25 and value(metrics, "megatron_ee:ready") == 1
    for loss in (0.0, 0.0, 0.5):
        metrics.audit("inquiries", loss, agrees=not loss)
    assert value(metrics, "megatron_ee:audits_total", task="inquiries") == 3
    assert value(metrics, "megatron_ee:audit_agreements_total", task="inquiries") == 2
    assert value(metrics, "megatron_ee:audit_loss_total", task="inquiries") == 0.5
    metrics.audit("inquiries", 0.0, agrees=False)  # other tokens, as good
    assert value(metrics, "megatron_ee:audit_agreements_total", task="inquiries") == 2
    monitor = new_monitor(0.1)
    certificate = {"certificate": "c" * 12, "task": "inquiries"}
    metrics.drift("c" * 64, "inquiries", monitor, fallback=False, restarts=0)
    assert value(metrics, "megatron_ee:drift_alarms", test="start", **certificate) == 0
    for _ in range(30):
        monitor = monitor.updated(1.0)
    metrics.drift("c" * 64, "inquiries", monitor, fallback=True, restarts=monitor.restarts)
    assert value(metrics, "megatron_ee:drift_alarms", test="start", **certificate) == 1
    assert value(metrics, "megatron_ee:drift_alarms", test="restarting", **certificate) == monitor.restarts > 0
    limit = value(metrics, "megatron_ee:drift_evidence_limit", **certificate)
    assert value(metrics, "megatron_ee:drift_evidence", test="start", **certificate) > limit == 100
    assert value(metrics, "megatron_ee:drift_mean_loss", **certificate) == 1
    assert value(metrics, "megatron_ee:drift_fallback", **certificate) == 1
    metrics.drift("c" * 64, "inquiries", new_monitor(0.1), fallback=True, restarts=monitor.restarts)  # a safer setting
    assert value(metrics, "megatron_ee:drift_alarms", test="start", **certificate) == 1
    assert value(metrics, "megatron_ee:drift_alarms", test="restarting", **certificate) == monitor.restarts
    metrics.lost_record()
    assert value(metrics, "megatron_ee:exit_log_lost_records_total") == 1
