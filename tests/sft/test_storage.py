from __future__ import annotations

from pathlib import Path

import pytest

from sft import storage
from sft.errors import StorageError


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
