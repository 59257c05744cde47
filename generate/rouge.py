"""ROUGE-L between texts, and the exact search for texts above a threshold in a growing pool, without comparing all."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sft.shingles import words


@dataclass(frozen=True, slots=True)
class Match:
    """A text of the pool, and how like it another one is."""

    id: str
    score: float


def tokens(text: str) -> list[str]:
    """Words in lower case, without punctuation; as the package rouge-score has them, and in every script."""
    return words(text).split()


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, by one addition of bit vectors for each word of `other`."""
    places: dict[str, int] = defaultdict(int)
    for place, word in enumerate(one):
        places[word] |= 1 << place
    whole = (1 << len(one)) - 1
    unmatched = whole
    for word in other:
        matched = unmatched & places.get(word, 0)
        unmatched = ((unmatched + matched) | (unmatched - matched)) & whole
    return len(one) - unmatched.bit_count()


def rouge_l(one: Sequence[str], other: Sequence[str]) -> float:
    """The F measure of precision and recall of the longest common subsequence; 0 where a side is empty."""
    both = len(one) + len(other)
    return 2 * common_subsequence(one, other) / both if both else 0.0


class RougeIndex:
    """Texts by the words that are in them.

    Two texts of m and n words reach a threshold t only with t(m + n) / 2 words in common, and n is then at least
    tm / (2 - t). So of any m - tm / (2 - t) + 1 words of a text, one is in each text that is like it: only those are
    looked up, the rarest ones. A word's second occurrence counts as another word.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._ids: list[str] = []
        self._texts: list[list[str]] = []
        self._having: dict[tuple[str, int], list[int]] = defaultdict(list)

    def add(self, id: str, text: str) -> None:
        """Takes a text into the pool."""
        found = tokens(text)
        for word in _numbered(found):
            self._having[word].append(len(self._texts))
        self._ids.append(id)
        self._texts.append(found)

    def nearest(self, text: str, but: Collection[str] = ()) -> Match | None:
        """The text that is most like this one, the earliest of equals; None where all are below the threshold.

        Args:
            text: any text.
            but: ids of texts that do not count.
        """
        found = tokens(text)
        needed = math.ceil(self._threshold * len(found) / (2 - self._threshold) - 1e-9)
        numbered = sorted(_numbered(found), key=lambda word: (len(self._having.get(word, ())), word))
        near = {place for word in numbered[: len(found) - needed + 1] for place in self._having.get(word, ())}
        best: Match | None = None
        for place in sorted(near):
            if self._ids[place] not in but:
                score = rouge_l(found, self._texts[place])
                if score >= self._threshold and (best is None or score > best.score):
                    best = Match(self._ids[place], score)
        return best


def _numbered(found: Sequence[str]) -> list[tuple[str, int]]:
    """Each word with how often it came before."""
    seen: Counter[str] = Counter()
    numbered = []
    for word in found:
        numbered.append((word, seen[word]))
        seen[word] += 1
    return numbered
