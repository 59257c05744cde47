"""The registry: immutable adapter versions and an append-only alias log, in a folder or any object store.

    versions/<name>/v<N>/reserved.json    written first, create-if-absent: the number belongs to one publisher
    versions/<name>/v<N>/<bundle files>
    versions/<name>/v<N>/bundle.json      written last, create-if-absent: from now on the version exists, whole
    aliases/<alias>/<00000001>.json       one entry a move, create-if-absent: that is compare-and-swap

Nothing is ever overwritten or removed, so what was read once stays true and is kept in memory.
"""

from __future__ import annotations

import getpass
import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Literal, Self

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore, from_url
from pydantic import ValidationError

from serve.errors import BadRequestError, ConflictError, RegistryError, UnknownModelError
from serve.versions import NAME, AliasEntry, Reservation, Version, VersionId, check_name, served_before
from sft.adapter import MANIFEST, Bundle, verify_bundle
from sft.errors import AdapterError

RESERVED = "reserved.json"
SCHEMES = ("s3", "gs", "az", "file")

_VERSION_KEY = re.compile(rf"versions/([^/]+)/v([1-9][0-9]{{0,8}})/({re.escape(RESERVED)}|{re.escape(MANIFEST)})")
_ENTRY_KEY = re.compile(r"aliases/([^/]+)/([0-9]{8})\.json")


