from __future__ import annotations

import random

import numpy as np
import pytest

from sft.minhash import SLOTS, bands, near_earlier, signatures, similarity
from tests.sft.rows_of_text import edited, jaccard, vocabulary


def test_equal_slots_estimate_the_similarity() -> None:
    rng = random.Random(0)
    known = vocabulary(rng)
    for length in (30, 100, 400):
        errors = []
        for _ in range(300):
            words = rng.choices(known, k=length)
            other = edited(rng, words, known, rng.randint(1, length // 20))
            one, two = signatures([" ".join(words), " ".join(other)])
            errors.append(similarity(one, two[np.newaxis])[0] - jaccard(words, other))
        assert abs(np.mean(errors)) < 0.008
        assert np.std(errors) < 0.04


def test_texts_with_nothing_in_common_are_not_similar() -> None:
    rng = random.Random(1)
    known = vocabulary(rng)
    made = signatures([" ".join(rng.choices(known, k=100)) for _ in range(300)])
    unlike = np.array([similarity(made[i], made[i + 1 :]).mean() for i in range(299)])
    assert abs(unlike.mean()) < 0.002


def test_a_signature_depends_on_its_text_alone() -> None:
    texts = ["a b c d e f g", "", "short", "a b c d e f g", "你 好"]
    made = signatures(texts)
    assert made.shape == (5, SLOTS)
    assert made.dtype == np.uint8
    assert not made[1].any()
    assert np.array_equal(made[0], made[3])
    assert np.array_equal(made, np.concatenate([signatures([text]) for text in texts]))
    assert signatures([]).shape == (0, SLOTS)
    assert not signatures([""]).any()


@pytest.mark.parametrize(("threshold", "cut"), [(0.5, (42, 3)), (0.7, (32, 4)), (0.8, (21, 6)), (0.95, (8, 16))])
def test_bands_share_at_the_threshold(threshold: float, cut: tuple[int, int]) -> None:
    count, slots = bands(threshold)
    assert (count, slots) == cut
    assert count * slots <= SLOTS
    assert (1 - threshold**slots) ** count <= 0.01


def test_a_row_is_compared_with_kept_rows_alone() -> None:
    """Of a chain of small changes the second row goes, and the third stays: the first is not near to it."""
    same = np.random.default_rng(0).integers(0, 256, SLOTS, np.uint8)
    second, third = same.copy(), same.copy()
    second[:16] += 1
    third[:32] += 1
    rows = np.stack([same, second, third, same])
    assert near_earlier(rows, rows, np.array([0, 1, 2, 3]), 0.8).tolist() == [-1, 0, -1, 0]
    assert near_earlier(rows, rows, np.array([2, 1, 0]), 0.8).tolist() == [-1, 2, -1]
    assert near_earlier(rows, rows, np.array([], np.int64), 0.8).tolist() == []


def test_the_answer_must_be_near_as_well() -> None:
    rows = np.zeros((2, SLOTS), np.uint8)
    answers = np.stack([np.zeros(SLOTS, np.uint8), np.ones(SLOTS, np.uint8)])
    assert near_earlier(rows, answers, np.array([0, 1]), 0.8).tolist() == [-1, -1]
    assert near_earlier(rows, rows, np.array([0, 1]), 0.8).tolist() == [-1, 0]
