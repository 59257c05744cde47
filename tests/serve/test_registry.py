from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.errors import BadRequestError, ConflictError, RegistryError, UnknownModelError, VersionRefusedError
from serve.registry import Registry
from serve.store import FolderStore
from serve.versions import AliasState, Canary, Shadow, VersionId
from sft.adapter import ADAPTER_WEIGHTS
from sft.errors import AdapterError

V1, V2, V3 = (VersionId("support", number) for number in (1, 2, 3))


def test_promote_and_roll_back(filled: Registry) -> None:
    assert filled.promote("support", V1, by="ann", reason="first").previous is None
    entry = filled.promote("support", V2)
    assert (entry.number, entry.version, entry.previous) == (2, V2, V1)
    assert filled.alias("support") == entry
    back = filled.rollback("support", reason="worse")
    assert (back.action, back.version, back.previous, back.reason) == ("rollback", V1, V2, "worse")
    assert [entry.number for entry in filled.history("support")] == [1, 2, 3]
    assert {alias: entry.version for alias, entry in filled.aliases().items()} == {"support": V1}


def test_rollbacks_walk_back_one_promotion_each(filled: Registry) -> None:
    for version in (V1, V2, V3):
        filled.promote("live", version)
    assert filled.rollback("live").version == V2
    assert filled.rollback("live").version == V1
    with pytest.raises(BadRequestError, match="no version was served before support@v1"):
        filled.rollback("live")
    filled.promote("live", V3)
    assert filled.rollback("live").version == V1


def test_promoting_what_is_served_writes_nothing(filled: Registry) -> None:
    assert filled.promote("support", V1) == filled.promote("support", V1)
    assert len(filled.history("support")) == 1


def test_an_alias_needs_a_version_that_exists(filled: Registry) -> None:
    with pytest.raises(UnknownModelError, match="support@v9"):
        filled.promote("support", VersionId("support", 9))
    with pytest.raises(UnknownModelError, match="no alias nothing"):
        filled.rollback("nothing")


