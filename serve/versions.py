"""Names, versions and alias entries: what a registry keeps and a request names. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Literal, Self

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


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Reservation(_Record):
    """Who took a version number, when, and the hash of the bundle manifest that will come."""

    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    at: datetime
    by: str


class Version(_Record):
    """A published version. Rule: what it holds never changes."""

    id: VersionText
    digest: str
    published_at: datetime
    published_by: str
    bundle: Bundle


class AliasEntry(_Record):
    """One move of an alias; the newest entry is where the alias points."""

    number: int = Field(gt=0)
    alias: str
    action: Literal["promote", "rollback"]
    version: VersionText
    previous: VersionText | None
    at: datetime
    by: str
    reason: str


def served_before(history: list[AliasEntry]) -> list[VersionId]:
    """The versions that rollbacks return to, the next one last: promote pushes, rollback pops. Pure."""
    stack: list[VersionId] = []
    for entry in history:
        if entry.action == "promote":
            stack.append(entry.version)
        elif stack:
            stack.pop()
    return stack[:-1]
