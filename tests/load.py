"""Clients that ask a running endpoint all the time, and what they heard."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

QUESTION = [{"role": "user", "content": "Tell me a short story about a fox and a lighthouse."}]
DONE = "[DONE]"


@dataclass(frozen=True, slots=True)
class Heard:
    """What one client got for one request, which was a stream.

    Rule: `status` is 0 where the connection broke before any; `whole` is false where a stream was torn, or ended with
    an error; `tells` is what a refusal says.
    """

    seconds: float
    status: int
    version: str | None = None
    text: str = ""
    whole: bool = False
    retry_after: str | None = None
    tells: str = ""

    @property
    def fault(self) -> str | None:
        """Why a client that tries again where it is told to would call this a failure; a torn stream is none."""
        if self.status == 200 or (self.status in (429, 503) and self.retry_after):
            return None
        return f"{self.status}: {self.tells}"


def ask(client: httpx.Client, model: str, **fields: Any) -> Heard:
    """Asks for a stream, greedily, and reads it to its end."""
    # Adapters of random weights may want to end at once; an answer must be long enough to tell them apart.
    body = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 8, "stream": True, **fields}
    body = {"min_tokens": body["max_tokens"], **body}
    began, status, version, text, whole = time.monotonic(), 0, None, "", False
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            status, version = answer.status_code, answer.headers.get("x-raysft-version")
            if status != 200:
                tells, retry_after = answer.read().decode()[:300], answer.headers.get("retry-after")
                return Heard(time.monotonic() - began, status, version, retry_after=retry_after, tells=tells)
            for line in answer.iter_lines():
                event = line.removeprefix("data: ")
                if event == DONE:
                    whole = True
                elif event:
                    text += "".join(_delta(choice) for choice in json.loads(event).get("choices", ()))
    except httpx.TransportError as error:
        return Heard(time.monotonic() - began, status, version, text, tells=type(error).__name__)
    return Heard(time.monotonic() - began, status, version, text, whole)


def _delta(choice: dict[str, Any]) -> str:
    return choice["delta"].get("content") or ""


class Load:
    """Clients that ask from the beginning of a `with` block to its end, each one request after the other.

    Args:
        url: the endpoint.
        models: what the clients ask, in turn.
        clients: how many there are.
        fields: of each request's body.
    """

    def __init__(self, url: str, models: Sequence[str], clients: int, **fields: Any) -> None:
        self._url, self._models, self._clients, self._fields = url, models, clients, fields
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(index,)) for index in range(clients)]
        self.heard: list[Heard] = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def more(self, count: int, seconds: float = 60) -> None:
        """Waits for so many more whole answers."""
        wanted = len(self.whole) + count
        until(lambda: len(self.whole) >= wanted, seconds)

    @property
    def whole(self) -> list[Heard]:
        return [heard for heard in self.heard if heard.whole]

    @property
    def torn(self) -> list[Heard]:
        return [heard for heard in self.heard if heard.status == 200 and not heard.whole]

    @property
    def faults(self) -> list[str]:
        return [heard.fault for heard in self.heard if heard.fault]

    def _run(self, index: int) -> None:
        model = self._models[index % len(self._models)]
        with httpx.Client(base_url=self._url, timeout=300) as client:
            while not self._over.is_set():
                heard = ask(client, model, **self._fields)
                self.heard.append(heard)
                if heard.status != 200:
                    self._over.wait(float(heard.retry_after or 1))


def until(check: Callable[[], bool], seconds: float) -> None:
    """Waits until something is so."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"not so within {seconds:.0f} s"
        time.sleep(0.1)
