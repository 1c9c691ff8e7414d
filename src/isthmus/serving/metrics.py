"""What Prometheus reads: the engine's own counters at the moment of asking, and how long requests took."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from isthmus.serving.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """One registry per server, so that several in a process do not meet."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, engine: Engine):
        self._registry = CollectorRegistry()
        self._registry.register(_Engine(engine))
        self.requests = Counter(
            "isthmus_requests", "Requests by route and status.", ["route", "status"], registry=self._registry
        )
        self.first_token = Histogram(
            "isthmus_first_token_seconds", "From arrival to the first token.", buckets=SECONDS, registry=self._registry
        )
        self.whole = Histogram(
            "isthmus_request_seconds", "From arrival to the last token.", buckets=SECONDS, registry=self._registry
        )

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Engine(Collector):
    """The engine's counters."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self.engine
        for name, value in vars(engine.counts).items():
            yield CounterMetricFamily(f"isthmus_engine_{name}", f"{name.replace('_', ' ')}, so far", value=value)
        for name, cache in (("prefix", engine.prefixes), ("picture", engine.pictures)):
            yield CounterMetricFamily(f"isthmus_{name}_hits", f"{name}s that were known", value=cache.hits)
            yield CounterMetricFamily(f"isthmus_{name}_misses", f"{name}s that were new", value=cache.misses)
            yield GaugeMetricFamily(f"isthmus_{name}_bytes", f"bytes kept of {name}s", value=cache.bytes)
        reused = engine.prefixes.reused_tokens
        yield CounterMetricFamily("isthmus_reused_tokens", "prompt tokens that were known", value=reused)
        yield GaugeMetricFamily("isthmus_running", "answers that are being decoded", value=engine.running)
        yield GaugeMetricFamily("isthmus_waiting", "requests that wait", value=engine.waiting)
