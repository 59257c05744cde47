from __future__ import annotations

from typing import get_args

import pytest

from serve.door import NOBODY, Door, check_exposure, check_model, check_scope, is_local
from serve.errors import ForbiddenError, UnauthorizedError
from serve.keys import Key, KeySource, Scope, hash_key
from sft.errors import ConfigError
from tests.serve.stand_in import Keys

HERE = {"host": "127.0.0.1:8000"}


@pytest.fixture
def keys() -> Keys:
    return Keys()


def door(keys: Keys) -> Door:
    return Door(KeySource(None, keys.text))


def test_a_key_opens_the_door_from_anywhere(keys: Keys) -> None:
    headers = keys.add("app")
    assert door(keys).enter("203.0.113.5", headers).id == "app"
    assert door(keys).enter(None, {"authorization": headers["authorization"].replace("Bearer", "bearer ")})


@pytest.mark.parametrize(
    "value", ["", "Bearer", "Bearer ", "Basic abc", "raysft_app_secret", "Bearer raysft_app_wrong", "Bearer \udcff"]
)
def test_without_a_known_key_nobody_comes_in(keys: Keys, value: str) -> None:
    keys.add("app")
    with pytest.raises(UnauthorizedError) as caught:
        door(keys).enter("127.0.0.1", {**HERE, "authorization": value})
    assert "wrong" not in str(caught.value)


@pytest.mark.parametrize(
    ("scopes", "allowed"),
    [
        (("chat",), ["chat"]),
        (("admin",), ["admin", "metrics"]),
        (("metrics",), ["metrics"]),
        (("chat", "admin"), ["chat", "admin", "metrics"]),
    ],
)
def test_a_key_does_what_its_scopes_say(scopes: tuple[Scope, ...], allowed: list[Scope]) -> None:
    key = Key(id="app", hash=hash_key(""), scopes=scopes)
    for scope in get_args(Scope):
        if scope in allowed:
            check_scope(key, scope)
            check_scope(NOBODY, scope)
        else:
            with pytest.raises(ForbiddenError, match=f"the scope {' and '.join(scopes)}; this needs {scope}"):
                check_scope(key, scope)


def test_a_key_names_only_its_models(keys: Keys) -> None:
    headers = keys.add("app", models=("support",))
    key = door(keys).enter(None, headers)
    check_model(key, "support")
    with pytest.raises(ForbiddenError, match="the API key app may not use the model 'other'") as caught:
        check_model(key, "other")
    assert caught.value.param == "model"
    check_model(NOBODY, "anything")


@pytest.mark.parametrize(
    ("client", "headers"),
    [
        ("127.0.0.1", HERE),
        ("::1", {"host": "[::1]:8000"}),
        ("127.0.0.1", {"host": "localhost:8000"}),
        ("127.0.0.1", {"host": "LOCALHOST"}),
        ("127.0.0.1", {**HERE, "origin": "http://127.0.0.1:8000"}),
    ],
)
def test_without_keys_this_machine_comes_in(client: str, headers: dict[str, str]) -> None:
    assert door(Keys()).enter(client, headers) is NOBODY


@pytest.mark.parametrize(
    ("client", "headers"),
    [
        (None, HERE),
        ("203.0.113.5", HERE),
        ("203.0.113.5", {"host": "localhost"}),
        ("127.0.0.1", {}),
        ("127.0.0.1", {"host": "evil.example"}),
        ("127.0.0.1", {"host": "[::1"}),
        ("127.0.0.1", {**HERE, "origin": "https://evil.example"}),
        ("127.0.0.1", {**HERE, "origin": "http://127.0.0.1:9999"}),
        ("127.0.0.1", {**HERE, "origin": "null"}),
    ],
)
def test_without_keys_nobody_else_does(client: str | None, headers: dict[str, str]) -> None:
    with pytest.raises(ForbiddenError, match="only programs on its own machine"):
        door(Keys()).enter(client, headers)
    assert Door(KeySource(None), open_to_all=True).enter(client, headers) is NOBODY


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_a_server_without_keys_starts_on_this_machine_only(keys: Keys, host: str, local: bool) -> None:
    assert is_local(host) is local
    nothing = KeySource(None)
    if local:
        check_exposure(host, nothing, open_to_all=False)
    else:
        with pytest.raises(ConfigError, match=r"http\.host: .* set access\.keys"):
            check_exposure(host, nothing, open_to_all=False)
    check_exposure(host, nothing, open_to_all=True)
    keys.add("app")
    check_exposure(host, KeySource(None, keys.text), open_to_all=False)
