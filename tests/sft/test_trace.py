from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sft.trace import MODULUS, trace

IDS = st.lists(st.text(max_size=12), max_size=20)


def test_a_trace_is_fixed() -> None:
    assert trace([]) == 0
    assert f"{trace(['rows/a.jsonl:1:0a1b2c']):016x}" == "336531286efc3124"


@given(IDS, IDS)
def test_the_traces_of_parts_add_up_whatever_the_order(left: list[str], right: list[str]) -> None:
    assert (trace(left) + trace(right)) % MODULUS == trace(sorted(left + right))


@given(IDS, st.text(max_size=12))
def test_a_row_more_is_seen(names: list[str], more: str) -> None:
    assert trace([*names, more]) != trace(names)
