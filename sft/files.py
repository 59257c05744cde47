"""Files of rows -> Arrow tables of raw rows, each with its place."""

from __future__ import annotations

import itertools
import json
import lzma
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft import storage
from sft.documents import document_rows
from sft.errors import DataError, StorageError
from sft.tables import LINE_LIMIT, csv_rows, parquet_rows

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4", ".xz": "xz"}
READ_ROWS = 512
DOCUMENT_LIMIT = 256 << 20
"""Largest .json document, in bytes: it is held in memory as text, where all other kinds are streamed."""

_CHUNK = 1 << 20
_BLOCK = 4 << 20
_ALLOWED = f"{', '.join(KINDS)}; all but Parquet also with {', '.join(COMPRESSIONS)}"
_UTF8_MARK = b"\xef\xbb\xbf"
_ARRAY = re.compile(rb"\s*\[\s*(?:\{|\Z)")
_MAGIC = {
    b"\xff\xfe": "UTF-16 text; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16 text; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\x1f\x8b": "a gzip file; let its name end in .gz",
    b"BZh": "a bzip2 file; let its name end in .bz2",
    b"\x28\xb5\x2f\xfd": "a zstandard file; let its name end in .zst",
    b"\x04\x22\x4d\x18": "an lz4 file; let its name end in .lz4",
    b"\xfd7zXZ\x00": "an xz file; let its name end in .xz",
    b"PAR1": "a Parquet file; let its name end in .parquet",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save it as CSV",
}
"""What a text file cannot begin with, and what it is then."""

RAW = pa.schema(
    [
        ("source", pa.string()),
        ("file", pa.string()),
        ("position", pa.int64()),
        ("raw", pa.binary()),
    ]
)
"""A row as read: `raw` is its JSON text in bytes; `position` counts rows from 1 (in JSONL lines, blank ones too)."""

Rows = tuple[pa.Array, pa.Array]
"""Positions and raw texts of some rows of a file."""


@dataclass(frozen=True, slots=True)
class RowFile:
    """One file to read, by its storage address, and what it is called in row ids. `size` is in bytes, as stored.

    Rule: a file that the user named must hold a row; one of many in a folder (`named` is false) may hold none.
    """

    address: str
    name: str
    source: str
    size: int
    named: bool = False


def list_files(path: str, source: str) -> list[RowFile]:
    """Lists a source's files in a stable order.

    Raises:
        StorageError: nothing readable is there.
        DataError: a single named file is of an unknown kind.
    """
    found = storage.find(path)
    files = [RowFile(file.address, file.name, source, file.size, file.named) for file in found if _kind(file.name)]
    if files:
        return files
    if found[0].named:
        raise DataError(f"{path}: unknown kind of file; allowed: {_ALLOWED}")
    raise StorageError(f"{path}: holds no file of rows; allowed: {_ALLOWED}")


def read(file: RowFile, rows: int = READ_ROWS) -> Iterator[pa.Table]:
    """Streams a file as RAW tables of at most `rows` rows.

    Raises:
        DataError: the file cannot be read, with its name and what to do.
    """
    empty = True
    unreadable: tuple[type[Exception], ...] = (
        *storage.faults(file.address),
        EOFError,
        lzma.LZMAError,
        UnicodeDecodeError,
    )
    try:
        for positions, raw in _read(file, rows):
            empty = False
            place = [pa.repeat(pa.scalar(text, pa.string()), len(raw)) for text in (file.source, file.name)]
            yield pa.table([*place, positions, raw], schema=RAW)
    except DataError as error:
        raise DataError(f"{file.address}: {error}") from None
    except unreadable as error:
        cause = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(
            f"{file.address}: the file cannot be read, it may be damaged or cut short ({cause}); copy it again"
        ) from None
    if empty and file.named:
        raise DataError(f"{file.address}: the file holds no row; take it out of the sources, or see how it was written")


def _kind(name: str) -> tuple[str, str] | None:
    """The kind of a file and its compression ("" for none) by its name; None where it is no file of rows."""
    stem = name.lower()
    ending = next((ending for ending in COMPRESSIONS if stem.endswith(ending)), "")
    kind = next((kind for kind in KINDS if stem.removesuffix(ending).endswith(kind)), None)
    return None if kind is None or (kind == ".parquet" and ending) else (kind, COMPRESSIONS.get(ending, ""))


