from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from serve.registry import Registry
from serve.versions import VersionId
from tests.serve.stand_in import Keys, StandIn, client_of, gateway_app

pytestmark = pytest.mark.anyio

PROMOTE = "/admin/aliases/support/promote"
ROLLBACK = "/admin/aliases/support/rollback"


@pytest.fixture
async def admin(engine: StandIn, registry: Registry) -> AsyncIterator[httpx.AsyncClient]:
    """A client with the scope admin, of a gateway that also knows a key without it, named app."""
    keys = Keys()
    keys.add("app")
    headers = keys.add("boss", scopes=("admin",))
    async with client_of(gateway_app(engine, registry, keys.text), headers=headers) as client:
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
    assert entry.version == VersionId("support", 1)
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
    ],
)
async def test_what_cannot_be_is_told(
    admin: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    response = await admin.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert (await admin.get("/admin/aliases/none/history")).status_code == 404


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
