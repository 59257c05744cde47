"""Files of rows -> Arrow tables of raw rows, each with its place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import ArrowException

from sft import storage
from sft.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
READ_ROWS = 512

RAW = pa.schema(
    [
        ("source", pa.string()),
        ("file", pa.string()),
        ("position", pa.int64()),
        ("raw", pa.binary()),
    ]
)
"""A row as read: `raw` is its JSON text in bytes; `position` counts rows (lines of JSONL) from 1."""


@dataclass(frozen=True, slots=True)
class RowFile:
    """One file to read, by its storage address, and what it is called in row ids. `size` is in bytes, as stored."""

    address: str
    name: str
    source: str
    size: int


def list_files(path: str, source: str) -> list[RowFile]:
    """Lists a source's files in a stable order.

    Raises:
        StorageError: nothing readable is there.
        DataError: a single named file is of an unknown kind.
    """
    scheme = path.split("://", 1)[0] + "://" if "://" in path else ""
    files = storage.find(path, SUFFIXES)
    for found, *_ in files:
        if not found.endswith(SUFFIXES):
            raise DataError(f"{path}: unknown kind of file; allowed: {', '.join(SUFFIXES)}")
    return [RowFile(scheme + found, name, source, size) for found, name, size in files]


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
            pa.array([raw for _, raw in chunk], pa.binary()),
        ],
        schema=RAW,
    )
