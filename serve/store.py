"""Objects by key at one address: a folder, or a bucket of S3, GCS or Azure. The only file that knows obstore."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from serve.errors import RegistryError

SCHEMES = ("s3", "gs", "az", "abfss", "file")
READERS = 32
"""Requests at a time to a remote store, where each waits for the network; a folder is quicker one by one."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An object as a listing shows it; `size` in bytes."""

    key: str
    size: int
    modified: datetime


class Store:
    """Objects at one address. Safe to share between threads; every call may block on storage.

    Every method raises `RegistryError` where the store fails, with the address and the key.
    """

    def __init__(self, address: str, store: ObjectStore) -> None:
        self.address = address
        self._store = store
        self._root = Path(store.prefix) if isinstance(store, LocalStore) and store.prefix else None

    @classmethod
    def open(cls, address: str | Path, *, create: bool = False) -> Self:
        """Opens a folder or an object store's address; see docs/registry.md for how credentials are given.

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
                return cls(text, from_url(text))
            folder = Path(rest if separator else text).expanduser().absolute()
            if not create and not folder.is_dir():
                raise RegistryError(f"registry {text}: there is no such folder; publish to it first, or check the path")
            folder.mkdir(parents=True, exist_ok=True)
            return cls(text, LocalStore(prefix=folder))

    def create(self, key: str, data: bytes) -> bool:
        """Writes an object if there is none yet; False if there is another one."""
        with _storage(self.address, f"written at {key}"):
            try:
                obstore.put(self._store, key, data, mode="create")
            except AlreadyExistsError:
                # A request that was repeated because its answer got lost finds its own object.
                return self.read(key) == data
        return True

    def write(self, key: str, data: bytes | Path) -> None:
        """Writes an object, whatever was there; a file's content where a path is given."""
        with _storage(self.address, f"written at {key}"):
            if self._root is not None and isinstance(data, Path):
                # A killed writer's rest is then a plain file, which a listing shows and a clean-up finds.
                target = self._root / key
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(data, target)
            else:
                obstore.put(self._store, key, data)

    def read(self, key: str) -> bytes | None:
        """Reads an object whole; None where there is none."""
        with _storage(self.address, f"read at {key}"):
            try:
                return bytes(obstore.get(self._store, key).bytes())
            except FileNotFoundError:
                self._check_there()
                return None

    def read_all(self, keys: Sequence[str]) -> list[bytes | None]:
        """Reads many objects."""
        if self._root is not None:
            return [self.read(key) for key in keys]
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(self.read, keys))

    def fetch(self, key: str, target: Path) -> None:
        """Streams an object into a file."""
        with _storage(self.address, f"read at {key}"), target.open("wb") as file:
            for chunk in obstore.get(self._store, key):
                file.write(chunk)

    def list(self, prefix: str, *, after: str | None = None) -> list[Stored]:
        """The objects below a prefix that ends in '/', those after a key only where one is given; in no order."""
        self._check_there()
        with _storage(self.address, "listed"):
            chunks = obstore.list(self._store, prefix, offset=after, chunk_size=1000)
            return [Stored(meta["path"], meta["size"], meta["last_modified"]) for chunk in chunks for meta in chunk]

    def folders(self, prefix: str) -> list[str]:
        """The names directly below a prefix that have objects below them."""
        self._check_there()
        with _storage(self.address, "listed"):
            found = obstore.list_with_delimiter(self._store, prefix)["common_prefixes"]
            return [path.rstrip("/").rsplit("/", 1)[-1] for path in found]

    def delete(self, keys: Sequence[str]) -> None:
        """Deletes objects; those that are gone already are no fault."""
        with _storage(self.address, "cleaned up"):
            for key in keys:
                try:
                    obstore.delete(self._store, key)
                except FileNotFoundError:
                    continue

    def _check_there(self) -> None:
        """A folder that went away would look like an empty store."""
        if self._root is not None and not self._root.is_dir():
            raise RegistryError(f"registry {self.address}: the folder is gone")


@contextmanager
def _storage(address: str, what: str) -> Iterator[None]:
    try:
        yield
    except (BaseError, OSError, ValueError) as error:
        text = str(error).strip().split("\n\n")[0].replace("\n", " ")[:300]
        raise RegistryError(f"registry {address} cannot be {what}: {text}") from error
