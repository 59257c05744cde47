from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.census import Cell, cells
from sft.errors import DataError
from sft.holdout import HoldOut
from sft.mixture import Draw, EpochPlan, Group, Mixture, Share, passes, plan_epoch, shares
from tests.sft.prepared import blocks, census_of, of_counts, prepared

NOTHING = HoldOut()
SOURCES = {"a": 1000, "b": 100, "c": 10}
CELLS = st.builds(Cell, st.sampled_from("ab"), st.sampled_from(["", "t", "u"]), st.sampled_from(["", "k"]))
HELD = HoldOut(frozenset(["u"]))


def counts(**rows: int) -> dict[Cell, int]:
    return {Cell(source, "", ""): number for source, number in rows.items()}


def targets(mixture: Mixture, rows: dict[Cell, int] | None = None, out: HoldOut = NOTHING) -> dict[str, int]:
    return {str(share.group): share.target for share in shares(rows or counts(**SOURCES), mixture, out)}


@pytest.mark.parametrize(
    ("mixture", "wanted"),
    [
        (Mixture(), {"a": 1000, "b": 100, "c": 10}),
        (Mixture(rows=111), {"a": 100, "b": 10, "c": 1}),
        (Mixture(rows=2220), {"a": 2000, "b": 200, "c": 20}),
        (Mixture(cap=100), {"a": 100, "b": 100, "c": 10}),
        (Mixture(cap=100, rows=420), {"a": 200, "b": 200, "c": 20}),
        (Mixture(limits={"a": 300}), {"a": 300, "b": 100, "c": 10}),
        (Mixture(mode="temperature", temperature=2, cap=100, rows=2316), {"a": 1000, "b": 1000, "c": 316}),
        (Mixture(mode="temperature", temperature=1), {"a": 1000, "b": 100, "c": 10}),
        (Mixture(mode="explicit", weights={"a": 1, "b": 1, "c": 0.5}, rows=100), {"a": 40, "b": 40, "c": 20}),
        # A limit holds whatever the share; the rest goes to the others in proportion.
        (
            Mixture(mode="explicit", weights={"a": 1, "b": 1, "c": 2}, rows=100, limits={"c": 10}),
            {"a": 45, "b": 45, "c": 10},
        ),
        # What is left of 10 after 3 + 3 + 3 goes to the first by name.
        (Mixture(mode="explicit", weights={"a": 1, "b": 1, "c": 1}, rows=10), {"a": 4, "b": 3, "c": 3}),
        (Mixture(rows=2), {"a": 2, "b": 0, "c": 0}),
    ],
)
def test_targets_by_source(mixture: Mixture, wanted: dict[str, int]) -> None:
    assert targets(mixture) == wanted


def test_targets_by_task() -> None:
    rows = {
        Cell("gym", "gcd", "maths"): 60,
        Cell("gym", "sum", "maths"): 30,
        Cell("gym", "sum", "easy"): 10,
        Cell("gym", "maze", "games"): 50,
        Cell("chat", "", ""): 20,
    }
    out = HoldOut(clusters=frozenset(["games"]))
    assert targets(Mixture(over="task"), rows, out) == {"chat/(no task)": 20, "gym/gcd": 60, "gym/sum": 40}
    assert targets(Mixture(over="source"), rows, out) == {"chat": 20, "gym": 100}
    equal = Mixture(over="task", mode="explicit", weights={"gym": 1, "chat": 1}, task_weights={"sum": 2}, rows=100)
    assert targets(equal, rows, out) == {"chat/(no task)": 25, "gym/gcd": 25, "gym/sum": 50}
    assert targets(Mixture(over="task", limits={"gym": 40}), rows, out)["gym/gcd"] == 40
    assert shares(rows, Mixture(over="task"), out)[2] == Share(
        Group("gym", "sum"), (Cell("gym", "sum", "easy"), Cell("gym", "sum", "maths")), 40, 40
    )


