from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import RetiredModelError, UnknownModelError, failure_of
from serve.traffic import Choice, Known, Target, choose, resolve
from serve.versions import Canary, Shadow, VersionId

V1, V2, V3, DRAFT = *(VersionId("support", number) for number in (1, 2, 3)), VersionId("draft", 1)
KNOWN = Known("base-1b", frozenset({V1, V2, DRAFT}), {"support": V1, "live": V2})

names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,8}", fullmatch=True)
ids = st.builds(VersionId, names, st.integers(1, 20))
sessions = st.text(max_size=20)
shares = st.floats(0, 1)


def split(weight: float = 0, share: float = 0, *, alias: str = "live", since: int = 2, shadow: VersionId = V3) -> Known:
    """An alias with a canary and a shadow beside its stable version."""
    return Known(
        "base",
        frozenset({V1, V2, V3}),
        {alias: V1},
        {alias: Canary(version=V2, weight=weight, since=since)},
        {alias: Shadow(version=shadow, share=share, since=since)},
    )


def on_canary(known: Known, session: str, alias: str = "live") -> bool:
    return choose(alias, known, session).target.version == V2


@pytest.mark.parametrize(
    ("model", "version", "engine_id"),
    [
        ("base-1b", None, "base-1b"),
        ("support", V1, "base-1b:support@v1"),
        ("live", V2, "base-1b:support@v2"),
        ("support@v2", V2, "base-1b:support@v2"),
        ("draft@v1", DRAFT, "base-1b:draft@v1"),
    ],
)
def test_base_alias_and_version_have_one_target(model: str, version: VersionId | None, engine_id: str) -> None:
    target = resolve(model, KNOWN)
    assert target == Target("base-1b", version)
    assert target.engine_id == engine_id
    assert str(target) == (str(version) if version else "base-1b")


@pytest.mark.parametrize(
    "model",
    ["", "Support", "support@v3", "support@v01", "support@", "base-1b:support@v1", "../support@v1", "live@v2", "a\0b"],
)
def test_anything_else_is_unknown(model: str) -> None:
    with pytest.raises(UnknownModelError, match="does not exist"):
        resolve(model, KNOWN)


def test_a_hint_names_what_is_near() -> None:
    with pytest.raises(UnknownModelError, match="did you mean support"):
        resolve("suport", KNOWN)
    with pytest.raises(UnknownModelError, match="no alias of that name is promoted; its newest version is draft@v1"):
        resolve("draft", KNOWN)
    with pytest.raises(UnknownModelError, match=r"GET /v1/models"):
        resolve("zzzzzz", KNOWN)


def test_a_long_name_is_cut_in_the_message() -> None:
    with pytest.raises(UnknownModelError) as caught:
        resolve("x" * 10_000, KNOWN)
    assert len(str(caught.value)) < 200


def test_an_alias_of_a_version_that_is_not_whole_is_unknown() -> None:
    with pytest.raises(UnknownModelError):
        resolve("live", Known("base", frozenset({V1}), {"live": V2}))


def test_the_base_wins_over_an_alias_of_its_name() -> None:
    assert resolve("base", Known("base", frozenset({V1}), {"base": V1})).version is None


@given(st.frozensets(ids), st.dictionaries(names, ids), st.one_of(st.text(), names, ids.map(str)))
def test_what_answers_was_asked_for(versions: frozenset[VersionId], aliases: dict[str, VersionId], model: str) -> None:
    known = Known("the base", versions, aliases)
    try:
        target = resolve(model, known)
    except UnknownModelError:
        assert model != known.base_id
        assert model not in {str(version) for version in versions} - set(aliases)
        assert aliases.get(model) not in versions
        return
    if target.version is None:
        assert model == known.base_id
    else:
        assert target.version in versions
        assert aliases.get(model, target.version) == target.version
        assert model in (str(target.version), *aliases)


@given(sessions, shares, shares)
def test_a_session_sticks(session: str, weight: float, share: float) -> None:
    known = split(weight, share)
    choice = choose("live", known, session)
    assert choice == choose("live", split(weight, share), session)
    assert choice.part == {V1: "stable", V2: "canary"}[choice.target.version]  # type: ignore[index]
    assert choice.shadow in (None, Target("base", V3))


