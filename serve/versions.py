"""Names, versions and alias entries: what a registry keeps and a request names. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from serve.errors import BadRequestError
from sft.adapter import NAME_PATTERN, Bundle

NAME = re.compile(NAME_PATTERN.removesuffix("$"))
_VERSION = re.compile(r"(.+)@v([1-9][0-9]{0,8})")


def check_name(name: str) -> str:
    """Returns the name of an adapter or alias if it is safe in paths, keys and model ids.

    Raises:
        BadRequestError: it is not.
    """
    if not NAME.fullmatch(name):
        raise BadRequestError(
            f"{name!r} is no adapter or alias name: use 1 to 63 of a-z, 0-9, '.', '_' and '-', first a letter or digit"
        )
    return name


def check_share(share: float, what: str) -> None:
    """Checks a share of sessions: a canary's `weight` or a shadow's `share`.

    Raises:
        BadRequestError: it is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise BadRequestError(f"{what} {share}: must be from 0 (ends it) to 1 (all sessions)", what)


@dataclass(frozen=True, slots=True, order=True)
class VersionId:
    """One exact version of an adapter; as text `support@v7`."""

    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.name}@v{self.number}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `name@vN`.

        Raises:
            BadRequestError: the text is something else.
        """
        found = _VERSION.fullmatch(text)
        if not found:
            raise BadRequestError(f"{text!r} is no version: write NAME@vN, for example support@v7")
        return cls(check_name(found[1]), int(found[2]))


def _version_id(value: object) -> object:
    return VersionId.parse(value) if isinstance(value, str) else value


VersionText = Annotated[VersionId, BeforeValidator(_version_id), PlainSerializer(str, return_type=str)]


Action = Literal["promote", "canary", "shadow", "rollback"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Signed(_Record):
    """Who wrote a record, when and why; `writer` tells two writers of one moment apart."""

    at: datetime
    by: str
    reason: str = ""
    writer: str = ""


class Reservation(Signed):
    """A version number that was taken, and the hash of the bundle manifest that will come."""

    digest: str = Field(pattern=r"^[0-9a-f]{64}$")


class Retirement(Signed):
    """The end of a version: it is promoted no more and takes no new request. Rule: there is no way back."""


class Version(_Record):
    """A published version. Rule: what it holds never changes."""

    id: VersionText
    digest: str
    published_at: datetime
    published_by: str
    bundle: Bundle


def summary(version: Version) -> dict[str, Any]:
    """A version as plain data for programs, without its files and its lineage."""
    bundle = version.bundle
    return {
        **version.model_dump(mode="json", exclude={"bundle"}),
        "base_model": bundle.base_model,
        "base_fingerprint": bundle.base_fingerprint,
        "template_fingerprint": bundle.template_fingerprint,
        "rank": bundle.rank,
        "target_modules": list(bundle.target_modules),
    }


class Canary(_Record):
    """A version on trial: it answers a share of an alias's sessions.

    Rule: `since` is the number of the entry that began the trial. It stays when the weight changes, and sessions are
    drawn by it: so a raised weight adds sessions and moves none back, and another trial draws others.
    """

    version: VersionText
    weight: float = Field(ge=0, le=1)
    since: int = Field(gt=0)


class Shadow(_Record):
    """A version that gets a copy of a share of an alias's sessions; its answers are recorded, never returned.

    Rule: `since` is as a canary's.
    """

    version: VersionText
    share: float = Field(ge=0, le=1)
    since: int = Field(gt=0)


class AliasState(_Record):
    """What an alias serves: `version` to all sessions that no canary takes."""

    version: VersionText
    canary: Canary | None = None
    shadow: Shadow | None = None

    def parts(self) -> dict[VersionId, str]:
        """Every version that this names, and as what."""
        trial = {self.canary.version: "canary"} if self.canary else {}
        copied = {self.shadow.version: "shadow"} if self.shadow else {}
        return {**copied, **trial, self.version: "stable version"}


class AliasEntry(AliasState, Signed):
    """One move of an alias and the whole state after it: the newest entry alone tells what the alias serves.

    Rule: `back_to` is the number of the entry whose state a rollback returns to; None where there is none. An entry
    that a rollback wrote carries that of the entry which it returned to, so the next rollback goes one step further.
    `evaluation` is the number of the version's evaluation that let it pass a gate; None where no gate was asked for.
    """

    number: int = Field(gt=0)
    alias: str
    action: Action
    previous: VersionText | None
    back_to: int | None = None
    evaluation: int | None = None

    @property
    def state(self) -> AliasState:
        """What the alias serves since this entry."""
        return AliasState(version=self.version, canary=self.canary, shadow=self.shadow)


def promoted(version: VersionId, state: AliasState | None) -> AliasState:
    """The state after a promotion: all sessions on one version; a shadow of another version goes on. Pure."""
    shadow = state.shadow if state else None
    return AliasState(version=version, shadow=shadow if shadow and shadow.version != version else None)


def without(version: VersionId, state: AliasState) -> AliasState:
    """The state, but for a trial of a version: it is neither canary nor shadow any more. Pure."""
    canary, shadow = state.canary, state.shadow
    return AliasState(
        version=state.version,
        canary=canary if canary and canary.version != version else None,
        shadow=shadow if shadow and shadow.version != version else None,
    )


def with_canary(entry: AliasEntry, version: VersionId, weight: float) -> AliasState:
    """The state after the entry that follows and sets a canary; weight 0 ends the trial. Pure."""
    now = entry.canary
    since = now.since if now and now.version == version else entry.number + 1
    canary = Canary(version=version, weight=weight, since=since) if weight > 0 else None
    return AliasState(version=entry.version, canary=canary, shadow=entry.shadow)


def with_shadow(entry: AliasEntry, version: VersionId, share: float) -> AliasState:
    """The state after the entry that follows and sets a shadow; share 0 ends it. Pure."""
    now = entry.shadow
    since = now.since if now and now.version == version else entry.number + 1
    shadow = Shadow(version=version, share=share, since=since) if share > 0 else None
    return AliasState(version=entry.version, canary=entry.canary, shadow=shadow)
