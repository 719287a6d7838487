"""Prometheus metrics: vLLM's names, so that its dashboards and routers work here, and ours beside them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from foreword.serving.engine import Finish, Stats, Token
from foreword.serving.registry import Usage

MOST_LABELS = 100
"""Soft prompts with a label of their own; all others share one."""
OTHER = "other"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/classify", "/v1/load_soft_prompt", "/v1/unload_soft_prompt",
          "/v1/models", "/metrics", "/openapi.json", "/health", "/ping", "/")  # fmt: skip


class Held:
    """What engine and registry count themselves, read when metrics are asked for."""

    def __init__(self, model: str) -> None:
        self._label = [model]
        self.stats, self.usage = Stats(), Usage(0, 0, 0, 0, 0)

    def collect(self) -> Iterator[Metric]:
        """The families, as prometheus-client wants them."""
        s, u = self.stats, self.usage
        yield self._gauge("vllm:num_requests_running", "Requests in the engine's batch.", s.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait for a place in it.", s.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 1 is all.", s.kv_usage)
        yield self._counter("vllm:prefix_cache_queries", "Context tokens looked up in the cache.", s.prefix_queries)
        yield self._counter("vllm:prefix_cache_hits", "Context tokens found there.", s.prefix_hits)
        yield self._counter("foreword:engine_restarts", "Times the engine was started again.", s.restarts)
        yield self._gauge("foreword:engine_prompt_bytes", "Bytes of soft prompts in the engine.", s.prompt_bytes)
        yield self._gauge("foreword:soft_prompts_loaded", "Soft prompts loaded.", u.loaded)
        yield self._gauge("foreword:soft_prompt_bytes", "Bytes of loaded soft prompts.", u.bytes)
        yield self._counter("foreword:soft_prompt_hits", "Requests whose soft prompt was loaded.", u.hits)
        yield self._counter("foreword:soft_prompt_misses", "Requests that had to load it.", u.misses)
        yield self._counter("foreword:soft_prompt_evictions", "Soft prompts that made room.", u.evictions)

    def _gauge(self, name: str, what: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, what, labels=["model_name"])
        family.add_metric(self._label, value)
        return family

    def _counter(self, name: str, what: str, value: float) -> Metric:
        family = CounterMetricFamily(name, what, labels=["model_name"])
        family.add_metric(self._label, value)
        return family


@dataclass
class Record:
    """A text while it is written. ``last``: when the token before came, or its request."""

    first_token: Histogram
    inter_token: Histogram
    last: float
    tokens: int = 0
    finish: Finish = "abort"

    def token(self, token: Token) -> None:
        """One more; an end alone is none."""
        now = time.perf_counter()
        (self.inter_token if self.tokens else self.first_token).observe(now - self.last)
        self.last = now
        self.tokens += token.id >= 0


class Metrics:
    """All metrics of one gateway, in a registry of its own. ``model``: the plain model's name."""

    def __init__(self, model: str) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.held = Held(model)
        self._registry.register(self.held)
        self._labels: set[str] = {model}
        self._make_vllm(model)
        self._make_own()

    def _make_vllm(self, model: str) -> None:
        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, what, ["model_name"], buckets=buckets, registry=self._registry).labels(model)

        def counter(name: str, what: str) -> Counter:
            return Counter(name, what, ["model_name"], registry=self._registry).labels(model)

        self._first_token = histogram("vllm:time_to_first_token_seconds", "From request to first token.", _SECONDS)
        self._inter_token = histogram("vllm:inter_token_latency_seconds", "Between two tokens.", _STEP_SECONDS)
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From request to last token.", _SECONDS)
        self._prompt_tokens = counter("vllm:prompt_tokens", "Context tokens, virtual ones included.")
        self._generation_tokens = counter("vllm:generation_tokens", "Tokens written.")
        finished = Counter(
            "vllm:request_success", "Texts written.", ["model_name", "finished_reason"], registry=self._registry
        )
        self._finished = {reason: finished.labels(model, reason) for reason in ("stop", "length", "abort")}

    def _make_own(self) -> None:
        by_prompt = {"labelnames": ["soft_prompt"], "registry": self._registry}
        self._texts = Counter("foreword:texts", "Texts begun.", **by_prompt)  # type: ignore[arg-type]
        self._classified = Counter("foreword:classified", "Inputs classified.", **by_prompt)  # type: ignore[arg-type]
        self._tokens = Counter("foreword:generation_tokens", "Tokens written.", **by_prompt)  # type: ignore[arg-type]
        self._http = Counter("foreword:http_requests", "HTTP requests.", ["path", "status"], registry=self._registry)
        self.queued = Gauge("foreword:queued", "Texts and inputs worked on or waiting.", registry=self._registry)

    @contextmanager
    def text(self, name: str, prompt_tokens: int, waited: float) -> Iterator[Record]:
        """A soft prompt's or the plain model's text while it is written. ``waited``: seconds since its request."""
        label, began = self._label(name), time.perf_counter()
        self._texts.labels(label).inc()
        self._prompt_tokens.inc(prompt_tokens)
        record = Record(self._first_token, self._inter_token, began - waited)
        try:
            yield record
        finally:
            self._tokens.labels(label).inc(record.tokens)
            self._generation_tokens.inc(record.tokens)
            self._finished[record.finish].inc()
            self._whole.observe(waited + time.perf_counter() - began)

    def classified(self, name: str, inputs: int, tokens: int) -> None:
        """Inputs got their probabilities."""
        self._classified.labels(self._label(name)).inc(inputs)
        self._prompt_tokens.inc(tokens)

    def answered(self, path: str, status: int) -> None:
        """An HTTP request has its answer."""
        known = path if path in _PATHS else "/v1/models/{id}" if path.startswith("/v1/models/") else OTHER
        self._http.labels(known, str(status)).inc()

    def page(self, stats: Stats, usage: Usage) -> bytes:
        """All of it in Prometheus' text format."""
        self.held.stats, self.held.usage = stats, usage
        return generate_latest(self._registry)

    def _label(self, name: str) -> str:
        """The name of something that is served, or ``other`` beyond the first hundred."""
        name = name.partition("@")[0]
        if name not in self._labels:
            if len(self._labels) > MOST_LABELS:
                return OTHER
            self._labels.add(name)
        return name
