from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.rowkey import hash_ids, row_keys, salt

IDS = [f"source/file-{i % 7}.jsonl:{i}:{i:012x}" for i in range(20_000)]


def hashes(ids: list[str]) -> list[int]:
    return [int(number) for number in hash_ids(pa.chunked_array([pa.array(ids, pa.string())]))]


def slowly(text: str) -> int:
    """The hash of an id in whole numbers, one after another."""

    def mix(number: int) -> int:
        number = (number + 0x9E3779B97F4A7C15) % 2**64
        number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        number = (number ^ (number >> 27)) * 0x94D049BB133111EB % 2**64
        return number ^ (number >> 31)

    data = text.encode()
    made = mix(len(data))
    for begin in range(0, len(data), 8):
        made = mix(made ^ int.from_bytes(data[begin : begin + 8], "little"))
    return made


def test_the_hash_of_an_id_never_changes() -> None:
    """Or a resumed run would draw other rows."""
    assert hashes(["", "rows.jsonl:1"]) == [0xE220A8397B1DCDAF, slowly("rows.jsonl:1")]
    assert hashes(IDS[:50]) == [slowly(one) for one in IDS[:50]]
    assert hash_ids(pa.chunked_array([], pa.string())).shape == (0,)


@given(ids=st.lists(st.text(max_size=40), max_size=12), cut=st.integers(0, 12), begin=st.integers(0, 12))
def test_a_hash_depends_on_the_id_alone(ids: list[str], cut: int, begin: int) -> None:
    alone = [hashes([one])[0] for one in ids]
    column = pa.chunked_array([pa.array(ids[:cut], pa.string()), pa.array(ids[cut:], pa.string())])
    assert hash_ids(column).tolist() == alone
    assert hash_ids(column.slice(begin)).tolist() == alone[begin:]
    assert hash_ids(pa.chunked_array([pa.array(ids, pa.large_string())])).tolist() == alone
    assert len(set(alone)) == len(set(ids))


def test_bytes_that_look_like_padding_count() -> None:
    assert len(set(hashes(["a", "a\0", "a\0\0", "\0a", "a" + "\0" * 8, "\0" * 8, "\0" * 16]))) == 7


def test_keys_put_rows_in_another_order_under_another_salt() -> None:
    numbers = hash_ids(pa.chunked_array([pa.array(IDS)]))
    assert len(np.unique(numbers)) == len(IDS)
    first, second = (row_keys(numbers, salt(3, epoch, "s")) for epoch in (0, 1))
    assert len(np.unique(first)) == len(IDS)
    lowest = [set(np.argsort(keys)[:5_000].tolist()) for keys in (first, second)]
    assert len(lowest[0] & lowest[1]) == pytest.approx(1_250, abs=150)  # a quarter of a quarter: independent draws
    both = row_keys(numbers, np.where(np.arange(len(IDS)) < 9, salt(3, 0, "s"), salt(3, 1, "s")).astype(np.uint64))
    assert np.array_equal(both, np.concatenate([first[:9], second[9:]]))


def test_each_bit_of_a_key_is_fair() -> None:
    keys = row_keys(hash_ids(pa.chunked_array([pa.array(IDS)])), salt(0))
    shares = [float(np.mean((keys >> np.uint64(bit)) & np.uint64(1))) for bit in range(64)]
    assert min(shares) > 0.48
    assert max(shares) < 0.52


def test_salts_differ_where_their_parts_do() -> None:
    made = [salt(1, 23, "a"), salt(12, 3, "a"), salt(1, 23, "b"), salt(1, 23, "a", None), salt(1, 23, "a", "")]
    assert len(set(made)) == len(made)
    assert all(0 <= number < 1 << 64 for number in made)