def _read(file: RowFile, rows: int) -> Iterator[Rows]:
    kind, compression = _kind(file.name) or ("", "")
    if kind == ".parquet":
        filesystem, path = storage.resolve(file.address)
        with filesystem.open_input_file(path) as stored:
            yield from _gathered(parquet_rows(stored), rows)
        return
    chunks = _chunks(file.address, compression)
    head = next(chunks, b"")
    chunks = itertools.chain([head], chunks)
    if kind == ".json":
        if _begins_with_line(head):
            yield from _lines(chunks, rows)
        else:
            yield from _gathered(_document(chunks, file.name), rows)
    elif kind == ".jsonl":
        if _ARRAY.match(head):
            raise DataError("begins with [ and so is one JSON array, not JSON Lines; let its name end in .json")
        yield from _lines(chunks, rows)
    else:
        yield from _gathered(csv_rows(chunks, "," if kind == ".csv" else "\t"), rows)


def _chunks(address: str, compression: str) -> Iterator[bytes]:
    """A text file's bytes, unpacked and without a byte order mark."""
    filesystem, path = storage.resolve(address)
    codec = None if compression in ("", "xz") else compression
    with (
        filesystem.open_input_stream(path, compression=codec, buffer_size=_CHUNK) as stored,
        lzma.open(stored) if compression == "xz" else nullcontext(stored) as stream,
    ):
        head = stream.read(_CHUNK)
        wrong = next((what for magic, what in _MAGIC.items() if head.startswith(magic)), None)
        if wrong is not None:
            raise DataError(f"this is {wrong}")
        yield head.removeprefix(_UTF8_MARK)
        while chunk := stream.read(_CHUNK):
            yield chunk


def _lines(chunks: Iterable[bytes], rows: int) -> Iterator[Rows]:
    """JSON Lines, cut by Arrow and not by Python. A position is the line's number; blank lines are no rows."""
    position, rest = 1, b""
    for chunk in chunks:
        text = rest + chunk
        end = text.rfind(b"\n") + 1
        rest = text[end:]
        if end:
            yield from _cut(text[:end], position, rows)
            position += text.count(b"\n")
        elif len(rest) > LINE_LIMIT:
            raise DataError(f"line {position} is longer than {LINE_LIMIT >> 20} MiB, so this is no file of JSON Lines")
    if rest:
        yield from _cut(rest, position, rows)


def _cut(text: bytes, position: int, rows: int) -> Iterator[Rows]:
    lines = pc.split_pattern(pa.array([text], pa.binary()), b"\n").values
    # A view only changes the name of the type: bytes that are not UTF-8 pass, and cost their own row later.
    raw = pc.ascii_trim_whitespace(lines.view(pa.string())).view(pa.binary())
    positions = pa.array(np.arange(position, position + len(raw)))
    filled = pc.greater(pc.binary_length(raw), 0)
    positions, raw = positions.filter(filled), raw.filter(filled)
    if len(raw):
        step = math.ceil(len(raw) / math.ceil(len(raw) / rows))
        for start in range(0, len(raw), step):
            yield positions.slice(start, step), raw.slice(start, step)


def _gathered(raws: Iterable[bytes], rows: int) -> Iterator[Rows]:
    """Numbers rows from 1, and gathers them into arrays of bounded length and size."""
    position, held, size = 1, list[bytes](), 0
    for raw in raws:
        held.append(raw)
        size += len(raw)
        if len(held) == rows or size >= _BLOCK:
            yield pa.array(range(position, position + len(held)), pa.int64()), pa.array(held, pa.binary())
            position, held, size = position + len(held), [], 0
    if held:
        yield pa.array(range(position, position + len(held)), pa.int64()), pa.array(held, pa.binary())


def _begins_with_line(head: bytes) -> bool:
    """Whether a .json file holds JSON Lines: its first line is a whole object, and more follows."""
    line, _, more = head.lstrip().partition(b"\n")
    if not line.startswith(b"{") or not more.strip():
        return False
    try:
        return isinstance(json.loads(line.decode("utf-8", "surrogateescape")), dict)
    except (ValueError, RecursionError):
        return False


def _document(chunks: Iterable[bytes], name: str) -> Iterator[bytes]:
    content = bytearray()
    for chunk in chunks:
        content += chunk
        if len(content) > DOCUMENT_LIMIT:
            raise DataError(
                f"a JSON document is read whole and may hold {DOCUMENT_LIMIT >> 20} MiB; "
                "convert it to JSON Lines (jq -c '.[]' FILE.json > FILE.jsonl), which have no limit"
            )
    task = name.rpartition("/")[2].partition(".")[0]
    for row in document_rows(content.decode("utf-8", "surrogateescape"), task):
        yield row.encode("utf-8", "surrogateescape")
