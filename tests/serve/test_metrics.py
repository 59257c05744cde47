from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve import metrics
from serve.access_log import Record
from serve.errors import Failure
from serve.exposition import STATUS_AGE_S, FleetMetrics, exposition, replica_families
from serve.fleet import ReplicaStatus
from serve.metrics import Metrics
from serve.registry import Registry
from tests.serve.stand_in import CHAT, STREAM, Keys, StandIn, StandInFleet, client_of, gateway_app

ROOT = Path(__file__).parents[2]
CHAT_ROUTE = "/v1/chat/completions"


def record(**fields: Any) -> Record:
    return Record(**{"request_id": "1", "method": "POST", "path": "/x", "began": 10.0, "status": 200, **fields})


def answered(version: str, **fields: Any) -> Record:
    times = {"first_token_at": 10.5, "ended_at": 12.5, "part": "stable"}
    tokens = {"prompt_tokens": 7, "completion_tokens": 5}
    return record(version=version, **{"model": "m", **times, **tokens, **fields})


def values(text: str) -> dict[tuple[str, ...], float]:
    """Every sample but the buckets: its name and its labels' values, in the order of the labels' names."""
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def shown(*made: Metrics) -> dict[tuple[str, ...], float]:
    return values(exposition({str(index): each.families() for index, each in enumerate(made)}).decode())


def test_what_is_counted_of_an_answer() -> None:
    made = Metrics(lambda: 3)
    made.observe(answered("a@v1"), "/chat")
    assert shown(made) == {
        ("raysft_requests_total", "m", "stable", "0", "/chat", "200", "a@v1"): 1,
        ("raysft_prompt_tokens_total", "m", "stable", "0", "a@v1"): 7,
        ("raysft_completion_tokens_total", "m", "stable", "0", "a@v1"): 5,
        ("raysft_time_to_first_token_seconds_count", "m", "stable", "0", "a@v1"): 1,
        ("raysft_time_to_first_token_seconds_sum", "m", "stable", "0", "a@v1"): 0.5,
        ("raysft_time_per_output_token_seconds_count", "m", "stable", "0", "a@v1"): 1,
        ("raysft_time_per_output_token_seconds_sum", "m", "stable", "0", "a@v1"): 0.5,
        ("raysft_request_seconds_count", "m", "stable", "0", "a@v1"): 1,
        ("raysft_request_seconds_sum", "m", "stable", "0", "a@v1"): 2.5,
        ("raysft_requests_in_flight", "0"): 3,
    }


def test_an_answer_that_was_not_streamed_has_no_first_token() -> None:
    made = Metrics()
    made.observe(answered("a@v1", first_token_at=None), "/chat")
    names = {name for name, *_ in shown(made)}
    assert "raysft_request_seconds_sum" in names
    assert not {name for name in names if name.startswith("raysft_time_")}


def test_what_a_client_makes_up_is_no_label() -> None:
    made = Metrics()
    for number in range(50):
        made.observe(record(model=f"made up {number}", path=f"/{number}", status=404, error=f"code {number}"), "")
    assert shown(made) == {
        ("raysft_requests_total", "", "", "0", "", "404", ""): 50,
        ("raysft_errors_total", "", "", "other", "0", ""): 50,
        ("raysft_requests_in_flight", "0"): 0,
    }


def test_versions_make_room_for_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "RECENT", 3)
    made = Metrics()
    for version in ("v1", "v2", "v3", "v1", "v4", "v5"):
        made.observe(answered(version, error="timeout"), "/chat")
        made.dropped("m", version)
        made.swapped(version, 0.1)
    found = shown(made)
    for name in ("prompt_tokens_total", "request_seconds_count", "requests_total", "errors_total"):
        assert {labels[-1] for key, *labels in found if key == f"raysft_{name}"} == {"v1", "v4", "v5"}
    assert {labels[-1] for key, *labels in found if key == "raysft_shadows_dropped_total"} == {"v1", "v4", "v5"}
    assert {labels[0] for key, *labels in found if key == "raysft_swap_seconds_count"} == {"v1", "v4", "v5"}


def test_a_canary_can_be_compared_with_what_it_is_to_replace() -> None:
    made = Metrics()
    for part, version in (("stable", "a@v1"), ("canary", "a@v2"), ("shadow", "a@v3")):
        made.observe(answered(version, part=part, error="timeout" if part == "canary" else None), "/chat")
    made.observe(answered("a@v2", model="a@v2", part="direct"), "/chat")
    found = shown(made)
    for name in ("requests_total", "completion_tokens_total", "request_seconds_sum"):
        assert [key[1:3] for key in found if key[0] == f"raysft_{name}"] == [
            ("m", "stable"),
            ("m", "canary"),
            ("m", "shadow"),
            ("a@v2", "direct"),
        ]
    assert found["raysft_errors_total", "m", "canary", "timeout", "0", "a@v2"] == 1


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.anyio
async def test_the_replicas_are_asked_now_and_then_and_may_be_away() -> None:
    fleet, clock = StandInFleet(), Clock()
    read = FleetMetrics(fleet, clock).read
    assert set(await read()) == {"engine#a", "engine#b"}
    fleet.down = True
    assert set(await read()) == {"engine#a", "engine#b"}
    clock.now += STATUS_AGE_S
    assert await read() == {}
    fleet.down = False
    assert await read() == {}
    clock.now += STATUS_AGE_S
    assert set(await read()) == {"engine#a", "engine#b"}


