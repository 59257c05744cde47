"""Objects by key at one address: a folder, or a bucket of S3, GCS or Azure. Create-if-absent is what they share."""

from __future__ import annotations

import os
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import ObjectStore, from_url

from serve.errors import RegistryError

SCHEMES = ("s3", "gs", "az", "abfss", "file")
READERS = 32
"""Requests at a time to a bucket, where each waits for the network."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An object as a listing shows it; `size` in bytes."""

    key: str
    size: int
    modified: datetime


class Store(ABC):
    """Objects at one address. Safe to share between threads; every call may block on storage.

    Keys are parts joined by '/'; a prefix ends in '/' or is empty. Every method raises `RegistryError` where the store
    fails, with the address and the key.
    """

    address: str

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Writes an object if there is none yet; False if there is another one."""

    @abstractmethod
    def write(self, key: str, data: bytes | Path) -> None:
        """Writes an object, whatever was there; a file's content where a path is given."""

    @abstractmethod
    def read(self, key: str) -> bytes | None:
        """Reads an object whole; None where there is none."""

    @abstractmethod
    def read_all(self, keys: Sequence[str]) -> list[bytes | None]:
        """Reads many objects."""

    @abstractmethod
    def fetch(self, key: str, target: Path) -> None:
        """Copies an object into a file."""

    @abstractmethod
    def keys(self, prefix: str, *, after: str = "") -> list[str]:
        """The keys below a prefix that follow another key in the alphabet; in no order."""

    @abstractmethod
    def listing(self, prefix: str) -> list[Stored]:
        """The objects below a prefix; in no order."""

    @abstractmethod
    def folders(self, prefix: str) -> list[str]:
        """The names directly below a prefix that have objects below them."""

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> None:
        """Deletes objects; those that are gone already are no fault."""


def open_store(address: str | Path, *, create: bool = False) -> Store:
    """Opens a folder or a bucket's address; see docs/registry.md for how credentials are given.

    Args:
        address: a folder, or s3://, gs://, az:// or abfss:// with bucket and prefix.
        create: make the folder if it is missing, rather than refuse it.

    Raises:
        RegistryError: the address cannot be used.
    """
    text = str(address)
    scheme, separator, rest = text.partition("://")
    if separator and scheme not in SCHEMES:
        allowed = "s3://, gs://, az:// or abfss://"
        raise RegistryError(f"registry {text}: unknown scheme {scheme}://; use a folder, {allowed}")
    with _storage(text, "opened"):
        if separator and scheme != "file":
            return BucketStore(text, from_url(text))
        folder = Path(rest if separator else text).expanduser().absolute()
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        elif not folder.is_dir():
            raise RegistryError(f"registry {text}: there is no such folder; publish to it first, or check the path")
        return FolderStore(text, folder)


class BucketStore(Store):
    """Objects in a bucket, through obstore."""

    def __init__(self, address: str, store: ObjectStore) -> None:
        self.address, self._store = address, store

    def create(self, key: str, data: bytes) -> bool:
        """See `Store`."""
        with _storage(self.address, f"written at {key}"):
            try:
                obstore.put(self._store, key, data, mode="create")
            except AlreadyExistsError:
                # A request that was repeated because its answer got lost finds its own object.
                return self.read(key) == data
        return True

    def write(self, key: str, data: bytes | Path) -> None:
        """See `Store`."""
        with _storage(self.address, f"written at {key}"):
            obstore.put(self._store, key, data)

    def read(self, key: str) -> bytes | None:
        """See `Store`."""
        with _storage(self.address, f"read at {key}"):
            try:
                return bytes(obstore.get(self._store, key).bytes())
            except FileNotFoundError:
                return None

    def read_all(self, keys: Sequence[str]) -> list[bytes | None]:
        """See `Store`."""
        if len(keys) < 2:
            return [self.read(key) for key in keys]
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(self.read, keys))

    def fetch(self, key: str, target: Path) -> None:
        """See `Store`."""
        with _storage(self.address, f"read at {key}"), target.open("wb") as file:
            for chunk in obstore.get(self._store, key):
                file.write(chunk)

    def keys(self, prefix: str, *, after: str = "") -> list[str]:
        """See `Store`."""
        with _storage(self.address, "listed"):
            chunks = obstore.list(self._store, prefix, offset=after or None, chunk_size=1000)
            return [meta["path"] for chunk in chunks for meta in chunk]

    def listing(self, prefix: str) -> list[Stored]:
        """See `Store`."""
        with _storage(self.address, "listed"):
            chunks = obstore.list(self._store, prefix, chunk_size=1000)
            return [Stored(meta["path"], meta["size"], meta["last_modified"]) for chunk in chunks for meta in chunk]

    def folders(self, prefix: str) -> list[str]:
        """See `Store`."""
        with _storage(self.address, "listed"):
            found = obstore.list_with_delimiter(self._store, prefix)["common_prefixes"]
            return [path.rstrip("/").rsplit("/", 1)[-1] for path in found]

    def delete(self, keys: Sequence[str]) -> None:
        """See `Store`."""
        with _storage(self.address, "cleaned up"), suppress(FileNotFoundError):
            obstore.delete(self._store, list(keys))


