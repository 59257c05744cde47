"""A running server, as jobs talk to it: an answer, or one line that says why there is none."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from serve.errors import BadRequestError, NotReadyError, UnknownModelError
from sft.errors import ConfigError, RaysftError

KEY_VARIABLE = "RAYSFT_API_KEY"
"""Environment variable with the API key for a server; on a command line everyone on the machine could read it."""

MOVE_S = 900.0
"""How long a move may take: every replica loads the version first."""


@contextmanager
def answered(
    client: httpx.Client, method: str, address: str, path: str, body: dict[str, Any] | None = None
) -> Iterator[httpx.Response]:
    """Sends a request and opens the answer, which can then be read as it comes.

    Args:
        client: carries key and time limits.
        method: GET or POST.
        address: the server's address, as messages name it.
        path: what is asked for, below the address.
        body: a JSON object to send.

    Raises:
        UnknownModelError: the server knows no such thing.
        BadRequestError: it refuses, with its own words.
        NotReadyError: it cannot be reached, fails, or breaks off.
    """
    try:
        with client.stream(method, f"{address.rstrip('/')}/{path}", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise _refusal(response)
            yield response
    except httpx.ConnectError as error:
        raise NotReadyError(f"nobody answers at {address} ({error}): is the server running?") from None
    except httpx.TimeoutException:
        raise NotReadyError(f"{address} sent nothing for {client.timeout.read:.0f} s: try again") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise NotReadyError(f"{address}: {error}") from None


def root(address: str) -> str:
    """A server's address without /v1, whichever way it was given."""
    return address.rstrip("/").removesuffix("/v1")


def get(address: str, key: str | None, path: str) -> dict[str, Any]:
    """Asks a raysft server what is; for arguments and errors see `post`."""
    return _asked("GET", address, key, path, None)


def post(address: str, key: str | None, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Asks a raysft server to change something.

    Args:
        address: the server's address, with or without /v1.
        key: an API key with the scope admin, where the server has keys.
        path: the route, below the address.
        body: the request's fields.

    Raises:
        UnknownModelError, BadRequestError, NotReadyError: as `answered` does.
    """
    return _asked("POST", address, key, path, body)


def _asked(method: str, address: str, key: str | None, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = httpx.Timeout(MOVE_S, connect=10.0)
    with (
        httpx.Client(headers=headers, timeout=timeout) as client,
        answered(client, method, root(address), path, body) as found,
    ):
        found.read()
        return parsed(found.text)


def read_key(file: Path | None) -> str | None:
    """The API key for a server: of a file, else of the environment, else none.

    Raises:
        ConfigError: the file cannot be read, or holds no key; never what it holds.
    """
    if file is None:
        origin, text = KEY_VARIABLE, os.environ.get(KEY_VARIABLE, "")
        if not text.strip():
            return None
    else:
        origin = str(file)
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
            raise ConfigError(origin, [f"the API key cannot be read: {reason}"]) from None
    key = text.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(origin, ["holds no API key: it must be the one line that `python -m jobs.keys create` shows"])
    return key


def message_of(body: Any) -> str:
    """The text of an error body; raises ValueError where it is none of OpenAI's shape."""
    try:
        return str(body["error"]["message"])
    except (KeyError, TypeError):
        raise ValueError("no error of OpenAI's shape") from None


def parsed(text: str) -> dict[str, Any]:
    """Reads a JSON object that a server sent.

    Raises:
        NotReadyError: it is none.
    """
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise NotReadyError(f"the endpoint sent what no OpenAI-compatible endpoint sends: {text[:80]!r}")
    return value


def _refusal(response: httpx.Response) -> RaysftError:
    try:
        message = message_of(response.json())
    except ValueError:
        message = (
            f"{response.url} answered {response.status_code}: is that the address of an OpenAI-compatible endpoint?"
        )
    if response.status_code == 404:
        return UnknownModelError(message)
    return BadRequestError(message) if response.status_code < 500 else NotReadyError(message)
