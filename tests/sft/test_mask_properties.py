"""The properties that prove a mask, for every chat template that passes the proofs on every kind of tokenizer."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import HealthCheck, given, seed, settings
from tokenizers.pre_tokenizers import ByteLevel

from sft.base import BaseTokenizer
from sft.rows import Rules
from sft.template import ChatTemplate
from tests.templates import LET_PASS, Family
from tests.templates.oracle import UNTRAINED, Row, Talk, check, may_be_refused, prepare_talks, render, served_ids
from tests.templates.talks import PLAIN, TWO, odd_talks, talk
from tests.templates.tokenizers import KINDS, Kind, make_base, pieces_of
from tests.tiny import CHATML, byte_tokenizer, small_base

EXAMPLES = 8
PAIRS = [(family, kind) for family in LET_PASS for kind in KINDS]


def crossed(pairs: list[tuple[Family, Kind]]) -> pytest.MarkDecorator:
    named = [pytest.param(family, kind, id=f"{family.name}-{kind}") for family, kind in pairs]
    return pytest.mark.parametrize(("family", "kind"), named)


every_pair = crossed(PAIRS)
ordinary_pairs = crossed([(family, kind) for family, kind in PAIRS if kind != "seam"])
merging_pairs = crossed([(family, kind) for family, kind in PAIRS if kind == "seam"])


@ordinary_pairs
def test_plain_conversations_are_all_kept_and_exact(family: Family, kind: Kind) -> None:
    base = make_base(family, kind)
    talks = [*PLAIN, *(talk("Hi", "Hello", system="You answer briefly.") for _ in range(family.supports_system))]
    rows = prepare_talks(base, talks)
    assert [row.reason for row in rows] == [""] * len(talks)
    for one, row in zip(talks, rows, strict=True):
        check(family, kind, base, one, row)
        assert bos_places(family, base, row) in ([], [0])


@every_pair
def test_odd_conversations_are_exact_or_refused_for_a_reason(family: Family, kind: Kind) -> None:
    base = make_base(family, kind)

    @seed(zlib.crc32(f"{family.name} {kind}".encode()))
    @settings(max_examples=EXAMPLES, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(odd_talks(family))
    def hold(talks: tuple[Talk, Talk]) -> None:
        rows = prepare_talks(base, talks)
        for one, row in zip(talks, rows, strict=True):
            if row.reason:
                assert row.reason == "not_maskable"
                assert may_be_refused(family, kind, base, one)
            else:
                check(family, kind, base, one, row)
        if not any(row.reason for row in rows):
            assert rows[0].trained == rows[1].trained, "what a user says moved a label"

    hold()


@merging_pairs
def test_a_merge_across_the_seam_is_refused_and_only_that(family: Family, kind: Kind) -> None:
    base = make_base(family, kind)
    answers = ["apple", "Blue", "The end", "ice", "42", "end."]
    rows = prepare_talks(base, [talk("Hi", answer) for answer in answers])
    opening = render(base, talk("Hi"), prompt=True)[-1]  # a mark with rstrip swallows it, so nothing can merge with it
    merges = ["\na", "\ne", "\ni", "\nT", ": ", "] "]
    assert [row.reason for row in rows] == [
        "not_maskable" if opening + family.answer(answer)[0] in merges and not family.rstrip else ""
        for answer in answers
    ]


@ordinary_pairs
def test_labels_do_not_depend_on_how_the_blocks_are_cut(family: Family, kind: Kind) -> None:
    base = make_base(family, kind)
    together = prepare_talks(base, PLAIN)
    alone = [row for one in PLAIN for row in prepare_talks(base, [one])]
    assert [(row.ids, row.labels) for row in together] == [(row.ids, row.labels) for row in alone]


@ordinary_pairs
def test_a_truncated_row_is_the_beginning_of_the_whole_one(family: Family, kind: Kind) -> None:
    base = make_base(family, kind)
    (whole,) = prepare_talks(base, [TWO])
    edges = {edge + step for run in whole.runs for edge in run for step in (-1, 0, 1)}
    for limit in sorted({1, 2, *edges, len(whole.ids) - 1}):
        (cut,) = prepare_talks(base, [TWO], Rules(limit, truncate=True))
        if any(label != UNTRAINED for label in whole.labels[:limit]):
            assert (cut.ids, cut.labels, cut.reason) == (whole.ids[:limit], whole.labels[:limit], "")
        else:
            assert (cut.ids, cut.labels, cut.reason) == ([], [], "no_trained_token")


@ordinary_pairs
def test_a_row_that_just_fits_is_not_cut(family: Family, kind: Kind) -> None:
    base = make_base(family, kind)
    (whole,) = prepare_talks(base, [TWO])
    length = len(whole.ids)
    fates = [prepare_talks(base, [TWO], Rules(limit, truncate=False)) for limit in (length, length - 1)]
    assert fates[0] == [whole]
    assert [row.reason for row in fates[1]] == ["too_long"]


def test_a_stop_token_that_merges_with_what_follows_is_refused() -> None:
    tokenizer = byte_tokenizer(CHATML.replace("<|im_end|>", "|"), merges=[("|", "Ċ")])
    base = BaseTokenizer(tokenizer, ChatTemplate(tokenizer, ["|"]), (tokenizer.convert_tokens_to_ids("|"),))
    assert tokenizer.convert_ids_to_tokens(served_ids(base, talk("Hi", "Hello"), prompt=False))[-1] == "|Ċ"
    (row,) = prepare_talks(base, [talk("Hi", "Hello")])
    assert row.reason == "not_maskable"


def test_a_prompt_whose_ids_depend_on_the_answer_is_refused() -> None:
    blank_line = CHATML.replace("\n' + m", "\n\n' + m").replace("assistant\n", "assistant\n\n")
    base = small_base(blank_line, merges=[("Ċ", "Ċ")])
    base.tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
    one = talk("Hi", "Hello")
    served = served_ids(base, one[:1])
    assert base.tokenizer.convert_ids_to_tokens(served)[-1] == "ĊĊ"
    whole = served_ids(base, one, prompt=False)
    assert pieces_of(base, "gpt2", whole)[len(served) - 1 : len(served) + 1] == [b"\n", b"\n"]
    (row,) = prepare_talks(base, [one])
    assert row.reason == "not_maskable"


def bos_places(family: Family, base: BaseTokenizer, row: Row) -> list[int]:
    """Where a BOS token stands that is not also the mark which opens or ends every turn."""
    if family.bos is None or family.bos in ("<|im_start|>", *family.stop):
        return []
    return [place for place, token in enumerate(row.ids) if token == base.tokenizer.bos_token_id]
