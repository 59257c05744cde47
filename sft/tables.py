"""CSV, TSV and Parquet -> the JSON text of each row, made from its columns; what is null is left out."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from sft.errors import DataError

LINE_LIMIT = 64 << 20
"""Longest line or value of a text file, in bytes or characters; what is longer is no file of rows."""

_PARQUET_BUFFER = 4 << 20
_PARQUET_ROWS = 4096
"""What is decoded at once: so many rows, or fewer where they would not fit the buffer."""
_encode = msgspec.json.Encoder().encode


def csv_rows(chunks: Iterable[bytes], delimiter: str) -> Iterator[bytes]:
    """Yields the rows below a header.

    Args:
        chunks: the file's bytes.
        delimiter: what stands between two values.

    Raises:
        DataError: it is no table with one name for each column, with the line, without the file's name.
    """
    csv.field_size_limit(LINE_LIMIT)  # the limit belongs to the process; its default is less than one long document
    reader = csv.reader(_lines(chunks), delimiter=delimiter, strict=True)
    header: list[str] = []
    number = 0
    try:
        for values in reader:
            if not values:
                continue
            if not header:
                header = values
                _check_names(header)
                continue
            number += 1
            if len(values) != len(header):
                raise DataError(
                    f"row {number}, which ends in line {reader.line_num}, has {len(values)} values and the header has "
                    f"{len(header)}; put quotes around values that hold line breaks or the delimiter"
                )
            yield _to_json(dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise DataError(
            f"not valid CSV in the row that ends in line {reader.line_num} ({error}); double the quotes within values"
        ) from None


def parquet_rows(stream: Any) -> Iterator[bytes]:
    """Yields the rows of a Parquet file. Columns of bytes, such as images, have no JSON form and are not read.

    Args:
        stream: the open file.

    Raises:
        DataError: a column cannot be written as JSON, without the file's name.
    """
    file = pq.ParquetFile(stream, buffer_size=_PARQUET_BUFFER)
    schema = file.schema_arrow
    _check_names(schema.names)
    names = [column.name for column in schema if not _holds_bytes(column.type)]
    if not names:
        raise DataError("none of its columns can be written as JSON")
    size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
    fitting = _PARQUET_BUFFER * file.metadata.num_rows // max(1, size)
    for batch in file.iter_batches(batch_size=max(1, min(_PARQUET_ROWS, fitting)), columns=names):
        try:
            columns = [_values(batch.column(name)) for name in names]
            for values in zip(*columns, strict=True):
                yield _to_json({name: value for name, value in zip(names, values, strict=True) if value is not None})
        except (TypeError, ValueError, OverflowError):
            raise DataError(
                "a value has no JSON form (text that is not UTF-8, or a time out of range); convert its column"
            ) from None


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Lines with their ends. Bytes that are not UTF-8 stay as they are, and cost only their own row."""
    rest = ""
    for text in codecs.iterdecode(chunks, "utf-8", "surrogateescape"):
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            yield line + "\n"
        if len(rest) > LINE_LIMIT:
            raise DataError(f"a line is longer than {LINE_LIMIT >> 20} MiB; is this a table in text?")
    if rest:
        yield rest


def _check_names(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"more than one column is called {', '.join(map(repr, twice[:8]))}; give each its own name")
    try:
        "".join(names).encode()
    except UnicodeEncodeError:
        raise DataError("the header is not UTF-8; convert the file (iconv -t UTF-8)") from None


def _to_json(row: dict[str, Any]) -> bytes:
    try:
        return _encode(row)
    except UnicodeEncodeError:
        return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogateescape")


def _holds_bytes(kind: pa.DataType) -> bool:
    types = pa.types
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return True
    return types.is_fixed_size_binary(kind) or any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))


def _values(column: pa.Array) -> list[Any]:
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type) or pa.types.is_time(column.type):
        column = column.cast(pa.string())
    values: list[Any] = column.to_pylist()
    return [_without_nulls(value) for value in values] if _holds_nulls(column) else values


def _holds_nulls(column: pa.Array) -> bool:
    """Whether a struct anywhere inside has a field that is null."""
    if pa.types.is_struct(column.type):
        fields = [column.field(i) for i in range(column.type.num_fields)]
        return any(field.null_count > 0 or _holds_nulls(field) for field in fields)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
        return _holds_nulls(column.values)
    return False


def _without_nulls(value: Any) -> Any:
    """Drops the keys that Arrow adds as null to nested structs, which templates would take for present."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value