@pytest.mark.parametrize(
    ("mixture", "words"),
    [
        (Mixture(rows=401, limits={"a": 300, "b": 90, "c": 10}), "asks for 401 rows, but the caps .* allow 400"),
        (Mixture(mode="explicit", weights={"a": 1}), "b, c: has no weight in an explicit mixture"),
        (
            Mixture(mode="explicit", weights=dict.fromkeys("abcd", 1.0)),
            "d: has a weight .* but none of its rows was kept",
        ),
        (Mixture(mode="explicit", over="task", weights={"a": 1}), r"b/\(no task\), c/\(no task\): has no weight"),
        (
            Mixture(mode="explicit", over="task", weights=dict.fromkeys("abc", 1.0), task_weights={"x": 1}),
            "data.mixture.weights: no row is of task x",
        ),
    ],
)
def test_mixtures_that_cannot_be_had(mixture: Mixture, words: str) -> None:
    with pytest.raises(DataError, match=words):
        targets(mixture)


def test_nothing_left_to_train_is_said() -> None:
    with pytest.raises(DataError, match="no row is left to train"):
        shares({Cell("a", "t", ""): 3, Cell("b", "", ""): 0}, Mixture(), HoldOut(tasks=frozenset("t")))


def test_a_source_that_is_held_out_whole_may_have_a_weight() -> None:
    rows = {Cell("a", "t", ""): 3, Cell("b", "", ""): 5}
    mixture = Mixture(mode="explicit", weights={"a": 1, "b": 1})
    assert targets(mixture, rows, HoldOut(tasks=frozenset("t"))) == {"b": 5}


MIXTURES = st.builds(
    Mixture,
    over=st.sampled_from(["source", "task"]),
    mode=st.sampled_from(["proportional", "temperature", "explicit"]),
    temperature=st.floats(1, 100),
    cap=st.none() | st.integers(1, 50),
    rows=st.none() | st.integers(1, 2000),
    weights=st.fixed_dictionaries({"a": st.floats(1e-6, 1e6), "b": st.floats(1e-6, 1e6)}),
    limits=st.dictionaries(st.sampled_from("ab"), st.integers(1, 60)),
)


@given(rows=st.dictionaries(CELLS, st.integers(0, 60), min_size=1), mixture=MIXTURES)
def test_targets_add_up_and_are_in_proportion(rows: dict[Cell, int], mixture: Mixture) -> None:
    try:
        made = shares(rows, mixture, HELD)
    except DataError:
        return
    wanted = mixture.rows or sum(
        min(share.kept, mixture.cap or share.kept, mixture.limits.get(share.group.source, share.kept)) for share in made
    )
    assert sum(share.target for share in made) == wanted
    assert sum(share.kept for share in made) == sum(number for cell, number in rows.items() if cell.task != "u")
    assert made == shares(dict(reversed(rows.items())), mixture, HELD)
    assert all(0 <= share.target <= mixture.limits.get(share.group.source, wanted) for share in made)
    if mixture.mode == "explicit" and not mixture.limits:
        total = sum(Fraction(mixture.weights[share.group.source]) for share in made)
        for share in made:
            assert abs(share.target - wanted * Fraction(mixture.weights[share.group.source]) / total) < 1


@settings(max_examples=60)
@given(
    rows=st.dictionaries(CELLS, st.integers(0, 40), min_size=1),
    mixture=MIXTURES,
    seed=st.integers(0, 5),
    size=st.integers(5, 90),
    parts=st.integers(1, 5),
)
def test_the_draw_is_exact_whatever_the_blocks_and_passes(
    rows: dict[Cell, int], mixture: Mixture, seed: int, size: int, parts: int
) -> None:
    table = of_counts(rows)
    census = census_of(*blocks(table, size))
    try:
        made = shares(census.counts, mixture, HELD)
    except DataError:
        return
    plan = plan_epoch(census, made, seed, 0)
    repeats = plan.repeats(table)
    assert np.concatenate([plan.repeats(block) for block in blocks(table, size)]).tolist() == repeats.tolist()
    by_pass = np.array([plan.repeats(table, part, parts) for part in range(parts)])
    assert by_pass.sum(axis=0).tolist() == repeats.tolist()
    assert plan.rows == repeats.sum()
    found, which = cells(table)
    for share in made:
        own = repeats[np.isin(which, [found.index(cell) for cell in share.cells])]
        assert own.sum() == share.target
        assert own.max() - own.min() <= 1
    held = repeats[np.isin(which, [number for number, cell in enumerate(found) if HELD.holds(cell)])]
    assert not held.any()


