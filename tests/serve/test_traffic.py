from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import UnknownModelError
from serve.traffic import Known, Target, resolve
from serve.versions import VersionId

V1, V2, DRAFT = VersionId("support", 1), VersionId("support", 2), VersionId("draft", 1)
KNOWN = Known("base-1b", frozenset({V1, V2, DRAFT}), {"support": V1, "live": V2})

names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,8}", fullmatch=True)
ids = st.builds(VersionId, names, st.integers(1, 20))


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