class FolderStore(Store):
    """Objects as files below a folder. Files whose names begin with a dot are on their way, and no objects.

    Links are not followed, neither to a file nor to a folder; the folder itself may be one.

    A record reaches the disk before its name does, so that a power cut leaves it whole or not at all.
    """

    def __init__(self, address: str, root: Path) -> None:
        self.address, self._root = address, root

    def create(self, key: str, data: bytes) -> bool:
        """See `Store`."""
        with _storage(self.address, f"written at {key}"), self._staged(key, data) as staged:
            try:
                os.link(staged, self._path(key))
            except FileExistsError:
                # On a network's file system a link may be made and its answer get lost: then there are two names.
                return staged.stat().st_nlink > 1
        return True

    def write(self, key: str, data: bytes | Path) -> None:
        """See `Store`."""
        with _storage(self.address, f"written at {key}"):
            if isinstance(data, bytes):
                with self._staged(key, data) as staged:
                    os.replace(staged, self._path(key))
                return
            # In place: what a killed writer leaves is then a plain file, which a listing shows and a clean-up finds.
            target = self._plain(key)
            target.parent.mkdir(parents=True, exist_ok=True)
            with data.open("rb") as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())

    def read(self, key: str) -> bytes | None:
        """See `Store`."""
        with _storage(self.address, f"read at {key}"):
            try:
                return self._plain(key).read_bytes()
            except FileNotFoundError:
                self._check_there()
                return None

    def read_all(self, keys: Sequence[str]) -> list[bytes | None]:
        """See `Store`."""
        return [self.read(key) for key in keys]

    def fetch(self, key: str, target: Path) -> None:
        """See `Store`."""
        with _storage(self.address, f"read at {key}"):
            shutil.copyfile(self._plain(key), target)

    def keys(self, prefix: str, *, after: str = "") -> list[str]:
        """See `Store`."""
        found = (f"{folder}{entry.name}" for folder, entry in self._walk(prefix))
        return [key for key in found if key > after]

    def listing(self, prefix: str) -> list[Stored]:
        """See `Store`."""
        found = []
        for folder, entry in self._walk(prefix):
            with _storage(self.address, "listed"), suppress(FileNotFoundError):  # a clean-up may have taken it
                stat = entry.stat()
                modified = datetime.fromtimestamp(stat.st_mtime, UTC)
                found.append(Stored(f"{folder}{entry.name}", stat.st_size, modified))
        return found

    def folders(self, prefix: str) -> list[str]:
        """See `Store`."""
        return [entry.name for entry in self._scan(prefix) if entry.is_dir(follow_symlinks=False)]

    def delete(self, keys: Sequence[str]) -> None:
        """See `Store`."""
        with _storage(self.address, "cleaned up"):
            for key in keys:
                self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        if any(part in ("", ".", "..") for part in key.split("/")):
            raise ValueError(f"{key!r} is no key")
        return self._root / key

    def _plain(self, key: str) -> Path:
        """A key's path, on which no link leads elsewhere: what a listing does not show is not there."""
        path = self._path(key)
        below = len(path.relative_to(self._root).parts)
        for each in (path, *path.parents[: below - 1]):
            if each.is_symlink():
                raise FileNotFoundError(f"{each.relative_to(self._root)} is a link, which is not followed")
        return path

    @contextmanager
    def _staged(self, key: str, data: bytes) -> Iterator[Path]:
        """A file beside the key's place that holds the data, on disk."""
        target = self._plain(key)
        staged = target.with_name(f".{target.name}-{secrets.token_hex(8)}")
        self._check_there()
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with staged.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield staged
        finally:
            staged.unlink(missing_ok=True)

    def _walk(self, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Files below a prefix, each with the prefix of its folder."""
        waiting = [prefix]
        while waiting:
            folder = waiting.pop()
            for entry in self._scan(folder):
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{folder}{entry.name}/")
                elif not entry.is_symlink():
                    yield folder, entry

    def _scan(self, prefix: str) -> list[os.DirEntry[str]]:
        self._check_there()
        found: list[os.DirEntry[str]] = []
        with (
            _storage(self.address, "listed"),
            suppress(FileNotFoundError),
            os.scandir(self._plain(prefix.rstrip("/")) if prefix else self._root) as entries,
        ):
            found += (entry for entry in entries if not entry.name.startswith("."))
        return found

    def _check_there(self) -> None:
        """A folder that went away would look like an empty store."""
        if not self._root.is_dir():
            raise RegistryError(f"registry {self.address}: the folder is gone")


@contextmanager
def _storage(address: str, what: str) -> Iterator[None]:
    try:
        yield
    except (BaseError, OSError, ValueError) as error:
        text = str(error).strip().split("\n\n")[0].replace("\n", " ")[:300]
        raise RegistryError(f"registry {address} cannot be {what}: {text}") from error
