"""Immutable adapter versions in a folder or any object store: the half of the registry that holds the bytes.

    versions/<name>/v<N>/reserved.json    written first, create-if-absent: the number belongs to one publisher
    versions/<name>/v<N>/<bundle files>
    versions/<name>/v<N>/bundle.json      written last, create-if-absent: from now on the version exists, whole;
                                          empty where the upload was given up instead
    versions/<name>/v<N>/retired.json     create-if-absent: the version is promoted and served to nobody new
    changed                               random, new after every change: tells readers when to read again

No record is ever overwritten or removed, so what was read once stays true and is kept in memory.
"""

from __future__ import annotations

import getpass
import hashlib
import logging
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Self, TypeVar

from pydantic import BaseModel, ValidationError

from serve.errors import BadRequestError, ConflictError, RegistryError, UnknownModelError, VersionRefusedError
from serve.store import Store, Stored, open_store
from serve.versions import NAME, Reservation, Retirement, Version, VersionId, check_name
from sft.adapter import MANIFEST, Bundle, verify_bundle
from sft.errors import AdapterError

RESERVED = "reserved.json"
RETIRED = "retired.json"
CHANGED = "changed"
GIVEN_UP = b""
"""In a manifest's place: an upload that never became whole, and now never will."""

_VERSION_KEY = re.compile(r"versions/([^/]+)/v([1-9][0-9]{0,8})/([^/]+)")

