from __future__ import annotations

from itertools import product
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.statistics import bootstrap, crossed_bootstrap, difference_interval, is_binary, mcnemar, mean_interval

SCORES = st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=12)


@settings(max_examples=25)
@given(SCORES)
def test_an_interval_is_the_same_each_time_and_has_a_width(scores: list[float]) -> None:
    low, high = mean_interval(scores)
    assert (low, high) == mean_interval(scores)
    assert 0 <= low < high <= 1


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=12))
def test_the_other_way_round_is_the_other_sign(pairs: list[tuple[float, float]]) -> None:
    base, tuned = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    low, high = difference_interval(base, tuned)
    back_low, back_high = difference_interval(tuned, base)
    assert -1 <= low < high <= 1
    assert (back_low, back_high) == pytest.approx((-high, -low), abs=1.01 / (len(pairs) + 2))  # a step of the means
    assert mcnemar(base, tuned) == mcnemar(tuned, base)


def test_twenty_right_of_twenty_are_not_certain() -> None:
    low, high = mean_interval([1.0] * 20)
    assert (round(low, 2), high) == (0.86, 1.0)
    assert difference_interval([1.0] * 20, [1.0] * 20)[0] < -0.05


def test_an_interval_covers_as_often_as_it_says() -> None:
    """Exact over all outcomes of 30 rows with a share of 0.8."""
    share, rows = 0.8, 30
    covered = 0.0
    for right in range(rows + 1):
        low, high = mean_interval([1.0] * right + [0.0] * (rows - right))
        covered += (low <= share <= high) * comb(rows, right) * share**right * (1 - share) ** (rows - right)
    assert 0.93 <= covered <= 0.99


def test_many_values_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bootstrap([0.0, 1.0] * 20, (0, 1))
    monkeypatch.setattr("evals.statistics.CHUNK", 5_000)
    assert bootstrap([0.0, 1.0] * 20, (0, 1)) == pytest.approx(whole, abs=0.03)


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (0, 6, 0.03125), (8, 1, 20 / 512), (10, 10, 1.0)],
)
def test_mcnemar(better: int, worse: int, p: float) -> None:
    base = [0.0] * better + [1.0] * worse + [1.0, 0.0]
    tuned = [1.0] * better + [0.0] * worse + [1.0, 0.0]
    assert mcnemar(base, tuned) == p


@pytest.mark.parametrize(("better", "worse"), [*product(range(0, 40, 13), range(0, 40, 7))])
def test_mcnemar_is_twice_the_tail_of_a_fair_coin(better: int, worse: int) -> None:
    changed = better + worse
    tail = sum(comb(changed, k) for k in range(min(better, worse) + 1))
    found = mcnemar([0.0] * better + [1.0] * worse, [1.0] * better + [0.0] * worse)
    assert found == pytest.approx(min(1.0, 2 * tail / 2**changed), rel=1e-12)


def test_mcnemar_of_thousands_of_rows() -> None:
    assert mcnemar([0.0] * 2000 + [1.0] * 2000, [1.0] * 2000 + [0.0] * 2000) == 1.0
    assert 0 < mcnemar([0.0] * 2100 + [1.0] * 1900, [1.0] * 2100 + [0.0] * 1900) < 0.01
    assert mcnemar([0.0] * 5000, [1.0] * 5000) == 0.0


def test_binary() -> None:
    assert is_binary([0.0, 1.0])
    assert not is_binary([0.0, 0.5])


def test_crossed_runs_and_rows_are_both_drawn() -> None:
    rows = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0] * 4
    one = crossed_bootstrap([rows], (-1.0, 1.0))
    assert one == pytest.approx(bootstrap(rows, (-1.0, 1.0)), abs=0.03)
    same = crossed_bootstrap([rows] * 3, (-1.0, 1.0))
    assert same == pytest.approx(one, abs=0.03)
    low, high = crossed_bootstrap([rows, [0.0] * 32, [1.0] * 32], (-1.0, 1.0))
    assert (low, high) == crossed_bootstrap([rows, [0.0] * 32, [1.0] * 32], (-1.0, 1.0))
    assert high - low > 2 * (same[1] - same[0])


def test_runs_that_agree_are_as_sure_as_one() -> None:
    low, high = crossed_bootstrap([[1.0] * 20] * 3, (-1.0, 1.0))
    assert (round(low, 2), high) == (0.73, 1.0)
