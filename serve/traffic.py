"""Requested model, session and what the registry holds -> the version that answers. Pure: no storage, no clock."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from types import MappingProxyType
from typing import Literal

from serve.errors import BadRequestError, RetiredModelError, UnknownModelError
from serve.versions import Canary, Shadow, VersionId


@dataclass(frozen=True, slots=True)
class Known:
    """What can be asked for: a base model, whole versions, and what each alias serves.

    Rule: `aliases` has every alias with its stable version; `canaries` and `shadows` only those that have one;
    `previous` has what a rollback of each alias goes back to. A retired version answers no request of its own, but goes
    on answering for an alias that names it: a view that was read between two changes never refuses an alias.
    """

    base_id: str
    versions: frozenset[VersionId] = frozenset()
    aliases: Mapping[str, VersionId] = field(default_factory=lambda: MappingProxyType({}))
    canaries: Mapping[str, Canary] = field(default_factory=lambda: MappingProxyType({}))
    shadows: Mapping[str, Shadow] = field(default_factory=lambda: MappingProxyType({}))
    retired: frozenset[VersionId] = frozenset()
    previous: Mapping[str, frozenset[VersionId]] = field(default_factory=lambda: MappingProxyType({}))

    def models(self) -> list[str]:
        """Every id that a request may carry."""
        return [self.base_id, *sorted(self.aliases), *map(str, sorted(self.versions - self.retired))]

    def wanted(self) -> frozenset[VersionId]:
        """The versions that aliases name, and that a replica should hold before it is asked for them."""
        trials = (canary.version for canary in self.canaries.values())
        copies = (shadow.version for shadow in self.shadows.values())
        return frozenset((*self.aliases.values(), *trials, *copies)) & self.versions

    def kept(self) -> frozenset[VersionId]:
        """The versions that a replica holds all the time: the wanted ones, and those that a rollback brings back."""
        before = frozenset[VersionId]().union(*self.previous.values())
        return self.wanted() | (before & self.versions - self.retired)


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


Part = Literal["stable", "canary", "shadow", "direct"]
"""As what a version answers: for an alias, as one of its three; or because the request names it, or the base."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What a request goes to: the target that answers, and one that gets a copy whose answer nobody waits for."""

    target: Target
    shadow: Target | None = None
    part: Part = "stable"


def choose(model: str, known: Known, session: str) -> Choice:
    """Finds what a request goes to: the base id, a version `name@vN`, or an alias by its canary and shadow.

    The same session gets the same choice as long as the alias does not move. Over many sessions the shares are the
    canary's weight and the shadow's share; which sessions they are differs from alias to alias and from trial to trial.
    A raised weight adds sessions and takes none off the canary. The base id wins over an alias of the same name.

    Args:
        model: the request's `model`.
        known: what there is.
        session: who asks, such as a conversation's or a user's id; a random text where nobody said.

    Raises:
        RetiredModelError: the version named was retired.
        UnknownModelError: nothing of that name can answer; the text says what is near.
    """
    stable = resolve(model, known)
    if model == known.base_id or model not in known.aliases:
        return Choice(stable, part="direct")
    canary, shadow = known.canaries.get(model), known.shadows.get(model)
    choice = Choice(stable)
    if canary and canary.version in known.versions and _drawn(session, "canary", model, canary.since, canary.weight):
        choice = Choice(Target(known.base_id, canary.version), part="canary")
    if shadow and shadow.version in known.versions and _drawn(session, "shadow", model, shadow.since, shadow.share):
        copied = Target(known.base_id, shadow.version)
        return choice if copied == choice.target else replace(choice, shadow=copied)
    return choice


def resolve(model: str, known: Known) -> Target:
    """Finds a model by its name alone; an alias is its stable version. Raises as `choose` does."""
    if model == known.base_id:
        return Target(known.base_id, None)
    version = known.aliases.get(model)
    if version is None and "@" in model:
        try:
            version = VersionId.parse(model)
        except BadRequestError:
            version = None
        if version in known.retired and version not in known.wanted():
            raise RetiredModelError(f"the model {version} was retired{_successor(version, known)}")
    if version is None or version not in known.versions:
        raise UnknownModelError(f"the model {_shown(model)} does not exist{_hint(model, known)}")
    return Target(known.base_id, version)


def _drawn(session: str, purpose: str, alias: str, since: int, share: float) -> bool:
    """Whether a session is among a share of all sessions: a fair draw that anybody can repeat."""
    draw = blake2b(f"{purpose}\0{alias}\0{since}\0{session}".encode("utf-8", "surrogatepass"), digest_size=8)
    # An integer against 2**64 times the share: exact at both ends, where a quotient would be rounded.
    return int.from_bytes(draw.digest()) < share * 2**64


def _successor(version: VersionId, known: Known) -> str:
    newest = _newest(known).get(version.name)
    return f"; the newest version of that name is {newest}" if newest else "; GET /v1/models lists what there is"


def _hint(model: str, known: Known) -> str:
    newest = _newest(known)
    if model in newest:
        return f": no alias of that name is promoted; its newest version is {newest[model]}"
    # One version of each name: comparing with all of them would make a wrong name costly.
    candidates = [known.base_id, *known.aliases, *map(str, newest.values())]
    near = difflib.get_close_matches(model[:200], candidates, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else "; GET /v1/models lists what there is"


def _newest(known: Known) -> dict[str, VersionId]:
    return {version.name: version for version in sorted(known.versions - known.retired)}


def _shown(model: str, limit: int = 80) -> str:
    return repr(model if len(model) <= limit else f"{model[:limit]}...")
