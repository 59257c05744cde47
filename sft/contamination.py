"""Rows that share text with evaluation files, found by n words in a row or by a prompt that is the same as a whole."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sft.messages import Conversation
from sft.shingles import Hashes, Shingles, said, shingles, words

COMMON_ROWS = 10
"""Words in a row that more evaluation rows share than this are a template's, not a row's: they are not looked for."""

_BATCH_ROWS = 512
_WHOLE = 1 << 62


@dataclass(frozen=True, slots=True)
class TextIndex:
    """Texts of files as sorted hashes, each with the place in the list of files of the first one that has it."""

    hashes: Hashes
    files: NDArray[np.int32]

    def meet(self, texts: Shingles, met: NDArray[np.int32]) -> None:
        """Lowers `met`, one number a text, to the first file that it shares a hash with."""
        if not len(self.hashes):
            return
        # Most batches share nothing, and in order that is seen several times faster.
        ordered = np.sort(texts.hashes)
        shared = ordered[self.hashes[self._find(ordered)] == ordered]
        if not len(shared):
            return
        places = np.flatnonzero(np.isin(texts.hashes, shared))
        rows = np.searchsorted(texts.offsets, places, side="right") - 1
        np.minimum.at(met, rows, self.files[self._find(texts.hashes[places])])

    def _find(self, hashes: Hashes) -> NDArray[np.int64]:
        return np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)


@dataclass(frozen=True, slots=True)
class Contamination:
    """The prompts and the n-grams of evaluation files: 12 bytes for each, and nothing that could be read."""

    ngram: int
    files: tuple[str, ...]
    prompts: TextIndex
    ngrams: TextIndex

    def find(self, conversations: Sequence[Conversation]) -> list[str | None]:
        """Names for each row the first evaluation file that it shares text with, or None."""
        met = np.full(len(conversations), len(self.files), np.int32)
        prompts, rows = _hash(conversations, self.ngram)
        self.prompts.meet(prompts, met)
        self.ngrams.meet(rows, met)
        return [self.files[file] if file < len(self.files) else None for file in met.tolist()]


def index_evaluation(files: Iterable[tuple[str, Iterable[Conversation]]], ngram: int) -> Contamination:
    """Reads evaluation rows into an index.

    Args:
        files: names, as they shall be reported, and rows. Each name once.
        ngram: words in a row that make an overlap.
    """
    names: list[str] = []
    prompts: list[tuple[Hashes, int]] = []
    ngrams: list[tuple[Hashes, int]] = []
    for file, (name, conversations) in enumerate(files):
        names.append(name)
        rest = iter(conversations)
        while batch := list(itertools.islice(rest, _BATCH_ROWS)):
            whole, rows = _hash(batch, ngram)
            prompts.append((whole.hashes, file))
            ngrams.append((_once_a_row(rows), file))
    return Contamination(ngram, tuple(names), _index(prompts, None), _index(ngrams, COMMON_ROWS))


def _hash(conversations: Sequence[Conversation], ngram: int) -> tuple[Shingles, Shingles]:
    """Hashes the prompts, each as a whole, and all n-grams of the rows; a row of fewer words has none.

    The system's turn is left out: a prompt of its own says nothing of where a row comes from.
    """
    prompts, rows = [], []
    for conversation in conversations:
        *turns, last = conversation.messages
        prompts.append(words("\n".join(said(turn) for turn in turns if turn.role != "system")))
        row = f"{prompts[-1]} {words(said(last))}".strip()
        rows.append(row if row.count(" ") + 1 >= ngram else "")
    return shingles(prompts, _WHOLE), shingles(rows, ngram)


def _once_a_row(texts: Shingles) -> Hashes:
    rows = np.split(texts.hashes, texts.offsets[1:-1])
    unique: Hashes = np.concatenate([np.unique(row) for row in rows])
    return unique


def _index(parts: Sequence[tuple[Hashes, int]], most: int | None) -> TextIndex:
    hashes = np.concatenate([np.empty(0, np.uint64), *(part for part, _ in parts)])
    files = np.repeat(np.array([file for _, file in parts], np.int32), [len(part) for part, _ in parts])
    unique, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    kept = slice(None) if most is None else counts <= most
    return TextIndex(unique[kept], files[first][kept])
