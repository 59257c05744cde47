from __future__ import annotations

import subprocess
import sys
from unicodedata import normalize

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.messages import Message, ToolCall
from sft.shingles import plain, said, shingles, words


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("  Say \t Hi\r\n\n", "say hi"),
        ("Straße", "strasse"),
        ("ﬁne ①  \uff46\uff55\uff4c\uff4c", "fine 1 full"),
        ("Cafe\u0301", "café"),
        ("a\u00a0b\u3000c\u2028d", "a b c d"),
        ("你好\uff0c世界 ok", "你 好 , 世 界 ok"),
        ("カタカナ ｶﾀｶﾅ", "カ タ カ ナ カ タ カ ナ"),
        ("हिन्दी में", "हिन्दी में"),
        ("Don't stop. 3*4", "don't stop. 3*4"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_plain_form(text: str, form: str) -> None:
    assert plain(text) == form


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("Don't stop! (3*4 = 12)", "don t stop 3 4 12"),
        ("snake_case, „Zitat“ — Ende…", "snake case zitat ende"),
        ("你好\uff0c世界。", "你 好 世 界"),
        ("हिन्दी में।", "हिन्दी में"),
        ("?!", ""),
    ],
)
def test_words_have_no_marks(text: str, form: str) -> None:
    assert words(text) == form


@given(st.text(max_size=40))
def test_forms_do_not_depend_on_how_unicode_is_written(text: str) -> None:
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert plain(normalize(form, text)) == plain(text)
    assert plain(f" \n{text}\t ") == plain(text)


@given(st.text(st.characters(max_codepoint=127), max_size=40))
def test_case_and_white_space_do_not_matter(text: str) -> None:
    assert plain(text.upper()) == plain(text.swapcase()) == plain(text.replace(" ", "\n\n"))


texts = st.lists(st.lists(st.sampled_from(["a", "b", "ab", "é"]), max_size=9).map(" ".join), max_size=12)


@given(texts, st.integers(1, 6))
def test_hashes_are_equal_exactly_where_the_words_are(batch: list[str], size: int) -> None:
    spans: list[tuple[str, ...]] = []
    lengths = []
    for text in batch:
        parts = text.split()
        own = [tuple(parts[i : i + size]) for i in range(max(1, len(parts) - size + 1))] if parts else []
        spans += own
        lengths.append(len(own))
    made = shingles(batch, size)
    assert np.diff(made.offsets).tolist() == lengths
    assert len(set(made.hashes.tolist())) == len(set(spans))
    assert len(set(zip(spans, made.hashes.tolist(), strict=True))) == len(set(spans))


@settings(max_examples=10)
@given(st.lists(st.integers(1, 30_000), min_size=1, max_size=6))
def test_a_text_has_the_same_hashes_alone_and_among_others(sizes: list[int]) -> None:
    generator = np.random.default_rng(sizes)
    batch = [" ".join(map(str, generator.integers(0, 50, size).tolist())) for size in sizes]
    made = shingles(batch, 5)
    for i, text in enumerate(batch):
        own = made.hashes[made.offsets[i] : made.offsets[i + 1]]
        assert np.array_equal(own, shingles([text], 5).hashes)


def test_hashes_are_the_same_in_every_process() -> None:
    code = "from sft.shingles import shingles; print(shingles(['one two three'], 2).hashes.tolist())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(shingles(["one two three"], 2).hashes.tolist())


def test_half_a_surrogate_is_text_like_any_other() -> None:
    assert len(shingles([plain("a \ud800 b")], 5).hashes) == 1


def test_all_that_a_turn_says() -> None:
    call = ToolCall("look_up", {"place": "Köln", "day": 3}, id="x1")
    turn = Message("assistant", "One moment.", reasoning="They ask.", tool_calls=(call,))
    assert said(turn) == 'They ask.\nOne moment.\nlook_up\n{"day": 3, "place": "Köln"}'
    assert said(turn, reasoning=False) == '\nOne moment.\nlook_up\n{"day": 3, "place": "Köln"}'
    assert said(Message("user", " Hi ")) == " Hi "
