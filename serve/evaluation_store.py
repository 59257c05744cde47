"""Evaluations of versions, in a folder or any object store, beside the versions and apart from their hashed files.

Each is one record, versions/<name>/v<N>/evaluations/<0001>.json: create-if-absent, and numbered without gaps.
"""

from __future__ import annotations

import re
from itertools import count

from serve.errors import RegistryError, UnknownModelError
from serve.evaluations import Evaluation, Findings
from serve.version_store import VersionStore, signed
from serve.versions import VersionId

_FILE = re.compile(r"[0-9]{4,}\.json")


class EvaluationStore(VersionStore):
    """Versions and their evaluations. Safe to share between threads; every call may block on storage.

    Every method raises `RegistryError` where the store fails.
    """

    def add_evaluation(
        self, version: VersionId, found: Findings, *, by: str | None = None, reason: str = ""
    ) -> Evaluation:
        """Keeps what an evaluation of a version found, under the next number.

        Raises:
            UnknownModelError: there is no such version.
            VersionRefusedError: the version's records are damaged.
        """
        self.get(version)
        for number in count(max(self._numbers(version), default=0) + 1):
            made = Evaluation(**dict(found), **signed(by, reason), number=number, version=version)
            if self._create(_key(version, number), made):
                return made
        raise AssertionError("numbers do not end")

    def evaluations(self, version: VersionId) -> list[Evaluation]:
        """All evaluations of a version, oldest first."""
        numbers = sorted(self._numbers(version))
        self._load([_key(version, number) for number in numbers])
        return [self.evaluation(version, number) for number in numbers]

    def evaluation(self, version: VersionId, number: int) -> Evaluation:
        """One evaluation of a version.

        Raises:
            UnknownModelError: there is no such evaluation.
        """
        key = _key(version, number)
        data = self._get(key)
        if data is None:
            raise UnknownModelError(f"{version} has no evaluation {number}")
        found = self._parsed(key, data, Evaluation)
        if (found.version, found.number) != (version, number):
            raise RegistryError(f"registry {self.address}: {key}: is evaluation {found.number} of {found.version}")
        return found

    def _numbers(self, version: VersionId) -> list[int]:
        names = (key.rsplit("/", 1)[-1] for key in self._store.keys(_folder(version)))
        return [int(name.removesuffix(".json")) for name in names if _FILE.fullmatch(name)]


def _folder(version: VersionId) -> str:
    return f"versions/{version.name}/v{version.number}/evaluations/"


def _key(version: VersionId, number: int) -> str:
    return f"{_folder(version)}{number:04d}.json"
