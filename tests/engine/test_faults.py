"""What goes wrong around a running engine, and whom it must not touch: everyone else."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from serve.version_store import RESERVED
from serve.versions import VersionId
from sft.adapter import ADAPTER_WEIGHTS, MANIFEST, hash_file
from tests.engine.conftest import Endpoint
from tests.load import Load, ask

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

V1, V2 = VersionId("support", 1), VersionId("support", 2)
FLIPS, STREAMS_A_FLIP = 8, 6

Damage = Callable[[Path], object]


def post(endpoint: Endpoint, path: str, **body: Any) -> httpx.Response:
    return endpoint.client.post(path, json=body)


def golden(endpoint: Endpoint, model: str) -> str:
    heard = ask(endpoint.client, model)
    assert heard.whole, heard
    return heard.text


@contextmanager
def undisturbed(endpoint: Endpoint, clients: int = 2) -> Iterator[Load]:
    """Others' streams meanwhile: all of them whole, and token by token what they were before."""
    expected = golden(endpoint, "support@v1")
    with Load(endpoint.url, ["support@v1"], clients) as load:
        load.more(clients)
        yield load
        load.more(clients)
    assert {(heard.status, heard.whole, heard.text) for heard in load.heard} == {(200, True, expected)}


def test_every_answer_during_swaps_is_of_the_version_that_it_names(endpoint: Endpoint) -> None:
    texts = {str(version): golden(endpoint, str(version)) for version in (V1, V2)}
    assert len(set(texts.values())) == 2
    post(endpoint, "/admin/aliases/swapped/promote", version=str(V1)).raise_for_status()
    with Load(endpoint.url, ["swapped"], 6) as load:
        for flip in range(FLIPS):
            wanted = (V2, V1)[flip % 2]
            moved = post(endpoint, "/admin/aliases/swapped/promote", version=str(wanted))
            assert (moved.status_code, moved.json()["moved"]) == (200, True)
            assert ask(endpoint.client, "swapped", max_tokens=1).version == str(wanted)
            load.more(STREAMS_A_FLIP)
    assert len(load.heard) >= FLIPS * STREAMS_A_FLIP
    assert [heard for heard in load.heard if not heard.whole] == []
    assert {heard.version for heard in load.heard} == set(texts)
    assert [heard for heard in load.heard if heard.text != texts[str(heard.version)]] == []


def weights(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        change(tensors)
        save_file(tensors, folder / ADAPTER_WEIGHTS)

    return damage


def manifest(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / MANIFEST
        path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))

    return damage


def scaled(factor: float) -> Damage:
    return weights(lambda w: [tensor.mul_(factor) for name, tensor in w.items() if ".lora_B." in name])


def sign(folder: Path) -> None:
    """Makes a version's records agree with its files again, as one can who writes to the registry by hand."""
    path = folder / MANIFEST
    found = json.loads(path.read_bytes())
    for name in found["files"]:
        found["files"][name] = hash_file(folder / name).model_dump()
    path.write_text(json.dumps(found))
    record = json.loads((folder / RESERVED).read_bytes())
    record["digest"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / RESERVED).write_text(json.dumps(record))


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.ran,)


def pickled(ran: Path) -> Damage:
    return lambda folder: (folder / ADAPTER_WEIGHTS).write_bytes(pickle.dumps(Payload(ran)))


