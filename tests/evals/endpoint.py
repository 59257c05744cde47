"""A stand-in OpenAI endpoint on loopback, which fails on demand."""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Endpoint:
    """What it answers to a question, and what it was asked.

    `reply` gets the request's body and how often this model was asked this question before. It returns an answer's
    text, a message, a status with headers and a body, or None to hang until the test ends.
    """

    reply: Callable[[dict[str, Any], int], str | dict[str, Any] | tuple[int, dict[str, str], str] | None]
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    most_at_once: int = 0
    seen: Counter[tuple[str, str]] = field(default_factory=Counter)
    ended: threading.Event = field(default_factory=threading.Event)

    def questions(self, model: str | None = None) -> list[str]:
        return [str(one["messages"][-1]["content"]) for one in self.asked if model in (None, one["model"])]


class Server(ThreadingHTTPServer):
    """Quiet about clients that have gone, which tests of time limits have."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def served(endpoint: Endpoint) -> Iterator[Endpoint]:
    """Runs the endpoint."""
    lock = threading.Lock()
    running = 0

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal running
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                running += 1
                endpoint.most_at_once = max(endpoint.most_at_once, running)
                question = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
                what = (str(body["model"]), str(question))
                before = endpoint.seen[what]
                endpoint.seen[what] += 1
                endpoint.asked.append(body)
                endpoint.keys.add(self.headers["authorization"])
            try:
                self._answer(endpoint.reply(body, before))
            finally:
                with lock:
                    running -= 1

        def _answer(self, found: str | dict[str, Any] | tuple[int, dict[str, str], str] | None) -> None:
            if found is None:
                endpoint.ended.wait(10)
                return
            if isinstance(found, tuple):
                status, headers, text = found
            else:
                message = {"role": "assistant", "content": found} if isinstance(found, str) else found
                usage = {"prompt_tokens": 11, "completion_tokens": 3}
                status, headers = 200, {}
                text = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage})
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Stays quiet."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield endpoint
    finally:
        endpoint.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()
