"""Rows that repeat, nearly repeat or contradict others of the data set, whatever their source.

Workers compute a record of fixed size for each row; the driver collects the records in order and compares them when the
last one is there. What it finds depends on the rows and their order alone, and not on how they were cut into blocks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.messages import Conversation, Reason
from sft.minhash import SLOTS, near_earlier, signatures
from sft.shingles import plain, said

_KEYS: list[Any] = [("prompt", "<u8", 2), ("whole", "<u8", 2), ("answer", "<u8")]
_EXACT = np.dtype([*_KEYS, ("row", "<u8"), ("held_out", "?")])
_NEAR = np.dtype([*_EXACT.descr, ("signature", "u1", SLOTS), ("answer_signature", "u1", SLOTS)])

REASONS = (Reason.DUPLICATE, Reason.NEAR_DUPLICATE, Reason.CONTRADICTION)
"""What is found; a row's reasons are bits in this order."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A row that something was found of. `row` and `first`, the row that it repeats or contradicts, count from 0."""

    row: int
    first: int
    reasons: tuple[Reason, ...]


@dataclass(frozen=True, slots=True)
class Findings:
    """All findings, one row once, in the rows' order: 25 bytes each.

    Args:
        rows: the rows' numbers in the order in which they were added, from 0.
        keys: what `row_key` makes of their ids.
        first: the rows that they repeat or contradict.
        bits: their reasons.
    """

    rows: NDArray[np.int64]
    keys: NDArray[np.uint64]
    first: NDArray[np.int64]
    bits: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Finding]:
        for row, first, bits in zip(self.rows.tolist(), self.first.tolist(), self.bits.tolist(), strict=True):
            yield Finding(row, first, tuple(reason for i, reason in enumerate(REASONS) if bits >> i & 1))


def row_key(row_id: str) -> int:
    """Makes 64 bits of a row's id: two of ten million rows share theirs with a chance of 3 in a million."""
    return int.from_bytes(hashlib.blake2b(row_id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def fingerprints(
    ids: Sequence[str], conversations: Sequence[Conversation], held_out: Sequence[bool], near: bool
) -> list[bytes]:
    """Computes the records by which rows are compared: 49 bytes each, 305 with `near`.

    Args:
        ids: the rows' ids.
        conversations: the rows as they are trained.
        held_out: whether a row is kept from training. Such a row counts as the first of its kind wherever it is, so
            that what repeats it in training is found.
        near: whether near duplicates are looked for.
    """
    records = np.zeros(len(ids), _NEAR if near else _EXACT)
    forms = [[plain(said(turn)) for turn in conversation.messages] for conversation in conversations]
    # A pair is told apart by its rejected answer, too; what it answers is the chosen one.
    rejected = [" ".join(plain(said(turn)) for turn in row.rejected[-1:]) for row in conversations]
    keys = np.frombuffer(b"".join(map(_keys, conversations, forms, rejected)), np.dtype(_KEYS))
    for name, *_ in _KEYS:
        records[name] = keys[name]
    records["row"] = [row_key(row_id) for row_id in ids]
    records["held_out"] = held_out
    if near:
        records["signature"] = signatures(list(map(_text, conversations, forms, rejected)))
        records["answer_signature"] = signatures([answer for *_, answer in forms])
    return [record.tobytes() for record in records]


class Duplicates:
    """Collects the records of all rows, in config, file and row order, and compares them."""

    def __init__(self, near_threshold: float | None = None) -> None:
        self._near_threshold = near_threshold
        self._type = _EXACT if near_threshold is None else _NEAR
        self._records = bytearray()

    def __len__(self) -> int:
        return len(self._records) // self._type.itemsize

    def add(self, records: Sequence[bytes]) -> None:
        """Takes the records of the next rows. They must have been made with `near` where there is a threshold."""
        assert all(len(record) == self._type.itemsize for record in records)
        self._records += b"".join(records)

    def findings(self) -> Findings:
        """Compares all rows that were added. Of rows that were held out nothing is found."""
        records = np.frombuffer(self._records, self._type)
        held_out = records["held_out"]
        order = np.argsort(~held_out, kind="stable")

        group, firsts = _group(records["whole"], order)
        first = firsts[group]
        duplicate = first != np.arange(len(records))

        near = np.zeros(len(records), bool)
        if self._near_threshold is not None:
            rest = order[~duplicate[order]]
            earlier = near_earlier(records["signature"], records["answer_signature"], rest, self._near_threshold)
            near[rest] = earlier >= 0
            first[rest[earlier >= 0]] = earlier[earlier >= 0]

        group, firsts = _group(records["prompt"], order)
        differs = records["answer"] != records["answer"][firsts[group]]
        others = np.full(len(firsts), -1, np.int64)
        # Backwards, so that of each group the first row that differs remains.
        for_others = order[differs[order]][::-1]
        others[group[for_others]] = for_others
        contradiction = others[group] >= 0
        alone = contradiction & ~duplicate & ~near
        first[alone] = np.where(differs, firsts[group], others[group])[alone]

        bits = (duplicate | near << 1 | contradiction << 2).astype(np.uint8)
        found = np.flatnonzero((bits > 0) & ~held_out)
        return Findings(found, records["row"][found], first[found], bits[found])


def _group(keys: NDArray[np.uint64], order: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers rows by their key of two words. Returns each row's group, and each group's first row in the order."""
    ordered = keys[order]
    place = np.lexsort((ordered[:, 1], ordered[:, 0]))
    ordered = ordered[place]
    begins = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])[: len(order)]
    group = np.empty(len(order), np.int64)
    group[order[place]] = np.cumsum(begins) - 1
    return group, order[place[begins]]


def _text(conversation: Conversation, forms: Sequence[str], rejected: str) -> str:
    """All that a row says. Rows that share a system's turn and tools must not resemble each other by them alone."""
    begin = int(conversation.messages[0].role == "system")
    return " ".join(filter(None, [*forms[begin:], rejected]))


def _keys(conversation: Conversation, forms: Sequence[str], rejected: str) -> bytes:
    """Hashes a row's prompt, the whole row, and its answer without the reasoning."""
    *turns, last = conversation.messages
    # A form has no other white space than spaces, to which these separators belong.
    prompt = [f"{turn.role}\x1f{form}" for turn, form in zip(turns, forms, strict=False)]
    if conversation.tools:
        prompt.append(plain(json.dumps(conversation.tools, sort_keys=True, ensure_ascii=False, default=str)))
    prompt_key = _digest("\x1e".join(prompt), 16)
    answer = forms[-1] if last.reasoning is None else plain(said(last, reasoning=False))
    # "Paris." does not contradict "Paris".
    whole = f"{forms[-1]}\x1f{answer}" + (f"\x1e{rejected}" if rejected else "")
    return prompt_key + _digest(whole, 16, prompt_key) + _digest(answer.rstrip(" .。"), 8)


def _digest(text: str, size: int, prefix: bytes = b"") -> bytes:
    return hashlib.blake2b(prefix + text.encode("utf-8", "surrogatepass"), digest_size=size).digest()