def pickled_as_peft_did(ran: Path) -> Damage:
    def damage(folder: Path) -> None:
        (folder / ADAPTER_WEIGHTS).unlink()
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload(ran)))
        found = json.loads((folder / MANIFEST).read_bytes())
        found["files"]["adapter_model.bin"] = found["files"].pop(ADAPTER_WEIGHTS)
        (folder / MANIFEST).write_text(json.dumps(found))

    return damage


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.chaos
def test_a_bad_version_moves_nothing_and_disturbs_nobody(
    endpoint: Endpoint, bundles: Callable[[int], Path], tmp_path: Path
) -> None:
    ran = tmp_path / "a-pickle-ran"
    damages: dict[str, tuple[Damage, str]] = {
        "cut": (
            lambda folder: (folder / ADAPTER_WEIGHTS).write_bytes((folder / ADAPTER_WEIGHTS).read_bytes()[:-1000]),
            f"{ADAPTER_WEIGHTS}: not readable as safetensors",
        ),
        "rank": (weights(lambda w: w.update({FIRST: w[FIRST][:4].clone()})), f"{FIRST}: its shape [4, 576]"),
        "base": (manifest(base_fingerprint="0" * 64), f"{MANIFEST}: base_fingerprint"),
        "shape": (weights(lambda w: w.update({FIRST: w[FIRST][:, :512].clone()})), f"{FIRST}: its shape [8, 512]"),
        "nan": (weights(lambda w: w[FIRST].view(-1)[7:8].fill_(np.nan)), f"{FIRST}: holds NaN"),
        "zero": (scaled(0.0), "every lora_B is zero"),
        "faint": (scaled(1e-30), "it has no effect"),
        "prompts": (
            manifest(golden=[{"messages": [{"role": "user", "content": "Hello!"}], "prompt_ids": [1, 2, 3]}]),
            f"{MANIFEST}: golden.0.prompt_ids",
        ),
        "pickle": (pickled(ran), f"{ADAPTER_WEIGHTS}: not readable as safetensors"),
        "bin": (pickled_as_peft_did(ran), "files: "),
    }
    post(endpoint, "/admin/aliases/guarded/promote", version=str(V1)).raise_for_status()
    for name, (damage, _) in damages.items():
        endpoint.registry.publish(bundles(1), f"bad-{name}")
        folder = Path(endpoint.registry.address) / f"versions/bad-{name}/v1"
        damage(folder)
        sign(folder)
    with undisturbed(endpoint):
        for name, (_, reason) in damages.items():
            answer = post(endpoint, "/admin/aliases/guarded/promote", version=f"bad-{name}@v1")
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (422, "model_refused"), (name, error)
            assert reason in error["message"], name
            assert len(error["message"].splitlines()) == 1
            assert str(tmp_path.parent) not in error["message"]
    (replica,) = endpoint.client.get("/admin/replicas").json()["replicas"].values()
    assert not [version for version in replica["resident"] if version.startswith("bad-")]
    assert len(endpoint.registry.history("guarded")) == 1
    assert not ran.exists()
    pickle.loads(pickle.dumps(Payload(ran)))
    assert ran.exists(), "the payload would have shown that it ran"


def hostile() -> dict[str, tuple[bytes, tuple[int, ...]]]:
    """Requests that want more than their share, and how they may be answered."""
    chat = {"model": "support@v1", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}

    def body(**fields: Any) -> bytes:
        return json.dumps({**chat, **fields}).encode()

    return {
        "a huge body": (b" " * 32 * 2**20, (413,)),
        "n": (body(n=10**6), (400,)),
        "max_tokens": (body(max_tokens=10**12), (400,)),
        "a long prompt": (body(messages=[{"role": "user", "content": "fox " * 900_000}]), (400,)),
        "many messages": (body(messages=[{"role": "user", "content": "x"}] * 100_000), (400,)),
        "logit_bias": (body(logit_bias={str(token): 1 for token in range(49_000)}), (400,)),
        "stop": (body(stop=["x"] * 10_000), (400,)),
        "a long regex": (body(structured_outputs={"regex": "(a|b)" * 200_000}), (400,)),
        # Short, but a hundred million letters when written out: the engine must not do that.
        "a deep regex": (body(structured_outputs={"regex": "(((a{1,99}){1,99}){1,99}){1,99}"}), (200, 400)),
        "a deep body": (b'{"model": "support", "messages": ' + b"[" * 500_000, (400,)),
        "a deep schema": (body(structured_outputs={"json": '{"a":' * 2000 + "1" + "}" * 2000}), (400,)),
    }


@pytest.mark.chaos
def test_greed_is_refused_quickly_and_nobody_else_waits(endpoint: Endpoint) -> None:
    requests = hostile()

    def send(name: str) -> tuple[str, int, float]:
        answer = endpoint.client.post("/v1/chat/completions", content=requests[name][0])
        return name, answer.status_code, answer.elapsed.total_seconds()

    with undisturbed(endpoint) as quiet:
        quiet.more(12)
    with undisturbed(endpoint) as load:
        with ThreadPoolExecutor(3) as pool:
            told = list(pool.map(send, requests))
        load.more(2)
    assert [(name, status) for name, status, _ in told if status not in requests[name][1]] == []
    assert [(name, seconds) for name, status, seconds in told if status != 200 and seconds > 3] == []
    assert _p99(load) < 2 * _p99(quiet) + 1.0


def _p99(load: Load) -> float:
    return float(np.percentile([heard.seconds for heard in load.heard], 99))
