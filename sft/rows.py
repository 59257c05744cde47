"""Files of rows -> Arrow tables of examples. Pure functions of their input: the same here, in a task or in an actor.

A row keeps its place (source, file, position) from the moment it is read, and its fate is written beside it: either
ids and labels, or a reason. So nothing is dropped without being counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import ArrowException

from sft import storage
from sft.base import BaseTokenizer
from sft.errors import DataError
from sft.mask import Example, mask
from sft.messages import FormatName, Reason, RowError, to_messages
from sft.template import Rendered

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
READ_ROWS = 512

RAW = pa.schema(
    [
        ("source", pa.string()),
        ("file", pa.string()),
        ("position", pa.int64()),
        ("format", pa.string()),
        ("raw", pa.binary()),
    ]
)
"""A row as read: `raw` is its JSON text in bytes; `position` counts rows (lines of JSONL) from 1."""

PREPARED = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("file", pa.string()),
        ("position", pa.int64()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("reason", pa.string()),
        ("field", pa.string()),
        ("message", pa.string()),
    ]
)
"""A row's fate: kept rows have ids and labels and an empty `reason`; the others empty lists and a reason."""


@dataclass(frozen=True, slots=True)
class RowFile:
    """One file to read, by its storage address, and what it is called in row ids."""

    address: str
    name: str
    source: str
    format: FormatName


def list_files(path: str, source: str, format_name: FormatName) -> list[RowFile]:
    """Lists a source's files in a stable order.

    Raises:
        StorageError: nothing readable is there.
        DataError: a single named file is of an unknown kind.
    """
    scheme = path.split("://", 1)[0] + "://" if "://" in path else ""
    files = storage.find(path, SUFFIXES)
    for found, _ in files:
        if not found.endswith(SUFFIXES):
            raise DataError(f"{path}: unknown kind of file; allowed: {', '.join(SUFFIXES)}")
    return [RowFile(scheme + found, name, source, format_name) for found, name in files]


def read(file: RowFile, rows: int = READ_ROWS) -> Iterator[pa.Table]:
    """Streams a file as RAW tables of at most `rows` rows.

    Raises:
        DataError: the file cannot be read, with its name.
    """
    lines = _read_parquet(file) if file.address.endswith(".parquet") else _read_lines(file)
    chunk: list[tuple[int, bytes]] = []
    try:
        for line in lines:
            chunk.append(line)
            if len(chunk) == rows:
                yield _raw_table(file, chunk)
                chunk = []
    except (OSError, ArrowException, EOFError) as error:
        raise DataError(f"{file.address}: the file cannot be read ({error})") from None
    if chunk:
        yield _raw_table(file, chunk)


def prepare(table: pa.Table, base: BaseTokenizer, *, max_length: int, truncate: bool) -> pa.Table:
    """Converts, renders, masks and tokenises a RAW table into a PREPARED one, row for row."""
    columns = [table.column(name).to_pylist() for name in ("source", "file", "position", "format", "raw")]
    ids: list[str] = []
    fates: dict[int, Example | RowError] = {}
    rendered: dict[int, tuple[str, Rendered]] = {}
    for number, (source, file, position, format_name, raw) in enumerate(zip(*columns, strict=True)):
        row_id = f"{source}/{file}:{position}:{hashlib.sha256(raw).hexdigest()[:12]}"
        ids.append(row_id)
        try:
            rendered[number] = (row_id, base.template.spans(to_messages(_parse(raw), format_name)))
        except RowError as error:
            fates[number] = error
    masked = mask(base.tokenizer, list(rendered.values()), max_length=max_length, truncate=truncate)
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


def _read_lines(file: RowFile) -> Iterator[tuple[int, bytes]]:
    filesystem, path = storage.resolve(file.address)
    with filesystem.open_input_stream(path, compression="detect", buffer_size=1 << 20) as stream:
        rest = b""
        position = 0
        while chunk := stream.read(1 << 20):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                position += 1
                if line.strip():
                    yield position, line.rstrip(b"\r")
        if rest.strip():
            yield position + 1, rest


def _read_parquet(file: RowFile) -> Iterator[tuple[int, bytes]]:
    filesystem, path = storage.resolve(file.address)
    with filesystem.open_input_file(path) as stream:
        position = 0
        for batch in pq.ParquetFile(stream).iter_batches(batch_size=READ_ROWS):
            for row in batch.to_pylist():
                position += 1
                yield position, json.dumps(_without_nulls(row), ensure_ascii=False, default=str).encode()


def _without_nulls(value: Any) -> Any:
    """Drops the keys that Arrow adds as null to nested structs, which templates would take for present."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def _raw_table(file: RowFile, chunk: Sequence[tuple[int, bytes]]) -> pa.Table:
    count = len(chunk)
    return pa.table(
        [
            pa.array([file.source] * count, pa.string()),
            pa.array([file.name] * count, pa.string()),
            pa.array([position for position, _ in chunk], pa.int64()),
            pa.array([file.format] * count, pa.string()),
            pa.array([raw for _, raw in chunk], pa.binary()),
        ],
        schema=RAW,
    )


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
            pa.array([example.input_ids if example else [] for example in kept], pa.list_(pa.int32())),
            pa.array([example.labels if example else [] for example in kept], pa.list_(pa.int32())),
            pa.array([str(error.reason) if error else "" for error in lost], pa.string()),
            pa.array([error.field if error else "" for error in lost], pa.string()),
            pa.array([error.message if error else "" for error in lost], pa.string()),
        ],
        schema=PREPARED,
    )
