from __future__ import annotations

import json
import subprocess
import sys
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from generate.rouge import Match, RougeIndex, common_subsequence, rouge_l, tokens
from tests.generate.scripted import said

FEW_WORDS = st.lists(st.sampled_from("abc"), max_size=12)


def by_table(one: list[str], other: list[str]) -> int:
    row = [0] * (len(other) + 1)
    for word in one:
        before = row
        row = [0]
        for place, against in enumerate(other):
            row.append(before[place] + 1 if word == against else max(row[place], before[place + 1]))
    return row[-1]


@given(FEW_WORDS, FEW_WORDS)
def test_the_longest_common_subsequence_is_that_of_the_table(one: list[str], other: list[str]) -> None:
    assert common_subsequence(one, other) == by_table(one, other)


@pytest.mark.parametrize(
    ("one", "other", "score"),
    [
        ("", "", 0.0),
        ("word", "", 0.0),
        ("Write a poem.", "write A POEM", 1.0),
        ("police killed the gunman", "police kill the gunman", 0.75),
        ("police killed the gunman", "the gunman kill police", 0.5),
        ("a b c d e f g", "a b c", 0.6),
        ("Schreibe ein Gedicht über Äpfel", "Schreibe ein Gedicht über Birnen", 0.8),
    ],
)
def test_literal_scores(one: str, other: str, score: float) -> None:
    assert rouge_l(tokens(one), tokens(other)) == pytest.approx(score)


# In a process of its own: the package brings absl, whose log handler closes pytest's own stderr at another's set-up.
SCORES = """
import json, sys
from rouge_score.rouge_scorer import RougeScorer
scorer = RougeScorer(["rougeL"], use_stemmer=False)
print(json.dumps([scorer.score(one, other)["rougeL"].fmeasure for one, other in json.load(sys.stdin)]))
"""


def test_scores_are_those_of_the_package_rouge_score() -> None:
    draw = Random(0)
    pairs = [[f"{said(draw, draw.randrange(1, 12))}, it's {draw.randrange(9)}_x!" for _ in range(2)] for _ in range(50)]
    done = subprocess.run([sys.executable, "-c", SCORES], input=json.dumps(pairs), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    scores = [rouge_l(tokens(one), tokens(other)) for one, other in pairs]
    assert scores == pytest.approx(json.loads(done.stdout))


@given(st.lists(FEW_WORDS, max_size=8), FEW_WORDS, st.sampled_from([0.3, 0.5, 0.7, 0.9, 1.0]))
def test_the_index_finds_what_comparing_with_all_finds(pool: list[list[str]], text: list[str], least: float) -> None:
    index = RougeIndex(least)
    for number, one in enumerate(pool):
        index.add(str(number), " ".join(one))
    scores = [rouge_l(text, one) for one in pool]
    best = max((score for score in scores if score >= least), default=None)
    expected = None if best is None else Match(str(scores.index(best)), best)
    assert index.nearest(" ".join(text)) == expected


def test_the_threshold_itself_is_too_near_and_some_texts_do_not_count() -> None:
    index = RougeIndex(0.7)
    index.add("first", "a b c d e f g x y z")
    index.add("second", "a b c d e f x y z w")
    assert index.nearest("a b c d e f g h i j") == Match("first", 0.7)
    assert index.nearest("a b c d e f h i j k") is None
    assert index.nearest("a b c d e f g h i j", but={"first"}) is None
    assert index.nearest("a b c d e f g x y z", but={"first"}) == Match("second", 0.9)
