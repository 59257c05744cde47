from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sft.lengths import BUCKETS, Lengths


def test_quantiles_are_lengths_that_occur() -> None:
    assert Lengths.of(np.arange(1, 101)) == Lengths(
        50, 90, 99, 100, {8: 8, 12: 4, 16: 4, 24: 8, 32: 8, 48: 16, 64: 16, 96: 32, 128: 4}
    )
    assert Lengths.of(np.array([7])) == Lengths(7, 7, 7, 7, {8: 1})
    assert Lengths.of(np.array([], np.int32)) == Lengths(0, 0, 0, 0, {})


def test_a_bucket_holds_its_bound_and_the_last_holds_the_rest() -> None:
    assert BUCKETS[:8] == (8, 12, 16, 24, 32, 48, 64, 96)
    assert list(BUCKETS) == sorted(set(BUCKETS))
    assert Lengths.of(np.array([8, 9, 12, 13, 1 << 30])).histogram == {8: 1, 12: 2, 16: 1, BUCKETS[-1]: 1}


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=200))
def test_every_row_is_in_one_bucket(lengths: list[int]) -> None:
    found = Lengths.of(np.sort(np.array(lengths)))
    counted: dict[int, int] = {}
    for length in lengths:
        bound = next(bound for bound in BUCKETS if length <= bound)
        counted[bound] = counted.get(bound, 0) + 1
    assert found.histogram == counted
    assert found.p50 <= found.p90 <= found.p99 <= found.longest == max(lengths)