Record = TypeVar("Record", bound=BaseModel)

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An upload that never became a version: the files of it that still lie in the store, and their bytes."""

    id: VersionId
    modified: datetime
    files: tuple[str, ...]
    size: int


class VersionStore:
    """Versions at one address. Safe to share between threads; every call may block on storage.

    Every method raises `RegistryError` where the store fails.
    """

    def __init__(self, store: Store) -> None:
        self.address = store.address
        self._store = store
        self._known: dict[str, bytes] = {}

    @classmethod
    def open(cls, address: str | Path, *, create: bool = False) -> Self:
        """Opens the registry at a folder or an object store's address.

        Args:
            address: a folder, or s3://, gs://, az:// or abfss:// with bucket and prefix.
            create: make the folder if it is missing, rather than refuse it.

        Raises:
            RegistryError: the address cannot be used.
        """
        return cls(open_store(address, create=create))

    def publish(self, bundle_folder: Path, name: str, *, by: str | None = None) -> Version:
        """Publishes a bundle as the next version of a name.

        Concurrent publishers get different numbers; a publisher that dies leaves a gap, never half a version.

        Raises:
            AdapterError: the bundle is damaged.
            BadRequestError: the name is not allowed.
            ConflictError: a clean-up gave the upload up before it was through.
        """
        check_name(name)
        bundle = verify_bundle(bundle_folder)
        manifest = (bundle_folder / MANIFEST).read_bytes()
        reservation = Reservation(**signed(by), digest=hashlib.sha256(manifest).hexdigest())
        numbers = [int(part[1:]) for part in self._store.folders(f"versions/{name}/") if part[1:].isdecimal()]
        for number in count(max(numbers, default=0) + 1):
            version = VersionId(name, number)
            if self._create(f"{_prefix(version)}/{RESERVED}", reservation):
                break
        try:
            for file in bundle.files:
                self._store.write(f"{_prefix(version)}/{file}", bundle_folder / file)
        except BaseException:
            with suppress(RegistryError):
                self._give_up(version, bundle.files)
            raise
        if not self._store.create(f"{_prefix(version)}/{MANIFEST}", manifest):
            raise ConflictError(f"the upload of {version} was given up by a clean-up: publish the bundle again")
        self._ring()
        return self.get(version)

    def version_ids(self) -> list[VersionId]:
        """All whole versions of all names, sorted."""
        return sorted(self._whole(self._version_files()))

    def names(self) -> list[str]:
        """The names that have at least one whole version."""
        return sorted({version.name for version in self.version_ids()})

    def versions(self, name: str) -> list[Version]:
        """The whole versions of a name, oldest first."""
        found = sorted(self._whole(self._version_files(f"versions/{check_name(name)}/")))
        self.preload(found)
        return [self.get(version) for version in found]

    def get(self, version: VersionId) -> Version:
        """Reads a version's manifest.

        Raises:
            UnknownModelError: there is no such version.
            VersionRefusedError: the version's records are damaged.
        """
        prefix = f"versions/{check_name(version.name)}/v{version.number}"
        manifest = self._get(f"{prefix}/{MANIFEST}")
        reserved = self._get(f"{prefix}/{RESERVED}")
        if not manifest or reserved is None:
            raise UnknownModelError(f"there is no version {version}")
        try:
            reservation = Reservation.model_validate_json(reserved)
            bundle = Bundle.model_validate_json(manifest)
        except ValidationError as error:
            raise VersionRefusedError(f"{version} is damaged in the registry: {_fault(error)}") from None
        if hashlib.sha256(manifest).hexdigest() != reservation.digest:
            raise VersionRefusedError(
                f"{version} is damaged in the registry: {MANIFEST} was changed after it was published"
            )
        return Version(
            id=version,
            digest=reservation.digest,
            published_at=reservation.at,
            published_by=reservation.by,
            bundle=bundle,
        )

    def preload(self, versions: Iterable[VersionId]) -> None:
        """Reads many versions' records at once, so that `get` finds them in memory."""
        self._load([f"{_prefix(version)}/{file}" for version in versions for file in (MANIFEST, RESERVED)])

    def download(self, version: Version, folder: Path) -> Path:
        """Puts a version's bundle in a folder: whole and verified, or not at all.

        A folder that already holds it whole is left as it is; anything else there is replaced.

        Raises:
            AdapterError: the version is damaged in the registry.
        """
        if _holds(folder, version):
            return folder
        prefix = _prefix(version.id)
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for file in (*version.bundle.files, MANIFEST):
                self._store.fetch(f"{prefix}/{file}", work / file)
            if _digest(work) != version.digest:
                raise AdapterError(f"{work / MANIFEST}: is not the manifest that was published")
            verify_bundle(work)
            work.chmod(0o755)
            _replace(work, folder, version)
        except AdapterError as error:
            fault = str(error).replace(f"{work}/", "")
            raise AdapterError(f"{version.id} is damaged in the registry: {fault}") from None
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return folder

    def verify(self, version: VersionId) -> Version:
        """Reads all files of a version back and proves them whole and sound.

        Raises:
            UnknownModelError: there is no such version.
            AdapterError: the version is damaged in the registry.
        """
        found = self.get(version)
        with tempfile.TemporaryDirectory(prefix="raysft-") as scratch:
            self.download(found, Path(scratch) / "bundle")
        return found

    def retirement(self, version: VersionId) -> Retirement | None:
        """Who retired a version, when and why; None while it is in use."""
        key = f"{_prefix(version)}/{RETIRED}"
        data = self._get(key)
        return None if data is None else self._parsed(key, data, Retirement)

    def changed(self) -> bytes | None:
        """A token that is another one after every change of the registry: one small read."""
        return self._store.read(CHANGED)

    def unfinished(self, older_than: timedelta) -> list[Unfinished]:
        """Uploads that never became versions and that nobody touched for some time."""
        uploads: dict[VersionId, dict[str, Stored]] = {}
        for version, file, stored in self._version_files():
            uploads.setdefault(version, {})[file] = stored
        found = []
        for version, files in sorted(uploads.items()):
            modified = max(stored.modified for stored in files.values())
            manifest, left = files.get(MANIFEST), sorted(files.keys() - {RESERVED, MANIFEST})
            done = manifest is not None and (manifest.size > 0 or not left)
            if not done and datetime.now(UTC) - modified >= older_than:
                found.append(Unfinished(version, modified, tuple(left), sum(files[file].size for file in left)))
        return found

    def collect(self, upload: Unfinished) -> bool:
        """Gives an unfinished upload up and deletes its files; False if it became a version in the meantime.

        A publisher that is still at work finds its place taken, and fails. The number is never used again.
        """
        return self._give_up(upload.id, upload.files)

    def _give_up(self, version: VersionId, files: Iterable[str]) -> bool:
        prefix = _prefix(version)
        manifest = f"{prefix}/{MANIFEST}"
        # Only one of this and the publisher's last step can win.
        if not self._store.create(manifest, GIVEN_UP) and self._store.read(manifest) != GIVEN_UP:
            return False
        self._store.delete([f"{prefix}/{file}" for file in files])
        return True

    def _retire(self, version: VersionId, by: str | None, reason: str) -> Retirement:
        record = Retirement(**signed(by, reason))
        if self._create(f"{_prefix(version)}/{RETIRED}", record):
            self._ring()
        return self.retirement(version) or record

    def _ring(self) -> None:
        """Tells readers that something changed. They also look by themselves now and then, so a failure is no loss."""
        try:
            self._store.write(CHANGED, secrets.token_hex(16).encode())
        except RegistryError as error:
            logger.warning("readers will see the last change later than usual: %s", error)

    def _version_files(self, prefix: str = "versions/") -> Iterator[tuple[VersionId, str, Stored]]:
        """Files of versions; a name that the allow-list refuses is none of ours."""
        for stored in self._store.listing(prefix):
            found = _VERSION_KEY.fullmatch(stored.key)
            if found and NAME.fullmatch(found[1]):
                yield VersionId(found[1], int(found[2])), found[3], stored

    @staticmethod
    def _whole(files: Iterable[tuple[VersionId, str, Stored]]) -> set[VersionId]:
        return {version for version, file, stored in files if file == MANIFEST and stored.size > len(GIVEN_UP)}

    def _create(self, key: str, record: BaseModel) -> bool:
        return self._store.create(key, record.model_dump_json().encode())

    def _get(self, key: str) -> bytes | None:
        self._load([key])
        return self._known.get(key)

    def _load(self, keys: Sequence[str]) -> None:
        missing = [key for key in keys if key not in self._known]
        found = zip(missing, self._store.read_all(missing), strict=True) if missing else ()
        self._known.update({key: data for key, data in found if data is not None})

    def _parsed(self, key: str, data: bytes | None, kind: type[Record]) -> Record:
        if data is None:
            raise RegistryError(f"registry {self.address}: {key}: is missing")
        try:
            return kind.model_validate_json(data)
        except (ValidationError, BadRequestError) as error:
            raise RegistryError(f"registry {self.address}: {key}: {_fault(error)}") from None


def signed(by: str | None, reason: str = "") -> dict[str, object]:
    """The fields that say who writes a record, when and why."""
    return {"at": datetime.now(UTC), "by": by or _user(), "reason": reason, "writer": secrets.token_hex(8)}


def _prefix(version: VersionId) -> str:
    return f"versions/{version.name}/v{version.number}"


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def _holds(folder: Path, version: Version) -> bool:
    try:
        verify_bundle(folder)
        return _digest(folder) == version.digest
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


def _fault(error: ValidationError | BadRequestError) -> str:
    """The first fault in one line."""
    if isinstance(error, BadRequestError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the record'}: {first['msg']}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
