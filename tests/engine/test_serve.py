"""The real application over HTTP: Serve, the gateway, the registry and vLLM."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from transformers import AutoTokenizer

from jobs import chat as chat_job
from serve import app
from serve.errors import NotReadyError
from serve.versions import VersionId
from sft.adapter import ADAPTER_WEIGHTS
from tests.bundles import lora_bundle, prompt_ids
from tests.engine.conftest import BASE, Endpoint

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

QUESTION = [{"role": "user", "content": "Tell me a short story about a fox and a lighthouse."}]


def ask(endpoint: Endpoint, model: str, **fields: Any) -> httpx.Response:
    body = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 12, **fields}
    # Adapters of random weights may want to end at once; an answer must be long enough to tell them apart.
    body.setdefault("min_tokens", min(8, body["max_tokens"]))
    return endpoint.client.post("/v1/chat/completions", json=body)


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def refused(response: httpx.Response, status: int) -> dict[str, Any]:
    """Checks the shape of a refusal: OpenAI's, one line, no trace and no path."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"].splitlines()) == 1
    for hint in ("Traceback", "Error:", "/tmp", "site-packages", ".py"):
        assert hint not in error["message"]
    return error


def events(response: httpx.Response) -> list[str]:
    assert response.headers["content-type"].startswith("text/event-stream")
    return [line.removeprefix("data: ") for line in response.text.splitlines() if line]


def until(check: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"not so within {seconds:.0f} s"
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("model", "version"),
    [(BASE, BASE), ("support", "support@v1"), ("support@v1", "support@v1"), ("support@v2", "support@v2")],
)
def test_the_answer_names_the_exact_version(endpoint: Endpoint, model: str, version: str) -> None:
    response = ask(endpoint, model)
    assert text(response)
    assert response.json()["model"] == version
    assert response.headers["x-raysft-version"] == version
    streamed = ask(endpoint, model, stream=True)
    assert streamed.headers["x-raysft-version"] == version
    assert {json.loads(event)["model"] for event in events(streamed)[:-1]} == {version}


def test_versions_answer_each_in_its_own_way(endpoint: Endpoint) -> None:
    models = [BASE, "support@v1", "support@v2"]
    answers = {model: text(ask(endpoint, model)) for model in models}
    assert len(set(answers.values())) == 3
    with ThreadPoolExecutor(9) as pool:
        mixed = list(pool.map(lambda model: (model, text(ask(endpoint, model))), models * 3))
    assert all(answers[model] == answer for model, answer in mixed)


def test_a_version_published_while_running_is_served_at_once(
    endpoint: Endpoint, bundles: Callable[[int], Path]
) -> None:
    refused(ask(endpoint, "fresh@v1"), 404)
    endpoint.registry.publish(bundles(3), "fresh")
    # All at the same moment: the first load of a version must not be refused to those who come second.
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: text(ask(endpoint, "fresh@v1")), range(6)))
    assert len(set(answers)) == 1
    assert answers[0] not in (text(ask(endpoint, BASE)), text(ask(endpoint, "support@v1")))
    error = refused(ask(endpoint, "fresh"), 404)
    assert "newest version is fresh@v1" in error["message"]


def test_an_alias_moves_and_rolls_back(endpoint: Endpoint) -> None:
    def serving() -> str:
        return str(ask(endpoint, "moving", max_tokens=1).headers.get("x-raysft-version"))

    endpoint.registry.promote("moving", VersionId("support", 1))
    until(lambda: serving() == "support@v1")
    endpoint.registry.promote("moving", VersionId("support", 2))
    until(lambda: serving() == "support@v2")
    assert text(ask(endpoint, "moving")) == text(ask(endpoint, "support@v2"))
    endpoint.registry.rollback("moving")
    until(lambda: serving() == "support@v1")


