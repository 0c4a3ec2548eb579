"""Metrics for Prometheus: under vLLM's names where vLLM has one, and what the exits do under ours.

vLLM's names are those of its ``v1/metrics/loggers.py`` and ``v1/spec_decode/metrics.py``, with its labels and buckets,
so that its dashboards work. Counters of a request move when it ends. The label ``task`` has only configured names: a
client cannot make new series.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

import megatron_ee
from megatron_ee.inference.requests import MAX_DRAFT, Completion, Request
from megatron_ee.serving.exit_record import BINS, OTHER, ExitRecord

if TYPE_CHECKING:
    from megatron_ee.evaluation.drift.monitor import DriftMonitor
    from megatron_ee.serving.engine_loop import LoopState

FINAL = "final"
"""Label of the final exit."""
FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160),
    *(640, 2560),
)
OUTPUT_TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
REQUEST_BUCKETS = (*(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680),)
SAMPLE_BUCKETS = (1, 2, 5, 10, 20)
FINISHED = {"eos": "stop", "stop": "stop", "length": "length", "context": "length", "cancelled": "abort"}
"""vLLM's names of our reasons."""
REFUSALS = (400, 401, 404, 413, 415, 429, 503)
"""HTTP statuses of refused requests."""
LABELS = ("model_name", "engine")


@dataclass(frozen=True)
class RequestFigures:
    """What metrics show of a request beyond its record in the exit log.

    Attributes:
        samples: number of outputs asked for.
        max_tokens: largest number of tokens of an output.
        most_tokens: tokens of its longest output.
        queue_time: seconds until its first output was scheduled; None if none was.
        decode_time: seconds from the first to the last token, of the output with the longest.
        intervals: seconds between two steps in which an output emitted tokens.
        drafts: rounds of speculative mode with a proposal.
        accepted_per_position: accepted proposals, by their position in a round.
    """

    samples: int
    max_tokens: int
    most_tokens: int
    queue_time: float | None
    decode_time: float
    intervals: Sequence[float]
    drafts: int
    accepted_per_position: Sequence[int]


def request_figures(request: Request, completions: Sequence[Completion], intervals: Sequence[float]) -> RequestFigures:
    """The figures of a request that has ended, from its outputs; ``intervals``: see ``Submission``."""
    statistics = [each.statistics for each in completions]
    waits = [each["queue_time"] for each in statistics if each["queue_time"] is not None]
    return RequestFigures(
        samples=request.samples,
        max_tokens=request.max_tokens,
        most_tokens=max((each["tokens"] for each in statistics), default=0),
        queue_time=min(waits, default=None),
        decode_time=max((each["decode_time"] for each in statistics), default=0.0),
        intervals=intervals,
        drafts=sum(each["drafts"] for each in statistics),
        accepted_per_position=[
            sum(counts) for counts in zip_longest(*(each["accepted_per_position"] for each in statistics), fillvalue=0)
        ],
    )