def test_rows_that_were_not_kept_do_not_change_the_draw() -> None:
    table = prepared([Cell("a", "", "")] * 50, refused=range(0, 50, 2))
    census = census_of(table)
    plan = plan_epoch(census, shares(census.counts, Mixture(rows=10), NOTHING), 0, 0)
    assert plan.repeats(table)[1::2].sum() == 10


def test_epochs_and_seeds_draw_other_rows_and_each_row_in_its_turn() -> None:
    table = of_counts(counts(a=400, b=100))
    census = census_of(table)
    made = shares(census.counts, Mixture(rows=125), NOTHING)

    def drawn(seed: int, epoch: int) -> Any:
        return plan_epoch(census, made, seed, epoch).repeats(table)

    assert drawn(0, 0).tolist() == drawn(0, 0).tolist()
    for other in (drawn(0, 1), drawn(1, 0)):
        both = int((drawn(0, 0) * other).sum())
        assert both == pytest.approx(125 / 4, abs=20)
    often = sum(drawn(0, epoch) for epoch in range(64))
    assert often.sum() == 64 * 125
    assert often.mean() == 16
    assert often.std() == pytest.approx((64 * 0.25 * 0.75) ** 0.5, rel=0.15)


def test_a_plan_is_a_few_numbers() -> None:
    census = census_of(of_counts(counts(a=3, b=2)))
    plan = plan_epoch(census, shares(census.counts, Mixture(rows=10), NOTHING), 0, 0)
    assert plan == EpochPlan(
        10,
        {
            Cell("a", "", ""): Draw(2, plan.draws[Cell("a", "", "")].salt, 0),
            Cell("b", "", ""): Draw(2, plan.draws[Cell("b", "", "")].salt, 0),
        },
    )
    assert plan.repeats(of_counts(counts(a=1, b=1, new=1))).tolist() == [2, 2, 0]
    assert plan.repeats(prepared([])).tolist() == []


def test_equal_hashes_are_drawn_exactly_or_refused() -> None:
    """Two of five ids have one hash. Some salts put the sub-sample's end between them, which a bound cannot express."""
    table = of_counts(counts(a=4))
    twice = census_of(table, table.slice(0, 1))
    made = shares(twice.counts, Mixture(rows=3), NOTHING)
    for epoch in range(20):
        plan = plan_epoch(twice, made, 0, epoch)
        assert plan.repeats(table).sum() + plan.repeats(table.slice(0, 1)).sum() == 3
    same = census_of(*[table.slice(0, 1)] * 5)
    with pytest.raises(DataError, match="a: rows have the same id, so no exact sub-sample of 3 rows can be drawn"):
        plan_epoch(same, made, 0, 0)


def test_copies_are_spread_over_the_passes() -> None:
    table = of_counts(counts(a=300))
    census = census_of(table)
    plan = plan_epoch(census, shares(census.counts, Mixture(rows=2 * 300 + 60), NOTHING), 0, 0)
    by_pass = np.array([plan.repeats(table, part, 3) for part in range(3)])
    assert set(by_pass.flat) == {0, 1}
    assert by_pass.sum(axis=1).tolist() == pytest.approx([220, 220, 220], abs=25)


def test_files_are_read_as_often_as_their_rows_are_trained() -> None:
    census = census_of(of_counts(counts(a=100, b=10, c=10)), prepared([Cell("d", "", "")], refused=[0]))
    made = shares(census.counts, Mixture(mode="explicit", weights={"a": 50, "b": 25, "c": 0.001}, rows=75), NOTHING)
    assert passes(census, made) == {
        ("a", "rows.jsonl"): 1,
        ("b", "rows.jsonl"): 3,
        ("c", "rows.jsonl"): 0,
        ("d", "rows.jsonl"): 0,
    }
