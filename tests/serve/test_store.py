from __future__ import annotations

from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.exceptions import AlreadyExistsError
from obstore.store import AzureStore, GCSStore, MemoryStore, S3Store

from serve.errors import RegistryError
from serve.store import BucketStore, Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store", create=True)


@pytest.fixture(params=["folder", "bucket"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(tmp_path / "any", create=True) if request.param == "folder" else BucketStore("b", MemoryStore())


@pytest.mark.parametrize(
    ("address", "environment", "kind", "place"),
    [
        ("s3://bucket/team/adapters", {}, S3Store, {"bucket": "bucket"}),
        ("gs://bucket/team/adapters", {}, GCSStore, {"bucket": "bucket"}),
        (
            "az://container/team/adapters",
            {"AZURE_STORAGE_ACCOUNT_NAME": "account"},
            AzureStore,
            {"container_name": "container"},
        ),
        (
            "abfss://container@account.dfs.core.windows.net/team/adapters",
            {},
            AzureStore,
            {"account_name": "account", "container_name": "container"},
        ),
    ],
)
def test_an_address_names_its_store(
    address: str, environment: dict[str, str], kind: Any, place: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    store = open_store(address)
    assert isinstance(store, BucketStore)
    opened = store._store
    assert isinstance(opened, kind)
    assert opened.prefix == "team/adapters"
    assert opened.config.items() >= place.items()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ftp://host/place", "unknown scheme ftp://; use a folder, s3://"),
        ("http://host/place", "unknown scheme"),
        ("s4://bucket", "unknown scheme"),
        ("s3://", "registry s3:// cannot be opened"),
        ("az://container/place", "registry az://container/place cannot be opened: .*Account must be specified"),
    ],
)
def test_an_address_that_cannot_be_used_says_why(address: str, words: str) -> None:
    with pytest.raises(RegistryError, match=words) as caught:
        open_store(address)
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_is_an_address_too(tmp_path: Path) -> None:
    open_store(f"file://{tmp_path}/a", create=True).write("k", b"1")
    assert open_store(tmp_path / "a").read("k") == b"1"


def test_only_the_first_writer_creates(any_store: Store) -> None:
    assert any_store.create("a/k", b"1")
    assert not any_store.create("a/k", b"2")
    assert any_store.read("a/k") == b"1"
    assert any_store.read("a/other") is None
    assert any_store.read_all(["a/k", "a/other"]) == [b"1", None]


def test_a_writer_whose_answer_got_lost_finds_its_own_object(monkeypatch: pytest.MonkeyPatch) -> None:
    store = BucketStore("memory", MemoryStore())
    real = obstore.put

    def repeated(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        raise AlreadyExistsError("the first request had come through")

    monkeypatch.setattr(obstore, "put", repeated)
    assert store.create("k", b"mine")


def test_what_is_on_its_way_is_no_object(store: Store) -> None:
    store.write("a/k", b"1")
    assert [path.name for path in Path(store.address).rglob("*")] == ["a", "k"]
    (Path(store.address) / "a/.k2-0123").write_bytes(b"a killed writer's")
    assert store.keys("") == ["a/k"]


def test_a_link_is_not_followed(store: Store, tmp_path: Path) -> None:
    store.write("a/k", b"1")
    root, outside = Path(store.address), tmp_path / "outside"
    outside.mkdir()
    (outside / "k").write_bytes(b"2")
    (root / "a/folder").symlink_to(outside)
    (root / "a/file").symlink_to(outside / "k")
    assert store.keys("") == ["a/k"]
    assert [stored.key for stored in store.listing("a/")] == ["a/k"]
    assert store.folders("a/") == store.folders("a/folder/") == store.keys("a/folder/") == []
    for key in ("a/folder/k", "a/folder/deeper/k", "a/file"):
        assert store.read(key) is None
        for use in (
            lambda key=key: store.fetch(key, tmp_path / "copy"),
            lambda key=key: store.create(key, b"3"),
            lambda key=key: store.write(key, b"3"),
            lambda key=key: store.write(key, root / "a/k"),
        ):
            with pytest.raises(RegistryError, match="is a link, which is not followed"):
                use()
    assert [(path.name, path.read_bytes()) for path in outside.iterdir()] == [("k", b"2")]
    linked = tmp_path / "linked"
    linked.symlink_to(root)
    assert open_store(linked).read("a/k") == b"1"


def test_listings_are_of_what_is_below(any_store: Store) -> None:
    for key in ("a/1", "a/2", "a/b/3", "a-b/4", "c"):
        any_store.write(key, b"x")
    assert {stored.key: stored.size for stored in any_store.listing("a/")} == {"a/1": 1, "a/2": 1, "a/b/3": 1}
    assert sorted(any_store.keys("a/")) == ["a/1", "a/2", "a/b/3"]
    assert any_store.keys("a/", after="a/2") == ["a/b/3"]
    assert (any_store.listing("nothing/"), any_store.keys("nothing/"), any_store.folders("nothing/")) == ([], [], [])
    assert sorted(any_store.folders("")) == ["a", "a-b"]
    assert any_store.folders("a/") == ["b"]
    any_store.delete(["a/1", "a/1", "a/nothing"])
    assert any_store.read("a/1") is None


def test_a_store_that_went_away_is_no_empty_one(store: Store) -> None:
    store.write("a/k", b"1")
    Path(store.address).rename(f"{store.address}-away")
    for read in (lambda: store.listing("a/"), lambda: store.folders(""), lambda: store.read("a/k")):
        with pytest.raises(RegistryError, match="the folder is gone"):
            read()


def test_nothing_is_opened_outside_the_folder(store: Store) -> None:
    for key in ("../escape", "a/../../escape", "a/./b", "a\0b"):
        with pytest.raises(RegistryError, match="cannot be written"):
            store.write(key, b"x")
        with pytest.raises(RegistryError, match="cannot be read"):
            store.read(key)
    assert [path.name for path in Path(store.address).parent.iterdir()] == ["store"]