@given(sessions, shares, shares)
def test_a_raised_weight_takes_nobody_off(session: str, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert on_canary(split(low), session) <= on_canary(split(high), session)
    lower, higher = (choose("live", split(0, share), session).shadow for share in (low, high))
    assert (lower is not None) <= (higher is not None)


@given(sessions)
def test_nothing_and_all_are_exact(session: str) -> None:
    assert choose("live", split(0, 0), session) == Choice(Target("base", V1))
    assert choose("live", split(1, 1), session) == Choice(Target("base", V2), Target("base", V3), "canary")


@given(shares, shares, sessions)
def test_a_copy_is_never_of_the_version_that_answers(weight: float, share: float, session: str) -> None:
    choice = choose("live", split(weight, share, shadow=V2), session)
    assert choice.shadow is None or choice.shadow != choice.target


SESSIONS = [f"session-{index}" for index in range(20_000)]


def share_of(known: Known, alias: str = "live") -> float:
    return sum(on_canary(known, session, alias) for session in SESSIONS) / len(SESSIONS)


@pytest.mark.parametrize("weight", [0.01, 0.1, 0.5, 0.9])
def test_the_share_is_the_weight(weight: float) -> None:
    error = 4 * (weight * (1 - weight) / len(SESSIONS)) ** 0.5
    assert share_of(split(weight)) == pytest.approx(weight, abs=error)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda session: on_canary(split(0.3, alias="beta"), session, "beta"), id="another alias"),
        pytest.param(lambda session: on_canary(split(0.3, since=7), session), id="another trial"),
        pytest.param(lambda session: choose("live", split(0, 0.3), session).shadow is not None, id="the shadow"),
    ],
)
def test_draws_are_independent(other: Callable[[str], bool]) -> None:
    both = sum(on_canary(split(0.3), session) and other(session) for session in SESSIONS) / len(SESSIONS)
    assert both == pytest.approx(0.09, abs=4 * (0.09 * 0.91 / len(SESSIONS)) ** 0.5)


def test_a_draw_is_the_same_everywhere_and_for_ever() -> None:
    drawn = [session for session in SESSIONS[:40] if on_canary(split(0.1), session)]
    assert drawn == ["session-2", "session-9", "session-24", "session-38"]


@pytest.mark.parametrize("model", ["base", "support@v1", "support@v2"])
def test_only_aliases_are_split(model: str) -> None:
    assert choose(model, split(1, 1), "x") == Choice(resolve(model, split(1, 1)), part="direct")


def test_a_name_alone_means_the_stable_version() -> None:
    assert resolve("live", split(1, 1)).version == V1


def test_a_trial_of_a_version_that_is_not_whole_gets_nobody() -> None:
    known = split(1, 1)
    assert choose("live", Known("base", frozenset({V1}), known.aliases, known.canaries, known.shadows), "x") == Choice(
        Target("base", V1)
    )


def test_the_base_wins_over_a_split_alias_of_its_name() -> None:
    assert choose("base", split(1, 1, alias="base"), "x") == Choice(Target("base", None), part="direct")


def test_a_retired_version_is_gone_and_says_so() -> None:
    known = Known("base", frozenset({V1, V2, V3}), {"live": V3}, retired=frozenset({V1}))
    with pytest.raises(
        RetiredModelError, match="support@v1 was retired; the newest version of that name is support@v3"
    ):
        choose("support@v1", known, "x")
    failure = failure_of(RetiredModelError("gone"))
    assert (failure.status, failure.code, failure.param) == (410, "model_retired", "model")
    alone = Known("base", frozenset({DRAFT}), retired=frozenset({DRAFT}))
    with pytest.raises(RetiredModelError, match="GET /v1/models lists what there is"):
        choose("draft@v1", alone, "x")
    assert alone.models() == ["base"]


@given(st.sampled_from(["stable", "canary", "shadow"]), sessions)
def test_a_view_between_two_changes_refuses_no_alias(part: str, session: str) -> None:
    named = {"stable": V1, "canary": V2, "shadow": V3}[part]
    known = split(0.5, 0.5)
    seen = Known("base", known.versions, known.aliases, known.canaries, known.shadows, frozenset({named}))
    assert choose("live", seen, session) == choose("live", known, session)
    assert choose(str(named), seen, session).target.version == named
    assert seen.wanted() == {V1, V2, V3}
