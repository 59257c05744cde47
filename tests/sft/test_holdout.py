from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.census import Cell
from sft.errors import DataError
from sft.holdout import HoldOut, HoldOutReport, Names, prove
from tests.sft.prepared import prepared

COUNTS = {
    Cell("gym", "sum", "maths"): 5,
    Cell("gym", "gcd", "maths"): 4,
    Cell("gym", "sort", "words"): 3,
    Cell("gym", "maze", "games"): 2,
    Cell("chat", "", ""): 7,
}
NAMES = st.sampled_from(["", "a", "b", "c"])


def hold_out(tasks: str = "", clusters: str = "") -> HoldOut:
    return HoldOut(frozenset(tasks.split()), frozenset(clusters.split()))


def test_the_report_names_both_sides() -> None:
    assert prove(COUNTS, hold_out("sort", "games")) == HoldOutReport(
        trained=Names(("gcd", "sum"), ("maths",), 16), held_out=Names(("maze", "sort"), ("games",), 5), unnamed=7
    )
    assert prove(COUNTS, HoldOut()).to_dict() == {
        "trained": {"tasks": ("gcd", "maze", "sort", "sum"), "clusters": ("games", "maths", "words"), "rows": 21},
        "held_out": {"tasks": (), "clusters": (), "rows": 0},
        "unnamed": 0,
    }


def test_a_task_that_is_held_out_leaves_its_cluster_in_training() -> None:
    report = prove(COUNTS, hold_out("gcd"))
    assert (report.trained.clusters, report.held_out.clusters) == (("games", "maths", "words"), ())


def test_names_that_occur_nowhere_are_refused_all_at_once() -> None:
    with pytest.raises(DataError) as caught:
        prove(COUNTS, hold_out("srot gcd", "Xyz game"))
    assert str(caught.value) == (
        "the hold-out cannot be kept:\n"
        "  - data.hold_out.tasks: no row names 'srot', so all would be trained; did you mean sort?\n"
        "  - data.hold_out.clusters: no row names 'Xyz', so all would be trained; 3 clusters occur in the data\n"
        "  - data.hold_out.clusters: no row names 'game', so all would be trained; did you mean games?"
    )


def test_a_name_of_rows_of_which_none_was_kept_is_known() -> None:
    counts = {**COUNTS, Cell("gym", "jugs", "games"): 0}
    assert prove(counts, hold_out("jugs")).held_out == Names(("jugs",), (), 0)


def test_a_task_with_two_clusters_is_not_held_out_by_halves() -> None:
    counts = {**COUNTS, Cell("more", "maze", "puzzles"): 1}
    with pytest.raises(DataError, match=r"task 'maze' is held out with cluster 'games' in source 'gym', but trained"):
        prove(counts, hold_out("", "games"))
    assert prove(counts, hold_out("maze", "games")).held_out.rows == 3
    assert prove({**counts, Cell("more", "maze", "puzzles"): 0}, hold_out("", "games")).held_out.tasks == ("maze",)


@given(
    counts=st.dictionaries(st.builds(Cell, st.sampled_from("st"), NAMES, NAMES), st.integers(0, 3), min_size=1),
    tasks=st.sets(NAMES.filter(bool)),
    clusters=st.sets(NAMES.filter(bool)),
)
def test_what_is_proven_holds(counts: dict[Cell, int], tasks: set[str], clusters: set[str]) -> None:
    out = HoldOut(frozenset(tasks), frozenset(clusters))
    try:
        report = prove(counts, out)
    except DataError:
        return
    trained, held = report.trained, report.held_out
    assert not set(trained.tasks) & (set(held.tasks) | tasks)
    assert not set(trained.clusters) & (set(held.clusters) | clusters)
    assert tasks <= set(held.tasks)
    assert clusters == set(held.clusters)
    assert trained.rows + held.rows == sum(counts.values())


def test_the_last_door_lets_nothing_through() -> None:
    cells = list(COUNTS)
    hold_out("maze").check(prepared([*cells[:3], cells[4]]))
    with pytest.raises(DataError, match="gym: rows of task 'maze' in cluster 'games' are held out"):
        hold_out("maze").check(prepared(cells))
    with pytest.raises(DataError, match="fault of raysft"):
        hold_out("", "words").check(prepared(cells))
