"""`jobs.adapters --endpoint` against a gateway behind a real HTTP server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from jobs import adapters
from jobs.endpoint import KEY_VARIABLE
from serve.errors import BadRequestError, NotReadyError, UnknownModelError
from serve.registry import Registry
from serve.versions import VersionId
from sft.errors import ConfigError
from tests.ports import free_port
from tests.serve.served import served
from tests.serve.stand_in import Keys, StandIn, StandInFleet, gateway_app

pytestmark = pytest.mark.anyio

V2 = VersionId("support", 2)


@pytest.fixture
def fleet() -> StandInFleet:
    return StandInFleet()


@pytest.fixture
async def url(
    engine: StandIn, registry: Registry, fleet: StandInFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[str]:
    """The address of a gateway with keys; the one of the environment may do everything."""
    keys = Keys()
    keys.add("app")
    monkeypatch.setenv(KEY_VARIABLE, keys.add("boss", scopes=("admin",))["authorization"].removeprefix("Bearer "))
    log = {"access_file": str(tmp_path / "access.jsonl")}
    async with served(gateway_app(engine, registry, keys.text, fleet=fleet, log=log)) as port:
        yield f"http://127.0.0.1:{port}"


async def job(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert await asyncio.to_thread(adapters.main, words) == 0
    return capsys.readouterr().out


async def test_every_move_goes_through_the_server(
    capsys: pytest.CaptureFixture[str], url: str, registry: Registry, fleet: StandInFleet
) -> None:
    to = ("--endpoint", url)
    text = await job(capsys, "canary", "support@v2", "--alias", "support", "--weight", "0.5", *to)
    one, two, three = text.splitlines()
    assert one == "support serves support@v1 (canary support@v2 50 %) since entry 2, canary"
    assert two == "before: support@v1, entry 1"
    assert three.startswith("2 replicas hold it after 0.25 s; served 0.")
    text = await job(capsys, "rollback", "support", "--reason", "worse", "--endpoint", f"{url}/v1/")
    assert text.splitlines()[2].startswith("served after 0.")
    words = ["shadow", "support@v2", "--alias", "support", "--share", "0.25", "--json"]
    data: dict[str, Any] = json.loads(await job(capsys, *words, *to))
    assert (data["number"], data["shadow"]["share"], data["by"], data["replicas"]) == (4, 0.25, "key boss", 2)
    text = await job(capsys, "promote", "support@v2", *to)
    assert text.startswith("support serves support@v2 since entry 5, promote\n")
    assert (await job(capsys, "retire", "support@v1", *to)).startswith("support@v1 is retired: it cannot be")
    assert (await job(capsys, "retire", "support@v1", *to)).startswith("support@v1 was retired already, by key boss on")
    assert [(entry.action, entry.reason) for entry in registry.history("support")][1:3] == [
        ("canary", ""),
        ("rollback", "worse"),
    ]
    assert fleet.asked == [[V2]] * 3


async def test_the_key_can_come_from_a_file_and_is_never_told(
    capsys: pytest.CaptureFixture[str], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE)
    file = tmp_path / "key"
    words = ["promote", "support@v2", "--endpoint", url]
    with pytest.raises(BadRequestError, match="no API key: send the header"):
        await job(capsys, *words)
    words += ["--key_file", str(file)]
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        await job(capsys, *words)
    for text in ("", "two\nlines", "tw\u00f6"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="holds no API key") as caught:
            await job(capsys, *words)
        assert not text or text not in str(caught.value)
    file.write_text("raysft_app_secret\n")
    with pytest.raises(BadRequestError, match="the API key app has the scope chat; this needs admin"):
        await job(capsys, *words)
    file.write_text("raysft_boss_secret\n")
    assert (await job(capsys, *words)).startswith("support serves support@v2")


async def test_what_the_server_refuses_is_one_message(
    capsys: pytest.CaptureFixture[str], url: str, fleet: StandInFleet, registry: Registry
) -> None:
    to = ("--endpoint", url)
    for words, kind, message in (
        (["promote", "support@v9"], UnknownModelError, "support@v9"),
        (["rollback", "nothing"], UnknownModelError, "there is no alias nothing"),
        (["rollback", "../versions"], BadRequestError, "no adapter or alias name"),
        (["canary", "support@v2", "--alias", "support", "--weight", "2"], BadRequestError, "weight 2.0: must be"),
        (["canary", "support@v2", "--alias", "support", "--weight", "nan"], BadRequestError, "weight nan: must be"),
        (["retire", "support@v1"], BadRequestError, "it is the stable version of support"),
    ):
        with pytest.raises(kind, match=message):
            await job(capsys, *words, *to)
    fleet.refused = {V2: "support@v2 cannot be served: too large"}
    with pytest.raises(BadRequestError, match=r"^support@v2 cannot be served: too large$"):
        await job(capsys, "promote", "support@v2", *to)
    fleet.down = True
    with pytest.raises(NotReadyError, match="no replica answers"):
        await job(capsys, "promote", "support@v2", *to)
    with pytest.raises(NotReadyError, match="nobody answers at"):
        await job(capsys, "promote", "support@v2", "--endpoint", f"http://127.0.0.1:{free_port()}")
    assert len(registry.history("support")) == 1
