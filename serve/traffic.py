"""Requested model and what the registry holds -> the exact version that answers. Pure: no storage, no clock."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from serve.errors import BadRequestError, UnknownModelError
from serve.versions import VersionId


@dataclass(frozen=True, slots=True)
class Known:
    """What can be asked for: a base model, whole versions, and where each alias points."""

    base_id: str
    versions: frozenset[VersionId] = frozenset()
    aliases: Mapping[str, VersionId] = field(default_factory=lambda: MappingProxyType({}))

    def models(self) -> list[str]:
        """Every id that a request may carry."""
        return [self.base_id, *sorted(self.aliases), *map(str, sorted(self.versions))]


@dataclass(frozen=True, slots=True)
class Target:
    """What answers a request, from its first token to its last: one version, or None for the bare base model."""

    base_id: str
    version: VersionId | None

    @property
    def engine_id(self) -> str:
        """The id inside the engine: never reused, because versions never change."""
        return f"{self.base_id}:{self.version}" if self.version else self.base_id

    def __str__(self) -> str:
        return str(self.version) if self.version else self.base_id


def resolve(model: str, known: Known) -> Target:
    """Finds the exact target of a request's `model`: the base id, a version `name@vN` or an alias.

    The base id wins over an alias of the same name.

    Raises:
        UnknownModelError: nothing of that name can answer; the text says what is near.
    """
    if model == known.base_id:
        return Target(known.base_id, None)
    version = known.aliases.get(model)
    if version is None and "@" in model:
        try:
            version = VersionId.parse(model)
        except BadRequestError:
            version = None
    if version is None or version not in known.versions:
        raise UnknownModelError(f"the model {_shown(model)} does not exist{_hint(model, known)}")
    return Target(known.base_id, version)


def _hint(model: str, known: Known) -> str:
    own = sorted(version for version in known.versions if version.name == model)
    if own:
        return f": no alias of that name is promoted; its newest version is {own[-1]}"
    near = difflib.get_close_matches(model[:200], known.models(), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else "; GET /v1/models lists what there is"


def _shown(model: str, limit: int = 80) -> str:
    return repr(model if len(model) <= limit else f"{model[:limit]}...")
