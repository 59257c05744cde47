from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import BadRequestError, ConflictError, RegistryError, UnknownModelError
from serve.registry import Registry
from serve.versions import VersionId, check_name, served_before
from sft.adapter import ADAPTER_WEIGHTS, MANIFEST, verify_bundle
from sft.errors import AdapterError
from tests.bundles import tiny_bundle

V1, V2, V3 = (VersionId("support", number) for number in (1, 2, 3))


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry.open(tmp_path / "registry", create=True)


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[[int], Path]:
    def make(seed: int) -> Path:
        folder = tmp_path / f"bundle-{seed}"
        tiny_bundle(folder, seed=seed)
        return folder

    return make


@pytest.fixture
def filled(registry: Registry, bundle: Callable[[int], Path]) -> Registry:
    for seed in (1, 2, 3):
        registry.publish(bundle(seed), "support")
    return registry


def test_an_empty_registry_holds_nothing(registry: Registry) -> None:
    assert (registry.names(), registry.version_ids(), registry.aliases()) == ([], [], {})
    assert registry.versions("support") == []
    assert registry.alias("support") is None


def test_versions_count_up_by_name(registry: Registry, bundle: Callable[[int], Path]) -> None:
    first = registry.publish(bundle(1), "support", by="ann")
    second = registry.publish(bundle(2), "support")
    other = registry.publish(bundle(3), "sales")
    assert [str(version.id) for version in (first, second, other)] == ["support@v1", "support@v2", "sales@v1"]
    assert registry.names() == ["sales", "support"]
    assert registry.versions("support") == [first, second]
    assert first.published_by == "ann"
    assert first.bundle.lineage["run"] == "run-1"
    assert first.digest != second.digest


def test_a_name_that_begins_another_is_another_name(registry: Registry, bundle: Callable[[int], Path]) -> None:
    registry.publish(bundle(1), "support-2")
    assert registry.publish(bundle(2), "support").id == V1
    assert registry.versions("support-2")[0].id == VersionId("support-2", 1)


def test_another_process_sees_the_same(filled: Registry) -> None:
    assert Registry.open(filled.address).versions("support") == filled.versions("support")


def test_download_gives_the_bundle_and_keeps_it(filled: Registry, tmp_path: Path) -> None:
    target = tmp_path / "cache" / "support@v1"
    assert filled.download(filled.get(V1), target) == target
    assert verify_bundle(target) == filled.get(V1).bundle
    before = target.stat().st_ino
    filled.download(filled.get(V1), target)
    assert target.stat().st_ino == before


def test_download_replaces_a_broken_copy(filled: Registry, tmp_path: Path) -> None:
    target = tmp_path / "support@v1"
    filled.download(filled.get(V1), target)
    (target / ADAPTER_WEIGHTS).write_bytes(b"torn")
    filled.download(filled.get(V1), target)
    assert verify_bundle(target) == filled.get(V1).bundle


