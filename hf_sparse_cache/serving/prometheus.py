"""What happens on the server in numbers, for Prometheus."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client import Counter as Total
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..stats import Cause, Reason
from ..store.store import CheckpointStore
from .tickets import Cancelled, Ticket


_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Totals since the server began, in a registry of their own.

    Args:
        store: whose bytes are told.
        waiting: how many requests are in the line now.
    """

    def __init__(self, store: CheckpointStore, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        here: dict[str, Any] = {"namespace": "hf_sparse_cache", "registry": self.registry}
        self._requests = Total(
            "requests", "Answers asked for, by endpoint and outcome", ("endpoint", "outcome"), **here
        )
        self._tokens = Total("tokens", "Tokens of prompts, cached and computed, and of answers", ("kind",), **here)
        self._misses = Total("misses", "Prompts of which nothing was resumed, by cause", ("cause",), **here)
        self._first = Histogram("first_token_seconds", "From arrival to the first token", buckets=_SECONDS, **here)
        self._waited = Histogram("waiting_seconds", "From arrival to the model", buckets=_SECONDS, **here)
        self._whole = Histogram("request_seconds", "From arrival to the end", buckets=_SECONDS, **here)
        Gauge("queue_length", "Requests that wait for the model or are on it", **here).set_function(waiting)
        self.registry.register(_Stored(store))
        self.recent: deque[Ticket] = deque(maxlen=20)
        self.reasons: Counter[str] = Counter()
        self.last_of: dict[str, Reason] = {}
        self.prompt_tokens = self.cached_tokens = self.answers = 0

    def count(self, ticket: Ticket) -> None:
        """Add one answer that came to its end, whatever that was."""
        ticket.ended = time.monotonic()
        outcome = "answered" if ticket.error is None else "failed"
        outcome = "cancelled" if isinstance(ticket.error, Cancelled) else outcome
        self._requests.labels(ticket.endpoint, outcome).inc()
        self._tokens.labels("answer").inc(ticket.tokens)
        for info in ticket.requests:
            self.answers += 1
            self.prompt_tokens += info.prompt_tokens
            self.cached_tokens += info.resumed_tokens
            self._tokens.labels("prompt").inc(info.prompt_tokens)
            self._tokens.labels("cached").inc(info.resumed_tokens)
            self._tokens.labels("computed").inc(info.computed_tokens)
            if info.reason.cause is not Cause.RESUMED:
                cause = info.reason.cause.name.lower()
                self._misses.labels(cause).inc()
                self.reasons[cause] += 1
                self.last_of[cause] = info.reason
        if ticket.started is not None:
            self._waited.observe(ticket.started - ticket.arrived)
            self._whole.observe(ticket.ended - ticket.arrived)
        if ticket.first_token is not None:
            self._first.observe(ticket.first_token - ticket.arrived)
        self.recent.append(ticket)

    def text(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self.registry)


class _Stored(Collector):
    """What the store holds, read when it is asked for."""

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store

    def collect(self) -> Iterable[Metric]:
        tiers = list(self._store.tiers)
        yield self._gauge("stored_bytes", "Bytes stored", ((tier.name, tier.used_bytes) for tier in tiers))
        yield self._gauge("checkpoints", "Checkpoints stored", ((tier.name, len(tier)) for tier in tiers))
        yield self._gauge("evictions", "Checkpoints evicted so far", ((tier.name, tier.evictions) for tier in tiers))

    @staticmethod
    def _gauge(name: str, says: str, values: Iterator[tuple[str, float]]) -> Metric:
        metric = GaugeMetricFamily(f"hf_sparse_cache_{name}", says, labels=("tier",))
        for tier, value in values:
            metric.add_metric([tier], value)
        return metric
