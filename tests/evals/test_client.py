from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from evals import client as module
from evals.client import Client, Request
from evals.errors import EvaluationError
from evals.records import Record
from tests.evals.endpoint import Endpoint, served
from tests.ports import free_port


def ask(url: str, *questions: str, tries: int = 3, timeout_s: float = 5.0, concurrency: int = 2) -> list[Record]:
    requests = [
        Request(Record("s", "m", question, 0, "f"), {"messages": [{"role": "user", "content": question}]})
        for question in questions
    ]

    async def run() -> list[Record]:
        client = Client(url, "sk-key", timeout_s=timeout_s, tries=tries, backoff_s=0.01)
        try:
            return [record async for record in client.ask_all(requests, concurrency)]
        finally:
            await client.close()

    return sorted(asyncio.run(run()), key=lambda record: record.row)


def test_answers_tokens_and_the_key() -> None:
    with served(Endpoint(lambda body, _: f"You said {body['messages'][-1]['content']}.")) as endpoint:
        (record,) = ask(endpoint.url, "hi")
    assert (record.text, record.failure, record.tries, record.finish_reason) == ("You said hi.", "", 1, "stop")
    assert (record.prompt_tokens, record.completion_tokens) == (11, 3)
    assert endpoint.keys == {"Bearer sk-key"}
    assert endpoint.asked[0]["model"] == "m"


def test_reasoning_and_half_characters() -> None:
    def reply(body: dict[str, Any], _: int) -> dict[str, Any]:
        name = body["messages"][-1]["content"]
        field = "reasoning" if name == "b" else "reasoning_content"
        return {"content": None if name == "empty" else "ok \ud83d", field: "Hm."}

    with served(Endpoint(reply)) as endpoint:
        found = {record.row: (record.text, record.reasoning) for record in ask(endpoint.url, "a", "b", "empty")}
    assert found == {"a": ("ok ?", "Hm."), "b": ("ok ?", "Hm."), "empty": ("", "Hm.")}


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {"Retry-After": "0"}, ""),
        (500, {}, "oops"),
        (503, {}, "{}"),
        (200, {}, "<html>"),
        (200, {}, '{"choices": []}'),
    ],
)
def test_what_may_pass_is_asked_again(trouble: tuple[int, dict[str, str], str]) -> None:
    with served(Endpoint(lambda _, before: "fine" if before == 2 else trouble)) as endpoint:
        (record,) = ask(endpoint.url, "hi")
    assert (record.text, record.failure, record.tries) == ("fine", "", 3)


@pytest.mark.parametrize(
    ("trouble", "failure", "tries"),
    [
        ((429, {}, '{"error": {"message": "slow down"}}'), "http_429", 2),
        ((500, {}, "oops"), "http_500", 2),
        ((400, {}, '{"error": {"message": "too long"}}'), "http_400", 1),
        ((429, {"Retry-After": "3600"}, ""), "http_429", 1),
        ((200, {}, '{"choices": [{"message": {"content": 7}}]}'), "broken_answer", 2),
        ((200, {}, "[]"), "broken_answer", 2),
    ],
)
def test_what_does_not_pass_is_counted_with_its_reason(
    trouble: tuple[int, dict[str, str], str], failure: str, tries: int
) -> None:
    with served(Endpoint(lambda *_: trouble)) as endpoint:
        (record,) = ask(endpoint.url, "hi", tries=2)
    assert (record.failure, record.tries, record.text) == (failure, tries, "")
    assert len(endpoint.asked) == tries


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(form: str) -> None:
    asked: list[float] = []

    def reply(*_: Any) -> Any:
        asked.append(time.monotonic())
        later = datetime.now(UTC) + timedelta(seconds=1.5)  # a date has whole seconds
        value = "0.4" if form == "seconds" else format_datetime(later, usegmt=True)
        return "fine" if len(asked) > 1 else (429, {"Retry-After": value}, "")

    with served(Endpoint(reply)) as endpoint:
        (record,) = ask(endpoint.url, "hi")
    assert record.text == "fine"
    assert asked[1] - asked[0] >= 0.39


def test_an_endpoint_that_hangs_times_out() -> None:
    with served(Endpoint(lambda *_: None)) as endpoint:
        (record,) = ask(endpoint.url, "hi", tries=2, timeout_s=0.1)
    assert (record.failure, record.tries) == ("timeout", 2)


def test_nobody_there() -> None:
    (record,) = ask(f"http://127.0.0.1:{free_port()}/v1", "hi", tries=2)
    assert (record.failure, record.tries) == ("connection", 2)


@pytest.mark.parametrize(("status", "text"), [(401, "RAYSFT_API_KEY"), (403, "RAYSFT_API_KEY"), (404, "no such model")])
def test_what_no_request_can_pass_ends_it_all(status: int, text: str) -> None:
    refusal: tuple[int, dict[str, str], str] = (status, {}, '{"error": {"message": "its own words"}}')
    with served(Endpoint(lambda *_: refusal)) as endpoint, pytest.raises(EvaluationError, match=text) as caught:
        ask(endpoint.url, *"abcdefgh")
    assert "its own words" in str(caught.value)
    assert len(endpoint.asked) <= 3
    with pytest.raises(EvaluationError, match="is no address"):
        ask("127.0.0.1:8000/v1", "hi")


def test_so_many_at_once_and_no_more() -> None:
    def reply(*_: Any) -> str:
        time.sleep(0.02)
        return "fine"

    with served(Endpoint(reply)) as endpoint:
        assert len(ask(endpoint.url, *"abcdefghijkl", concurrency=4)) == 12
    assert 2 <= endpoint.most_at_once <= 4


def test_no_more_requests_a_minute_than_allowed() -> None:
    requests = [Request(Record("s", "m", row, 0, "f"), {"messages": [{"content": row}]}) for row in "abcd"]

    async def run(url: str) -> list[Record]:
        client = Client(url, None, timeout_s=5, tries=1, per_minute=1200)
        try:
            return [record async for record in client.ask_all(requests, 4)]
        finally:
            await client.close()

    with served(Endpoint(lambda *_: "fine")) as endpoint:
        begun = time.monotonic()
        assert len(asyncio.run(run(endpoint.url))) == 4
    assert time.monotonic() - begun >= 3 * 0.05


def test_a_text_is_continued() -> None:
    body = '{"choices": [{"text": " you?", "finish_reason": "length"}], "usage": {"prompt_tokens": 3}}'

    async def run(url: str) -> Record:
        client = Client(url, None, timeout_s=5, tries=1)
        try:
            return await client.ask(Request(Record("s", "m", "r", 0, "f"), {"prompt": "How are"}, "completions"))
        finally:
            await client.close()

    with served(Endpoint(lambda *_: (200, {}, body))) as endpoint:
        record = asyncio.run(run(endpoint.url))
    assert (record.text, record.finish_reason, record.prompt_tokens) == (" you?", "length", 3)
    assert endpoint.asked == [{"model": "m", "prompt": "How are"}]


def test_a_dead_endpoint_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FAILED_IN_A_ROW", 4)
    with served(Endpoint(lambda *_: (500, {}, ""))) as endpoint:
        records = ask(endpoint.url, *map(str, range(30)), tries=1)
    assert 4 <= len(records) <= 6
    assert {record.failure for record in records} == {"http_500"}


def test_refused_requests_are_no_sign_of_a_dead_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FAILED_IN_A_ROW", 4)
    with served(Endpoint(lambda *_: (400, {}, ""))) as endpoint:
        assert len(ask(endpoint.url, *map(str, range(12)))) == 12
