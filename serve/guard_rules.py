"""Which version of an alias is on probation, and whether what was counted of it breaks a limit. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from typing import Literal

from serve.config import Ceiling, GuardSection, LiveCheck
from serve.guard_counts import Counts, p95
from serve.versions import AliasEntry, VersionId

Kind = Literal["error_rate", "first_token", "total", "checker"]


@dataclass(frozen=True, slots=True)
class Watch:
    """A version on probation: it was promoted a short while ago, or is a canary.

    Rule: `since` is the number of the entry that began it, so another promotion of the same version is another watch.
    """

    alias: str
    since: int
    version: VersionId
    before: VersionId
    canary: bool


@dataclass(frozen=True, slots=True)
class Breach:
    """A limit that is broken: which kind, and one line with the numbers."""

    kind: Kind
    text: str


def watch_of(entry: AliasEntry, now: datetime, watch_s: float) -> Watch | None:
    """Who is on probation by an alias's newest entry; None where nobody is.

    A canary is as long as it runs, beside the stable version. A promoted version is for some time, beside the version
    that it replaced, and only until the alias moves again: a rollback would then undo that move, and not the promotion.
    """
    if entry.canary:
        return Watch(entry.alias, entry.canary.since, entry.canary.version, entry.version, canary=True)
    replaced = entry.previous if entry.action == "promote" and entry.back_to is not None else None
    if replaced is None or replaced == entry.version or now - entry.at >= timedelta(seconds=watch_s):
        return None
    return Watch(entry.alias, entry.number, entry.version, replaced, canary=False)


def checkers_of(guard: GuardSection, alias: str) -> list[str]:
    """The names of the checkers that an alias's answers are scored by."""
    return [
        name for name, check in guard.checkers.items() if any(fnmatchcase(alias, pattern) for pattern in check.aliases)
    ]


def judge(guard: GuardSection, watch: Watch, counts: Counts, before: Counts) -> Breach | None:
    """Finds the first limit that a version breaks; None where it breaks none, or there is too little to tell.

    Args:
        guard: the limits.
        watch: who is judged.
        counts: of the version.
        before: of the version that it is compared with.
    """
    return next(_breaches(guard, watch, counts, before), None)


def _breaches(guard: GuardSection, watch: Watch, counts: Counts, before: Counts) -> Iterator[Breach]:
    least, name = guard.min_requests, watch.before
    rate, past = _rate(counts, least), _rate(before, least)
    if broken := _above(rate, past, guard.error_rate, name):
        yield Breach("error_rate", f"{counts.failures} of {counts.requests} requests failed, {rate:.3g} {broken}")
    first, past = _p95(counts.first_tokens, least), _p95(before.first_tokens, least)
    if broken := _above(first, past, guard.first_token_p95_s, name):
        yield Breach("first_token", f"the p95 of the times to the first token is {first:.3g} s {broken}")
    total, past = _p95(counts.totals, least), _p95(before.totals, least)
    if broken := _above(total, past, guard.total_p95_s, name):
        yield Breach("total", f"the p95 of the times of answers is {total:.3g} s {broken}")
    for checker in checkers_of(guard, watch.alias):
        mean, past = _mean(counts, checker, least), _mean(before, checker, least)
        if broken := _below(mean, past, guard.checkers[checker], name):
            scored = counts.checks[checker][0]
            yield Breach("checker", f"checker {checker} scores {scored} answers {mean:.3g} {broken}")


def _above(found: float | None, past: float | None, limit: Ceiling, before: VersionId) -> str | None:
    """How a number breaks its ceiling; None where it does not, or is not known."""
    if found is None:
        return None
    if limit.at_most is not None and found > limit.at_most:
        return f"above {limit.at_most:g}"
    if past is None:
        return None
    if limit.above_before is not None and found > past + limit.above_before:
        return f"more than {limit.above_before:g} above the {past:.3g} of {before}"
    if limit.times_before is not None and found > past * limit.times_before:
        return f"above {limit.times_before:g} times the {past:.3g} of {before}"
    return None


def _below(found: float | None, past: float | None, limit: LiveCheck, before: VersionId) -> str | None:
    """How a mean score breaks its floor; None where it does not, or is not known."""
    if found is None:
        return None
    if limit.at_least is not None and found < limit.at_least:
        return f"below {limit.at_least:g}"
    if past is not None and limit.below_before is not None and found < past - limit.below_before:
        return f"more than {limit.below_before:g} below the {past:.3g} of {before}"
    return None


def _rate(counts: Counts, least: int) -> float | None:
    return counts.failures / counts.requests if counts.requests >= least else None


def _p95(classes: Mapping[int, int], least: int) -> float | None:
    return p95(classes) if sum(classes.values()) >= least else None


def _mean(counts: Counts, checker: str, least: int) -> float | None:
    scored, total = counts.checks.get(checker, (0, 0.0))
    return total / scored if scored >= least else None