class Registry:
    """Versions and aliases at one address. Safe to share between threads; every call may block on storage."""

    def __init__(self, address: str, store: ObjectStore) -> None:
        self.address = address
        self._store = store
        self._root = store.prefix if isinstance(store, LocalStore) else None
        self._read: dict[str, bytes] = {}

    @classmethod
    def open(cls, address: str | Path, *, create: bool = False) -> Self:
        """Opens the registry at a folder or an object store's address.

        Args:
            address: a folder, or s3://, gs:// or az:// with bucket and prefix; credentials come from the environment.
            create: make the folder if it is missing, rather than refuse it.

        Raises:
            RegistryError: the address cannot be used.
        """
        text = str(address)
        scheme, separator, rest = text.partition("://")
        if separator and scheme not in SCHEMES:
            raise RegistryError(f"registry {text}: unknown scheme {scheme}://; use a folder, s3://, gs:// or az://")
        with _storage(text, "opened"):
            if separator and scheme != "file":
                return cls(text, from_url(text))
            folder = Path(rest if separator else text).absolute()
            if not create and not folder.is_dir():
                raise RegistryError(f"registry {text}: there is no such folder; publish to it first, or check the path")
            folder.mkdir(parents=True, exist_ok=True)
            return cls(text, LocalStore(prefix=folder))

    def publish(self, bundle_folder: Path, name: str, *, by: str | None = None) -> Version:
        """Publishes a bundle as the next version of a name.

        Concurrent publishers get different numbers; a publisher that dies leaves a gap, never half a version.

        Raises:
            AdapterError: the bundle is damaged.
            BadRequestError: the name is not allowed.
            RegistryError: the store failed.
        """
        check_name(name)
        bundle = verify_bundle(bundle_folder)
        manifest = (bundle_folder / MANIFEST).read_bytes()
        reservation = Reservation(digest=hashlib.sha256(manifest).hexdigest(), at=_now(), by=by or _user())
        taken = [number for other, number, _ in self._version_keys(f"versions/{name}/") if other == name]
        for number in count(max(taken, default=0) + 1):
            prefix = f"versions/{name}/v{number}"
            if self._create(f"{prefix}/{RESERVED}", reservation.model_dump_json().encode()):
                break
        for file in bundle.files:
            with _storage(self.address, f"written at {prefix}/{file}"):
                obstore.put(self._store, f"{prefix}/{file}", bundle_folder / file)
        self._create(f"{prefix}/{MANIFEST}", manifest)
        return self.get(VersionId(name, number))

    def version_ids(self) -> list[VersionId]:
        """All whole versions of all names, sorted."""
        return sorted(VersionId(name, number) for name, number, file in self._version_keys() if file == MANIFEST)

    def names(self) -> list[str]:
        """The names that have at least one whole version."""
        return sorted({version.name for version in self.version_ids()})

    def versions(self, name: str) -> list[Version]:
        """The whole versions of a name, oldest first."""
        keys = self._version_keys(f"versions/{check_name(name)}/")
        numbers = sorted(number for other, number, file in keys if other == name and file == MANIFEST)
        return [self.get(VersionId(name, number)) for number in numbers]

    def get(self, version: VersionId) -> Version:
        """Reads a version's manifest.

        Raises:
            UnknownModelError: there is no such version.
            AdapterError: the version's records are damaged.
            RegistryError: the store failed.
        """
        prefix = f"versions/{check_name(version.name)}/v{version.number}"
        manifest = self._get(f"{prefix}/{MANIFEST}")
        reserved = self._get(f"{prefix}/{RESERVED}")
        if manifest is None or reserved is None:
            raise UnknownModelError(f"there is no version {version}")
        try:
            reservation = Reservation.model_validate_json(reserved)
            bundle = Bundle.model_validate_json(manifest)
        except ValidationError as error:
            raise AdapterError(f"{version} is damaged in the registry: {_first_line(error)}") from None
        if hashlib.sha256(manifest).hexdigest() != reservation.digest:
            raise AdapterError(f"{version} is damaged in the registry: {MANIFEST} was changed after it was published")
        return Version(
            id=version,
            digest=reservation.digest,
            published_at=reservation.at,
            published_by=reservation.by,
            bundle=bundle,
        )

    def download(self, version: Version, folder: Path) -> Path:
        """Puts a version's bundle in a folder: whole and verified, or not at all.

        A folder that already holds it whole is left as it is; anything else there is replaced.

        Raises:
            AdapterError: the version is damaged in the registry.
            RegistryError: the store failed.
        """
        if _holds(folder, version):
            return folder
        prefix = f"versions/{version.id.name}/v{version.id.number}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for file in (*version.bundle.files, MANIFEST):
                with _storage(self.address, f"read at {prefix}/{file}"), (work / file).open("wb") as target:
                    for chunk in obstore.get(self._store, f"{prefix}/{file}"):
                        target.write(chunk)
            verify_bundle(work)
            if not _holds(work, version):
                raise AdapterError(f"{work / MANIFEST}: is not the manifest that was published")
            work.chmod(0o755)
            _replace(work, folder, version)
        except AdapterError as error:
            fault = str(error).replace(f"{work}/", "")
            raise AdapterError(f"{version.id} is damaged in the registry: {fault}") from None
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return folder

    def promote(self, alias: str, version: VersionId, *, by: str | None = None, reason: str = "") -> AliasEntry:
        """Points an alias at a version. Where it points there already, nothing is written.

        Raises:
            UnknownModelError: there is no such version.
            ConflictError: someone else moved the alias at the same moment.
        """
        self.get(version)
        current = self.alias(alias)
        if current is not None and current.version == version:
            return current
        return self._append(alias, "promote", version, current, by, reason)

    def rollback(self, alias: str, *, by: str | None = None, reason: str = "") -> AliasEntry:
        """Points an alias back at the version that it served before; again and again back to its first.

        Raises:
            UnknownModelError: the alias does not exist.
            BadRequestError: no version was served before.
            ConflictError: someone else moved the alias at the same moment.
        """
        history = self.history(alias)
        if not history:
            raise UnknownModelError(f"there is no alias {alias}")
        served = served_before(history)
        if not served:
            raise BadRequestError(f"{alias} cannot be rolled back: no version was served before {history[-1].version}")
        return self._append(alias, "rollback", served[-1], history[-1], by, reason)

    def alias(self, alias: str) -> AliasEntry | None:
        """Where an alias points now: its newest entry, or None for an unknown alias."""
        numbers = self._entry_numbers(f"aliases/{check_name(alias)}/").get(alias)
        return self._entry(alias, max(numbers)) if numbers else None

    def aliases(self) -> dict[str, AliasEntry]:
        """Where every alias points now."""
        return {alias: self._entry(alias, max(numbers)) for alias, numbers in sorted(self._entry_numbers().items())}

    def history(self, alias: str) -> list[AliasEntry]:
        """All moves of an alias, oldest first."""
        numbers = self._entry_numbers(f"aliases/{check_name(alias)}/").get(alias, [])
        return [self._entry(alias, number) for number in sorted(numbers)]

    def _append(
        self,
        alias: str,
        action: Literal["promote", "rollback"],
        version: VersionId,
        current: AliasEntry | None,
        by: str | None,
        reason: str,
    ) -> AliasEntry:
        entry = AliasEntry(
            number=current.number + 1 if current else 1,
            alias=alias,
            action=action,
            version=version,
            previous=current.version if current else None,
            at=_now(),
            by=by or _user(),
            reason=reason,
        )
        if not self._create(_entry_key(alias, entry.number), entry.model_dump_json().encode()):
            raise ConflictError(f"someone else moved {alias} at the same moment: look at its history and try again")
        return entry

    def _entry(self, alias: str, number: int) -> AliasEntry:
        key = _entry_key(alias, number)
        data = self._get(key)
        try:
            entry = AliasEntry.model_validate_json(data or b"")
        except (ValidationError, BadRequestError) as error:
            raise RegistryError(f"registry {self.address}: {key}: {_first_line(error)}") from None
        if (entry.alias, entry.number) != (alias, number):
            raise RegistryError(f"registry {self.address}: {key}: is the entry of {entry.alias} {entry.number}")
        return entry

    def _entry_numbers(self, prefix: str = "aliases/") -> dict[str, list[int]]:
        numbers: dict[str, list[int]] = {}
        for found in self._matches(prefix, _ENTRY_KEY):
            numbers.setdefault(found[1], []).append(int(found[2]))
        return numbers

    def _version_keys(self, prefix: str = "versions/") -> Iterator[tuple[str, int, str]]:
        for found in self._matches(prefix, _VERSION_KEY):
            yield found[1], int(found[2]), found[3]

    def _matches(self, prefix: str, pattern: re.Pattern[str]) -> Iterator[re.Match[str]]:
        """Keys that are ours; a name that the allow-list refuses is no key of ours."""
        if self._root is not None and not self._root.is_dir():
            # A folder that went away would list as an empty registry.
            raise RegistryError(f"registry {self.address}: the folder is gone")
        with _storage(self.address, "listed"):
            paths = [meta["path"] for chunk in obstore.list(self._store, prefix) for meta in chunk]
        for path in paths:
            found = pattern.fullmatch(path)
            if found and NAME.fullmatch(found[1]):
                yield found

    def _create(self, key: str, data: bytes) -> bool:
        """Writes an object if there is none yet; False if there is one."""
        with _storage(self.address, f"written at {key}"):
            try:
                obstore.put(self._store, key, data, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def _get(self, key: str) -> bytes | None:
        if key not in self._read:
            with _storage(self.address, f"read at {key}"):
                try:
                    self._read[key] = bytes(obstore.get(self._store, key).bytes())
                except FileNotFoundError:
                    return None
        return self._read[key]


def _entry_key(alias: str, number: int) -> str:
    return f"aliases/{alias}/{number:08d}.json"


def _holds(folder: Path, version: Version) -> bool:
    try:
        verify_bundle(folder)
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest() == version.digest
    except (AdapterError, OSError):
        return False


def _replace(work: Path, folder: Path, version: Version) -> None:
    """Renames a verified folder into place; another process may do the same at the same moment."""
    for _ in range(3):
        try:
            work.rename(folder)
            return
        except OSError:
            if _holds(folder, version):
                return
            shutil.rmtree(folder, ignore_errors=True)
    raise RegistryError(f"{folder}: cannot be replaced")


@contextmanager
def _storage(address: str, what: str) -> Iterator[None]:
    try:
        yield
    except (BaseError, OSError) as error:
        raise RegistryError(f"registry {address} cannot be {what}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n\n")[0].replace("\n", " ")[:300]


def _now() -> datetime:
    return datetime.now(UTC)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
