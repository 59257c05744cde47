"""Prometheus metrics of a gateway. Every set of labels is bounded: what a client makes up is never a label."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

from serve.access_log import Record
from serve.errors import CODES

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REASONS = CODES | {"bad_request", "refused_by_engine", "route_not_found", "method_not_allowed"}
VERSIONS = 512
"""So many versions have series of their own; the one that was not asked for longest gives its place up."""

FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
PER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
TOTAL_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """The metrics of one gateway replica.

    Args:
        running: how many requests are worked on now.
    """

    def __init__(self, running: Callable[[], int] = lambda: 0) -> None:
        self._registry = registry = CollectorRegistry()
        self._versions: OrderedDict[str, None] = OrderedDict()
        self._requests = Counter(
            "raysft_requests",
            "Requests that were answered.",
            ("route", "model", "version", "status"),
            registry=registry,
        )
        self._errors = Counter("raysft_errors", "Requests that failed, by reason.", ("reason",), registry=registry)
        self._rejected = Counter(
            "raysft_rejected", "Requests that a limit turned away, by limit.", ("limit",), registry=registry
        )
        self._prompt_tokens = Counter("raysft_prompt_tokens", "Tokens read.", ("version",), registry=registry)
        self._completion_tokens = Counter("raysft_completion_tokens", "Tokens made.", ("version",), registry=registry)
        self._first_token = Histogram(
            "raysft_time_to_first_token_seconds",
            "From a stream's request to its first token.",
            ("version",),
            buckets=FIRST_TOKEN_S,
            registry=registry,
        )
        self._per_token = Histogram(
            "raysft_time_per_output_token_seconds",
            "Between two tokens of a stream.",
            ("version",),
            buckets=PER_TOKEN_S,
            registry=registry,
        )
        self._total = Histogram(
            "raysft_request_seconds",
            "From a request to the end of its answer.",
            ("version",),
            buckets=TOTAL_S,
            registry=registry,
        )
        in_flight = Gauge("raysft_requests_in_flight", "Requests that are worked on now.", registry=registry)
        in_flight.set_function(running)

    def observe(self, record: Record, route: str) -> None:
        """Counts a request that has ended.

        Args:
            record: what became known of it; its model is one that exists wherever it has a version.
            route: the route's pattern, or empty where no route fits.
        """
        version = record.version or ""
        self._requests.labels(route, (record.model or "") if version else "", version, str(record.status)).inc()
        if record.error:
            self._errors.labels(record.error if record.error in REASONS else "other").inc()
        if record.limit:
            self._rejected.labels(record.limit).inc()
        if not version:
            return
        self._make_room(version)
        for counter, tokens in (
            (self._prompt_tokens, record.prompt_tokens),
            (self._completion_tokens, record.completion_tokens),
        ):
            counter.labels(version).inc(tokens or 0)
        for histogram, seconds in (
            (self._first_token, record.first_token_s),
            (self._per_token, record.per_token_s),
            (self._total, record.total_s),
        ):
            if seconds is not None:
                histogram.labels(version).observe(seconds)

    def families(self) -> list[Metric]:
        """All metrics with their present values, as plain data that may pass between processes."""
        return list(self._registry.collect())

    def _make_room(self, version: str) -> None:
        self._versions[version] = None
        self._versions.move_to_end(version)
        if len(self._versions) > VERSIONS:
            oldest, _ = self._versions.popitem(last=False)
            for metric in (
                self._requests,
                self._prompt_tokens,
                self._completion_tokens,
                self._first_token,
                self._per_token,
                self._total,
            ):
                metric.remove_by_labels({"version": oldest})


def exposition(replicas: Mapping[str, Sequence[Metric]]) -> bytes:
    """The text that Prometheus reads, of all replicas, each sample with its `replica`.

    Args:
        replicas: replica -> its metrics.
    """
    merged: dict[str, Metric] = {}
    for replica, families in replicas.items():
        for family in families:
            into = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            into.samples += [
                sample._replace(labels={**sample.labels, "replica": replica})
                for sample in family.samples
                if not sample.name.endswith("_created")
            ]

    class Merged:
        def collect(self) -> Iterable[Metric]:
            return merged.values()

    return generate_latest(Merged())
