from __future__ import annotations

import hashlib
import json
import os
import resource
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import BadRequestError, ConflictError, RegistryError, UnknownModelError
from serve.registry import Registry
from serve.store import FolderStore
from serve.versions import VersionId, check_name
from sft.adapter import ADAPTER_WEIGHTS, CARD, MANIFEST, verify_bundle
from sft.errors import AdapterError
from tests.bundles import tiny_bundle

V1, V2, V3 = (VersionId("support", number) for number in (1, 2, 3))


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry.open(tmp_path / "registry", create=True)


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


def test_a_model_card_travels_with_its_version(registry: Registry, tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "bundle", card="# Card\n")
    registry.publish(tmp_path / "bundle", "support")
    registry.download(registry.get(V1), tmp_path / "copy")
    assert (tmp_path / "copy" / CARD).read_text() == "# Card\n"
    assert verify_bundle(tmp_path / "copy") == registry.get(V1).bundle


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


def test_a_manifest_that_names_a_path_is_refused_before_it_is_followed(filled: Registry, tmp_path: Path) -> None:
    folder = Path(filled.address) / "versions/support/v1"
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["../../escape"] = manifest["files"].pop(ADAPTER_WEIGHTS)
    data = json.dumps(manifest).encode()
    (folder / MANIFEST).write_bytes(data)
    reserved = json.loads((folder / "reserved.json").read_text())
    (folder / "reserved.json").write_text(json.dumps({**reserved, "digest": hashlib.sha256(data).hexdigest()}))
    registry = Registry.open(filled.address)
    for use in (registry.get, registry.verify, lambda version: registry.promote("live", version)):
        with pytest.raises(AdapterError, match=r"support@v1 is damaged in the registry: files: .*'../../escape'"):
            use(V1)
    assert not list(tmp_path.rglob("escape"))


def test_a_publisher_that_died_leaves_a_gap_and_no_version(filled: Registry, bundle: Callable[[int], Path]) -> None:
    (Path(filled.address) / "versions/support/v3" / MANIFEST).unlink()
    registry = Registry.open(filled.address)
    assert registry.version_ids() == [V1, V2]
    with pytest.raises(UnknownModelError, match="support@v3"):
        registry.get(V3)
    assert registry.publish(bundle(4), "support").id.number == 4


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


def test_a_file_where_the_folder_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match="registry"):
        Registry.open(tmp_path / "file", create=True)


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