def test_download_replaces_another_version_in_the_same_folder(filled: Registry, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    filled.download(filled.get(V1), target)
    filled.download(filled.get(V2), target)
    assert verify_bundle(target) == filled.get(V2).bundle


def test_a_damaged_bundle_is_not_published(registry: Registry, bundle: Callable[[int], Path]) -> None:
    folder = bundle(1)
    (folder / ADAPTER_WEIGHTS).write_bytes(b"x")
    with pytest.raises(AdapterError, match=ADAPTER_WEIGHTS):
        registry.publish(folder, "support")
    assert registry.version_ids() == []


def test_damaged_weights_are_refused_and_leave_nothing(filled: Registry, tmp_path: Path) -> None:
    weights = Path(filled.address) / "versions/support/v1" / ADAPTER_WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(
        AdapterError, match=f"^support@v1 is damaged in the registry: {ADAPTER_WEIGHTS}: the file is not"
    ):
        filled.download(filled.get(V1), tmp_path / "cache" / "copy")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_changed_manifest_is_refused(filled: Registry) -> None:
    manifest = Path(filled.address) / "versions/support/v1" / MANIFEST
    changed = json.loads(manifest.read_text())
    changed["lineage"] = {"run": "another"}
    manifest.write_text(json.dumps(changed))
    with pytest.raises(AdapterError, match=r"bundle\.json was changed after it was published"):
        Registry.open(filled.address).get(V1)


def test_a_publisher_that_died_leaves_a_gap_and_no_version(filled: Registry, bundle: Callable[[int], Path]) -> None:
    (Path(filled.address) / "versions/support/v3" / MANIFEST).unlink()
    registry = Registry.open(filled.address)
    assert registry.version_ids() == [V1, V2]
    with pytest.raises(UnknownModelError, match="support@v3"):
        registry.get(V3)
    assert registry.publish(bundle(4), "support").id.number == 4


def test_promote_and_roll_back(filled: Registry) -> None:
    assert filled.promote("support", V1, by="ann", reason="first").previous is None
    entry = filled.promote("support", V2)
    assert (entry.number, entry.version, entry.previous) == (2, V2, V1)
    assert filled.alias("support") == entry
    back = filled.rollback("support", reason="worse")
    assert (back.action, back.version, back.previous, back.reason) == ("rollback", V1, V2, "worse")
    assert [entry.number for entry in filled.history("support")] == [1, 2, 3]
    assert {alias: entry.version for alias, entry in filled.aliases().items()} == {"support": V1}


def test_rollbacks_walk_back_one_promotion_each(filled: Registry) -> None:
    for version in (V1, V2, V3):
        filled.promote("live", version)
    assert filled.rollback("live").version == V2
    assert filled.rollback("live").version == V1
    with pytest.raises(BadRequestError, match="no version was served before support@v1"):
        filled.rollback("live")
    filled.promote("live", V3)
    assert filled.rollback("live").version == V1


def test_promoting_what_is_served_writes_nothing(filled: Registry) -> None:
    assert filled.promote("support", V1) == filled.promote("support", V1)
    assert len(filled.history("support")) == 1


def test_an_alias_needs_a_version_that_exists(filled: Registry) -> None:
    with pytest.raises(UnknownModelError, match="support@v9"):
        filled.promote("support", VersionId("support", 9))
    with pytest.raises(UnknownModelError, match="no alias nothing"):
        filled.rollback("nothing")


def test_a_promotion_that_lost_the_race_is_told(filled: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    filled.promote("support", V1)
    stale = filled.alias("support")
    filled.promote("support", V2)
    monkeypatch.setattr(filled, "alias", lambda _: stale)
    with pytest.raises(ConflictError, match="someone else moved support"):
        filled.promote("support", V3)
    assert filled.history("support")[-1].version == V2


def test_a_missing_folder_is_refused_unless_it_may_be_made(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="there is no such folder"):
        Registry.open(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


def test_a_folder_that_went_away_is_no_empty_registry(filled: Registry) -> None:
    Path(filled.address).rename(f"{filled.address}-away")
    for read in (filled.version_ids, filled.aliases):
        with pytest.raises(RegistryError, match="the folder is gone"):
            read()


@pytest.mark.parametrize("address", ["ftp://host/place", "http://host/place", "s4://bucket"])
def test_an_unknown_scheme_is_refused(address: str) -> None:
    with pytest.raises(RegistryError, match="unknown scheme"):
        Registry.open(address)


def test_a_file_where_the_folder_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match="registry"):
        Registry.open(tmp_path / "file", create=True)


def test_a_torn_alias_entry_is_named(filled: Registry) -> None:
    filled.promote("support", V1)
    (Path(filled.address) / "aliases/support/00000001.json").write_text("{")
    with pytest.raises(RegistryError, match=r"aliases/support/00000001\.json"):
        Registry.open(filled.address).alias("support")


BAD_NAMES = [
    "",
    "..",
    "../x",
    "/etc",
    "a/b",
    "a\\b",
    "a\0b",
    "%2e%2e",
    "A",
    "a b",
    "-a",
    ".a",
    "a\n",
    "a" * 64,
    "ä",
    "a@v1",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_unsafe_names_reach_no_path(registry: Registry, bundle: Callable[[int], Path], name: str) -> None:
    folder = bundle(1)
    for use in (
        lambda: registry.publish(folder, name),
        lambda: registry.versions(name),
        lambda: registry.get(VersionId(name, 1)),
        lambda: registry.alias(name),
        lambda: registry.history(name),
        lambda: registry.rollback(name),
    ):
        with pytest.raises(BadRequestError, match="is no adapter or alias name"):
            use()
    assert [path for path in Path(registry.address).rglob("*") if path.is_file()] == []


@given(st.text(max_size=70))
def test_a_checked_name_is_one_plain_path_part(name: str) -> None:
    try:
        check_name(name)
    except BadRequestError:
        return
    assert Path(name).name == name
    assert name not in (".", "..")
    assert name.isascii()
    assert name.isprintable()
    assert not set(name) & set("/\\@:% ")


@given(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True), st.integers(1, 999_999_999))
def test_a_version_survives_text(name: str, number: int) -> None:
    assert VersionId.parse(str(VersionId(name, number))) == VersionId(name, number)


@pytest.mark.parametrize("text", ["support", "support@v0", "support@v01", "support@1", "@v1", "support@v1 ", "../x@v1"])
def test_other_texts_are_no_version(text: str) -> None:
    with pytest.raises(BadRequestError):
        VersionId.parse(text)


def test_nothing_was_served_before_nothing() -> None:
    assert served_before([]) == []


def _publish_and_promote(address: str, bundle: str, worker: int, rounds: int) -> tuple[list[str], int, int]:
    registry = Registry.open(address)
    published, moved, lost = [], 0, 0
    for _ in range(rounds):
        version = registry.publish(Path(bundle), "support", by=f"worker-{worker}").id
        published.append(str(version))
        try:
            moved += registry.promote("support", version).by != ""
        except ConflictError:
            lost += 1
    return published, moved, lost


def test_many_processes_lose_and_overwrite_nothing(registry: Registry, tmp_path: Path) -> None:
    workers, rounds = 4, 5
    jobs = []
    for worker in range(workers):
        tiny_bundle(tmp_path / f"w{worker}", seed=worker)
        jobs.append((registry.address, str(tmp_path / f"w{worker}"), worker, rounds))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        results = pool.starmap(_publish_and_promote, jobs)
    versions = registry.versions("support")
    assert sorted(int(text.rsplit("v", 1)[1]) for found, _, _ in results for text in found) == list(range(1, 21))
    assert [version.id.number for version in versions] == list(range(1, 21))
    for version in versions:
        worker = int(version.published_by.rsplit("-", 1)[1])
        assert version.bundle.lineage["run"] == f"run-{worker}"
        assert str(version.id) in results[worker][0]
        registry.download(version, tmp_path / "check" / str(version.id))
    history = registry.history("support")
    assert [entry.number for entry in history] == list(range(1, len(history) + 1))
    assert len(history) == sum(moved for _, moved, _ in results)
    assert len(history) + sum(lost for _, _, lost in results) == workers * rounds
    assert [entry.previous for entry in history] == [None, *(entry.version for entry in history[:-1])]
