"""Who comes in: a request's headers -> the key that it is served under.

Without any key configured the server answers this machine only. A web page that someone on this machine looks at is
not this machine's: a browser names the page in `Origin`, and a name that was bent to this machine in `Host`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from serve.errors import ForbiddenError, UnauthorizedError
from serve.keys import Key, KeySource, Scope, hash_key
from sft.errors import ConfigError

NOBODY = Key(id="nobody", hash=hash_key(""), scopes=("chat", "admin", "metrics"))
"""What everyone is served under where no keys are configured."""


class Door:
    """Lets requests in, or not.

    Args:
        keys: the keys in force.
        open_to_all: answer other machines even where no keys are configured.
    """

    def __init__(self, keys: KeySource, *, open_to_all: bool = False) -> None:
        self._keys, self._open_to_all = keys, open_to_all

    def enter(self, client: str | None, headers: Mapping[str, str]) -> Key:
        """Finds the key of a request.

        Args:
            client: the address that the request comes from.
            headers: the request's headers, by any case.

        Raises:
            UnauthorizedError: there is no key, or an unknown one.
            ForbiddenError: keys are not configured, and the request is not this machine's.
        """
        if not self._keys.configured:
            if not self._open_to_all:
                _check_local(client, headers)
            return NOBODY
        kind, _, text = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not text.strip():
            raise UnauthorizedError("no API key: send the header `Authorization: Bearer KEY`")
        key = self._keys.ring().find(text.strip())
        if key is None:
            raise UnauthorizedError("the API key is unknown")
        return key


def check_scope(key: Key, scope: Scope) -> None:
    """Checks that a key may use a route; metrics are open to admins, too.

    Raises:
        ForbiddenError: it may not.
    """
    if scope not in key.scopes and not (scope == "metrics" and "admin" in key.scopes):
        raise ForbiddenError(f"the API key {key.id} has the scope {' and '.join(key.scopes)}; this needs {scope}")


def check_model(key: Key, model: str) -> None:
    """Checks that a key may use a model, whether or not there is such a model.

    Raises:
        ForbiddenError: it may not.
    """
    if not key.may_use(model):
        shown = model if len(model) <= 80 else f"{model[:80]}..."
        raise ForbiddenError(f"the API key {key.id} may not use the model {shown!r}", "model")


def check_exposure(host: str, keys: KeySource, *, open_to_all: bool) -> None:
    """Checks that a server without keys listens on this machine only, before it starts.

    Raises:
        ConfigError: it would not.
    """
    if not (keys.configured or open_to_all or is_local(host)):
        fault = f"http.host: {host} is reachable from other machines, and no API keys are configured"
        remedy = "set access.keys (see `python -m jobs.keys create --help`), or access.open to serve everyone"
        raise ConfigError("access", [f"{fault}; {remedy}"])


def is_local(host: str) -> bool:
    """Whether a host's name or address means this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _check_local(client: str | None, headers: Mapping[str, str]) -> None:
    host, origin = headers.get("host", "").lower(), headers.get("origin")
    try:
        local = client is not None and is_local(client) and is_local(urlsplit(f"//{host}").hostname or "")
        own_page = origin is None or urlsplit(origin).netloc.lower() == host
    except ValueError:  # no address at all
        local = own_page = False
    if not (local and own_page):
        raise ForbiddenError("this server has no API keys, so it answers only programs on its own machine")


def client_of(scope: Mapping[str, Any]) -> str | None:
    """The address that a request comes from, of an ASGI scope."""
    client = scope.get("client")
    return str(client[0]) if client else None
