"""What goes wrong around a running engine, and whom it must not touch: everyone else."""

from __future__ import annotations

import hashlib
import json
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from serve.errors import RegistryError
from serve.version_store import RESERVED
from serve.versions import VersionId
from sft.adapter import ADAPTER_WEIGHTS, MANIFEST, hash_file
from tests.engine.conftest import Endpoint
from tests.load import Load, ask

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

V1, V2 = VersionId("support", 1), VersionId("support", 2)
FLIPS, STREAMS_A_FLIP = 8, 6
TOKENS = 5
"""Enough to tell the versions apart."""

Damage = Callable[[Path], object]


def post(endpoint: Endpoint, path: str, **body: Any) -> httpx.Response:
    return endpoint.client.post(path, json=body)


def golden(endpoint: Endpoint, model: str) -> str:
    heard = ask(endpoint.client, model, max_tokens=TOKENS)
    assert heard.whole, heard
    return heard.text


@contextmanager
def undisturbed(endpoint: Endpoint, clients: int = 2) -> Iterator[Load]:
    """Others' streams meanwhile: all of them whole, and token by token what they were before."""
    expected = golden(endpoint, "support@v1")
    with Load(endpoint.url, ["support@v1"], clients, max_tokens=TOKENS) as load:
        load.more(clients)
        yield load
        load.more(clients)
    assert {(heard.status, heard.whole, heard.text) for heard in load.heard} == {(200, True, expected)}


def test_every_answer_during_swaps_is_of_the_version_that_it_names(endpoint: Endpoint) -> None:
    texts = {str(version): golden(endpoint, str(version)) for version in (V1, V2)}
    assert len(set(texts.values())) == 2
    post(endpoint, "/admin/aliases/swapped/promote", version=str(V1)).raise_for_status()
    with Load(endpoint.url, ["swapped"], 6, max_tokens=TOKENS) as load:
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


def test_no_name_leads_out_of_the_registry(
    endpoint: Endpoint, bundles: Callable[[int], Path], request: pytest.FixtureRequest
) -> None:
    root = Path(endpoint.registry.address)
    inside = str(endpoint.registry.publish(bundles(1), "inside").id)
    endpoint.registry.promote("kept", VersionId.parse(inside))
    # Whole versions and an alias where a path that is followed would find them.
    outside = root.parent / "outside"
    for place in (root / "versions/..outside", root / "outside", outside):
        shutil.copytree(root / "versions/inside", place)
        request.addfinalizer(partial(shutil.rmtree, place))
    for link, target in ((root / "versions/linked", outside), (root / "aliases/linked", root / "aliases/kept")):
        link.symlink_to(target)
        request.addfinalizer(link.unlink)
    names = ["../outside", "../../outside", "..outside", "%2e%2e/outside", "%2e%2e%2foutside", "..\\outside", "linked"]
    names += [str(outside), "inside\0", "\0", "inside/../inside", "./inside", "inside\n", "\uff49nside"]
    for name in names:
        for model in (name, f"{name}@v1"):
            assert ask(endpoint.client, model).status == 404, model
            moved = post(endpoint, "/admin/aliases/kept/promote", version=model)
            assert moved.status_code in (400, 404), model
    for part in ("%2e%2e", "..%2foutside", "%00", "inside%00", "linked", "%2e%2e%2f%2e%2e%2foutside@v1"):
        for path in (f"/admin/versions/{part}", f"/admin/aliases/{part}/history", f"/v1/models/{part}"):
            answer = endpoint.client.get(path)
            assert answer.status_code in (400, 404), path
            assert "error" in answer.json()
        assert "entry" not in post(endpoint, f"/admin/aliases/{part}/promote", version=inside).json(), part
    listed = {card["id"] for card in endpoint.client.get("/v1/models").json()["data"]}
    assert {"inside@v1", "kept"} <= listed
    assert not [name for name in listed if "outside" in name or "linked" in name]
    assert sorted(path.name for path in outside.iterdir()) == ["v1"]
    assert len(endpoint.registry.history("kept")) == 1


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
        quiet.more(8)
    with undisturbed(endpoint) as load:
        with ThreadPoolExecutor(3) as pool:
            told = list(pool.map(send, requests))
        load.more(2)
    assert [(name, status) for name, status, _ in told if status not in requests[name][1]] == []
    assert [(name, seconds) for name, status, seconds in told if status != 200 and seconds > 3] == []
    assert _p99(load) < 2 * _p99(quiet) + 1.0


def _p99(load: Load) -> float:
    return float(np.percentile([heard.seconds for heard in load.heard], 99))


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_at_publish_shows_nobody_half_a_version(
    endpoint: Endpoint, bundles: Callable[[int], Path]
) -> None:
    endpoint.registry.publish(bundles(1), "tight")
    endpoint.registry.promote("tight", VersionId("tight", 1))
    with undisturbed(endpoint):
        with full_disk(200_000), pytest.raises(RegistryError, match="cannot be written"):
            endpoint.registry.publish(bundles(2), "tight")
        for model, status in (("tight@v1", 200), ("tight", 200), ("tight@v2", 404)):
            assert ask(endpoint.client, model, max_tokens=1).status == status, model
        assert post(endpoint, "/admin/aliases/tight/promote", version="tight@v2").status_code == 404
        again = str(endpoint.registry.publish(bundles(2), "tight").id)
        assert again == "tight@v3"
        post(endpoint, "/admin/aliases/tight/promote", version=again).raise_for_status()
        assert ask(endpoint.client, "tight", max_tokens=1).version == again