@pytest.mark.parametrize(
    "model", ["nothing", "support@v99", "support@v01", f"{BASE}:support@v1", "../support", "%2e%2e"]
)
def test_an_unknown_model_is_404(endpoint: Endpoint, model: str) -> None:
    error = refused(ask(endpoint, model), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


BAD_FIELDS: list[dict[str, Any]] = [
    {"temprature": 1},
    {"temperature": "hot"},
    {"temperature": -1},
    {"max_tokens": 0},
    {"max_tokens": 10_000},
    {"n": 1_000_000},
    {"n": 0},
    {"top_p": 2},
    {"top_logprobs": 1000, "logprobs": True},
    {"logit_bias": {"a": 1}},
    {"logit_bias": {"99999999": 1}},
    {"stream": "maybe"},
    {"response_format": {"type": "json_schema"}},
    {"chat_template": "{{ messages }}"},
    {"chat_template_kwargs": {"chat_template": "x"}},
    {"request_id": "mine"},
    {"messages": []},
    {"messages": "hello"},
    {"messages": ["hello"]},
    {"messages": [{"role": "robot", "content": "x"}]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x"}}]}]},
    {"messages": [{"role": "user", "content": "too long " * 600}]},
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", BAD_FIELDS, ids=lambda fields: json.dumps(fields)[:50])
def test_a_bad_request_is_400(endpoint: Endpoint, fields: dict[str, Any], stream: bool) -> None:
    error = refused(ask(endpoint, "support", **{"stream": stream or None, **fields}), 400)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"\xff", b"{}", b'{"model": 5}', b'{"model": ""}', b"[" * 100_000]
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize"])
def test_a_broken_body_is_400(endpoint: Endpoint, path: str, body: bytes) -> None:
    refused(endpoint.client.post(path, content=body), 400)


def test_a_bad_completion_is_400(endpoint: Endpoint) -> None:
    refused(endpoint.client.post("/v1/completions", json={"model": "support"}), 400)
    refused(endpoint.client.post("/v1/completions", json={"model": "support", "prompt": {"a": 1}}), 400)


def test_stream_options_need_a_stream(endpoint: Endpoint) -> None:
    refused(ask(endpoint, "support", stream_options={"include_usage": True}), 400)


def test_routes_and_methods_that_do_not_exist(endpoint: Endpoint) -> None:
    refused(endpoint.client.get("/v1/nothing"), 404)
    refused(endpoint.client.get("/v1/chat/completions"), 405)
    refused(endpoint.client.delete("/v1/models"), 405)
    refused(endpoint.client.get("/docs"), 404)


@pytest.mark.parametrize("model", [BASE, "support@v2"])
def test_a_stream_says_what_the_whole_answer_says(endpoint: Endpoint, model: str) -> None:
    whole = ask(endpoint, model)
    found = events(ask(endpoint, model, stream=True, stream_options={"include_usage": True}))
    assert found[-1] == "[DONE]"
    chunks = [json.loads(event) for event in found[:-1]]
    pieces = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    assert "".join(pieces) == text(whole)
    assert len(pieces) > 3
    usage, expected = chunks[-1]["usage"], whole.json()["usage"]
    assert all(usage[key] == expected[key] for key in ("prompt_tokens", "completion_tokens", "total_tokens"))


def test_completions(endpoint: Endpoint) -> None:
    body = {"model": "support@v2", "prompt": "The capital of France is", "temperature": 0, "max_tokens": 6}
    response = endpoint.client.post("/v1/completions", json=body)
    assert (response.status_code, response.json()["model"]) == (200, "support@v2")
    streamed = events(endpoint.client.post("/v1/completions", json={**body, "stream": True}))
    assert streamed[-1] == "[DONE]"
    pieces = [choice["text"] for event in streamed[:-1] for choice in json.loads(event)["choices"]]
    assert "".join(pieces) == response.json()["choices"][0]["text"]


def test_models_lists_base_aliases_and_versions(endpoint: Endpoint) -> None:
    cards = {card["id"]: card for card in endpoint.client.get("/v1/models").json()["data"]}
    assert {BASE, "support", "support@v1", "support@v2"} <= set(cards)
    assert (cards[BASE]["parent"], cards[BASE]["max_model_len"]) == (None, 512)
    assert (cards["support"]["root"], cards["support"]["parent"]) == ("support@v1", BASE)
    assert cards["support@v2"]["metadata"]["lineage"] == {"run": "seed-2"}
    assert cards["support@v1"]["metadata"]["digest"] != cards["support@v2"]["metadata"]["digest"]
    assert endpoint.client.get("/v1/models/support@v2").json() == cards["support@v2"]
    assert endpoint.client.get(f"/v1/models/{BASE}").json() == cards[BASE]
    refused(endpoint.client.get("/v1/models/nothing"), 404)


def test_health(endpoint: Endpoint) -> None:
    response = endpoint.client.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hello!"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "  two spaces,\ta tab\n\nand lines  "}],
    [{"role": "system", "content": "Answer in one sentence."}, {"role": "user", "content": "Naïve café 漢字 🙂?"}],
    [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "<b>And</b> <|im_end|> 3 + 3?"},
    ],
]


