"""The chat page as a response; tests/browser has it in a browser."""

from __future__ import annotations

import base64
import hashlib
import re

import httpx
import pytest

from serve.registry import Registry
from tests.serve.stand_in import Keys, StandIn, client_of, gateway_app

pytestmark = pytest.mark.anyio


async def test_the_page_needs_no_key_and_what_it_asks_for_does(engine: StandIn, registry: Registry) -> None:
    keys = Keys()
    keys.add("app")
    async with client_of(gateway_app(engine, registry, keys.text)) as client:
        response = await client.get("/")
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        assert (await client.get("/v1/models")).status_code == 401


async def test_a_browser_may_run_what_the_page_holds_and_nothing_else(client: httpx.AsyncClient) -> None:
    response = await client.get("/")
    policy = dict(rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; "))
    for kind in ("style", "script"):
        (held,) = re.findall(f"<{kind}>(.*?)</{kind}>", response.text, re.DOTALL)
        assert policy[f"{kind}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(held.encode()).digest()).decode()}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"


async def test_the_page_loads_nothing(client: httpx.AsyncClient) -> None:
    text = (await client.get("/")).text
    assert "{{" not in text
    assert "@import" not in text
    assert "url(" not in text
    links = re.findall(r"""(?:src|href)=["']([^"']*)""", text)
    assert [link[:18] for link in links] == ["data:image/svg+xml"]
