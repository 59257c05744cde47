"""Near duplicates of a growing set: a row is compared with those that share a band of its MinHash signature."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from sft.minhash import Signatures, bands, signatures, similarity
from sft.shingles import plain


class NearIndex:
    """Rows and what is near them, by the rule of the data path: the whole row and its answer both are."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._bands, self._slots = bands(threshold)
        self._ids: list[str] = []
        self._rows: list[Signatures] = []
        self._by_band: dict[tuple[int, bytes], list[int]] = defaultdict(list)

    def add(self, id: str, prompt: str, answer: str) -> None:
        """Takes a row in."""
        signed = _sign(prompt, answer)
        for band in self._cut(signed[0]):
            self._by_band[band].append(len(self._ids))
        self._ids.append(id)
        self._rows.append(signed)

    def nearest(self, prompt: str, answer: str) -> str | None:
        """The id of the first row that this one nearly repeats; None where there is none."""
        whole, answered = _sign(prompt, answer)
        places = sorted({place for band in self._cut(whole) for place in self._by_band.get(band, ())})
        if not places:
            return None
        rows = np.stack([self._rows[place] for place in places])
        near = similarity(whole, rows[:, 0]) >= self._threshold
        near &= similarity(answered, rows[:, 1]) >= self._threshold
        return self._ids[places[int(near.argmax())]] if near.any() else None

    def _cut(self, signature: Signatures) -> list[tuple[int, bytes]]:
        size = self._slots
        return [(band, signature[band * size : (band + 1) * size].tobytes()) for band in range(self._bands)]


def _sign(prompt: str, answer: str) -> Signatures:
    """Signatures of the whole row and of its answer, of shape (2, slots)."""
    answered = plain(answer)
    return signatures([f"{plain(prompt)} {answered}", answered])
