from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft import storage
from sft.errors import StorageError
from sft.storage import StoredFile, find, resolve


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_write_read_upload_download(tmp_path: Path, scheme: str) -> None:
    address = f"{scheme}{tmp_path}/deep/er/a.txt"
    assert storage.read(address) is None
    storage.write(address, b"one")
    assert storage.read(address) == b"one"
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "manifest", "z"):
        (folder / name).write_text(name)
    storage.upload(folder, f"{scheme}{tmp_path}/there", last="manifest")
    written = sorted((tmp_path / "there").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert written[-1].name == "manifest"
    storage.download(f"{scheme}{tmp_path}/there", tmp_path / "back")
    assert {path.name: path.read_text() for path in (tmp_path / "back").iterdir()} == {
        "a": "a",
        "manifest": "manifest",
        "z": "z",
    }


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        storage.write(f"{tmp_path}/file/below/a.txt", b"")


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_find_gives_addresses_that_lead_back(tmp_path: Path, scheme: str) -> None:
    (tmp_path / "sub").mkdir()
    odd = "a b#%20?[ä].txt"
    for name in (odd, "sub/c.txt", "_marker", "sub/.hidden"):
        (tmp_path / name).write_text(name)
    first = StoredFile(str(tmp_path / odd), odd, len(odd.encode()))
    second = StoredFile(str(tmp_path / "sub/c.txt"), "sub/c.txt", 9)
    assert find(f"{scheme}{tmp_path}") == find(f"{scheme}{tmp_path}/**") == [first, second]
    assert find(f"{scheme}{tmp_path}/*/c.*") == [second]
    assert find(second.address) == [StoredFile(second.address, "c.txt", 9, named=True)]
    assert find(first.address) == [StoredFile(first.address, odd, first.size, named=True)]


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("*.txt", ["a.txt"]),
        ("?.[!j]*", ["a.txt"]),
        ("**/*.txt", ["a.txt", "b/a.txt", "b/c/a.txt"]),
        ("b/**", ["b/a.json", "b/a.txt", "b/c/a.txt"]),
        ("**/c/**/*.txt", ["b/c/a.txt"]),
        ("*/*/*", ["b/c/a.txt"]),
    ],
)
def test_globs(tmp_path: Path, pattern: str, matched: list[str]) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("a.txt", "b/a.txt", "b/a.json", "b/c/a.txt"):
        (tmp_path / name).write_text("")
    assert [file.address for file in find(f"{tmp_path}/{pattern}")] == [f"{tmp_path}/{name}" for name in matched]


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1))
def test_addresses_of_object_stores_keep_odd_names_and_options(name: str) -> None:
    asked = "s3://bucket/rows?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:9"
    path = f"bucket/x{name.replace('/', '')}"
    filesystem, found = resolve(storage._address_of(path, asked))
    assert found == path
    assert filesystem.region == "us-east-1"


def test_what_cannot_be_found_is_said(tmp_path: Path) -> None:
    for address, message in (
        (f"{tmp_path}/none", "there is no such file or folder"),
        (str(tmp_path), "no file is there"),
        (f"{tmp_path}/*.txt", "no file is there"),
        (f"{tmp_path}/none/*.txt", "cannot be listed"),
        ("ftp://host/x", "cannot be used as a storage address"),
        ("hf://models/owner/name", "is written hf://datasets/OWNER/NAME"),
    ):
        with pytest.raises(StorageError, match=message) as caught:
            find(address)
        assert str(caught.value).startswith(f"{address}: ")
