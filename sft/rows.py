"""Files of rows -> Arrow tables of examples. Pure functions of their input: the same here, in a task or in an actor.

A row keeps its place (source, file, position) from the moment it is read, and its fate is written beside it: either
ids and labels, or a reason. So nothing is dropped without being counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from sft.base import BaseTokenizer
from sft.formats import RowSpec, to_conversation
from sft.mask import Example, Masked, mask
from sft.messages import Reason, RowError
from sft.spans import Rendered

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
        ("weights", pa.list_(pa.float32())),
        ("reason", pa.string()),
        ("field", pa.string()),
        ("message", pa.string()),
    ]
)
"""A row's fate: kept rows have ids and labels and an empty `reason`; the others empty lists and a reason. `flags` name
what was noticed of a row that was kept, such as `truncated`. `weights` is null where all labels count the same."""


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
    """Converts, renders, masks and tokenises a RAW table into a PREPARED one.

    Every row gives one row, in order; a conversation that is split gives one for each trained turn.
    """
    source, file, position, raw = (table.column(name).to_pylist() for name in ("source", "file", "position", "raw"))
    fates: list[_Fate] = []
    for number, content in enumerate(raw):
        name = source[number]
        plan = sources[name]
        task, cluster = plan.task, plan.cluster
        place = f"{name}/{file[number]}:{position[number]}:{hashlib.blake2b(content, digest_size=6).hexdigest()}"
        try:
            conversation = to_conversation(_parse(content), plan.spec)
            task, cluster = conversation.task or task, conversation.cluster or cluster
            texts = base.template.examples(conversation, history=rules.history, reasoning=rules.reasoning)
            if b"\\u" in content:
                _check_unicode(texts)
        except RowError as error:
            fates.append(_Fate(number, place, task, cluster, None, error))
            continue
        for text in texts:
            part = place if text.turn is None else f"{place}#{text.turn}"
            fates.append(_Fate(number, part, task, cluster, text, None))
    masked = mask(
        base.encoder,
        [fate.rendered for fate in fates if fate.rendered is not None],
        max_length=rules.max_length,
        truncate=rules.truncate,
        prompt_weight=rules.prompt_weight,
        stop_ids=base.stop_ids,
    )
    return _prepared_table(table, fates, masked)


def examples(table: pa.Table) -> list[Example]:
    """Takes the kept rows of a PREPARED table as examples, in order."""
    kept = table.filter(pa.compute.equal(table.column("reason"), ""))
    made: list[Example] = []
    for batch in kept.select(["id", "input_ids", "labels", "weights"]).to_batches():
        ids = batch.column("id").to_pylist()
        inputs, labels, weights = (batch.column(name) for name in ("input_ids", "labels", "weights"))
        edges = inputs.offsets.to_numpy()
        flat = [column.values.to_numpy(zero_copy_only=False) for column in (inputs, labels)]
        if weights.null_count:
            made += [
                Example(name, flat[0][a:b], flat[1][a:b]) for name, a, b in zip(ids, edges[:-1], edges[1:], strict=True)
            ]
        else:
            weighed = weights.values.to_numpy()
            made += [
                Example(name, flat[0][a:b], flat[1][a:b], weighed[a:b])
                for name, a, b in zip(ids, edges[:-1], edges[1:], strict=True)
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


def _check_unicode(texts: Sequence[Rendered]) -> None:
    """JSON can spell half of a surrogate pair, which is no text."""
    try:
        for text in texts:
            text.text.encode()
    except UnicodeEncodeError:
        raise RowError(Reason.INVALID_ENCODING, "", "an escape such as \\ud83d without its other half") from None


class _Fate(NamedTuple):
    """What has become of a row so far: the row it came from, and a text or an error."""

    row: int
    id: str
    task: str
    cluster: str
    rendered: Rendered | None
    error: RowError | None


def _prepared_table(table: pa.Table, fates: Sequence[_Fate], masked: Masked) -> pa.Table:
    origin = table.select(["source", "file", "position"]).take([fate.row for fate in fates])
    rendered = np.fromiter((fate.rendered is not None for fate in fates), np.bool_, len(fates))
    errors = [fate.error for fate in fates]
    for place, error in zip(np.flatnonzero(rendered), masked.errors, strict=True):
        errors[place] = error
    lengths = np.zeros(len(fates), np.int64)
    lengths[rendered] = np.diff(masked.starts)
    truncated = np.zeros(len(fates), np.bool_)
    truncated[rendered] = masked.truncated
    starts = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    marks = pa.array(np.concatenate([[0], np.cumsum(truncated)]).astype(np.int32))
    columns = {
        "id": pa.array([fate.id for fate in fates], pa.string()),
        **{name: origin.column(name) for name in origin.column_names},
        "task": pa.array([fate.task for fate in fates], pa.string()),
        "cluster": pa.array([fate.cluster for fate in fates], pa.string()),
        "flags": pa.ListArray.from_arrays(marks, pa.array(["truncated"] * int(truncated.sum()), pa.string())),
        "input_ids": pa.ListArray.from_arrays(starts, masked.ids),
        "labels": pa.ListArray.from_arrays(starts, masked.labels),
        "weights": pa.nulls(len(fates), pa.list_(pa.float32()))
        if masked.weights is None
        else pa.ListArray.from_arrays(starts, masked.weights),
        "reason": pa.array([str(error.reason) if error else "" for error in errors], pa.string()),
        "field": pa.array([error.field if error else "" for error in errors], pa.string()),
        "message": pa.array([error.message if error else "" for error in errors], pa.string()),
    }
    return pa.table([columns[field.name] for field in PREPARED], schema=PREPARED)