class Metrics:
    """The metrics of one server. Its methods may be called in any thread.

    Attributes:
        registry: holds them.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        exits: Sequence[int],
        num_layers: int,
        tasks: Collection[str],
        model_name: str,
        *,
        max_positions: int = 2**17,
    ) -> None:
        """Register the metrics.

        Args:
            registry: with no other ``Metrics``.
            exits: layers of the exits.
            num_layers: of the model.
            tasks: names of the configured tasks.
            model_name: as clients call the model.
            max_positions: of the model: no request has more tokens.
        """
        disable_created_metrics()
        self.registry, self._num_layers, self._model_name = registry, num_layers, model_name
        self._exits = [str(layer) for layer in sorted({*exits} - {num_layers})] + [FINAL]
        self._tasks: frozenset[str] = frozenset()
        ProcessCollector(registry=registry)
        self._register_vllm(_steps(max_positions))
        self._register_ours()
        self._confidences = _ConfidenceHistograms()
        registry.register(self._confidences)
        self._info.labels(megatron_ee.__version__, model_name).set(1)
        self._layers.set(num_layers)
        self.configure(tasks)

    def _register_vllm(self, counts: Sequence[int]) -> None:
        """The metrics that vLLM has, too. ``counts``: buckets of numbers of tokens."""
        values = (self._model_name, "0")

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"vllm:{name}", text, LABELS, registry=self.registry).labels(*values)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"vllm:{name}", text, LABELS, registry=self.registry).labels(*values)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"vllm:{name}", text, LABELS, registry=self.registry, buckets=buckets).labels(*values)

        self._running = gauge("num_requests_running", "Running sequences.")
        self._waiting = gauge("num_requests_waiting", "Waiting sequences.")
        self._kv_usage = gauge("kv_cache_usage_perc", "Share of the KV cache's budget that is used, from 0 to 1.")
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self._generation_tokens = counter("generation_tokens", "Emitted tokens.")
        self._cache_queries = counter("prefix_cache_queries", "Prompt tokens that were looked for in the KV cache.")
        self._cache_hits = counter("prefix_cache_hits", "Prompt tokens whose KV was copied from another request.")
        self._drafts = counter("spec_decode_num_drafts", "Rounds with drafted tokens.")
        self._draft_tokens = counter("spec_decode_num_draft_tokens", "Tokens that exits drafted.")
        self._accepted_tokens = counter("spec_decode_num_accepted_tokens", "Drafted tokens that the model accepted.")
        by_position = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens that the model accepted, by their position in the draft, from 0.",
            (*LABELS, "position"),
            registry=self.registry,
        )
        self._accepted_per_position = [by_position.labels(*values, str(position)) for position in range(MAX_DRAFT)]
        self._preemptions, self._num_preempted = counter("num_preemptions", "Preemptions of sequences."), 0
        finished = Counter(
            "vllm:request_success", "Requests that ended.", (*LABELS, "finished_reason"), registry=self.registry
        )
        self._success = {name: finished.labels(*values, name) for name in (*dict.fromkeys(FINISHED.values()), "error")}
        self._request_prompt = histogram("request_prompt_tokens", "Prompt tokens of a request.", counts)
        self._request_generation = histogram("request_generation_tokens", "Emitted tokens of a request.", counts)
        computed = "Prompt tokens of a request whose KV was computed, not copied."
        self._computed = histogram("request_prefill_kv_computed_tokens", computed, counts)
        self._most_tokens = histogram(
            "request_max_num_generation_tokens", "Tokens of a request's longest output.", counts
        )
        self._max_tokens = histogram("request_params_max_tokens", "Tokens that an output may have.", counts)
        self._samples = histogram("request_params_n", "Outputs of a request.", SAMPLE_BUCKETS)
        self._first_token = histogram(
            "time_to_first_token_seconds", "Time to the first token of a request.", FIRST_TOKEN_BUCKETS
        )
        self._per_token = histogram(
            "request_time_per_output_token_seconds",
            "Mean time per token after the first, of a request.",
            OUTPUT_TOKEN_BUCKETS,
        )
        self._interval = histogram(
            "inter_token_latency_seconds",
            "Time between two steps in which an output emitted tokens.",
            OUTPUT_TOKEN_BUCKETS,
        )
        self._latency = histogram(
            "e2e_request_latency_seconds", "Time from arrival to the end of a request.", REQUEST_BUCKETS
        )
        self._queue_time = histogram(
            "request_queue_time_seconds", "Time that a request waits until it is first scheduled.", REQUEST_BUCKETS
        )
        prefill = "Time from the first scheduling of a request to its first token."
        self._prefill_time = histogram("request_prefill_time_seconds", prefill, REQUEST_BUCKETS)
        decode = "Time from the first to the last token of a request."
        self._decode_time = histogram("request_decode_time_seconds", decode, REQUEST_BUCKETS)
        self._inference_time = histogram(
            "request_inference_time_seconds", "Prefill time plus decode time of a request.", REQUEST_BUCKETS
        )

    def _register_ours(self) -> None:
        """The metrics that only this server has."""

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"megatron_ee:{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"megatron_ee:{name}", text, labels, registry=self.registry)

        self._info = gauge("build_info", "1; the labels describe the server.", "version", "model_name")
        self._layers = gauge("model_layers", "Decoder layers of the model.")
        self._ready = gauge("ready", "1 while new requests are taken.")
        self._exit_tokens = counter("exit_tokens", "Tokens by the exit that emitted them.", "exit", "task")
        self._layers_per_token = Histogram(
            "megatron_ee:layers_per_token",
            "Decoder layers run per token after the first, of a request.",
            ("task",),
            buckets=layer_buckets(self._num_layers),
            registry=self.registry,
        )
        requests = "Requests that ended; coverage says what a certificate says of the answer."
        self._requests = counter("requests", requests, "task", "mode", "tier", "coverage", "status")
        self._refused = counter("refused_requests", "Refused requests by HTTP status.", "status")
        self._audits = counter("audits", "Audited requests.", "task")
        self._agreements = counter("audit_agreements", "Audited requests whose answer is full mode's.", "task")
        self._losses = counter("audit_loss", "Sum of the losses of audited requests.", "task")
        self._lost = counter("exit_log_lost_records", "Requests that the exit log could not take.")
        certificate = ("certificate", "task")
        self._risk = gauge("drift_risk", "Mean loss that a certificate allows.", *certificate)
        self._mean_loss = gauge("drift_mean_loss", "Mean loss of a certificate's audited requests.", *certificate)
        self._drift_audits = gauge("drift_audits", "Audited requests of a certificate.", *certificate)
        evidence = "Evidence against the certified risk; a test alarms where it reaches the limit."
        self._evidence = gauge("drift_evidence", evidence, *certificate, "test")
        self._limit = gauge("drift_evidence_limit", "Evidence at which the tests alarm.", *certificate)
        alarms = "Alarms so far: of the test from the start, 0 or 1; of the restarting test."
        self._alarms = gauge("drift_alarms", alarms, *certificate, "test")
        fallback = "1 while a certificate's requests run in full mode or a safer setting, after an alarm."
        self._fallback = gauge("drift_fallback", fallback, *certificate)

    def configure(self, tasks: Collection[str]) -> None:
        """Set the configured tasks anew, as after the rules were read again. Series of earlier tasks remain."""
        self._tasks = frozenset(tasks)
        for task in sorted({*tasks, OTHER}):
            for layer in self._exits:
                self._exit_tokens.labels(layer, task)
            for metric in (self._layers_per_token, self._audits, self._agreements, self._losses):
                metric.labels(task)
            self._confidences.add(task, [0] * BINS)
        for status in (*REFUSALS, OTHER):
            self._refused.labels(str(status))

    def task(self, name: str) -> str:
        """The label of a task."""
        return name if name in self._tasks else OTHER

    def request(self, record: ExitRecord, figures: RequestFigures) -> None:
        """Count a request that has ended. Its audit is counted by ``audit``."""
        task = self.task(record.task)
        coverage = "none" if record.calibration is None else record.calibration.status
        self._requests.labels(task, record.mode, record.tier, coverage, record.status).inc()
        reason = "error" if record.status == "error" else FINISHED.get(record.finish_reason or "", "abort")
        self._success[reason].inc()
        self._prompt_tokens.inc(record.prompt_tokens)
        self._cache_queries.inc(record.prompt_tokens)
        self._cache_hits.inc(record.reused_tokens)
        self._generation_tokens.inc(record.tokens)
        self._drafts.inc(figures.drafts)
        self._draft_tokens.inc(record.proposed)
        self._accepted_tokens.inc(record.accepted)
        for accepted, count in zip(self._accepted_per_position, figures.accepted_per_position, strict=False):
            accepted.inc(count)
        self._request_prompt.observe(record.prompt_tokens)
        self._request_generation.observe(record.tokens)
        self._latency.observe(record.seconds)
        first, later = record.time_to_first_token, record.tokens / record.outputs - 1
        if first is not None:
            self._first_token.observe(first)
            if later > 0:
                self._per_token.observe(max(record.seconds - first, 0.0) / later)
        self._times(first, figures)
        self._computed.observe(record.prompt_tokens - record.reused_tokens)
        self._most_tokens.observe(figures.most_tokens)
        self._max_tokens.observe(figures.max_tokens)
        self._samples.observe(figures.samples)
        if record.layers_per_token is not None:
            self._layers_per_token.labels(task).observe(record.layers_per_token)
        for layer, count in record.tokens_by_layer.items():
            self._exit_tokens.labels(FINAL if layer == str(self._num_layers) else layer, task).inc(count)
        self._confidences.add(task, record.confidences)

    def _times(self, first_token: float | None, figures: RequestFigures) -> None:
        """Show where a request's time went. ``first_token``: seconds to it; None without tokens."""
        for interval in figures.intervals:
            self._interval.observe(interval)
        if figures.queue_time is None:
            return
        self._queue_time.observe(figures.queue_time)
        if first_token is not None:
            prefill = max(first_token - figures.queue_time, 0.0)
            self._prefill_time.observe(prefill)
            self._decode_time.observe(figures.decode_time)
            self._inference_time.observe(prefill + figures.decode_time)

    def refused(self, status: int) -> None:
        """Count a refused request, by the HTTP status of its answer."""
        self._refused.labels(str(status) if status in REFUSALS else OTHER).inc()

    def lost_record(self) -> None:
        """Count a record that ``ExitLog.write`` could not write."""
        self._lost.inc()

    def loop(self, state: LoopState) -> None:
        """Show the state of the engine's loop."""
        self._running.set(state.num_running)
        self._waiting.set(state.num_waiting)
        self._kv_usage.set(state.kv_cache_usage)
        self._preemptions.inc(state.num_preempted - self._num_preempted)
        self._num_preempted = state.num_preempted
        self._ready.set(state.ready)

    def audit(self, task: str, loss: float, *, agrees: bool) -> None:
        """Count an audit.

        Args:
            task: of the request.
            loss: in [0, 1].
            agrees: whether the answer is full mode's.
        """
        label = self.task(task)
        self._audits.labels(label).inc()
        self._losses.labels(label).inc(loss)
        if agrees:
            self._agreements.labels(label).inc()

    def drift(self, certificate: str, task: str, monitor: DriftMonitor, *, fallback: bool, restarts: int) -> None:
        """Show the state of a certificate's tests, also before its first audit.

        Args:
            certificate: SHA-256 of its file.
            task: that it is for.
            monitor: of its audited requests, with the setting in force.
            fallback: its requests run in full mode or with safer thresholds, after an alarm of the test from the start.
            restarts: alarms of the restarting test, with earlier settings too.
        """
        labels = certificate[:12], self.task(task)
        self._risk.labels(*labels).set(monitor.risk)
        self._mean_loss.labels(*labels).set(monitor.mean_loss or 0.0)
        self._drift_audits.labels(*labels).set(monitor.audits)
        self._limit.labels(*labels).set(1 / monitor.alarm_level)
        self._evidence.labels(*labels, "start").set(math.exp(min(monitor.log_wealth, 700.0)))
        self._evidence.labels(*labels, "restarting").set(monitor.detector)
        # The safer setting of a fallback has new tests, which must not end the alert of the alarm before.
        self._alarms.labels(*labels, "start").set(fallback or monitor.alarm is not None)
        self._alarms.labels(*labels, "restarting").set(restarts)
        self._fallback.labels(*labels).set(fallback)

    def exposition(self, accept: str | None = None) -> tuple[bytes, str]:
        """The answer of ``/metrics`` and its content type.

        Args:
            accept: the request's header.
        """
        if "application/openmetrics-text" not in (accept or ""):
            return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4
        # The library's own choice would write vllm_num_requests_running for older Prometheus, though colons are valid.
        content = openmetrics.generate_latest(self.registry, escaping=openmetrics.ALLOWUTF8)
        return content, openmetrics.CONTENT_TYPE_LATEST