def test_a_move_that_lost_the_race_is_told(filled: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    filled.promote("support", V1)
    stale = filled.alias("support")
    other = Registry.open(filled.address)
    other.promote("support", V2)
    monkeypatch.setattr(filled, "alias", lambda _: stale)
    moves: list[Callable[[], object]] = [
        lambda: filled.promote("support", V3),
        lambda: filled.canary("support", V3, 0.5),
        lambda: filled.shadow("support", V3, 0.5),
    ]
    for move in moves:
        with pytest.raises(ConflictError, match="someone else moved support"):
            move()
    assert [entry.version for entry in other.history("support")] == [V1, V2]


def shape(state: AliasState | None) -> tuple[VersionId, tuple[VersionId, float] | None, tuple[VersionId, float] | None]:
    """A state without the entries that its parts began at."""
    assert state
    canary = (state.canary.version, state.canary.weight) if state.canary else None
    return state.version, canary, (state.shadow.version, state.shadow.share) if state.shadow else None


def test_a_canary_begins_grows_and_ends(filled: Registry) -> None:
    filled.promote("live", V1)
    entry = filled.canary("live", V2, 0.1, by="ann", reason="first try")
    assert (entry.number, entry.action, entry.previous, entry.by, entry.reason) == (2, "canary", V1, "ann", "first try")
    assert (entry.version, entry.canary) == (V1, Canary(version=V2, weight=0.1, since=2))
    assert filled.canary("live", V2, 0.2).canary == Canary(version=V2, weight=0.2, since=2)
    assert filled.canary("live", V2, 0.2).number == 3
    assert filled.canary("live", V3, 0.2).canary == Canary(version=V3, weight=0.2, since=4)
    assert filled.canary("live", V3, 0).canary is None
    with pytest.raises(BadRequestError, match="support@v3 is no canary of live"):
        filled.canary("live", V3, 0)


def test_a_shadow_begins_grows_and_ends(filled: Registry) -> None:
    filled.promote("live", V1)
    assert filled.shadow("live", V2, 0.1).shadow == Shadow(version=V2, share=0.1, since=2)
    assert filled.shadow("live", V2, 1).shadow == Shadow(version=V2, share=1, since=2)
    assert filled.shadow("live", V3, 1).shadow == Shadow(version=V3, share=1, since=4)
    assert filled.shadow("live", V3, 0).shadow is None
    with pytest.raises(BadRequestError, match="support@v3 is no shadow of live"):
        filled.shadow("live", V3, 0)


def test_the_newest_entry_alone_tells_the_state(filled: Registry) -> None:
    filled.promote("live", V1)
    filled.shadow("live", V3, 0.5)
    filled.canary("live", V2, 0.25)
    read = Registry.open(filled.address).alias("live")
    assert shape(read) == (V1, (V2, 0.25), (V3, 0.5))
    assert read
    assert read.parts() == {V1: "stable version", V2: "canary", V3: "shadow"}


def test_a_promotion_ends_the_canary_and_keeps_another_shadow(filled: Registry) -> None:
    filled.promote("live", V1)
    filled.shadow("live", V3, 0.5)
    filled.canary("live", V2, 0.25)
    assert shape(filled.promote("live", V2)) == (V2, None, (V3, 0.5))
    assert shape(filled.promote("live", V3)) == (V3, None, None)
    filled.canary("live", V1, 0.25)
    assert shape(filled.promote("live", V3)) == (V3, None, None)


def test_rollback_undoes_promote_canary_and_shadow_alike(filled: Registry) -> None:
    filled.promote("live", V1)
    filled.canary("live", V2, 0.1)
    filled.canary("live", V2, 0.5)
    filled.shadow("live", V3, 0.5)
    filled.promote("live", V2)
    assert shape(filled.rollback("live")) == (V1, (V2, 0.5), (V3, 0.5))
    assert shape(filled.rollback("live")) == (V1, (V2, 0.5), None)
    back = filled.rollback("live")
    assert back.canary == Canary(version=V2, weight=0.1, since=2)
    assert shape(filled.promote("live", V3)) == (V3, None, None)
    assert shape(filled.rollback("live")) == (V1, (V2, 0.1), None)
    assert shape(filled.rollback("live")) == (V1, None, None)
    with pytest.raises(BadRequestError, match="no version was served before support@v1"):
        filled.rollback("live")


moves = st.lists(
    st.one_of(
        st.tuples(st.just("promote"), st.sampled_from([V1, V2, V3])),
        st.tuples(st.sampled_from(["canary", "shadow"]), st.sampled_from([V1, V2, V3]), st.sampled_from([0, 0.5, 1])),
        st.tuples(st.just("rollback")),
    ),
    max_size=8,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves)
def test_rollbacks_are_an_undo_list(filled: Registry, moves: list[tuple[Any, ...]]) -> None:
    alias = f"alias-{secrets.token_hex(8)}"
    undo: list[AliasState] = []
    for action, *arguments in moves:
        before = len(filled.history(alias))
        try:
            entry = getattr(filled, action)(alias, *arguments)
        except (BadRequestError, UnknownModelError):
            assert len(filled.history(alias)) == before
            assert action != "rollback" or len(undo) < 2
            continue
        if action == "rollback":
            undo.pop()
            assert entry.state == undo[-1]
        elif not undo or entry.state != undo[-1]:
            undo.append(entry.state)
        assert Registry.open(filled.address).alias(alias) == entry
        assert entry.number == before + (entry.number > before)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_share_is_from_0_to_1(filled: Registry, share: float) -> None:
    filled.promote("live", V1)
    for use, what in ((filled.canary, "weight"), (filled.shadow, "share")):
        with pytest.raises(BadRequestError, match=f"{what} .*: must be from 0"):
            use("live", V2, share)


def test_canary_and_shadow_need_an_alias_and_another_version(filled: Registry) -> None:
    for use in (filled.canary, filled.shadow):
        with pytest.raises(UnknownModelError, match="there is no alias live; promote a version to it first"):
            use("live", V1, 0.5)
    filled.promote("live", V1)
    for use in (filled.canary, filled.shadow):
        with pytest.raises(BadRequestError, match="live serves support@v1 to all sessions already"):
            use("live", V1, 0.5)
        with pytest.raises(UnknownModelError, match="support@v9"):
            use("live", VersionId("support", 9), 0.5)
    assert len(filled.history("live")) == 1


def test_no_alias_is_given_a_version_that_fails_verification(filled: Registry) -> None:
    filled.promote("live", V1)
    weights = Path(filled.address) / "versions/support/v2" / ADAPTER_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    for move in (
        lambda: filled.promote("live", V2),
        lambda: filled.canary("live", V2, 0.5),
        lambda: filled.shadow("live", V2, 0.5),
        lambda: filled.verify(V2),
    ):
        with pytest.raises(AdapterError, match=f"^support@v2 is damaged in the registry: {ADAPTER_WEIGHTS}: the file"):
            move()
    with pytest.raises(VersionRefusedError):
        filled.promote("live", V2)
    assert len(filled.history("live")) == 1
    assert filled.verify(V1).id == V1


def test_what_an_alias_names_is_not_retired(filled: Registry) -> None:
    filled.promote("live", V1)
    filled.canary("live", V2, 0.1)
    filled.shadow("live", V3, 0.1)
    for version, reason in (
        (V1, "it is the stable version of live; first promote another version to live"),
        (V2, "it is the canary of live; first end it with canary support@v2 --alias live --weight 0"),
        (V3, "it is the shadow of live; first end it with shadow support@v3 --alias live --share 0"),
    ):
        with pytest.raises(BadRequestError, match=reason):
            filled.retire(version)
        assert filled.retirement(version) is None
    assert filled.contents().retired == frozenset()


def test_a_retired_version_is_out_for_good(filled: Registry) -> None:
    filled.promote("live", V1)
    filled.promote("live", V2)
    retired = filled.retire(V1, by="ann", reason="wrong answers")
    assert (retired.by, retired.reason) == ("ann", "wrong answers")
    assert filled.retire(V1, by="bob") == retired
    other = Registry.open(filled.address)
    assert other.retirement(V1) == retired
    assert other.contents().retired == {V1}
    assert V1 in other.contents().versions
    moves: list[Callable[[], object]] = [
        lambda: other.promote("live", V1),
        lambda: other.canary("live", V1, 0.1),
        lambda: other.shadow("live", V1, 0.1),
        lambda: other.rollback("live"),
    ]
    for move in moves:
        with pytest.raises(BadRequestError, match=r"support@v1.* is retired"):
            move()
    with pytest.raises(UnknownModelError, match="support@v9"):
        other.retire(VersionId("support", 9))
    assert len(other.history("live")) == 2


def test_the_token_changes_with_every_change_and_only_then(filled: Registry, bundle: Callable[[int], Path]) -> None:
    changes: list[Callable[[], object]] = [
        lambda: filled.publish(bundle(4), "support"),
        lambda: filled.promote("live", V1),
        lambda: filled.canary("live", V2, 0.1),
        lambda: filled.shadow("live", V3, 0.1),
        lambda: filled.rollback("live"),
        lambda: filled.retire(VersionId("support", 4)),
    ]
    tokens = [filled.changed()]
    for change in changes:
        change()
        tokens.append(filled.changed())
    assert len(set(tokens)) == len(changes) + 1
    filled.retire(VersionId("support", 4))
    filled.canary("live", V2, 0.1)
    assert filled.changed() == tokens[-1]


def test_a_change_whose_token_is_not_written_is_a_change_still(
    filled: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RegistryError("slow down")

    monkeypatch.setattr(FolderStore, "write", fail)
    assert filled.promote("live", V1).number == 1
    assert "later than usual: slow down" in caplog.text


def test_the_newest_entry_is_found_without_listing_the_log(filled: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in (V1, V2):
        filled.promote("live", version)
    listed: list[str] = []
    real = FolderStore.keys

    def counted(self: FolderStore, prefix: str, *, after: str = "") -> list[str]:
        listed.append(after)
        return real(self, prefix, after=after)

    monkeypatch.setattr(FolderStore, "keys", counted)
    reader = Registry.open(filled.address)
    for _ in range(3):
        assert reader.alias("live") == filled.alias("live")
    assert listed.count("aliases/live/00000000.json") == 1
    listed.clear()
    filled.promote("live", V3)
    assert [reader.alias("live"), reader.alias("live")] == [filled.alias("live")] * 2
    assert listed == ["aliases/live/00000002.json"]


def test_a_torn_alias_entry_is_named(filled: Registry) -> None:
    filled.promote("support", V1)
    (Path(filled.address) / "aliases/support/00000001.json").write_text("{")
    with pytest.raises(RegistryError, match=r"aliases/support/00000001\.json"):
        Registry.open(filled.address).alias("support")
