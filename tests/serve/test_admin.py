from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.registry import Registry
from serve.versions import VersionId
from tests.serve.stand_in import CHAT, Keys, StandIn, StandInFleet, client_of, gateway_app
from tests.serve.test_evaluations import findings

pytestmark = pytest.mark.anyio

PROMOTE = "/admin/aliases/support/promote"
ROLLBACK = "/admin/aliases/support/rollback"
CANARY = "/admin/aliases/support/canary"
SHADOW = "/admin/aliases/support/shadow"
V1, V2 = VersionId("support", 1), VersionId("support", 2)


@pytest.fixture
def fleet() -> StandInFleet:
    return StandInFleet()


@pytest.fixture
async def admin(engine: StandIn, registry: Registry, fleet: StandInFleet) -> AsyncIterator[httpx.AsyncClient]:
    """A client with the scope admin, of a gateway that also knows a key without it, named app."""
    keys = Keys()
    keys.add("app")
    headers = keys.add("boss", scopes=("admin",))
    async with client_of(gateway_app(engine, registry, keys.text, fleet=fleet), headers=headers) as client:
        yield client


async def test_the_versions_and_where_aliases_point(admin: httpx.AsyncClient) -> None:
    versions = (await admin.get("/admin/versions")).json()["versions"]
    assert [(each["id"], each["aliases"], each["rank"]) for each in versions] == [
        ("support@v1", ["support"], 2),
        ("support@v2", [], 2),
    ]
    (entry,) = (await admin.get("/admin/aliases")).json()["aliases"].values()
    assert (entry["alias"], entry["version"], entry["number"]) == ("support", "support@v1", 1)


async def test_the_lineage_of_a_version(admin: httpx.AsyncClient) -> None:
    found = (await admin.get("/admin/versions/support@v1")).json()
    assert found["lineage"]["metrics"] == {"loss": 1.5}
    assert found["target_modules"] == ["q_proj"]
    assert set(found["files"]) == {"adapter_model.safetensors", "adapter_config.json", "chat_template.jinja"}
    assert (await admin.get("/admin/versions/support@v9")).status_code == 404
    assert (await admin.get("/admin/versions/nonsense")).status_code == 400


