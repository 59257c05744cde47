"""Kept rows as examples that a person can look at, token by token."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sft.base import BaseTokenizer
from sft.mask import UNTRAINED

MOST_SHOWN = 40
"""Examples shown at most, however many sources there are."""
EDGE_TOKENS = 1000
"""Tokens shown of an example's begin and of its end; what lies between is left out."""

_JOINERS = "\u200c\u200d"
"""Invisible, but part of how ordinary words and emoji are spelled."""

_UNFINISHED = "\ufffd"
LONGEST_CHARACTER = 4
"""Tokens of which one character is made at most: its bytes in UTF-8."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A token's text; several tokens' where none of them alone is a whole character.

    Rule: `weight` is 1 for a trained piece, 0 for an untrained one, and in between for prompt text that is trained
    with a weight. `special` pieces are control tokens, such as the stop token.
    """

    text: str
    ids: tuple[int, ...]
    labels: tuple[int, ...]
    weight: float
    special: bool


@dataclass(frozen=True, slots=True)
class ShownExample:
    """One kept row to look at; `omitted` tokens between `head` and `tail` are left out."""

    id: str
    source: str
    task: str
    cluster: str
    flags: tuple[str, ...]
    tokens: int
    trained_tokens: int
    head: tuple[Piece, ...]
    omitted: int
    tail: tuple[Piece, ...]

    def shortened(self, edge: int) -> ShownExample:
        """The same with at most so many pieces of its begin and of its end."""
        pieces = (*self.head, *self.tail)
        if len(pieces) <= 2 * edge:
            return self
        head, tail = self.head[:edge], pieces[-edge:]
        left = sum(len(piece.ids) for piece in (*head, *tail))
        return dataclasses.replace(self, head=head, tail=tail, omitted=self.tokens - left)

    @property
    def weighted(self) -> bool:
        """Whether some text is trained with a weight."""
        return any(0 < piece.weight < 1 for piece in (*self.head, *self.tail))


class ExamplePicker:
    """Picks rows to look at as tables pass by: the first of each source, and the first with each flag.

    Args:
        each: how many of each source.
    """

    def __init__(self, each: int) -> None:
        self._each = each
        self._taken: dict[str, int] = {}
        self._flags: set[tuple[str, str]] = set()
        self.rows: list[dict[str, Any]] = []

    def add(self, table: pa.Table) -> None:
        """Looks for rows to pick in a PREPARED table."""
        if not self._each or len(self.rows) >= MOST_SHOWN:
            return
        kept = np.flatnonzero(pc.equal(table.column("reason"), "").to_numpy())
        source_of = table.column("source").take(pa.array(kept)).to_numpy()
        flags = table.column("flags").take(pa.array(kept))
        picked: set[int] = set()
        for source in dict.fromkeys(source_of):
            left = self._each - self._taken.get(source, 0)
            first = np.flatnonzero(source_of == source)[:left].tolist()
            self._taken[source] = self._taken.get(source, 0) + len(first)
            picked.update(first)
        for row in np.flatnonzero(pc.list_value_length(flags).to_numpy()).tolist():
            new = {(source_of[row], flag) for flag in flags[row].as_py()} - self._flags
            if new:
                self._flags |= new
                picked.add(row)
        room = sorted(picked)[: MOST_SHOWN - len(self.rows)]
        self.rows += table.take(pa.array(kept[room])).to_pylist() if room else []


def shown(row: Mapping[str, Any], base: BaseTokenizer) -> ShownExample:
    """Makes a kept row of a PREPARED table readable."""
    weights = _weights(row)
    ids = row["input_ids"]
    omitted = max(0, len(ids) - 2 * EDGE_TOKENS)
    head_end, tail_begin = (EDGE_TOKENS, len(ids) - EDGE_TOKENS) if omitted else (len(ids), len(ids))
    return ShownExample(
        id=row["id"],
        source=row["source"],
        task=row["task"],
        cluster=row["cluster"],
        flags=tuple(row["flags"]),
        tokens=len(ids),
        trained_tokens=int(np.count_nonzero(np.asarray(row["labels"]) != UNTRAINED)),
        head=_pieces(row, 0, head_end, weights, base),
        omitted=omitted,
        tail=_pieces(row, tail_begin, len(ids), weights, base),
    )


def dump(row: Mapping[str, Any], base: BaseTokenizer) -> dict[str, Any]:
    """A kept row of a PREPARED table as tests and other programs take it."""
    trained = np.asarray(row["labels"]) != UNTRAINED
    edges = np.flatnonzero(np.diff(trained, prepend=False, append=False)).reshape(-1, 2).tolist()
    texts = [str(base.tokenizer.decode(row["input_ids"][begin:end])) for begin, end in edges]
    return {
        "id": row["id"],
        "source": row["source"],
        "input_ids": row["input_ids"],
        "labels": row["labels"],
        "trained_text": "".join(texts),
    }


def visible(text: str) -> str:
    """Makes white space and invisible characters visible, so that no text hides and none moves a terminal's cursor."""
    return re.sub(r"[^\x20-\x7e]", lambda found: _visible(found[0]), text)


def _weights(row: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    weights = row.get("weights")
    return np.asarray(np.asarray(row["labels"]) != UNTRAINED if weights is None else weights, np.float32)


def _pieces(
    row: Mapping[str, Any], begin: int, last: int, weights: npt.NDArray[np.float32], base: BaseTokenizer
) -> tuple[Piece, ...]:
    """The tokens from `begin` to `last`, each with the text that it adds to the text before it."""
    ids, labels = row["input_ids"], row["labels"]
    added = base.tokenizer.added_tokens_decoder.items()
    special = {*base.stop_ids, *(number for number, token in added if token.special)}
    made: list[Piece] = []
    context = begin
    for end in range(begin + 1, last + 1):
        text = str(base.tokenizer.decode(ids[context:end]))
        if text.endswith(_UNFINISHED) and end < last and end - begin < LONGEST_CHARACTER:
            continue
        before = str(base.tokenizer.decode(ids[context:begin]))
        text = text[len(before) :] if text.startswith(before) else str(base.tokenizer.decode(ids[begin:end]))
        weight = float(weights[begin:end].max())
        made.append(Piece(text, tuple(ids[begin:end]), tuple(labels[begin:end]), weight, ids[end - 1] in special))
        context, begin = begin, end
    return tuple(made)


def _visible(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character == "\t":
        return "⇥\t"
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp", "Zs")
    return f"⟨U+{ord(character):04X}⟩" if hidden and character not in _JOINERS else character
