from __future__ import annotations

import json
import os
import resource
import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.errors import BadRequestError, ConflictError, RegistryError, UnknownModelError
from serve.registry import Registry
from serve.store import FolderStore
from serve.versions import AliasState, Canary, Shadow, VersionId, check_name
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
        if not folder.exists():
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


def test_a_move_that_lost_the_race_is_told(filled: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    filled.promote("support", V1)
    stale = filled.alias("support")
    other = Registry.open(filled.address)
    other.promote("support", V2)
    monkeypatch.setattr(filled, "alias", lambda _: stale)
    moves: list[Callable[[], object]] = [
        lambda: filled.promote("support", V3),
        lambda: filled.canary("support", V3, 0.5),
        lambda: filled.shadow("support", V3, 0.5),
    ]
    for move in moves:
        with pytest.raises(ConflictError, match="someone else moved support"):
            move()
    assert [entry.version for entry in other.history("support")] == [V1, V2]


def shape(state: AliasState | None) -> tuple[VersionId, tuple[VersionId, float] | None, tuple[VersionId, float] | None]:
    """A state without the entries that its parts began at."""
    assert state
    canary = (state.canary.version, state.canary.weight) if state.canary else None
    return state.version, canary, (state.shadow.version, state.shadow.share) if state.shadow else None


def test_a_canary_begins_grows_and_ends(filled: Registry) -> None:
    filled.promote("live", V1)
    entry = filled.canary("live", V2, 0.1, by="ann", reason="first try")
    assert (entry.number, entry.action, entry.previous, entry.by, entry.reason) == (2, "canary", V1, "ann", "first try")
    assert (entry.version, entry.canary) == (V1, Canary(version=V2, weight=0.1, since=2))
    assert filled.canary("live", V2, 0.2).canary == Canary(version=V2, weight=0.2, since=2)
    assert filled.canary("live", V2, 0.2).number == 3
    assert filled.canary("live", V3, 0.2).canary == Canary(version=V3, weight=0.2, since=4)
    assert filled.canary("live", V3, 0).canary is None
    with pytest.raises(BadRequestError, match="support@v3 is no canary of live"):
        filled.canary("live", V3, 0)


def test_a_shadow_begins_grows_and_ends(filled: Registry) -> None:
    filled.promote("live", V1)
    assert filled.shadow("live", V2, 0.1).shadow == Shadow(version=V2, share=0.1, since=2)
    assert filled.shadow("live", V2, 1).shadow == Shadow(version=V2, share=1, since=2)
    assert filled.shadow("live", V3, 1).shadow == Shadow(version=V3, share=1, since=4)
    assert filled.shadow("live", V3, 0).shadow is None
    with pytest.raises(BadRequestError, match="support@v3 is no shadow of live"):
        filled.shadow("live", V3, 0)


def test_the_newest_entry_alone_tells_the_state(filled: Registry) -> None:
    filled.promote("live", V1)
    filled.shadow("live", V3, 0.5)
    filled.canary("live", V2, 0.25)
    read = Registry.open(filled.address).alias("live")
    assert shape(read) == (V1, (V2, 0.25), (V3, 0.5))
    assert read
    assert read.parts() == {V1: "stable version", V2: "canary", V3: "shadow"}


def test_a_promotion_ends_the_canary_and_keeps_another_shadow(filled: Registry) -> None:
    filled.promote("live", V1)
    filled.shadow("live", V3, 0.5)
    filled.canary("live", V2, 0.25)
    assert shape(filled.promote("live", V2)) == (V2, None, (V3, 0.5))
    assert shape(filled.promote("live", V3)) == (V3, None, None)
    filled.canary("live", V1, 0.25)
    assert shape(filled.promote("live", V3)) == (V3, None, None)


def test_rollback_undoes_promote_canary_and_shadow_alike(filled: Registry) -> None:
    filled.promote("live", V1)
    filled.canary("live", V2, 0.1)
    filled.canary("live", V2, 0.5)
    filled.shadow("live", V3, 0.5)
    filled.promote("live", V2)
    assert shape(filled.rollback("live")) == (V1, (V2, 0.5), (V3, 0.5))
    assert shape(filled.rollback("live")) == (V1, (V2, 0.5), None)
    back = filled.rollback("live")
    assert back.canary == Canary(version=V2, weight=0.1, since=2)
    assert shape(filled.promote("live", V3)) == (V3, None, None)
    assert shape(filled.rollback("live")) == (V1, (V2, 0.1), None)
    assert shape(filled.rollback("live")) == (V1, None, None)
    with pytest.raises(BadRequestError, match="no version was served before support@v1"):
        filled.rollback("live")


moves = st.lists(
    st.one_of(
        st.tuples(st.just("promote"), st.sampled_from([V1, V2, V3])),
        st.tuples(st.sampled_from(["canary", "shadow"]), st.sampled_from([V1, V2, V3]), st.sampled_from([0, 0.5, 1])),
        st.tuples(st.just("rollback")),
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves)
def test_rollbacks_are_an_undo_list(filled: Registry, moves: list[tuple[Any, ...]]) -> None:
    alias = f"alias-{secrets.token_hex(8)}"
    undo: list[AliasState] = []
    for action, *arguments in moves:
        before = len(filled.history(alias))
        try:
            entry = getattr(filled, action)(alias, *arguments)
        except (BadRequestError, UnknownModelError):
            assert len(filled.history(alias)) == before
            assert action != "rollback" or len(undo) < 2
            continue
        if action == "rollback":
            undo.pop()
            assert entry.state == undo[-1]
        elif not undo or entry.state != undo[-1]:
            undo.append(entry.state)
        assert Registry.open(filled.address).alias(alias) == entry
        assert entry.number == before + (entry.number > before)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_share_is_from_0_to_1(filled: Registry, share: float) -> None:
    filled.promote("live", V1)
    for use, what in ((filled.canary, "weight"), (filled.shadow, "share")):
        with pytest.raises(BadRequestError, match=f"{what} .*: must be from 0"):
            use("live", V2, share)


def test_canary_and_shadow_need_an_alias_and_another_version(filled: Registry) -> None:
    for use in (filled.canary, filled.shadow):
        with pytest.raises(UnknownModelError, match="there is no alias live; promote a version to it first"):
            use("live", V1, 0.5)
    filled.promote("live", V1)
    for use in (filled.canary, filled.shadow):
        with pytest.raises(BadRequestError, match="live serves support@v1 to all sessions already"):
            use("live", V1, 0.5)
        with pytest.raises(UnknownModelError, match="support@v9"):
            use("live", VersionId("support", 9), 0.5)
    assert len(filled.history("live")) == 1


def test_no_alias_is_given_a_version_that_fails_verification(filled: Registry) -> None:
    filled.promote("live", V1)
    weights = Path(filled.address) / "versions/support/v2" / ADAPTER_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    for move in (
        lambda: filled.promote("live", V2),
        lambda: filled.canary("live", V2, 0.5),
        lambda: filled.shadow("live", V2, 0.5),
        lambda: filled.verify(V2),
    ):
        with pytest.raises(AdapterError, match=f"^support@v2 is damaged in the registry: {ADAPTER_WEIGHTS}: the file"):
            move()
    assert len(filled.history("live")) == 1
    assert filled.verify(V1).id == V1


def test_what_an_alias_names_is_not_retired(filled: Registry) -> None:
    filled.promote("live", V1)
    filled.canary("live", V2, 0.1)
    filled.shadow("live", V3, 0.1)
    for version, reason in (
        (V1, "it is the stable version of live; first promote another version to live"),
        (V2, "it is the canary of live; first end it with canary support@v2 --alias live --weight 0"),
        (V3, "it is the shadow of live; first end it with shadow support@v3 --alias live --share 0"),
    ):
        with pytest.raises(BadRequestError, match=reason):
            filled.retire(version)
        assert filled.retirement(version) is None
    assert filled.contents().retired == frozenset()


def test_a_retired_version_is_out_for_good(filled: Registry) -> None:
    filled.promote("live", V1)
    filled.promote("live", V2)
    retired = filled.retire(V1, by="ann", reason="wrong answers")
    assert (retired.by, retired.reason) == ("ann", "wrong answers")
    assert filled.retire(V1, by="bob") == retired
    other = Registry.open(filled.address)
    assert other.retirement(V1) == retired
    assert other.contents().retired == {V1}
    assert V1 in other.contents().versions
    moves: list[Callable[[], object]] = [
        lambda: other.promote("live", V1),
        lambda: other.canary("live", V1, 0.1),
        lambda: other.shadow("live", V1, 0.1),
        lambda: other.rollback("live"),
    ]
    for move in moves:
        with pytest.raises(BadRequestError, match=r"support@v1.* is retired"):
            move()
    with pytest.raises(UnknownModelError, match="support@v9"):
        other.retire(VersionId("support", 9))
    assert len(other.history("live")) == 2


def test_the_token_changes_with_every_change_and_only_then(filled: Registry, bundle: Callable[[int], Path]) -> None:
    changes: list[Callable[[], object]] = [
        lambda: filled.publish(bundle(4), "support"),
        lambda: filled.promote("live", V1),
        lambda: filled.canary("live", V2, 0.1),
        lambda: filled.shadow("live", V3, 0.1),
        lambda: filled.rollback("live"),
        lambda: filled.retire(VersionId("support", 4)),
    ]
    tokens = [filled.changed()]
    for change in changes:
        change()
        tokens.append(filled.changed())
    assert len(set(tokens)) == len(changes) + 1
    filled.retire(VersionId("support", 4))
    filled.canary("live", V2, 0.1)
    assert filled.changed() == tokens[-1]


def test_a_change_whose_token_is_not_written_is_a_change_still(
    filled: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RegistryError("slow down")

    monkeypatch.setattr(FolderStore, "write", fail)
    assert filled.promote("live", V1).number == 1
    assert "later than usual: slow down" in caplog.text


def test_the_newest_entry_is_found_without_listing_the_log(filled: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in (V1, V2):
        filled.promote("live", version)
    listed: list[str] = []
    real = FolderStore.keys

    def counted(self: FolderStore, prefix: str, *, after: str = "") -> list[str]:
        listed.append(after)
        return real(self, prefix, after=after)

    monkeypatch.setattr(FolderStore, "keys", counted)
    reader = Registry.open(filled.address)
    for _ in range(3):
        assert reader.alias("live") == filled.alias("live")
    assert listed.count("aliases/live/00000000.json") == 1
    listed.clear()
    filled.promote("live", V3)
    assert [reader.alias("live"), reader.alias("live")] == [filled.alias("live")] * 2
    assert listed == ["aliases/live/00000002.json"]


def torn(registry: Registry, name: str, *files: str, age: timedelta = timedelta()) -> Path:
    """What a publisher leaves that died in mid-upload."""
    folder = Path(registry.address) / f"versions/{name}"
    folder.mkdir(parents=True)
    moment = (datetime.now(UTC) - age).timestamp()
    for file in ("reserved.json", *files):
        (folder / file).write_bytes(b"x" * 100)
        os.utime(folder / file, (moment, moment))
    return folder


def test_unfinished_uploads_are_collected_and_nothing_else(filled: Registry, bundle: Callable[[int], Path]) -> None:
    day = timedelta(days=1)
    old = torn(filled, "support/v4", ADAPTER_WEIGHTS, age=2 * day)
    bare = torn(filled, "other/v1", age=2 * day)
    young = torn(filled, "support/v5", ADAPTER_WEIGHTS)
    found = filled.unfinished(day)
    assert [(str(upload.id), upload.files, upload.size) for upload in found] == [
        ("other@v1", (), 0),
        ("support@v4", (ADAPTER_WEIGHTS,), 100),
    ]
    assert filled.version_ids() == [V1, V2, V3]
    assert [filled.collect(upload) for upload in found] == [True, True]
    assert (
        {path.name for path in old.iterdir()} == {path.name for path in bare.iterdir()} == {"reserved.json", MANIFEST}
    )
    assert (young / ADAPTER_WEIGHTS).exists()
    assert filled.unfinished(day) == []
    assert Registry.open(filled.address).version_ids() == [V1, V2, V3]
    with pytest.raises(UnknownModelError, match="support@v4"):
        filled.get(VersionId("support", 4))
    assert filled.publish(bundle(4), "support").id.number == 6
    assert filled.publish(bundle(4), "other").id.number == 2
    for version in filled.version_ids():
        filled.verify(version)


def test_a_publisher_whose_upload_was_given_up_is_told(
    registry: Registry, bundle: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FolderStore.write

    def slow(self: FolderStore, key: str, data: bytes | Path) -> None:
        if key.endswith(ADAPTER_WEIGHTS):
            (upload,) = registry.unfinished(timedelta())
            assert registry.collect(upload)
        real(self, key, data)

    monkeypatch.setattr(FolderStore, "write", slow)
    with pytest.raises(ConflictError, match="the upload of support@v1 was given up by a clean-up: publish"):
        registry.publish(bundle(1), "support")
    assert registry.version_ids() == []
    (left,) = registry.unfinished(timedelta())
    assert registry.collect(left)
    assert registry.unfinished(timedelta()) == []


def test_a_clean_up_that_comes_too_late_takes_nothing(filled: Registry, bundle: Callable[[int], Path]) -> None:
    torn(filled, "support/v4", ADAPTER_WEIGHTS)
    (upload,) = filled.unfinished(timedelta())
    (Path(filled.address) / "versions/support/v4" / MANIFEST).write_bytes((bundle(4) / MANIFEST).read_bytes())
    assert not filled.collect(upload)
    assert (Path(filled.address) / "versions/support/v4" / ADAPTER_WEIGHTS).exists()


def test_a_disk_that_is_full_leaves_no_half_version(registry: Registry, tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "small")
    tiny_bundle(tmp_path / "large", rank=64)
    registry.publish(tmp_path / "small", "support")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(RegistryError, match=f"cannot be written at versions/support/v2/{ADAPTER_WEIGHTS}"):
            registry.publish(tmp_path / "large", "support")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Registry.open(registry.address).version_ids() == [V1]
    assert registry.verify(V1).id == V1
    assert not (Path(registry.address) / "versions/support/v2" / ADAPTER_WEIGHTS).exists()
    assert registry.publish(tmp_path / "large", "support").id == V3


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
