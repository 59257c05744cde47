from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sft.pack import best_fit, efficiency


def test_the_fullest_pack_with_room_is_taken() -> None:
    assert best_fit([2, 6, 5, 3, 4, 1], 8) == [[1, 0], [2, 3], [4, 5]]
    assert best_fit([8, 8], 8) == [[0], [1]]
    assert best_fit([], 8) == []


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 120))
def test_every_example_is_in_one_pack_and_no_pack_is_too_long(lengths: list[int], capacity: int) -> None:
    packs = best_fit(lengths, capacity)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in pack) <= capacity for pack in packs)
    assert packs == best_fit(lengths, capacity)
    # Best fit decreasing opens a pack only for what fits no other: at most one pack is half empty.
    assert sum(2 * sum(lengths[i] for i in pack) <= capacity for pack in packs) <= 1


def test_short_rows_fill_their_packs() -> None:
    lengths = np.random.default_rng(0).lognormal(4.5, 0.7, 10_000).clip(1, 2048).astype(int).tolist()
    assert efficiency(lengths, len(best_fit(lengths, 2048)), 2048) > 0.998
