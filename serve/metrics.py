"""Prometheus metrics of a gateway. Every set of labels is bounded: what a client makes up is never a label."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric

from serve.access_log import Record
from serve.errors import CODES

REASONS = CODES | {"bad_request", "refused_by_engine", "route_not_found", "method_not_allowed"}
RECENT = 512
"""So many versions, and aliases that moved, have series of their own; the one of the longest ago gives up its place."""

ANSWER = ("model", "version", "part")
"""What tells answers apart: the name that was asked for, the version that answered, and as what it did."""

FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
PER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
TOTAL_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
SWAP_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """The metrics of one gateway replica.

    Args:
        running: how many requests are worked on now.
    """

    def __init__(self, running: Callable[[], int] = lambda: 0) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"raysft_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"raysft_{name}_seconds", text, labels, buckets=buckets, registry=registry)

        self._requests = counter("requests", "Requests that were answered.", "route", "status", *ANSWER)
        self._errors = counter("errors", "Requests that failed, by reason.", "reason", *ANSWER)
        self._rejected = counter("rejected", "Requests that a limit turned away, by limit.", "limit")
        self._prompt_tokens = counter("prompt_tokens", "Tokens read.", *ANSWER)
        self._completion_tokens = counter("completion_tokens", "Tokens made.", *ANSWER)
        self._dropped = counter(
            "shadows_dropped", "Requests that were not copied, as too many copies ran.", "model", "version"
        )
        self._first_token = histogram(
            "time_to_first_token", "From a stream's request to its first token.", FIRST_TOKEN_S, *ANSWER
        )
        self._per_token = histogram("time_per_output_token", "Between two tokens of a stream.", PER_TOKEN_S, *ANSWER)
        self._total = histogram("request", "From a request to the end of its answer.", TOTAL_S, *ANSWER)
        self._swap = histogram("swap", "From the wish to move an alias until it was served.", SWAP_S, "alias")
        by_version = [self._requests, self._errors, self._prompt_tokens, self._completion_tokens, self._dropped]
        self._versions = _Recent("version", [*by_version, self._first_token, self._per_token, self._total])
        self._guarded = counter("guard_rollbacks", "Moves that the guard undid.", "alias", "reason")
        self._unchecked = counter("guard_checks_dropped", "Sampled answers that were not checked.", "alias")
        self._aliases = _Recent("alias", [self._swap, self._guarded, self._unchecked])
        in_flight = Gauge("raysft_requests_in_flight", "Requests that are worked on now.", registry=registry)
        in_flight.set_function(running)

    def observe(self, record: Record, route: str) -> None:
        """Counts a request, or a shadow copy, that has ended.

        Args:
            record: what became known of it; its model is one that exists wherever it has a version.
            route: the route's pattern, or empty where no route fits.
        """
        version = record.version or ""
        answer = ((record.model or ""), version, record.part or "") if version else ("", "", "")
        self._requests.labels(route, str(record.status), *answer).inc()
        if record.error:
            self._errors.labels(record.error if record.error in REASONS else "other", *answer).inc()
        if record.limit:
            self._rejected.labels(record.limit).inc()
        if not version:
            return
        self._versions.note(version)
        for counter, tokens in (
            (self._prompt_tokens, record.prompt_tokens),
            (self._completion_tokens, record.completion_tokens),
        ):
            counter.labels(*answer).inc(tokens or 0)
        for histogram, seconds in (
            (self._first_token, record.first_token_s),
            (self._per_token, record.per_token_s),
            (self._total, record.total_s),
        ):
            if seconds is not None:
                histogram.labels(*answer).observe(seconds)

    def dropped(self, model: str, version: str) -> None:
        """Counts a request of an alias that was not copied to its shadow version."""
        self._dropped.labels(model, version).inc()
        self._versions.note(version)

    def swapped(self, alias: str, seconds: float) -> None:
        """Counts a move of an alias that took so long until it was served."""
        self._swap.labels(alias).observe(seconds)
        self._aliases.note(alias)

    def guarded(self, alias: str, reason: str) -> None:
        """Counts a promotion or canary that the guard undid, by the kind of limit that was broken."""
        self._guarded.labels(alias, reason).inc()
        self._aliases.note(alias)

    def unchecked(self, alias: str) -> None:
        """Counts an answer of an alias that was drawn to be checked while too many waited."""
        self._unchecked.labels(alias).inc()
        self._aliases.note(alias)

    def families(self) -> list[Metric]:
        """All metrics with their present values, as plain data that may pass between processes."""
        return list(self._registry.collect())


class _Recent:
    """Takes the series of a label's oldest value away where there are too many values."""

    def __init__(self, label: str, metrics: Sequence[MetricWrapperBase]) -> None:
        self._label, self._metrics = label, metrics
        self._values: OrderedDict[str, None] = OrderedDict()

    def note(self, value: str) -> None:
        """Notes that a value was used."""
        self._values[value] = None
        self._values.move_to_end(value)
        if len(self._values) > RECENT:
            oldest, _ = self._values.popitem(last=False)
            for metric in self._metrics:
                metric.remove_by_labels({self._label: oldest})
