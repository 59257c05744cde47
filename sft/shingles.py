"""Texts in one form, and hashes of n words in a row: what near duplicates and contamination are found by.

A character of a script that puts no spaces between words counts as a word.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from sft.messages import Message

Hashes = NDArray[np.uint64]

# Thai to Tibetan, Myanmar, Khmer, Han radicals, kana and bopomofo, Han.
_UNSPACED = re.compile(
    "[\u0e01-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3040-\u312f\u31a0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)

# Powers of an odd number have an inverse modulo 2**64, so the hash of any span of bytes is a difference of prefix sums.
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)
_BYTE_VALUES: Hashes = np.random.Generator(np.random.PCG64(0)).integers(0, 1 << 64, 256, dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class Shingles:
    """Hashes of texts: text i has `hashes[offsets[i] : offsets[i + 1]]`."""

    hashes: Hashes
    offsets: NDArray[np.int64]


def said(turn: Message, reasoning: bool = True) -> str:
    """Returns all text of a turn: its reasoning, if wanted, its content and its tool calls."""
    if turn.reasoning is None and not turn.tool_calls:
        return turn.content
    texts = [turn.reasoning or "" if reasoning else "", turn.content]
    for call in turn.tool_calls:
        texts += [call.name, json.dumps(call.arguments, sort_keys=True, ensure_ascii=False, default=str)]
    return "\n".join(texts)


def plain(text: str) -> str:
    """Returns a text without what seldom matters: NFKC, no case, single spaces, and none at the ends."""
    if text.isascii():
        return " ".join(text.lower().split())
    folded = normalize("NFKC", normalize("NFKC", text).casefold())
    return " ".join(_UNSPACED.sub(r" \g<0> ", folded).split())


def words(text: str) -> str:
    """Returns the words of a text in plain form, without punctuation and symbols, joined by single spaces."""
    form = plain(text)
    return " ".join(form.translate(_NO_WORDS).split())


def shingles(texts: Sequence[str], size: int) -> Shingles:
    """Hashes all `size` words in a row of each text.

    Args:
        texts: in plain form or as words; words are what single spaces separate. A text of fewer words is one shingle
            as a whole, an empty one has none.
        size: words of a shingle.

    Returns:
        Hashes of 64 bits that depend on the words alone: the same in every process and on every machine.
    """
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    words_of = np.array([text.count(b" ") + 1 if text else 0 for text in encoded], np.int64)
    counts = np.where(words_of > size, words_of - size + 1, np.minimum(words_of, 1))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    hashes = np.empty(offsets[-1], np.uint64)
    for part in _groups(encoded):
        data = np.frombuffer(b" ".join([*filter(None, encoded[part]), b""]), np.uint8)
        ends = np.flatnonzero(data == ord(" "))
        starts = np.concatenate([[0], ends + 1])
        after = np.cumsum(words_of[part])
        before = after - words_of[part]
        first = np.repeat(before - offsets[part] + offsets[part.start], counts[part])
        first += np.arange(len(first))
        last = np.minimum(first + size, np.repeat(after, counts[part])) - 1
        hashes[offsets[part.start] : offsets[part.stop]] = _hash_spans(data, starts[first], ends[last])
    return Shingles(hashes, offsets)


def _groups(texts: Sequence[bytes]) -> Iterator[slice]:
    """Cuts texts into groups whose arrays stay in the processor's cache."""
    start = size = 0
    for i, text in enumerate(texts):
        if size + len(text) >= _GROUP_BYTES and i > start:
            yield slice(start, i)
            start, size = i, 0
        size += len(text) + 1
    if start < len(texts):
        yield slice(start, len(texts))


def _hash_spans(data: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Hashes:
    """Hashes data[start:end] of all pairs, whatever their length, in a few passes over the data."""
    small = len(data) <= _GROUP_BYTES
    terms = _BYTE_VALUES[data]
    terms *= _POWERS[: len(data)] if small else _powers(_BASE, len(data))
    sums = np.zeros(len(data) + 1, np.uint64)
    np.cumsum(terms, out=sums[1:])
    mixed: Hashes = sums[ends]
    mixed -= sums[starts]
    mixed *= (_INVERSE_POWERS if small else _powers(_INVERSE, len(data)))[starts]
    # The finish of splitmix64 spreads what differs over all bits.
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _powers(base: int, count: int) -> Hashes:
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    powers: Hashes = np.multiply.accumulate(factors)
    return powers


_GROUP_BYTES = 1 << 15
_POWERS = _powers(_BASE, _GROUP_BYTES)
_INVERSE_POWERS = _powers(_INVERSE, _GROUP_BYTES)


class _NoWords(dict[int, int | str]):
    """A table for str.translate: what is neither letter, mark nor number becomes a space."""

    def __missing__(self, code: int) -> int | str:
        self[code] = code if unicodedata.category(chr(code))[0] in "LMN" else " "
        return self[code]


_NO_WORDS = _NoWords()