async def test_a_damaged_version_hides_no_other(engine: StandIn, registry: Registry) -> None:
    (Path(registry.address) / "versions/support/v2/bundle.json").write_text("{")
    reason = "support@v2 is damaged in the registry: the record: "
    async with client_of(gateway_app(engine, Registry.open(registry.address))) as client:
        listed = (await client.get("/admin/versions")).json()
        assert [version["id"] for version in listed["versions"]] == ["support@v1"]
        assert [line.startswith(reason) for line in listed["damaged"]] == [True]
        for answer in (
            await client.get("/admin/versions/support@v2"),
            await client.post("/admin/versions/support@v2/retire", json={}),
            await client.post("/admin/aliases/support/promote", json={"version": "support@v2"}),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (422, "model_refused")
            assert answer.json()["error"]["message"].startswith(reason)


async def test_promote_rollback_and_the_history(
    capsys: pytest.CaptureFixture[str], admin: httpx.AsyncClient, registry: Registry
) -> None:
    body = {"version": "support@v2", "reason": "better"}
    moved = (await admin.post(PROMOTE, json=body, headers={"x-request-id": "one"})).json()
    assert (moved["moved"], moved["entry"]["version"], moved["entry"]["by"]) == (True, "support@v2", "key boss")
    again = (await admin.post(PROMOTE, json=body)).json()
    assert (again["moved"], again["entry"], again["before"]) == (False, moved["entry"], moved["entry"])
    back = (await admin.post(ROLLBACK, json={})).json()
    assert (back["moved"], back["entry"]["version"], back["entry"]["action"]) == (True, "support@v1", "rollback")
    entry = registry.alias("support")
    assert entry is not None
    assert entry.version == V1
    history = (await admin.get("/admin/aliases/support/history")).json()["history"]
    assert [(each["action"], each["version"], each["reason"]) for each in history] == [
        ("promote", "support@v1", ""),
        ("promote", "support@v2", "better"),
        ("rollback", "support@v1", ""),
    ]
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    audits = [line for line in lines if line["kind"] == "audit"]
    assert [(line["action"], line["key"], line["moved"]) for line in audits] == [
        ("promote", "boss", True),
        ("promote", "boss", False),
        ("rollback", "boss", True),
    ]
    assert (audits[0]["request_id"], audits[0]["entry"]["reason"]) == ("one", "better")


async def test_a_new_alias(admin: httpx.AsyncClient) -> None:
    assert (await admin.post("/admin/aliases/fresh/promote", json={"version": "support@v1"})).json()["moved"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (PROMOTE, {}, 400, "version"),
        (PROMOTE, {"version": 1}, 400, "version"),
        (PROMOTE, {"version": "support@v1", "reason": 5}, 400, "reason"),
        (PROMOTE, {"version": "support@v1", "force": True}, 400, "force"),
        (PROMOTE, {"version": "support"}, 400, None),
        (PROMOTE, {"version": "support@v9"}, 404, "model"),
        (ROLLBACK, {}, 400, None),
        ("/admin/aliases/none/rollback", {}, 404, "model"),
        ("/admin/aliases/No!/promote", {"version": "support@v1"}, 400, None),
        ("/admin/aliases/No!/rollback", {}, 400, None),
        (CANARY, {"version": "support@v2"}, 400, "weight"),
        (CANARY, {"version": "support@v2", "weight": 1.01}, 400, "weight"),
        (CANARY, {"version": "support@v2", "weight": "0.5"}, 400, "weight"),
        (CANARY, {"version": "support@v2", "weight": True}, 400, "weight"),
        (CANARY, {"version": "support@v2", "share": 0.5}, 400, "weight"),
        (CANARY, {"version": "support@v2", "weight": 0}, 400, None),
        (CANARY, {"version": "support@v1", "weight": 0.5}, 400, None),
        (CANARY, {"version": "support@v9", "weight": 0.5}, 404, "model"),
        (SHADOW, {"version": "support@v2", "share": -0.5}, 400, "share"),
        ("/admin/aliases/none/shadow", {"version": "support@v2", "share": 0.5}, 404, "model"),
        ("/admin/versions/support@v1/retire", {}, 400, None),
        ("/admin/versions/support@v9/retire", {}, 404, "model"),
        ("/admin/versions/support/retire", {}, 400, None),
    ],
)
async def test_what_cannot_be_is_told(
    admin: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    response = await admin.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert (await admin.get("/admin/aliases/none/history")).status_code == 404


async def test_a_fault_in_a_body_says_what_is_allowed(admin: httpx.AsyncClient) -> None:
    async def fault(body: dict[str, Any]) -> str:
        return str((await admin.post(CANARY, json=body)).json()["error"]["message"])

    assert await fault({"version": "support@v2", "weight": 2}) == "weight: Input should be less than or equal to 1"
    several = {"version": "support@v2", "weight": 0.5, "force": True}
    assert await fault(several) == "force: no such field in this request; it takes reason, version, weight"


async def test_a_move_is_served_when_its_answer_is_there(admin: httpx.AsyncClient, fleet: StandInFleet) -> None:
    async def version(model: str = "support") -> str:
        headers = {"authorization": "Bearer raysft_app_secret"}
        response = await admin.post("/v1/chat/completions", json={**CHAT, "model": model}, headers=headers)
        return str(response.headers.get("x-raysft-version", response.status_code))

    assert await version() == "support@v1"
    moved = (await admin.post(CANARY, json={"version": "support@v2", "weight": 1})).json()
    assert await version() == "support@v2"
    assert moved["entry"]["canary"] == {"version": "support@v2", "weight": 1.0, "since": 2}
    assert (moved["before"]["number"], moved["before"]["canary"], moved["replicas"]) == (1, None, 2)
    assert moved["seconds"]["prepare"] == 0.25
    assert 0 < moved["seconds"]["flip"] < 5
    back = (await admin.post(ROLLBACK, json={})).json()
    assert await version() == "support@v1"
    assert (back["replicas"], back["seconds"]["prepare"]) == (None, 0)
    await admin.post(PROMOTE, json={"version": "support@v2"})
    assert await version() == "support@v2"
    retire = "/admin/versions/support@v1/retire"
    retired = (await admin.post(retire, json={"reason": "old"})).json()
    assert await version("support@v1") == "410"
    assert (retired["moved"], retired["version"], retired["retirement"]["reason"]) == (True, "support@v1", "old")
    assert not (await admin.post(retire, json={})).json()["moved"]
    # A rollback waits for nobody.
    assert fleet.asked == [[V2], [V2]]
    text = (await admin.get("/metrics")).text
    assert 'raysft_swap_seconds_count{alias="support",replica="0"} 3.0' in text


@pytest.mark.parametrize(("path", "share"), [(PROMOTE, {}), (CANARY, {"weight": 0.5}), (SHADOW, {"share": 0.5})])
async def test_a_version_that_a_replica_refuses_is_served_by_nobody(
    admin: httpx.AsyncClient, fleet: StandInFleet, registry: Registry, path: str, share: dict[str, float]
) -> None:
    body = {"version": "support@v2", **share}
    fleet.refused = {V2: "support@v2 cannot be served: bundle.json: rank: its rank 2 is above 1"}
    response = await admin.post(path, json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (422, "model_refused")
    assert response.json()["error"]["message"] == fleet.refused[V2]
    fleet.down = True
    response = await admin.post(path, json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
    assert len(registry.history("support")) == 1
    fleet.down, fleet.refused = False, {}
    assert (await admin.post(path, json=body)).json()["moved"]


async def test_a_trial_can_be_ended_while_no_replica_answers(
    admin: httpx.AsyncClient, fleet: StandInFleet, registry: Registry
) -> None:
    await admin.post(CANARY, json={"version": "support@v2", "weight": 0.5})
    await admin.post(SHADOW, json={"version": "support@v2", "share": 0.5})
    fleet.down = True
    assert (await admin.post(CANARY, json={"version": "support@v2", "weight": 0})).json()["entry"]["canary"] is None
    assert (await admin.post(SHADOW, json={"version": "support@v2", "share": 0})).json()["entry"]["shadow"] is None
    assert len(registry.history("support")) == 5


async def test_a_version_that_cannot_be_named_is_loaded_nowhere(
    admin: httpx.AsyncClient, fleet: StandInFleet, registry: Registry
) -> None:
    registry.retire(V2)
    for version, status in (("support@v2", 400), ("support@v9", 404)):
        assert (await admin.post(PROMOTE, json={"version": version})).status_code == status
    assert fleet.asked == []


async def test_a_version_is_prepared_without_a_move(
    admin: httpx.AsyncClient, fleet: StandInFleet, registry: Registry
) -> None:
    prepare = "/admin/versions/support@v2/prepare"
    found = (await admin.post(prepare, json={})).json()
    assert (found["version"], found["replicas"], found["seconds"], found["base"]) == ("support@v2", 2, 0.25, "base")
    assert {"ray", "torch"} <= found["software"].keys()
    assert fleet.asked == [[V2]]
    fleet.refused = {V2: "support@v2 cannot be served: it has no effect"}
    assert (await admin.post(prepare, json={})).status_code == 422
    fleet.down = True
    assert (await admin.post(prepare, json={})).status_code == 503
    assert (await admin.post("/admin/versions/support@v9/prepare", json={})).status_code == 404
    assert len(registry.history("support")) == 1


async def test_an_evaluation_is_kept_and_a_promotion_names_it(admin: httpx.AsyncClient, registry: Registry) -> None:
    evaluations = "/admin/versions/support@v2/evaluations"
    for found in (findings(), findings(passed=False)):
        kept = await admin.post(evaluations, json={"found": found.model_dump(mode="json"), "reason": "nightly"})
        assert kept.json()["passed"] is found.passed
    shown = (await admin.get("/admin/versions/support@v2")).json()["evaluations"]
    assert [(one["number"], one["by"], one["reason"], one["passed"]) for one in shown] == [
        (1, "key boss", "nightly", True),
        (2, "key boss", "nightly", False),
    ]
    assert (await admin.post(evaluations, json={"found": {"gate": "x"}})).status_code == 400
    body = {"version": "support@v2", "expected": 1}
    assert (await admin.post(PROMOTE, json={**body, "evaluation": 2})).status_code == 400
    assert (await admin.post(PROMOTE, json={**body, "expected": 0, "evaluation": 1})).status_code == 409
    assert len(registry.history("support")) == 1
    assert (await admin.post(PROMOTE, json={**body, "evaluation": 1})).json()["entry"]["evaluation"] == 1


async def test_what_the_replicas_hold(admin: httpx.AsyncClient, fleet: StandInFleet) -> None:
    await admin.post(PROMOTE, json={"version": "support@v2"})
    found = (await admin.get("/admin/replicas")).json()["replicas"]
    one = {"resident": ["support@v2"], "generations": {"support": 1}, "loads": 1, "load_seconds": 0.5, "evictions": 0}
    assert found == {"engine#a": one, "engine#b": one}
    fleet.down = True
    assert (await admin.get("/admin/replicas")).status_code == 503


async def test_the_scope_admin_is_needed_and_no_other(admin: httpx.AsyncClient, registry: Registry) -> None:
    app = {"authorization": "Bearer raysft_app_secret"}
    assert (await admin.get("/admin/versions", headers=app)).status_code == 403
    assert (await admin.post(PROMOTE, json={"version": "support@v2"}, headers=app)).status_code == 403
    assert (await admin.get("/v1/models")).status_code == 403
    assert len(registry.history("support")) == 1


async def test_a_body_must_be_said_to_be_json(admin: httpx.AsyncClient) -> None:
    for headers in ({}, {"content-type": "text/plain"}):
        response = await admin.post(PROMOTE, content=b'{"version": "support@v2"}', headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")


async def test_a_registry_that_is_gone_is_503_without_its_address(admin: httpx.AsyncClient, registry: Registry) -> None:
    shutil.rmtree(registry.address)
    response = await admin.get("/admin/versions")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "registry_unavailable")
    assert registry.address not in response.text
