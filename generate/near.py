"""Near duplicates of a growing set: a row is compared with those that share a band of its MinHash signature."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from generate.candidate import Candidate
from sft.minhash import SLOTS, Signatures, bands, signatures, similarity
from sft.shingles import plain


class NearIndex:
    """Rows and what is near them, by the rule of the data path: the whole row and its answer both are."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._bands, self._slots = bands(threshold)
        self._ids: list[str] = []
        self._rows: list[Signatures] = []
        self._by_band: dict[tuple[int, bytes], list[int]] = defaultdict(list)

    def add(self, rows: Sequence[Candidate]) -> None:
        """Takes rows in."""
        for row, signed in zip(rows, _sign(rows), strict=True):
            for band in self._cut(signed[0]):
                self._by_band[band].append(len(self._ids))
            self._ids.append(row.id)
            self._rows.append(signed)

    def nearest(self, row: Candidate) -> str | None:
        """The id of the first row that this one nearly repeats; None where there is none."""
        whole, answered = _sign([row])[0]
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


def _sign(rows: Sequence[Candidate]) -> Signatures:
    """Signatures of the whole rows and of their answers, of shape (rows, 2, slots)."""
    texts = [form for row in rows for form in (plain(f"{row.prompt} {row.output}"), plain(row.output))]
    return signatures(texts).reshape(len(rows), 2, SLOTS)
