"""The registry on a real S3 API server: the same promises as in a folder, by the same code."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from jobs import adapters
from serve.errors import BadRequestError, RegistryError, UnknownModelError
from serve.registry import Registry
from serve.store import open_store
from serve.versions import VersionId
from sft.adapter import ADAPTER_WEIGHTS, verify_bundle
from sft.errors import AdapterError
from tests.bundles import tiny_bundle
from tests.s3_server import BUCKET, s3_server
from tests.serve.test_registry_races import work

V1, V2, V3 = (VersionId("support", number) for number in (1, 2, 3))


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def address(request: pytest.FixtureRequest) -> str:
    request.getfixturevalue("server")
    return f"s3://{BUCKET}/{request.node.name}"


def test_a_whole_life(address: str, tmp_path: Path) -> None:
    registry = Registry.open(address)
    assert (registry.version_ids(), registry.aliases(), registry.changed()) == ([], {}, None)
    for seed in range(3):
        tiny_bundle(tmp_path / f"b{seed}", seed=seed)
        registry.publish(tmp_path / f"b{seed}", "support")
    assert [version.bundle.lineage["run"] for version in registry.versions("support")] == ["run-0", "run-1", "run-2"]
    registry.promote("live", V1)
    registry.canary("live", V2, 0.25)
    registry.shadow("live", V3, 0.5)
    other = Registry.open(address)
    entry = other.alias("live")
    assert entry
    assert (entry.version, entry.number) == (V1, 3)
    assert set(entry.parts()) == {V1, V2, V3}
    with pytest.raises(BadRequestError, match="it is the canary of live"):
        other.retire(V2)
    assert other.promote("live", V2).canary is None
    assert registry.rollback("live").canary == entry.canary
    assert registry.alias("live") == other.alias("live")
    assert [entry.action for entry in other.history("live")] == ["promote", "canary", "shadow", "promote", "rollback"]
    other.promote("live", V3)
    other.retire(V1, reason="old")
    assert registry.contents().retired == {V1}
    downloaded = registry.download(registry.get(V2), tmp_path / "copy")
    assert verify_bundle(downloaded) == registry.get(V2).bundle


def test_damage_and_gaps(address: str, tmp_path: Path) -> None:
    registry, store = Registry.open(address), open_store(address)
    tiny_bundle(tmp_path / "b")
    registry.publish(tmp_path / "b", "support")
    store.write(f"versions/support/v1/{ADAPTER_WEIGHTS}", b"torn")
    with pytest.raises(AdapterError, match=f"support@v1 is damaged in the registry: {ADAPTER_WEIGHTS}: the file"):
        registry.promote("live", V1)
    store.write("versions/support/v2/reserved.json", b"{}")
    store.write(f"versions/support/v2/{ADAPTER_WEIGHTS}", b"half")
    assert registry.publish(tmp_path / "b", "support").id == V3
    (upload,) = registry.unfinished(timedelta())
    assert (upload.id, upload.size) == (V2, 4)
    assert registry.collect(upload)
    assert registry.unfinished(timedelta()) == []
    with pytest.raises(UnknownModelError, match="support@v2"):
        Registry.open(address).get(V2)


def test_processes_lose_and_overwrite_nothing(address: str, tmp_path: Path) -> None:
    workers, rounds = 4, 4
    jobs = []
    for worker in range(workers):
        tiny_bundle(tmp_path / f"w{worker}", seed=worker)
        jobs.append((address, str(tmp_path / f"w{worker}"), worker, rounds))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        results = pool.starmap(work, jobs, chunksize=1)
    registry = Registry.open(address)
    versions = registry.versions("support")
    assert [version.id.number for version in versions] == list(range(1, workers * rounds + 1))
    for version in versions:
        worker = int(version.published_by.removeprefix("worker-"))
        assert str(version.id) in results[worker][0]
        assert registry.verify(version.id).bundle.lineage["run"] == f"run-{worker}"
    written = sorted(entry for _, entries, _ in results for entry in entries)
    logged = sorted((alias, entry.number) for alias in registry.aliases() for entry in registry.history(alias))
    assert written == logged


def test_a_large_file_is_sent_in_parts(address: str, tmp_path: Path) -> None:
    store = open_store(address)
    content = os.urandom(11_000_000)
    (tmp_path / "large").write_bytes(content)
    store.write("large", tmp_path / "large")
    store.fetch("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content


def test_the_command_line_takes_the_address(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_bundle(tmp_path / "b")
    for words in (["publish", str(tmp_path / "b"), "--name", "support"], ["promote", "support@v1"], ["list"]):
        assert adapters.main([*words, "--registry", address]) == 0
    assert "support@v1" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.usefixtures("server")
def test_a_bucket_that_is_not_there_is_one_line() -> None:
    with pytest.raises(RegistryError, match=r"registry s3://nothing/place cannot be listed: .*NoSuchBucket") as caught:
        Registry.open("s3://nothing/place").version_ids()
    assert len(str(caught.value).splitlines()) == 1
