"""The chat job against a small HTTP server; tests/engine has it against the real one."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from jobs import chat
from serve.errors import BadRequestError, NotReadyError, UnknownModelError
from sft.errors import ConfigError
from tests.ports import free_port


class Endpoint(BaseHTTPRequestHandler):
    """Echoes the last message, as a stream of words."""

    asked: ClassVar[list[dict[str, Any]]] = []
    keys: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self._send(200, json.dumps({"data": [{"id": "first"}, {"id": "second"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append(body)
        self.keys.append(self.headers["authorization"])
        question = body["messages"][-1]["content"]
        if body["model"] == "unknown":
            self._send(404, json.dumps({"error": {"message": "the model 'unknown' does not exist"}}))
        elif question == "refuse":
            self._send(400, json.dumps({"error": {"message": "refused"}}))
        elif question == "page":
            self._send(502, "<html>bad gateway</html>")
        elif question == "junk":
            self._send(200, "data: {]\n\n")
        else:
            events = [{"choices": [{"delta": {"content": f"{word} "}}]} for word in question.split()]
            if question == "break":
                events.append({"error": {"message": "the engine was lost"}})  # type: ignore[dict-item]
            lines = [f"data: {json.dumps(event)}" for event in events]
            done = [] if question in ("break", "end early") else ["data: [DONE]"]
            self._send(200, "\n\n".join([": a comment", *lines, *done, ""]))

    def log_message(self, format: str, *args: object) -> None:
        """Stays quiet."""

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def url() -> Iterator[str]:
    Endpoint.asked.clear()
    Endpoint.keys.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


def converse(monkeypatch: pytest.MonkeyPatch, url: str, *lines: str) -> None:
    left = iter(lines)

    def read(_: str = "") -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert chat.main(["--url", url, "--system", "Be brief."]) == 0


def test_one_question(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    words = ["--url", url, "--model", "second", "--system", "Be brief.", "--max_tokens", "5", "--api_key_env", "MY_KEY"]
    assert chat.main([*words, "--once", "how are you"]) == 0
    assert capsys.readouterr().out == "how are you \n"
    assert Endpoint.asked == [
        {
            "model": "second",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "how are you"}],
            "stream": True,
            "temperature": 0.0,
            "max_tokens": 5,
        }
    ]
    assert Endpoint.keys == ["Bearer secret"]


def test_without_a_model_the_first_answers(url: str) -> None:
    chat.main(["--url", f"{url}/", "--once", "hi"])
    assert Endpoint.asked[0]["model"] == "first"


def test_a_conversation_keeps_its_history(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    converse(monkeypatch, url, "one", "", "refuse", "break", "two", "/reset", "three", "/quit", "never asked")
    said = [[message["content"] for message in body["messages"]] for body in Endpoint.asked]
    assert said[0] == ["Be brief.", "one"]
    assert said[3] == ["Be brief.", "one", "one ", "two"]
    assert said[4] == ["Be brief.", "three"]
    assert len(said) == 5
    assert capsys.readouterr().err == "error: refused\nerror: the answer broke off: the engine was lost\n"


def test_commands(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    converse(monkeypatch, url, "/models", "/model second", "hi", "/model third", "/what")
    out, err = capsys.readouterr()
    assert "first\nsecond\n" in out
    assert "talking to second" in out
    assert Endpoint.asked[0]["model"] == "second"
    assert err == "error: the endpoint has no model third; /models lists what it has\n"
    assert out.rstrip().endswith(f"commands: {chat.COMMANDS}")


@pytest.mark.parametrize(
    ("model", "question", "kind", "message"),
    [
        ("unknown", "hi", UnknownModelError, "'unknown' does not exist"),
        ("first", "refuse", BadRequestError, "refused"),
        ("first", "page", NotReadyError, "answered 502"),
        ("first", "junk", NotReadyError, "sent what no OpenAI-compatible endpoint sends"),
        ("first", "break", NotReadyError, "the engine was lost"),
        ("first", "end early", NotReadyError, "the connection ended early"),
    ],
)
def test_what_goes_wrong_is_one_message(
    url: str, model: str, question: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        chat.main(["--url", url, "--model", model, "--once", question])


def test_nobody_there_is_one_line_and_a_code() -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    words = [sys.executable, "-m", "jobs.chat", "--url", url, "--once", "hi"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: nobody answers at {url}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("url", ["nonsense", "ftp://host/v1", "http://[x"])
def test_an_address_that_is_none_is_told(url: str) -> None:
    with pytest.raises(NotReadyError):
        chat.main(["--url", url, "--once", "hi"])


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="max_tokens"):
        chat.main(["--max_tokens", "0", "--temprature", "1"])
