"""Files of rows -> Arrow tables of examples. Pure functions of their input: the same here, in a task or in an actor.

A row keeps its place (source, file, position) from the moment it is read, and its fate is written beside it: either
ids and labels, or a reason. So nothing is dropped without being counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from sft.base import BaseTokenizer
from sft.census import Cell
from sft.duplicates import fingerprints
from sft.files import RAW
from sft.formats import RowSpec, to_conversation
from sft.holdout import HoldOut
from sft.hygiene import Found, HygieneRules, screen
from sft.mask import Example, Flags, Masked, mask
from sft.messages import Conversation, Reason, RowError
from sft.pairs import SIDES, join, on_side
from sft.set_aside import content_hash, is_set_aside
from sft.spans import Rendered
from sft.tokens import Places

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
        ("second", pa.int32()),
        ("reason", pa.string()),
        ("field", pa.string()),
        ("message", pa.string()),
    ]
)
"""A row's fate: kept rows have ids and labels and an empty `reason`; the others empty lists and a reason. `flags` name
what was noticed of a row that was kept, such as `truncated`. `weights` is null where all labels count the same, and
`second` where a row is no pair (`sft.mask.Example`)."""


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """What is known of all rows of one source. `task` and `cluster` hold where a row names none itself."""

    spec: RowSpec
    task: str
    cluster: str


@dataclass(frozen=True, slots=True)
class Rules:
    """How conversations become examples. With `pairs` all rows are pairs of answers, and without none is."""

    max_length: int
    truncate: bool
    history: Literal["refuse", "split"] = "refuse"
    reasoning: bool = True
    prompt_weight: float = 0.0
    pairs: bool = False


def prepare(
    table: pa.Table,
    base: BaseTokenizer,
    sources: Mapping[str, SourcePlan],
    rules: Rules,
    hold_out: HoldOut | None = None,
    hygiene: HygieneRules | None = None,
    found: Found | None = None,
    set_aside: float = 0.0,
) -> pa.Table:
    """Makes a PREPARED table of a RAW one: converts, leaves out, renders, masks and tokenises.

    Every row gives one row, in order; a conversation that is split gives one for each trained turn, a pair one.

    Args:
        table: RAW rows; further columns are handed on.
        base: tokenizer and template.
        sources: how the rows of each source are read.
        rules: how conversations become examples.
        hold_out: what is not trained.
        hygiene: what is looked for in single rows.
        found: what a comparison of all rows found.
        set_aside: share of the rows that is not trained but evaluated.
    """
    rows = _convert(table, sources)
    if not rules.pairs:
        rows = [_no_pair(row) for row in rows]
    if set_aside:
        rows = [_set_aside(row, set_aside) for row in rows]
    if hold_out:
        rows = [_held_out(row, hold_out) for row in rows]
    if found is not None and hygiene is not None:
        reasons = found.look_up([row.id for row in rows])
        rows = [_compared(row, why, hygiene) for row, why in zip(rows, reasons, strict=True)]
    if hygiene is not None and hygiene.screens:
        rows = _screened(rows, hygiene)
    fates: list[_Fate] = []
    for number, row in enumerate(rows):
        if row.conversation is None:
            fates.append(_Fate(number, row.id, row, (), row.error))
            continue
        try:
            if rules.pairs:
                fates.append(_Fate(number, row.id, row, _both(row.conversation, base, rules), None))
                continue
            texts = base.template.examples(row.conversation, history=rules.history, reasoning=rules.reasoning)
            if row.escaped:
                _check_unicode(texts)
        except RowError as error:
            fates.append(_Fate(number, row.id, row, (), error))
            continue
        fates += [
            _Fate(number, row.id if text.turn is None else f"{row.id}#{text.turn}", row, (text,), None)
            for text in texts
        ]
    masked = mask(
        base.encoder,
        [text for fate in fates for text in fate.texts],
        max_length=rules.max_length,
        truncate=rules.truncate,
        prompt_weight=rules.prompt_weight,
        stop_ids=base.stop_ids,
    )
    return _prepared_table(table, fates, *(join(masked) if rules.pairs else (masked, None)))


def _both(pair: Conversation, base: BaseTokenizer, rules: Rules) -> tuple[Rendered, ...]:
    """The two texts of a pair."""
    made: list[Rendered] = []
    for side, conversation in zip(SIDES, pair.sides, strict=True):
        try:
            texts = base.template.examples(conversation, history=rules.history, reasoning=rules.reasoning)
            _check_unicode(texts)
        except RowError as error:
            raise on_side(error, side) from None
        if len(texts) > 1:
            raise RowError(Reason.NOT_MASKABLE, side, "the template rewrites earlier turns of this answer")
        made += texts
    return tuple(made)


def records(
    table: pa.Table,
    sources: Mapping[str, SourcePlan],
    hold_out: HoldOut,
    hygiene: HygieneRules,
    set_aside: float = 0.0,
) -> pa.Table:
    """Makes the records by which rows are compared with each other (`sft.duplicates`), of the rows that can be read.

    Returns:
        One column, `record`, in the rows' order.
    """
    rows = _convert(table, sources)
    if hygiene.screens:
        rows = _screened(rows, hygiene)
    kept = [row for row in rows if row.conversation is not None]
    made = fingerprints(
        [row.id for row in kept],
        [row.conversation for row in kept if row.conversation is not None],
        [hold_out.holds(row.cell) or is_set_aside(row.id, set_aside) for row in kept],
        hygiene.near_threshold is not None,
    )
    return pa.table({"record": pa.array(made, pa.binary())})


class _Row(NamedTuple):
    """A row that was read: a conversation, or why not."""

    id: str
    cell: Cell
    conversation: Conversation | None
    error: RowError | None
    flags: tuple[str, ...] = ()
    escaped: bool = False


def _convert(table: pa.Table, sources: Mapping[str, SourcePlan]) -> list[_Row]:
    source, file, position, raw = (table.column(name).to_pylist() for name in ("source", "file", "position", "raw"))
    rows = []
    for number, content in enumerate(raw):
        name = source[number]
        plan = sources[name]
        place = f"{name}/{file[number]}:{position[number]}:{content_hash(content)}"
        try:
            conversation = to_conversation(parse(content), plan.spec)
        except RowError as error:
            rows.append(_Row(place, Cell(name, plan.task, plan.cluster), None, error))
            continue
        cell = Cell(name, conversation.task or plan.task, conversation.cluster or plan.cluster)
        rows.append(_Row(place, cell, conversation, None, (), b"\\u" in content))
    return rows


def _no_pair(row: _Row) -> _Row:
    if row.conversation is None or not row.conversation.rejected:
        return row
    error = RowError(Reason.UNKNOWN_FORMAT, "rejected", "a pair of answers is trained by train.stage dpo")
    return row._replace(conversation=None, error=error)


def _held_out(row: _Row, hold_out: HoldOut) -> _Row:
    if row.conversation is None or not hold_out.holds(row.cell):
        return row
    of = f"task {row.cell.task!r}" if row.cell.task in hold_out.tasks else f"cluster {row.cell.cluster!r}"
    return row._replace(conversation=None, error=RowError(Reason.HELD_OUT, "", f"{of} is held out (data.hold_out)"))


def _set_aside(row: _Row, share: float) -> _Row:
    if row.conversation is None or not is_set_aside(row.id, share):
        return row
    error = RowError(Reason.SET_ASIDE, "", "is evaluated and not trained (evaluate.share)")
    return row._replace(conversation=None, error=error)


def _compared(row: _Row, reasons: tuple[Reason, ...], hygiene: HygieneRules) -> _Row:
    if row.conversation is None or not reasons:
        return row
    reason = hygiene.dropped(reasons)
    if reason is not None:
        return row._replace(conversation=None, error=RowError(reason, "", _COMPARED[reason]))
    return row._replace(flags=hygiene.flags(reasons))


_COMPARED = {
    Reason.DUPLICATE: "an earlier row says the same",
    Reason.NEAR_DUPLICATE: "an earlier row says nearly the same",
    Reason.CONTRADICTION: "another row answers the same prompt otherwise",
}


def _screened(rows: Sequence[_Row], hygiene: HygieneRules) -> list[_Row]:
    passed = iter(screen([row.conversation for row in rows if row.conversation is not None], hygiene))
    made = []
    for row in rows:
        if row.conversation is None:
            made.append(row)
            continue
        fate = next(passed)
        if isinstance(fate, RowError):
            made.append(row._replace(conversation=None, error=fate))
        else:
            made.append(row._replace(conversation=fate.conversation, flags=(*row.flags, *fate.flags)))
    return made


def examples(table: pa.Table) -> list[Example]:
    """Takes the kept rows of a PREPARED table as examples, in order."""
    kept = table.filter(pa.compute.equal(table.column("reason"), ""))
    made: list[Example] = []
    for batch in kept.select(["id", "input_ids", "labels", "weights", "second"]).to_batches():
        ids = batch.column("id").to_pylist()
        inputs, labels, weights = (batch.column(name) for name in ("input_ids", "labels", "weights"))
        edges = inputs.offsets.to_numpy()
        flat = [column.values.to_numpy(zero_copy_only=False) for column in (inputs, labels)]
        second = batch.column("second")
        if not second.null_count:
            made += [
                Example(name, flat[0][a:b], flat[1][a:b], None, cut)
                for name, a, b, cut in zip(ids, edges[:-1], edges[1:], second.to_pylist(), strict=True)
            ]
        elif weights.null_count:
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


def parse(raw: bytes) -> object:
    """Parses a RAW row's JSON text.

    Raises:
        RowError: it is none.
    """
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass  # the standard library's reader is slower, takes a little more, and says where the fault lies
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
    """What has become of a row: the number of the row it came from, and its text, or two of a pair, or an error."""

    number: int
    id: str
    row: _Row
    texts: tuple[Rendered, ...]
    error: RowError | None


def _prepared_table(table: pa.Table, fates: Sequence[_Fate], masked: Masked, second: Places | None) -> pa.Table:
    origin = table.drop(["raw"]).take(pa.array([fate.number for fate in fates], pa.int64()))
    rendered = np.fromiter((bool(fate.texts) for fate in fates), np.bool_, len(fates))
    errors = [fate.error for fate in fates]
    for place, error in zip(np.flatnonzero(rendered), masked.errors, strict=True):
        errors[place] = error
    lengths = np.zeros(len(fates), np.int64)
    lengths[rendered] = np.diff(masked.starts)
    truncated = np.zeros(len(fates), np.bool_)
    truncated[rendered] = masked.truncated
    starts = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    columns = {
        **{name: origin.column(name) for name in origin.column_names},
        "id": pa.array([fate.id for fate in fates], pa.string()),
        "task": pa.array([fate.row.cell.task for fate in fates], pa.string()),
        "cluster": pa.array([fate.row.cell.cluster for fate in fates], pa.string()),
        "flags": _flags(fates, truncated, errors),
        "input_ids": pa.ListArray.from_arrays(starts, masked.ids),
        "labels": pa.ListArray.from_arrays(starts, masked.labels),
        "weights": pa.nulls(len(fates), pa.list_(pa.float32()))
        if masked.weights is None
        else pa.ListArray.from_arrays(starts, masked.weights),
        "second": _seconds(len(fates), rendered, second),
        "reason": pa.array([str(error.reason) if error else "" for error in errors], pa.string()),
        "field": pa.array([error.field if error else "" for error in errors], pa.string()),
        "message": pa.array([error.message if error else "" for error in errors], pa.string()),
    }
    further = [table.schema.field(name) for name in table.column_names if name not in RAW.names]
    schema = pa.schema([*PREPARED, *further])
    return pa.table([columns[field.name] for field in schema], schema=schema)


def _seconds(count: int, rendered: Flags, second: Places | None) -> pa.Array:
    if second is None:
        return pa.nulls(count, pa.int32())
    filled = np.zeros(count, np.int32)
    filled[rendered] = second
    return pa.array(filled, mask=~rendered)


def _flags(fates: Sequence[_Fate], truncated: Flags, errors: Sequence[RowError | None]) -> pa.Array:
    if not any(fate.row.flags for fate in fates):
        marks = pa.array(np.concatenate([[0], np.cumsum(truncated)]).astype(np.int32))
        return pa.ListArray.from_arrays(marks, pa.array(["truncated"] * int(truncated.sum()), pa.string()))
    return pa.array(
        [
            [] if error else [*fate.row.flags, *(["truncated"] if cut else [])]
            for fate, cut, error in zip(fates, truncated.tolist(), errors, strict=True)
        ],
        pa.list_(pa.string()),
    )
