"""Which Ray is joined or started, and what it lacks."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from sft.cluster import connect, shortage


@pytest.mark.parametrize(
    ("address", "variable", "started"),
    [
        (None, None, True),
        (None, "10.0.0.1:6379", False),
        ("local", None, True),
        ("local", "10.0.0.1:6379", True),
        ("auto", None, False),
    ],
)
def test_a_ray_is_started_here_with_room_for_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, address: str | None, variable: str | None, started: bool
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: calls.append(options))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert connect(address, num_cpus=None, needed_cpus=1000) is started
    assert calls[0]["address"] == ("local" if started else "auto")
    assert calls[0].get("num_cpus") == (1001 if started else None)


@pytest.mark.parametrize(
    ("cpus", "lacking"),
    [
        ([3.0], None),
        ([1.0, 1.0, 1.0], None),
        (
            [2.0],
            "2 worker(s) with 1 CPU each, 2 CPU together and a CPU for the data; the cluster has 2 CPU on 1 node(s), "
            "which is room for 2",
        ),
        (
            [1.0],
            "2 worker(s) with 1 CPU each, 2 CPU together; the cluster has 1 CPU on 1 node(s), which is room for 1",
        ),
    ],
)
def test_workers_need_room_and_a_cpu_beside_them(
    monkeypatch: pytest.MonkeyPatch, cpus: list[float], lacking: str | None
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": count}} for count in cpus])
    assert shortage(2, {"CPU": 1}) == lacking