@pytest.mark.parametrize("model", [BASE, "support"])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_server_makes_the_prompt_ids_of_training(
    endpoint: Endpoint, demo_model: Path, model: str, messages: list[dict[str, str]]
) -> None:
    response = endpoint.client.post("/tokenize", json={"model": model, "messages": messages})
    assert response.status_code == 200, response.text
    expected = prompt_ids(AutoTokenizer.from_pretrained(demo_model), messages)
    assert response.json()["tokens"] == expected
    answered = ask(endpoint, model, messages=messages, max_tokens=1, return_token_ids=True)
    assert answered.json()["prompt_token_ids"] == expected


def test_golden_prompts_of_a_bundle_hold(endpoint: Endpoint) -> None:
    for golden in endpoint.registry.get(VersionId("support", 1)).bundle.golden:
        body = {"model": "support@v1", "messages": list(golden.messages)}
        assert endpoint.client.post("/tokenize", json=body).json()["tokens"] == list(golden.prompt_ids)


def test_the_official_client_is_at_home(endpoint: Endpoint) -> None:
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", timeout=120) as client:
        assert "support" in [model.id for model in client.models.list()]
        messages: Any = QUESTION
        whole = client.chat.completions.create(model="support", messages=messages, temperature=0, max_tokens=8)
        assert whole.model == "support@v1"
        stream = client.chat.completions.create(
            model="support", messages=messages, temperature=0, max_tokens=8, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.choices[0].message.content
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.chat.completions.create(model="nothing", messages=messages)
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(model="support", messages=messages, temperature=-1)


def test_a_damaged_version_is_refused_and_others_go_on(endpoint: Endpoint, bundles: Callable[[int], Path]) -> None:
    version = endpoint.registry.publish(bundles(2), "damaged").id
    weights = Path(endpoint.registry.address) / "versions/damaged/v1" / ADAPTER_WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    for stream in (False, True):
        error = refused(ask(endpoint, str(version), stream=stream), 422)
        assert f"damaged@v1 is damaged in the registry: {ADAPTER_WEIGHTS}" in error["message"]
    assert text(ask(endpoint, "support@v2"))


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("other-base", {"base_fingerprint": "0" * 64, "base_model": "another-7b"}, r"another base \(another-7b\)"),
        ("too-wide", {"rank": 32}, "rank 32 is above engine.max_lora_rank 16"),
    ],
)
def test_a_version_that_does_not_fit_is_refused(
    endpoint: Endpoint, demo_model: Path, tmp_path: Path, name: str, changes: dict[str, Any], reason: str
) -> None:
    lora_bundle(tmp_path / name, demo_model, seed=4, **changes)
    version = endpoint.registry.publish(tmp_path / name, name).id
    error = refused(ask(endpoint, str(version)), 422)
    assert error["code"] == "model_refused"
    assert re.search(reason, error["message"])


def test_a_lost_registry_leaves_the_known_models_up(endpoint: Endpoint) -> None:
    folder = Path(endpoint.registry.address)
    away = folder.with_name(f"{folder.name}-away")
    text(ask(endpoint, "support@v1"))
    shutil.move(folder, away)
    try:
        time.sleep(1.2)
        assert text(ask(endpoint, "support@v1"))
        refused(ask(endpoint, "nothing"), 404)
    finally:
        shutil.move(away, folder)


def test_the_chat_job_asks_once(endpoint: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--url", f"{endpoint.url}/v1", "--model", BASE, "--max_tokens", "12", "--once", QUESTION[0]["content"]]
    assert chat_job.main(words) == 0
    assert capsys.readouterr().out == f"{text(ask(endpoint, BASE))}\n"


def test_a_second_server_on_the_port_is_refused(endpoint: Endpoint) -> None:
    with pytest.raises(NotReadyError, match=f"port {endpoint.config.http.port} on 127.0.0.1 is taken"):
        app.start(endpoint.config)
