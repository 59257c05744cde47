"""What a prepared row must be, told by transformers' own chat template and tokenizer alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from sft.base import BaseTokenizer
from sft.files import RAW
from sft.formats import RowSpec
from sft.rows import Rules, SourcePlan, prepare
from tests.templates import Family
from tests.templates.tokenizers import Kind, as_read, pieces_of, text_of

UNTRAINED = -100
ANY_FORMAT = RowSpec()
WHOLE = Rules(max_length=100_000, truncate=False)

Talk = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a PREPARED table."""

    id: str
    ids: list[int]
    labels: list[int]
    reason: str
    flags: list[str]

    @property
    def trained(self) -> list[int]:
        """The trained ids, in order."""
        return [label for label in self.labels if label != UNTRAINED]

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Half-open ranges of trained tokens that follow one another."""
        edges = [
            i
            for i in range(len(self.labels) + 1)
            if (i > 0 and self.labels[i - 1] != UNTRAINED) != (i < len(self.labels) and self.labels[i] != UNTRAINED)
        ]
        return list(zip(edges[::2], edges[1::2], strict=True))


def raw_table(rows: Sequence[object]) -> pa.Table:
    """Rows as a RAW table of one file."""
    places = [
        {"source": "s", "file": "f.jsonl", "position": i, "raw": json.dumps(row).encode()}
        for i, row in enumerate(rows, 1)
    ]
    return pa.Table.from_pylist(places, schema=RAW)


def prepare_rows(
    base: BaseTokenizer, rows: Sequence[object], rules: Rules = WHOLE, spec: RowSpec = ANY_FORMAT
) -> list[Row]:
    """The rows' fates."""
    table = prepare(raw_table(rows), base, {"s": SourcePlan(spec, "", "")}, rules)
    return [Row(row["id"], row["input_ids"], row["labels"], row["reason"], row["flags"]) for row in table.to_pylist()]


def prepare_talks(base: BaseTokenizer, talks: Sequence[Talk], rules: Rules = WHOLE) -> list[Row]:
    """The fates of conversations."""
    return prepare_rows(base, [{"messages": talk} for talk in talks], rules)


def render(base: BaseTokenizer, talk: Talk, prompt: bool, **more: Any) -> str:
    """A conversation as text, or as the prompt for its next answer."""
    return str(base.tokenizer.apply_chat_template(talk, add_generation_prompt=prompt, tokenize=False, **more))


def served_ids(base: BaseTokenizer, talk: Talk, prompt: bool = True, **more: Any) -> list[int]:
    """The ids that a server makes of a conversation."""
    return list(base.tokenizer.apply_chat_template(talk, add_generation_prompt=prompt, **more)["input_ids"])


def answers(talk: Talk) -> list[int]:
    """Where the assistant speaks."""
    return [i for i, turn in enumerate(talk) if turn["role"] == "assistant"]


def check(family: Family, kind: Kind, base: BaseTokenizer, talk: Talk, row: Row) -> None:
    """Holds a kept row against the properties that prove a mask."""
    assert len(row.ids) == len(row.labels)
    assert row.labels[0] == UNTRAINED
    assert all(label in (UNTRAINED, token) for token, label in zip(row.ids, row.labels, strict=True))
    assert served_ids(base, talk, prompt=False)[: len(row.ids)] == row.ids
    assert len(row.runs) == len(answers(talk))
    for (start, end), turn in zip(row.runs, answers(talk), strict=True):
        assert text_of(base, kind, row.ids[start:end]) == answer_as_read(family, kind, base, talk, turn)
        assert row.ids[:start] == served_ids(base, talk[:turn])
        assert row.ids[end - 1] in base.stop_ids


def answer_as_read(family: Family, kind: Kind, base: BaseTokenizer, talk: Talk, turn: int) -> str:
    """What the trained ids of a turn must stand for."""
    answer = as_read(base, kind, family.answer(talk[turn]["content"]))
    prompt = render(base, talk[:turn], prompt=True)
    opened_by_mark = prompt.endswith(family.special) or prompt.rstrip().endswith(family.rstrip)
    return f" {answer}" if kind == "prepend" and opened_by_mark else answer


def may_be_refused(family: Family, kind: Kind, base: BaseTokenizer, talk: Talk) -> bool:
    """Whether no mask of this conversation is exact: a token crosses an edge, or the prompt's ids are others."""
    whole = served_ids(base, talk, prompt=False)
    pieces = pieces_of(base, kind, whole)
    if b"".join(pieces) != as_read(base, kind, render(base, talk, prompt=False)).encode():
        return True  # tokens say more than the text does, so this oracle cannot tell
    edges = {0: 0}
    length = 0
    for number, piece in enumerate(pieces, 1):
        length += len(piece)
        edges[length] = number
    for turn in answers(talk):
        start = len(as_read(base, kind, render(base, talk[:turn], prompt=True)).encode())
        end = start + len(as_read(base, kind, family.answer(talk[turn]["content"])).encode())
        if start not in edges or end not in edges or whole[: edges[start]] != served_ids(base, talk[:turn]):
            return True
    return False
