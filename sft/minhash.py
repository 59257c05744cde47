"""Signatures of texts, whose equal slots estimate how much of their shingles they share, and the search for near ones.

MinHash by the library rensa; of each slot one byte is kept, which costs next to no precision (b-bit MinHash).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sft.shingles import shingles

SLOTS = 128
"""Bytes of a signature. The estimate's standard deviation is about 0.03 where similarities matter."""

SHINGLE_WORDS = 5

Signatures = NDArray[np.uint8]

_SEED = 1
_CHANCE = 1 / 256
# Share of the texts exactly at the threshold that no band finds.
_MISS = 0.01
# Where a template makes thousands of rows alike, each is compared with so many of a band, the newest first.
_CANDIDATES = 64


def signatures(texts: Sequence[str]) -> Signatures:
    """Computes signatures of texts in plain form, of shape (texts, SLOTS). Those of empty texts are zeros.

    They are the same in every process, but not with every version of rensa: they are not to be stored.
    """
    import rensa

    parts = shingles(texts, SHINGLE_WORDS)
    filled = np.diff(parts.offsets) > 0
    signed = np.zeros((len(texts), SLOTS), np.uint8)
    if filled.any():
        offsets = np.append(parts.offsets[:-1][filled], parts.offsets[-1]).astype(np.uint64)
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(parts.hashes, offsets, SLOTS, _SEED)
        slots = np.frombuffer(b"".join(array("I", row) for row in matrix.to_rows()), np.uint32)
        # Smallest values are small: only after mixing is the upper byte like any other.
        signed[filled] = ((slots * np.uint32(0x9E3779B1)) >> np.uint32(24)).astype(np.uint8).reshape(-1, SLOTS)
    return signed


def similarity(one: Signatures, many: Signatures) -> NDArray[np.float64]:
    """Estimates the Jaccard similarity of one text and each of many, without the slots that are equal by chance."""
    equal = np.count_nonzero(many == one, axis=1) / SLOTS
    similar: NDArray[np.float64] = (equal - _CHANCE) / (1 - _CHANCE)
    return similar


def bands(threshold: float) -> tuple[int, int]:
    """Cuts a signature for the search: texts of the threshold's similarity share a band in 99 of 100 cases.

    Returns:
        The number of bands, and the slots of each: as many as possible, so that few other texts share one.
    """
    for slots in range(SLOTS, 1, -1):
        if (1 - threshold**slots) ** (SLOTS // slots) <= _MISS:
            return SLOTS // slots, slots
    return SLOTS, 1


def near_earlier(
    rows: Signatures, answers: Signatures, order: NDArray[np.int64], threshold: float
) -> NDArray[np.int64]:
    """Finds rows that nearly repeat an earlier one: the whole row and its answer are both as near as the threshold.

    A row is compared with rows that repeat none themselves. So each row that is found has one like it that is kept,
    and a chain of small changes is not followed from end to end.

    Args:
        rows: signatures of whole rows, one each.
        answers: signatures of their answers.
        order: indices of the rows to compare, the first one first.
        threshold: Jaccard similarity.

    Returns:
        For each place in `order` the index of the first row that it is near to, or -1.
    """
    count, slots = bands(threshold)
    near = np.full(len(order), -1, np.int64)
    groups = np.empty((len(order), count), np.int32)
    for band in range(count):
        groups[:, band] = _shared(rows[order, band * slots : (band + 1) * slots])
    places = np.flatnonzero((groups >= 0).any(axis=1))
    groups, order = groups[places], order[places]
    # The rows of each group that repeat none are a chain: its newest row, and for each row and band the one before.
    newest = [array("i", [-1]) * (int(groups[:, band].max(initial=-1)) + 1) for band in range(count)]
    before = array("i", [-1]) * groups.size
    for row, numbers in enumerate(groups):
        shared = [(band, group) for band, group in enumerate(numbers.tolist()) if group >= 0]
        others: set[int] = set()
        for band, group in shared:
            other = newest[band][group]
            for _ in range(_CANDIDATES):
                if other < 0:
                    break
                others.add(other)
                other = before[other * count + band]
        if others:
            earlier = order[sorted(others)]
            like = similarity(rows[order[row]], rows[earlier]) >= threshold
            like &= similarity(answers[order[row]], answers[earlier]) >= threshold
            if like.any():
                near[places[row]] = earlier[like.argmax()]
                continue
        for band, group in shared:
            before[row * count + band] = newest[band][group]
            newest[band][group] = row
    return near


def _shared(band: Signatures) -> NDArray[np.int32]:
    """Numbers the bands that more than one text has; -1 for the others."""
    hashed = np.zeros(len(band), np.uint64)
    for slot in band.T:
        hashed *= np.uint64(0x9E3779B97F4A7C15)
        hashed += slot
        hashed ^= hashed >> np.uint64(29)
    _, group, counts = np.unique(hashed, return_inverse=True, return_counts=True)
    numbers = np.cumsum(counts > 1, dtype=np.int32) - 1
    numbers[counts == 1] = -1
    return numbers.astype(np.int32)[group]
