"""What Prometheus reads: the metrics of all gateways, and those of the engine replicas behind them, as one text."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from serve.fleet import Fleet, ReplicaStatus

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATUS_AGE_S = 5.0
"""Replicas are not asked again sooner than this."""
STATUS_TIMEOUT_S = 3.0

Replicas = Mapping[str, Sequence[Metric]]
"""Replica -> its metrics."""

logger = logging.getLogger("ray.serve")


class FleetMetrics:
    """The metrics of the engine replicas, as they were at most `STATUS_AGE_S` ago.

    Args:
        fleet: the replicas.
        clock: seconds, ever growing.
    """

    def __init__(self, fleet: Fleet, clock: Callable[[], float] = time.monotonic) -> None:
        self._fleet, self._clock = fleet, clock
        self._read_at = float("-inf")
        self._found: Replicas = {}

    async def read(self) -> Replicas:
        """Asks the replicas; without those that do not answer, so that a scrape never fails for them."""
        if self._clock() - self._read_at >= STATUS_AGE_S:
            try:
                async with asyncio.timeout(STATUS_TIMEOUT_S):
                    statuses = await self._fleet.statuses()
                self._found = {replica: replica_families(status) for replica, status in statuses.items()}
            except Exception as error:  # whatever it is, the gateways' own metrics matter more
                logger.warning("the metrics of the engine replicas could not be read: %r", error)
                self._found = {}
            self._read_at = self._clock()
        return self._found


def replica_families(status: ReplicaStatus) -> list[Metric]:
    """The metrics of one engine replica."""
    generations = GaugeMetricFamily(
        "raysft_alias_generation", "Entry of an alias whose versions a replica holds.", labels=("alias",)
    )
    for alias, number in status.generations.items():
        generations.add_metric((alias,), number)
    return [
        GaugeMetricFamily("raysft_resident_versions", "Versions that a replica holds.", len(status.resident)),
        generations,
        CounterMetricFamily("raysft_version_loads", "Versions that a replica loaded.", status.loads),
        CounterMetricFamily("raysft_version_load_seconds", "Time that loading took.", status.load_seconds),
        CounterMetricFamily("raysft_version_evictions", "Versions that a replica let go.", status.evictions),
    ]


def exposition(replicas: Replicas) -> bytes:
    """The text of the metrics of all replicas, each sample with its `replica`."""
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
