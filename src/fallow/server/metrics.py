"""What ``/metrics`` says, in the Prometheus text format, out of a registry of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from fallow.server.record import RequestRecord

if TYPE_CHECKING:
    from prometheus_client import Metric

    from fallow.engine.engine import Engine
    from fallow.meter.energy import EnergyMeter

_FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_REQUEST_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Energy:
    """Joules since the start, added up by closing and opening a measurement at every reading.

    Hardware counters wrap round after minutes, so the server reads this from time to time even if nobody asks.
    """

    def __init__(self, meter: EnergyMeter) -> None:
        self.source: str = meter.source
        self._meter = meter
        self._total = 0.0
        self._open()

    def _open(self) -> None:
        self._context = self._meter.measure()
        self._measurement = self._context.__enter__()

    def joules(self) -> float:
        self._context.__exit__(None, None, None)
        self._total += self._measurement.joules
        self._open()
        return self._total


class _EngineCollector(Collector):
    """The engine's own counts, read when somebody asks."""

    def __init__(self, engine: Engine, energy: Energy, price_per_hour: float | None) -> None:
        self._engine = engine
        self._energy = energy
        self._price_per_hour = price_per_hour
        self._started = time.monotonic()

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        gauges = (
            ("requests_running", "Sequences in the batch.", stats.running),
            ("requests_waiting", "Requests in the engine's queue.", stats.waiting),
            ("kv_pages_used", "KV pages that running sequences hold.", stats.pages_used),
            ("kv_pages_total", "KV pages there are.", stats.pages_total),
            ("kv_pages_cached", "Unused KV pages that still hold a prefix.", stats.pages_cached),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(f"fallow_{name}", text, value=value)
        counters: tuple[tuple[str, str, float], ...] = (
            ("prompt_tokens", "Tokens of prompts, cached ones too.", stats.prompt_tokens),
            ("generated_tokens", "Tokens written.", stats.generated_tokens),
            ("prefix_cached_tokens", "Prompt tokens that were found in the cache.", stats.prefix_hits),
            ("preemptions", "Sequences that were set back to free pages.", stats.preemptions),
            ("drafted_tokens", "Tokens drafted by speculation.", stats.drafted_tokens),
            ("accepted_tokens", "Drafted tokens that were accepted.", stats.accepted_tokens),
            ("engine_steps", "Steps of the engine.", stats.steps),
            ("engine_busy_seconds", "Seconds in which the engine computed.", stats.busy_seconds),
        )
        for name, text, count in counters:
            yield CounterMetricFamily(f"fallow_{name}", text, value=count)
        joules = CounterMetricFamily(
            "fallow_energy_joules", "Energy since the start; source says how it was measured.", labels=["source"]
        )
        joules.add_metric([self._energy.source], self._energy.joules())
        yield joules
        if self._price_per_hour is not None:
            cost = self._price_per_hour * (time.monotonic() - self._started) / 3600
            yield CounterMetricFamily("fallow_cost_usd", "Price of the machine since the start.", value=cost)


class Metrics:
    """Counters of the HTTP side, beside the engine's."""

    def __init__(self, engine: Engine, *, energy: Energy, price_per_hour: float | None) -> None:
        self.energy = energy
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "fallow_http_requests", "HTTP requests that have ended.", ["route", "status"], registry=registry
        )
        self._in_flight = Gauge("fallow_http_requests_in_flight", "HTTP requests under way.", registry=registry)
        self._seconds = Histogram(
            "fallow_request_seconds",
            "From a completion request's arrival to the end of its answer.",
            ["route"],
            buckets=_REQUEST_SECONDS,
            registry=registry,
        )
        self._first_token = Histogram(
            "fallow_time_to_first_token_seconds",
            "From a completion request's arrival to its first token.",
            buckets=_FIRST_TOKEN_SECONDS,
            registry=registry,
        )
        self._per_token = Histogram(
            "fallow_time_per_output_token_seconds",
            "Mean time between two tokens of a request.",
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        registry.register(_EngineCollector(engine, energy, price_per_hour))

    def begin(self) -> None:
        self._in_flight.inc()

    def end(self, record: RequestRecord) -> None:
        self._in_flight.dec()
        self._requests.labels(record.route, str(record.logged_status)).inc()
        if record.generation is None:
            return
        self._seconds.labels(record.route).observe(time.monotonic() - record.started)
        if (first := record.time_to_first_token) is not None:
            self._first_token.observe(first)
        if (per_token := record.time_per_output_token) is not None:
            self._per_token.observe(per_token)

    def text(self) -> bytes:
        return generate_latest(self._registry)