def test_what_a_replica_holds() -> None:
    status = ReplicaStatus(("a@v1", "a@v2"), {"live": 7}, 5, 2.5, 3)
    assert values(exposition({"engine#a": replica_families(status)}).decode()) == {
        ("raysft_resident_versions", "engine#a"): 2,
        ("raysft_alias_generation", "live", "engine#a"): 7,
        ("raysft_version_loads_total", "engine#a"): 5,
        ("raysft_version_load_seconds_total", "engine#a"): 2.5,
        ("raysft_version_evictions_total", "engine#a"): 3,
    }


def test_replicas_are_told_apart_in_one_text() -> None:
    first, second = Metrics(lambda: 1), Metrics(lambda: 2)
    first.observe(answered("a@v1"), "/chat")
    found = shown(first, second)
    assert found["raysft_requests_in_flight", "0"] == 1
    assert found["raysft_requests_in_flight", "1"] == 2
    text = exposition({"a": pickle.loads(pickle.dumps(first.families())), "b": second.families()}).decode()
    assert text.count("# TYPE raysft_requests_in_flight gauge") == 1
    assert "_created" not in text


@pytest.mark.anyio
async def test_the_route_counts_what_happened(engine: StandIn, registry: Registry) -> None:
    keys = Keys()
    app, probe, nosy = keys.add("app", concurrency=1), keys.add("probe", scopes=("metrics",)), keys.add("nosy")
    async with client_of(gateway_app(engine, registry, keys.text, limits={"requests_per_minute": 3})) as client:
        engine.items = [*STREAM]
        await client.post(CHAT_ROUTE, json={**CHAT, "stream": True}, headers=app)
        engine.items = [Failure(400, "no", "invalid_request_error")]
        await client.post(CHAT_ROUTE, json=CHAT, headers=app)
        await client.post(CHAT_ROUTE, json={**CHAT, "model": "made up"}, headers=app)
        await client.post(CHAT_ROUTE, json=CHAT, headers=app)
        await client.post(CHAT_ROUTE, json=CHAT, headers=app)
        await client.get("/made/up", headers=app)
        await client.post(CHAT_ROUTE, json=CHAT)
        assert (await client.get("/metrics")).status_code == 401
        assert (await client.get("/metrics", headers=nosy)).status_code == 403
        response = await client.get("/metrics", headers=probe)
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = values(response.text)
    assert {key[1:]: value for key, value in found.items() if key[0] == "raysft_requests_total"} == {
        ("support", "stable", "0", CHAT_ROUTE, "200", "support@v1"): 1,
        ("support", "stable", "0", CHAT_ROUTE, "400", "support@v1"): 2,
        ("support", "stable", "0", CHAT_ROUTE, "429", "support@v1"): 1,
        ("", "", "0", CHAT_ROUTE, "404", ""): 1,
        ("", "", "0", CHAT_ROUTE, "401", ""): 1,
        ("", "", "0", "", "404", ""): 1,
        ("", "", "0", "/metrics", "401", ""): 1,
        ("", "", "0", "/metrics", "403", ""): 1,
    }
    assert found["raysft_rejected_total", "requests", "0"] == 1
    assert found["raysft_errors_total", "support", "stable", "refused_by_engine", "0", "support@v1"] == 2
    assert found["raysft_errors_total", "", "", "model_not_found", "0", ""] == 1
    assert found["raysft_prompt_tokens_total", "support", "stable", "0", "support@v1"] == 7
    assert found["raysft_time_to_first_token_seconds_count", "support", "stable", "0", "support@v1"] == 1
    assert found["raysft_resident_versions", "engine#a"] == found["raysft_resident_versions", "engine#b"] == 0


def expressions(node: Any) -> list[str]:
    """Every Prometheus expression in a dashboard, wherever it stands."""
    if isinstance(node, list):
        return [found for each in node for found in expressions(each)]
    if not isinstance(node, dict):
        return []
    own = [node[key] for key in ("expr", "definition") if isinstance(node.get(key), str)]
    return own + [found for each in node.values() for found in expressions(each)]


def test_the_dashboard_asks_only_for_what_there_is() -> None:
    dashboard = json.loads((ROOT / "serve" / "grafana.json").read_text())
    made = Metrics()
    made.observe(answered("a@v1", error="timeout", limit="tokens"), "/chat")
    made.dropped("m", "a@v2")
    made.swapped("m", 0.1)
    made.guarded("m", "error_rate")
    made.unchecked("m")
    replica = replica_families(ReplicaStatus((), {"m": 1}, 0, 0, 0))
    families = list(text_string_to_metric_families(exposition({"0": made.families(), "1": replica}).decode()))
    samples = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    asked = expressions(dashboard)
    assert len(asked) > 10
    used = set()
    for expression in asked:
        names = re.findall(r"raysft_\w+", expression)
        assert names, expression
        used |= set(names)
        for name in names:
            assert name in samples, expression
            labels = {label for by in re.findall(r"by \(([^)]*)\)", expression) for label in by.split(", ")}
            assert labels - {"le"} <= samples[name], expression
        for name, selector in re.findall(r"(raysft_\w+){([^}]*)}", expression):
            assert set(re.findall(r"(\w+)(?:=~?|!=)\"", selector)) <= samples[name], expression
    whole = {re.sub(r"_(bucket|sum|count)$", "", name) for name in samples}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in used} == whole


def test_the_dashboard_is_laid_out() -> None:
    panels = json.loads((ROOT / "serve" / "grafana.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places)
    assert all(panel["title"] and (panel["type"] == "row" or panel["description"]) for panel in panels)
