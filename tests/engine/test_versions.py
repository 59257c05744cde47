"""What becomes of versions in a running engine: proof, residence, slots, templates, and moves through the server."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from serve.versions import VersionId
from tests.bundles import lora_bundle, prompt_ids
from tests.engine.conftest import BASE, Endpoint
from tests.engine.test_serve import QUESTION, ask, refused, text, until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}[assistant] "


def resident(endpoint: Endpoint) -> set[str]:
    (replica,) = endpoint.client.get("/admin/replicas").json()["replicas"].values()
    return set(replica["resident"])


def move(endpoint: Endpoint, alias: str, action: str, **body: Any) -> Any:
    return endpoint.client.post(f"/admin/aliases/{alias}/{action}", json=body)


def test_the_template_of_training_is_applied(endpoint: Endpoint, demo_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    lora_bundle(tmp_path / "bundle", demo_model, seed=7, template=TEMPLATE)
    version = endpoint.registry.publish(tmp_path / "bundle", "templated").id
    tokenizer.chat_template = TEMPLATE
    expected = prompt_ids(tokenizer, QUESTION)
    asked = endpoint.client.post("/tokenize", json={"model": str(version), "messages": QUESTION})
    assert asked.json()["tokens"] == expected
    answer = ask(endpoint, str(version)).json()
    assert answer["usage"]["prompt_tokens"] == len(expected)
    assert ask(endpoint, BASE).json()["usage"]["prompt_tokens"] != len(expected)


def test_a_version_without_an_effect_never_answers(endpoint: Endpoint, demo_model: Path, tmp_path: Path) -> None:
    lora_bundle(tmp_path / "bundle", demo_model, seed=8, blind=True)
    version = endpoint.registry.publish(tmp_path / "bundle", "blind").id
    error = refused(ask(endpoint, str(version)), 422)
    assert error["message"].startswith("blind@v1 cannot be served: it has no effect: on the manifest's golden prompts")
    before = endpoint.registry.alias("support")
    error = refused(move(endpoint, "support", "promote", version=str(version)), 422)
    assert "it has no effect" in error["message"]
    assert endpoint.registry.alias("support") == before
    # Past the server, on the command line, it can be promoted; the server stays where it is.
    endpoint.registry.promote("support", version)
    time.sleep(3)
    assert ask(endpoint, "support").headers["x-raysft-version"] == "support@v1"
    endpoint.registry.rollback("support")
    assert str(version) not in resident(endpoint)


def test_more_versions_than_slots_answer_each_in_its_own_way(
    endpoint: Endpoint, bundles: Callable[[int], Path]
) -> None:
    assert endpoint.config.engine.max_loras == 4
    versions = [str(endpoint.registry.publish(bundles(seed), "many").id) for seed in range(1, 7)]
    alone = {version: text(ask(endpoint, version)) for version in versions}
    assert len(set(alone.values())) == 6
    with ThreadPoolExecutor(6) as pool:
        mixed = list(pool.map(lambda version: (version, text(ask(endpoint, version))), versions * 2))
    assert all(alone[version] == answer for version, answer in mixed)
    assert set(versions) <= resident(endpoint)


def test_a_move_through_the_server_is_in_force_when_it_is_answered(endpoint: Endpoint) -> None:
    for action, body, expected in (
        ("promote", {"version": "support@v1"}, "support@v1"),
        ("promote", {"version": "support@v2"}, "support@v2"),
        ("rollback", {}, "support@v1"),
    ):
        moved = move(endpoint, "through", action, **body)
        assert moved.status_code == 200, moved.text
        assert ask(endpoint, "through", max_tokens=1).headers["x-raysft-version"] == expected
    (replica,) = endpoint.client.get("/admin/replicas").json()["replicas"].values()
    until(lambda: _generation(endpoint, "through") == 3)
    assert replica["loads"] >= 2


def _generation(endpoint: Endpoint, alias: str) -> int:
    (replica,) = endpoint.client.get("/admin/replicas").json()["replicas"].values()
    return int(replica["generations"].get(alias, 0))


def test_a_canary_takes_its_sessions_and_a_shadow_none(endpoint: Endpoint) -> None:
    assert move(endpoint, "trial", "promote", version="support@v1").status_code == 200
    assert move(endpoint, "trial", "canary", version="support@v2", weight=0.5).status_code == 200

    def answered(session: str) -> str:
        return str(ask(endpoint, "trial", max_tokens=1, user=session).headers["x-raysft-version"])

    first = {session: answered(session) for session in map(str, range(12))}
    assert set(first.values()) == {"support@v1", "support@v2"}
    assert first == {session: answered(session) for session in first}
    assert move(endpoint, "trial", "canary", version="support@v2", weight=0).status_code == 200
    assert move(endpoint, "trial", "shadow", version="support@v2", share=1).status_code == 200
    assert {answered(session) for session in first} == {"support@v1"}
    metrics = endpoint.client.get("/metrics").text
    assert 'part="shadow"' in metrics
    assert 'version="support@v2",part="canary"' in metrics.replace(", ", ",") or 'part="canary"' in metrics


def test_a_retired_version_leaves_the_engine(endpoint: Endpoint, bundles: Callable[[int], Path]) -> None:
    version = endpoint.registry.publish(bundles(3), "leaving").id
    assert text(ask(endpoint, str(version)))
    assert str(version) in resident(endpoint)
    assert endpoint.client.post(f"/admin/versions/{version}/retire", json={}).status_code == 200
    refused(ask(endpoint, str(version)), 410)
    until(lambda: str(version) not in resident(endpoint))


def test_a_version_is_served_within_two_seconds_of_its_last_byte(
    endpoint: Endpoint, bundles: Callable[[int], Path]
) -> None:
    version = endpoint.registry.publish(bundles(4), "quick").id
    begin = time.monotonic()
    moved = move(endpoint, "quick", "promote", version=str(version))
    assert moved.status_code == 200, moved.text
    assert text(ask(endpoint, "quick", max_tokens=1, min_tokens=1)) is not None
    assert time.monotonic() - begin < 2 + moved.json()["seconds"]["prepare"]
    assert VersionId.parse(ask(endpoint, "quick", max_tokens=1).headers["x-raysft-version"]) == version
