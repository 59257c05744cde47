"""Files of rows -> Arrow tables of examples. Pure functions of their input: the same here, in a task or in an actor.

A row keeps its place (source, file, position) from the moment it is read, and its fate is written beside it: either
ids and labels, or a reason. So nothing is dropped without being counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from sft.base import BaseTokenizer
from sft.formats import RowSpec, to_conversation
from sft.mask import Example, mask
from sft.messages import Reason, RowError
from sft.template import Rendered

PREPARED = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("file", pa.string()),
        ("position", pa.int64()),
        ("task", pa.string()),
        ("cluster", pa.string()),
        ("flags", pa.list_(pa.string())),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("reason", pa.string()),
        ("field", pa.string()),
        ("message", pa.string()),
    ]
)
"""A row's fate: kept rows have ids and labels and an empty `reason`; the others empty lists and a reason. `flags` name
what was noticed of a row that was kept, such as `truncated`."""


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """What is known of all rows of one source. `task` and `cluster` hold where a row names none itself."""

    spec: RowSpec
    task: str
    cluster: str


@dataclass(frozen=True, slots=True)
class Rules:
    """How conversations become examples."""

    max_length: int
    truncate: bool
    history: Literal["refuse", "split"] = "refuse"
    reasoning: bool = True
    prompt_weight: float = 0.0


def prepare(table: pa.Table, base: BaseTokenizer, sources: Mapping[str, SourcePlan], rules: Rules) -> pa.Table:
    """Converts, renders, masks and tokenises a RAW table into a PREPARED one, row for row."""
    columns = [table.column(name).to_pylist() for name in ("source", "file", "position", "raw")]
    ids: list[str] = []
    fates: dict[int, Example | RowError] = {}
    rendered: dict[int, tuple[str, Rendered]] = {}
    for number, (source, file, position, raw) in enumerate(zip(*columns, strict=True)):
        row_id = f"{source}/{file}:{position}:{hashlib.sha256(raw).hexdigest()[:12]}"
        ids.append(row_id)
        try:
            conversation = to_conversation(_parse(raw), sources[source].spec)
            rendered[number] = (row_id, base.template.spans(conversation.messages))
        except RowError as error:
            fates[number] = error
    masked = mask(base.tokenizer, list(rendered.values()), max_length=rules.max_length, truncate=rules.truncate)
    fates |= zip(rendered, masked, strict=True)
    return _prepared_table(ids, columns, [fates[number] for number in range(len(ids))])


def examples(table: pa.Table) -> list[Example]:
    """Takes the kept rows of a PREPARED table as examples, in order."""
    kept = table.filter(pa.compute.equal(table.column("reason"), ""))
    made: list[Example] = []
    for batch in kept.select(["id", "input_ids", "labels"]).to_batches():
        ids, inputs, labels = batch.columns
        made += [
            Example(ids[i].as_py(), inputs[i].values.to_numpy(), labels[i].values.to_numpy())
            for i in range(batch.num_rows)
        ]
    return made


def _parse(raw: bytes) -> object:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(Reason.INVALID_ENCODING, "", f"not UTF-8 at byte {error.start}") from None
    except ValueError as error:
        place = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise RowError(Reason.INVALID_JSON, "", f"not valid JSON{place}") from None
    except RecursionError:
        raise RowError(Reason.INVALID_JSON, "", "nested too deeply") from None


def _prepared_table(
    ids: Sequence[str], columns: Sequence[Sequence[Any]], fates: Sequence[Example | RowError]
) -> pa.Table:
    kept = [fate if isinstance(fate, Example) else None for fate in fates]
    lost = [fate if isinstance(fate, RowError) else None for fate in fates]
    return pa.table(
        [
            pa.array(ids, pa.string()),
            pa.array(columns[0], pa.string()),
            pa.array(columns[1], pa.string()),
            pa.array(columns[2], pa.int64()),
            pa.array([""] * len(ids), pa.string()),
            pa.array([""] * len(ids), pa.string()),
            pa.array([[]] * len(ids), pa.list_(pa.string())),
            pa.array([example.input_ids if example else [] for example in kept], pa.list_(pa.int32())),
            pa.array([example.labels if example else [] for example in kept], pa.list_(pa.int32())),
            pa.array([str(error.reason) if error else "" for error in lost], pa.string()),
            pa.array([error.field if error else "" for error in lost], pa.string()),
            pa.array([error.message if error else "" for error in lost], pa.string()),
        ],
        schema=PREPARED,
    )