def layer_buckets(num_layers: int) -> list[float]:
    """Buckets of layers per token: a twelfth of the depth each, and 1.25, 1.5 and 2 times the depth, which rejected
    proposals can cost."""
    within = sorted({round(num_layers * part / 12, 1) for part in range(1, 13)})
    return [*within, *(num_layers * factor for factor in (1.25, 1.5, 2.0))]


def _steps(most: int) -> list[int]:
    """1, 2, 5, 10, ... up to ``most``, as vLLM has them."""
    steps = [digit * 10**power for power in range(len(str(most))) for digit in (1, 2, 5)]
    return [step for step in steps if step <= most]


class _ConfidenceHistograms(Collector):
    """``megatron_ee:exit_confidence``. A request adds counts, while the library's histogram takes value by value."""

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}

    def add(self, task: str, counts: Sequence[int]) -> None:
        """Add a request's confidences."""
        before = self._counts.get(task, [0] * BINS)
        self._counts[task] = [old + new for old, new in zip(before, counts, strict=True)]

    def collect(self) -> Iterable[HistogramMetricFamily]:
        text = "Confidences of the exits that emitted tokens, in equal bins; the sum takes the middle of each bin."
        family = HistogramMetricFamily("megatron_ee:exit_confidence", text, labels=["task"])
        for task, counts in list(self._counts.items()):
            total, buckets = 0, []
            for number, count in enumerate(counts, start=1):
                total += count
                buckets.append((f"{number / BINS:.1f}", total))
            middles = sum(count * (number + 0.5) / BINS for number, count in enumerate(counts))
            family.add_metric([task], [*buckets, ("+Inf", total)], middles)
        yield family
