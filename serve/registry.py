"""The registry: immutable adapter versions, and an append-only alias log that says which of them answer.

    aliases/<alias>/<00000001>.json       one entry a move, create-if-absent: that is compare-and-swap

Entries are numbered without gaps, and the newest one holds the whole state. See serve/version_store.py
and serve/evaluation_store.py for the rest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from serve.errors import BadRequestError, ConflictError, RegistryError, UnknownModelError, VersionRefusedError
from serve.evaluation_store import EvaluationStore
from serve.store import Store
from serve.version_store import RETIRED, signed
from serve.versions import (
    NAME,
    Action,
    AliasEntry,
    AliasState,
    Retirement,
    VersionId,
    check_name,
    check_share,
    promoted,
    with_canary,
    with_shadow,
    without,
)
from sft.errors import AdapterError

_ENTRY_KEY = re.compile(r"aliases/([^/]+)/([0-9]{8})\.json")


@dataclass(frozen=True, slots=True)
class Contents:
    """What a registry held at one moment.

    Rule: every version that an alias names is among the versions; `previous` has the state that a rollback of an alias
    goes back to, where there is one.
    """

    versions: frozenset[VersionId]
    retired: frozenset[VersionId]
    aliases: Mapping[str, AliasEntry]
    previous: Mapping[str, AliasEntry]


class Registry(EvaluationStore):
    """Versions and aliases at one address. Safe to share between threads; every call may block on storage.

    Every method raises `RegistryError` where the store fails.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._newest: dict[str, int] = {}

    def contents(self) -> Contents:
        """All aliases with what was before, and whole versions, in two listings."""
        # Aliases first: a version that an alias names is then surely among the versions read after it.
        aliases = MappingProxyType(self.aliases())
        steps = {alias: entry.back_to for alias, entry in aliases.items() if entry.back_to is not None}
        self._load([_entry_key(alias, number) for alias, number in steps.items()])
        previous = MappingProxyType({alias: self._entry(alias, number) for alias, number in steps.items()})
        files = list(self._version_files())
        retired = frozenset(version for version, file, _ in files if file == RETIRED)
        return Contents(frozenset(self._whole(files)), retired, aliases, previous)

    def promote(
        self,
        alias: str,
        version: VersionId,
        *,
        by: str | None = None,
        reason: str = "",
        expected: int | None = None,
        evaluation: int | None = None,
    ) -> AliasEntry:
        """Points an alias at a version, for all sessions. Where it does so already, nothing is written.

        This ends the alias's canary; a shadow of another version goes on.

        Args:
            alias: the alias.
            version: what it is to serve.
            by: who moves it; by default this process's user.
            reason: why.
            expected: number of the alias's newest entry as the caller knows it, 0 for none; None takes any.
            evaluation: number of the version's evaluation that let it pass a gate.

        Raises:
            UnknownModelError: there is no such version or evaluation.
            VersionRefusedError: the version is damaged in the registry.
            BadRequestError: the version is retired, or did not pass that evaluation.
            ConflictError: someone else moved the alias at the same moment, or since the entry that was expected.
        """
        check_name(alias)
        self._admit(version)
        if evaluation is not None and not self.evaluation(version, evaluation).passed:
            raise BadRequestError(f"{version} did not pass its evaluation {evaluation}, so that cannot promote it")
        current = self.alias(alias)
        _check_expected(alias, current, expected)
        return self._move(alias, "promote", promoted(version, current), current, by, reason, evaluation)

    def canary(
        self,
        alias: str,
        version: VersionId,
        weight: float,
        *,
        by: str | None = None,
        reason: str = "",
        expected: int | None = None,
    ) -> AliasEntry:
        """Gives a share of an alias's sessions to a version on trial; weight 0 ends the trial.

        A new weight for the same version keeps the sessions that it has, as far as the weight allows. For `expected`
        see `promote`.

        Raises:
            UnknownModelError: there is no such version or alias.
            VersionRefusedError: the version is damaged in the registry.
            BadRequestError: the weight is not from 0 to 1, or the version is retired or the stable one already.
            ConflictError: someone else moved the alias at the same moment, or since the entry that was expected.
        """
        current = self._tried(alias, version, weight, "weight", expected)
        if weight == 0 and (current.canary is None or current.canary.version != version):
            raise BadRequestError(f"{version} is no canary of {alias}, so there is none to end; see its history")
        return self._move(alias, "canary", with_canary(current, version, weight), current, by, reason)

    def shadow(
        self, alias: str, version: VersionId, share: float, *, by: str | None = None, reason: str = ""
    ) -> AliasEntry:
        """Sends a copy of a share of an alias's sessions to a version, whose answers nobody gets; share 0 ends it.

        Raises:
            UnknownModelError: there is no such version or alias.
            VersionRefusedError: the version is damaged in the registry.
            BadRequestError: the share is not from 0 to 1, or the version is retired or the stable one already.
            ConflictError: someone else moved the alias at the same moment.
        """
        current = self._tried(alias, version, share, "share")
        if share == 0 and (current.shadow is None or current.shadow.version != version):
            raise BadRequestError(f"{version} is no shadow of {alias}, so there is none to end; see its history")
        return self._move(alias, "shadow", with_shadow(current, version, share), current, by, reason)

    def rollback(
        self,
        alias: str,
        *,
        by: str | None = None,
        reason: str = "",
        expected: int | None = None,
        banned: VersionId | None = None,
    ) -> AliasEntry:
        """Undoes an alias's last promote, canary or shadow; again and again back to its first state.

        Args:
            alias: the alias.
            by: who moves it; by default this process's user.
            reason: why.
            expected: as `promote` has it.
            banned: a version that shall not come back as canary or shadow.

        Raises:
            UnknownModelError: the alias does not exist.
            BadRequestError: there is no state before, or it names a retired version.
            ConflictError: someone else moved the alias at the same moment, or since the entry that was expected.
        """
        current = self._current(alias)
        _check_expected(alias, current, expected)
        if current.back_to is None:
            raise BadRequestError(
                f"{alias} cannot be rolled back: no version was served before {current.version}; promote another one"
            )
        before = self._entry(alias, current.back_to)
        state = without(banned, before.state) if banned else before.state
        for version in state.parts():
            if self.retirement(version):
                raise BadRequestError(
                    f"{alias} cannot be rolled back: its state before named {version}, which is retired; promote a "
                    "version instead"
                )
        return self._append(alias, "rollback", state, current, before.back_to, by, reason)

    def retire(self, version: VersionId, *, by: str | None = None, reason: str = "") -> Retirement:
        """Ends a version: it is promoted no more, and takes no new request. A second time changes nothing.

        Where someone promotes it at the very same moment, that alias goes on serving it until it moves.

        Raises:
            UnknownModelError: there is no such version.
            BadRequestError: an alias names it.
        """
        self.get(version)
        for alias, entry in self.aliases().items():
            part = entry.parts().get(version)
            if part:
                remedies = {
                    "canary": f"end it with canary {version} --alias {alias} --weight 0",
                    "shadow": f"end it with shadow {version} --alias {alias} --share 0",
                }
                first = remedies.get(part, f"promote another version to {alias}")
                raise BadRequestError(f"{version} cannot be retired: it is the {part} of {alias}; first {first}")
        return self._retire(version, by, reason)

    def check_admissible(self, version: VersionId) -> None:
        """Refuses a version that no alias may name, by its records alone; a move verifies its files, too.

        Raises:
            UnknownModelError: there is no such version.
            VersionRefusedError: its manifest is damaged.
            BadRequestError: it is retired.
        """
        try:
            self.get(version)
        except AdapterError as error:
            raise VersionRefusedError(str(error)) from None
        if self.retirement(version):
            raise BadRequestError(f"{version} is retired, for good; publish its bundle again to use it")

    def alias(self, alias: str) -> AliasEntry | None:
        """Where an alias points now: its newest entry, or None for an unknown alias."""
        check_name(alias)
        known = self._newest.get(alias, 0)
        # While the entry after the last one seen is missing, that one is the newest: no listing is needed.
        if not known or self._get(_entry_key(alias, known + 1)) is not None:
            self._note(self._store.keys(f"aliases/{alias}/", after=_entry_key(alias, known)))
        newest = self._newest.get(alias)
        return self._entry(alias, newest) if newest else None

    def aliases(self) -> dict[str, AliasEntry]:
        """Where every alias points now."""
        self._note(self._store.keys("aliases/"))
        newest = sorted(self._newest.items())
        self._load([_entry_key(alias, number) for alias, number in newest])
        return {alias: self._entry(alias, number) for alias, number in newest}

    def history(self, alias: str) -> list[AliasEntry]:
        """All moves of an alias, oldest first."""
        newest = self.alias(alias)
        numbers = range(1, newest.number + 1 if newest else 1)
        self._load([_entry_key(alias, number) for number in numbers])
        return [self._entry(alias, number) for number in numbers]

    def _current(self, alias: str) -> AliasEntry:
        current = self.alias(alias)
        if current is None:
            raise UnknownModelError(f"there is no alias {alias}; promote a version to it first")
        return current

    def _admit(self, version: VersionId) -> None:
        self.check_admissible(version)
        try:
            self.verify(version)
        except AdapterError as error:
            raise VersionRefusedError(str(error)) from None

    def _tried(
        self, alias: str, version: VersionId, share: float, what: str, expected: int | None = None
    ) -> AliasEntry:
        """Checks what canary and shadow have in common; returns the alias's entry to go on from."""
        check_share(share, what)
        self._current(alias)
        if share:
            self._admit(version)
        current = self._current(alias)
        _check_expected(alias, current, expected)
        if current.version == version:
            raise BadRequestError(f"{alias} serves {version} to all sessions already; name another version")
        return current

    def _move(
        self,
        alias: str,
        action: Action,
        state: AliasState,
        current: AliasEntry | None,
        by: str | None,
        reason: str,
        evaluation: int | None = None,
    ) -> AliasEntry:
        """Writes the next entry, unless it would change nothing."""
        if current is not None and state == current.state:
            return current
        back_to = current.number if current else None
        return self._append(alias, action, state, current, back_to, by, reason, evaluation)

    def _append(
        self,
        alias: str,
        action: Action,
        state: AliasState,
        current: AliasEntry | None,
        back_to: int | None,
        by: str | None,
        reason: str,
        evaluation: int | None = None,
    ) -> AliasEntry:
        entry = AliasEntry(
            **dict(state),
            **signed(by, reason),
            number=current.number + 1 if current else 1,
            alias=alias,
            action=action,
            previous=current.version if current else None,
            back_to=back_to,
            evaluation=evaluation,
        )
        if not self._create(_entry_key(alias, entry.number), entry):
            raise ConflictError(f"someone else moved {alias} at the same moment: look at its history and try again")
        self._newest[alias] = max(self._newest.get(alias, 0), entry.number)
        self._ring()
        return entry

    def _entry(self, alias: str, number: int) -> AliasEntry:
        key = _entry_key(alias, number)
        entry = self._parsed(key, self._get(key), AliasEntry)
        if (entry.alias, entry.number) != (alias, number):
            raise RegistryError(f"registry {self.address}: {key}: is the entry of {entry.alias} {entry.number}")
        return entry

    def _note(self, keys: Sequence[str]) -> None:
        """Takes in what a listing shows of the log's ends; a name that the allow-list refuses is none of ours."""
        highest: dict[str, str] = {}
        for key in filter(_ENTRY_KEY.fullmatch, keys):
            _, alias, file = key.split("/")
            highest[alias] = max(file, highest.get(alias, ""))
        for alias, file in highest.items():
            if NAME.fullmatch(alias):
                self._newest[alias] = max(int(file.removesuffix(".json")), self._newest.get(alias, 0))


def _check_expected(alias: str, current: AliasEntry | None, expected: int | None) -> None:
    number = current.number if current else 0
    if expected is not None and number != expected:
        raise ConflictError(
            f"{alias} was moved meanwhile: it is at entry {number}, no longer at {expected}; nothing was changed; look "
            "at its history, and try again"
        )


def _entry_key(alias: str, number: int) -> str:
    return f"aliases/{alias}/{number:08d}.json"
