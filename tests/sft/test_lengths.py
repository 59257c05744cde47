from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sft.lengths import BUCKETS, Lengths


def test_quantiles_are_lengths_that_occur() -> None:
    found = Lengths.of(np.arange(1, 101))
    assert (found.p50, found.p90, found.p99, found.longest) == (50, 90, 99, 100)
    assert [found.histogram[bound] for bound in (8, 10, 16, 20, 64, 80, 96, 112)] == [8, 2, 2, 4, 8, 16, 16, 4]
    assert Lengths.of(np.array([7])) == Lengths(7, 7, 7, 7, {8: 1})
    assert Lengths.of(np.array([], np.int32)) == Lengths(0, 0, 0, 0, {})


def test_a_bucket_holds_its_bound_and_the_last_holds_the_rest() -> None:
    assert BUCKETS[:8] == (8, 10, 12, 14, 16, 20, 24, 28)
    assert list(BUCKETS) == sorted(set(BUCKETS))
    assert Lengths.of(np.array([8, 9, 12, 13, 1 << 30])).histogram == {8: 1, 10: 1, 12: 1, 14: 1, BUCKETS[-1]: 1}


def test_many_buckets_are_joined_at_powers_of_two() -> None:
    found = Lengths.of(np.array([9, 11, 11, 100]))
    assert found.bounds(20) == [10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112]
    assert found.bounds(8) == [12, 16, 24, 32, 48, 64, 96, 128]
    assert found.counts(found.bounds(8)) == [3, 0, 0, 0, 0, 0, 0, 1]
    assert found.bounds(2) == [32, 128]
    assert Lengths.of(np.array([], np.int32)).bounds(5) == []


@given(st.lists(st.integers(1, 1 << 22), min_size=1, max_size=9), st.integers(2, 20))
def test_no_row_is_lost_between_bounds(lengths: list[int], most: int) -> None:
    found = Lengths.of(np.sort(np.array(lengths)))
    bounds = found.bounds(most)
    assert len(bounds) <= most
    assert sum(found.counts(bounds)) == len(lengths)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=200))
def test_every_row_is_in_one_bucket(lengths: list[int]) -> None:
    found = Lengths.of(np.sort(np.array(lengths)))
    counted: dict[int, int] = {}
    for length in lengths:
        bound = next(bound for bound in BUCKETS if length <= bound)
        counted[bound] = counted.get(bound, 0) + 1
    assert found.histogram == counted
    assert found.p50 <= found.p90 <= found.p99 <= found.longest == max(lengths)
