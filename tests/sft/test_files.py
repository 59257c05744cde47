from __future__ import annotations

import bz2
import csv
import datetime
import gzip
import io
import json
import lzma
import math
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.dirfs import DirFileSystem  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from huggingface_hub import HfFileSystem
from hypothesis import given
from hypothesis import strategies as st

from sft import files, storage
from sft.errors import DataError, StorageError
from sft.files import RAW, RowFile, list_files, read

ROWS = [{"instruction": f'Say "{i}",\nplease', "output": f"ä{i}\tb"} for i in range(7)]
SNI = {
    "Contributors": ["x"],
    "Definition": ["Greet."],
    "Categories": ["Dialogue"],
    "Positive Examples": [{"input": "a", "output": "b"}],
    "Instances": [{"id": "t-1", "input": "Hi", "output": ["Hello", "Hey"]}, 7, {}],
}


def arrow_packed(codec: str, content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(content)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: arrow_packed("zstd", content),
    ".lz4": lambda content: arrow_packed("lz4", content),
}


def as_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_table(rows: list[dict[str, str]], delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]], schema: pa.Schema | None = None, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), sink, **options)
    return sink.getvalue()


WRITTEN = {
    ".jsonl": as_lines(ROWS),
    ".json": json.dumps(ROWS, indent=1).encode(),
    ".csv": as_table(ROWS, ","),
    ".tsv": as_table(ROWS, "\t"),
}


def tables(path: Path | str, rows: int = 3) -> Iterator[pa.Table]:
    for file in list_files(str(path), "s"):
        yield from read(file, rows)


def raw(path: Path | str) -> list[tuple[int, bytes]]:
    return [(row["position"], row["raw"]) for table in tables(path) for row in table.to_pylist()]


def parsed(path: Path | str) -> list[Any]:
    return [json.loads(content) for _, content in raw(path)]


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_every_kind_gives_the_same_rows(tmp_path: Path, kind: str, packing: str, mark: bytes) -> None:
    path = put(tmp_path / f"x{kind}{packing}", PACKED[packing](mark + WRITTEN[kind]))
    assert [(position, json.loads(content)) for position, content in raw(path)] == list(enumerate(ROWS, 1))
    assert raw(f"file://{path}") == raw(path)


def test_a_name_may_be_in_capitals(tmp_path: Path) -> None:
    assert parsed(put(tmp_path / "X.JSONL.GZ", gzip.compress(as_lines(ROWS), mtime=0))) == ROWS


def test_tables_are_small_and_say_where_rows_come_from(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", as_lines(ROWS))
    got = list(tables(path))
    assert {table.schema for table in got} == {RAW}
    assert [table.num_rows for table in got] == [3, 3, 1]
    assert got[2].to_pylist() == [
        {"source": "s", "file": "a.jsonl", "position": 7, "raw": json.dumps(ROWS[6]).encode()}
    ]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
def test_large_rows_make_small_tables(tmp_path: Path, kind: str) -> None:
    rows = [{"output": f"{i % 10}" * 300_000} for i in range(20)]
    written = {
        ".jsonl": as_lines(rows),
        ".json": json.dumps(rows).encode(),
        ".csv": as_table(rows, ","),
        ".parquet": as_parquet(rows, use_dictionary=False, compression="none"),
    }
    path = put(tmp_path / f"a{kind}", written[kind])
    assert parsed(path) == rows
    assert max(table.nbytes for table in tables(path, 512)) < 5 << 20


# JSON Lines


def test_positions_are_lines(tmp_path: Path) -> None:
    content = b'\n{"a": 1}\r\n  \r\n\xff\xfe\n\t{"b":\t2} \n[1, "\x0b"]\n\n{"c": 3}'
    assert raw(put(tmp_path / "a.jsonl", content)) == [
        (2, b'{"a": 1}'),
        (4, b"\xff\xfe"),
        (5, b'{"b":\t2}'),
        (6, b'[1, "\x0b"]'),
        (8, b'{"c": 3}'),
    ]


@given(st.lists(st.binary(max_size=30), max_size=30), st.integers(1, 7), st.integers(1, 40))
def test_lines_do_not_depend_on_how_the_file_is_cut(lines: list[bytes], rows: int, chunk: int) -> None:
    content = b"\n".join(line.replace(b"\n", b"") for line in lines)
    chunks = [content[i : i + chunk] for i in range(0, len(content), chunk)]
    got = [
        (position, text)
        for positions, texts in files._lines(chunks, rows)
        for position, text in zip(positions.to_pylist(), texts.to_pylist(), strict=True)
    ]
    assert got == [(i, line.strip()) for i, line in enumerate(content.split(b"\n"), 1) if line.strip()]


def test_a_line_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft.files.LINE_LIMIT", 2 << 20)
    path = put(tmp_path / "a.jsonl", b"{}\n" + b"x" * (4 << 20))
    with pytest.raises(DataError, match=r"a\.jsonl: line 2 is longer than 2 MiB"):
        raw(path)


# JSON documents


@pytest.mark.parametrize(
    ("document", "rows"),
    [
        (b'[{"a": 1} , {"a":\n2},3, "x"]\n', [b'{"a": 1}', b'{"a":\n2}', b"3", b'"x"']),
        (b'{"version": [1, []], "data": [{"a": 1}, null]}', [b'{"a": 1}', b"null"]),
        (b' {"instances":[{"a": "]}"}],"x":{"data":[2]}}', [b'{"a": "]}"}']),
        (b'{"a": 1, "data": "x"} ', [b'{"a": 1, "data": "x"}']),
        (b'[{"a": "\xff"}, {"a": "\x01"}]', [b'{"a": "\xff"}', b'{"a": "\x01"}']),
        (b"[%s, {}]" % (b"9" * 5000), [b"9" * 5000, b"{}"]),
        (b'{"a": 1}\n{"a": 2}\n', [b'{"a": 1}', b'{"a": 2}']),
        (b'{"a": 1}\n\n{"a":', [b'{"a": 1}', b'{"a":']),
        (b'{"a":\n1}', [b'{"a":\n1}']),
    ],
)
def test_documents(tmp_path: Path, document: bytes, rows: list[bytes]) -> None:
    assert [content for _, content in raw(put(tmp_path / "a.json", document))] == rows


def test_a_super_natural_instructions_task(tmp_path: Path) -> None:
    assert parsed(put(tmp_path / "task001_x.json", json.dumps(SNI).encode())) == [
        {
            "task": "task001_x",
            "Definition": ["Greet."],
            "Categories": ["Dialogue"],
            "id": "t-1",
            "input": "Hi",
            "output": ["Hello", "Hey"],
        },
        7,
        {},
    ]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b'[{"a": 1},]', "line 1, column 11"),
        (b'[{"a": 1} {"a": 2}]', "line 1, column 11: , is expected"),
        (b'[{"a": 1}', "line 1, column 10"),
        (b'[{"a":\n 1}] x', "line 2, column 6: text follows the end"),
        (b'{"a" 1}', "column 6: : is expected"),
        (b"{1: 2}", "a field's name is expected"),
        (b'{"data": [1}', "column 12"),
        (b"hello", "column 1"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_documents(tmp_path: Path, document: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        raw(put(tmp_path / "a.json", document))
    assert str(caught.value).startswith(f"{tmp_path}/a.json: not ")


def test_a_document_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "DOCUMENT_LIMIT", 2 << 20)
    path = put(tmp_path / "a.json", json.dumps([{"a": "x" * 1000}] * 3000).encode())
    with pytest.raises(DataError, match=r"may hold 2 MiB; convert it to JSON Lines"):
        raw(path)


# CSV


def test_csv_values_are_text(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", b',a,b\r\n0,"x ""y"",\r\nz",\r\n\r\n1,2,\xff\r\n')
    assert raw(path) == [(1, b'{"":"0","a":"x \\"y\\",\\r\\nz","b":""}'), (2, b'{"":"1","a":"2","b":"\xff"}')]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n1\n", r"row 2, which ends in line 3, has 1 values and the header has 2; put quotes"),
        (b"a,b\n1,2,3\n", "row 1, which ends in line 2, has 3 values"),
        (b"a,b,a\n1,2,3\n", "more than one column is called 'a'"),
        (b"a,b\n1,\"2\n3,4\n", "not valid CSV in the row that ends in line 3"),
        (b'a,b\n1,"2"3\n', "not valid CSV in the row that ends in line 2"),
        (b"\xe4,b\n1,2\n", "the header is not UTF-8"),
    ],
)  # fmt: skip
def test_broken_tables(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.csv: {message}"):
        raw(put(tmp_path / "a.csv", content))


# Parquet


def test_parquet_nulls_are_no_fields(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"a": None, "b": [{"x": 1, "y": {"z": None}}, None], "c": "ä"},
        {"a": 1.5, "b": [{"x": None, "y": None}, {"x": 2, "y": {"z": "q"}}], "c": None},
    ]
    assert raw(put(tmp_path / "a.parquet", as_parquet(rows, row_group_size=1))) == [
        (1, '{"b":[{"x":1,"y":{}},null],"c":"ä"}'.encode()),
        (2, b'{"a":1.5,"b":[{},{"x":2,"y":{"z":"q"}}]}'),
    ]


def test_parquet_columns_that_are_no_json(tmp_path: Path) -> None:
    row = {
        "image": {"bytes": b"\x00"},
        "when": datetime.datetime(2024, 1, 2, 3, 4, 5),
        "day": datetime.date(2024, 1, 2),
        "score": math.nan,
        "output": "x",
    }
    got = parsed(put(tmp_path / "a.parquet", as_parquet([row])))
    assert got == [{"when": "2024-01-02 03:04:05.000000", "day": "2024-01-02", "score": None, "output": "x"}]
    with pytest.raises(DataError, match="none of its columns"):
        raw(put(tmp_path / "a.parquet", as_parquet([{"image": b"\x00"}])))


# Where files are


def test_folders_and_globs(tmp_path: Path) -> None:
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / ".cache").mkdir()
    for name in ("b.jsonl", "sub/a b#%.jsonl", "sub/deep/c.csv", ".cache/d.jsonl", "_e.json", "f.parquet.gz"):
        put(tmp_path / name, as_table(ROWS, ",") if name.endswith(".csv") else as_lines(ROWS))
    put(tmp_path / "notes.txt", b"no rows")

    def names(path: str) -> list[str]:
        assert parsed(path) == ROWS * len(list_files(path, "s"))
        return [file.name for file in list_files(path, "s")]

    for root in (str(tmp_path), f"file://{tmp_path}"):
        assert names(root) == ["b.jsonl", "sub/a b#%.jsonl", "sub/deep/c.csv"]
        assert names(f"{root}/*.jsonl") == ["b.jsonl"]
        assert names(f"{root}/*/*.jsonl") == ["sub/a b#%.jsonl"]
        assert names(f"{root}/**/*.[!p]s*") == ["b.jsonl", "sub/a b#%.jsonl", "sub/deep/c.csv"]
        assert names(f"{root}/sub/**") == ["a b#%.jsonl", "deep/c.csv"]
    (file,) = list_files(str(tmp_path / "b.jsonl"), "s")
    assert file == RowFile(str(tmp_path / "b.jsonl"), "b.jsonl", "s", len(as_lines(ROWS)), named=True)


def test_what_is_missing_or_unknown_is_said(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nothing\.jsonl: there is no such file"):
        list_files(str(tmp_path / "nothing.jsonl"), "s")
    with pytest.raises(StorageError, match="no file is there"):
        list_files(str(tmp_path), "s")
    put(tmp_path / "a.xlsx", b"PK")
    with pytest.raises(DataError, match=r"unknown kind of file; allowed: \.jsonl, \.json, \.csv"):
        list_files(str(tmp_path / "a.xlsx"), "s")
    with pytest.raises(StorageError, match=r"holds no file of rows; allowed: \.jsonl"):
        list_files(str(tmp_path), "s")
    with pytest.raises(StorageError, match="ftp"):
        list_files("ftp://host/a.jsonl", "s")


# Bad files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(as_lines(ROWS), mtime=0)[:-12], "damaged or cut short"),
        ("a.jsonl.bz2", bz2.compress(as_lines(ROWS))[:-12], "damaged or cut short"),
        ("a.jsonl.xz", lzma.compress(as_lines(ROWS))[:-12], "damaged or cut short"),
        ("a.jsonl.xz", b"junk", "damaged or cut short"),
        ("a.jsonl.zst", arrow_packed("zstd", as_lines(ROWS))[:-12], "damaged or cut short"),
        ("a.csv.lz4", arrow_packed("lz4", as_lines(ROWS))[:-12], "damaged or cut short"),
        ("a.jsonl.gz", as_lines(ROWS), "damaged or cut short"),
        ("a.parquet", b"PAR1junk", "damaged or cut short"),
        ("a.parquet", as_parquet(ROWS)[:-12], "damaged or cut short"),
        ("a.parquet", b"", "damaged or cut short"),
        ("a.jsonl", gzip.compress(as_lines(ROWS), mtime=0), "a gzip file; let its name end in .gz"),
        ("a.csv", as_parquet(ROWS), "a Parquet file"),
        ("a.csv", b"PK\x03\x04", "a zip archive or a spreadsheet"),
        ("a.jsonl", json.dumps(ROWS[0]).encode("utf-16"), "UTF-16 text; convert it to UTF-8"),
        ("a.json", "\ufeff[]".encode("utf-16-be"), "UTF-16 text"),
        ("a.jsonl", json.dumps(ROWS, indent=1).encode(), "one JSON array, not JSON Lines; let its name end in .json"),
    ],
)
def test_a_bad_file_is_named_with_what_to_do(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = put(tmp_path / name, content)
    for where in (path, tmp_path):
        with pytest.raises(DataError) as caught:
            raw(where)
        assert str(caught.value).startswith(f"{path}: ")
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b"\xef\xbb\xbf"),
        ("a.jsonl.gz", gzip.compress(b"\n \n", mtime=0)),
        ("a.json", b""),
        ("a.json", b" []"),
        ("a.json", b'{"data": []}'),
        ("a.csv", b""),
        ("a.csv", b"a,b\n"),
        ("a.parquet", as_parquet([], schema=pa.schema([("a", pa.string())]))),
    ],
)
def test_a_file_without_rows_is_refused_when_named(tmp_path: Path, name: str, content: bytes) -> None:
    path = put(tmp_path / name, content)
    put(tmp_path / "b.jsonl", as_lines(ROWS))
    with pytest.raises(DataError, match=rf"{name}: the file holds no row"):
        raw(path)
    assert parsed(tmp_path) == ROWS


def test_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", as_lines(ROWS))
    (file,) = list_files(str(path), "s")
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl: the file cannot be read"):
        list(read(file))


def test_content_is_not_in_a_message(tmp_path: Path) -> None:
    secret = "0049-40-123456"
    for name, text in (
        ("a.json", f'["{secret}" "{secret}"]'),
        ("a.csv", f"a,b\n{secret}\n"),
        ("b.csv", f'a,b\n1,"{secret}" {secret}\n'),
    ):
        with pytest.raises(DataError) as caught:
            raw(put(tmp_path / name, text.encode()))
        assert secret not in str(caught.value)


marks = st.sampled_from([b"\n", b"\r", b'"', b",", b"[", b"]", b"{", b"}", b":", b"{}", b'{"data":[', b"\xef\xbb\xbf"])
contents = st.lists(marks | st.binary(max_size=8), max_size=12).map(b"".join)
written = st.sampled_from([*WRITTEN.values(), as_parquet(ROWS)])


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A good file with a piece taken out or put in."""
    content = draw(written)
    begin = draw(st.integers(0, len(content)))
    end = draw(st.integers(begin, len(content)))
    return content[:begin] + draw(contents) + content[end:]


@given(contents | damaged(), st.sampled_from([*WRITTEN, ".parquet"]), st.sampled_from([*PACKED]), st.booleans())
def test_any_bytes_are_rows_or_an_error_that_names_the_file(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, kind: str, packing: str, packed: bool
) -> None:
    packing = "" if kind == ".parquet" else packing
    path = tmp_path_factory.getbasetemp() / f"any{kind}{packing}"
    path.write_bytes(PACKED[packing](content) if packed else content)
    try:
        rows = raw(path)
    except DataError as error:
        rows, message = [], str(error)
        assert str(path) in message
    positions = [position for position, _ in rows]
    assert positions == sorted(set(positions))
    assert all(content for _, content in rows)


# Size


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.xz", ".csv", ".parquet"])
def test_memory_is_bounded(tmp_path: Path, kind: str) -> None:
    rows = [{"output": f"{i:06}" * 150} for i in range(32_000)]
    lines = as_lines(rows)
    contents = {
        ".jsonl": lambda: lines,
        ".jsonl.xz": lambda: lzma.compress(lines, preset=0),
        ".csv": lambda: as_table(rows, ","),
        ".parquet": lambda: as_parquet(rows),
    }
    path = put(tmp_path / f"a{kind}", contents[kind]())
    count, held, before = 0, 0, pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        for table in tables(path, 512):
            count += table.num_rows
            held = max(held, pa.total_allocated_bytes() - before)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == len(rows)
    assert peak + held < 20 << 20 < len(lines)


# The hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the hub's place, behind the same fsspec seam; returns the folder of one data set."""
    stored = DirFileSystem(str(tmp_path), LocalFileSystem())
    monkeypatch.setattr(storage, "hub", lambda: stored)
    folder = tmp_path / "datasets" / "owner" / "name@v1"
    folder.mkdir(parents=True)
    return folder


def test_the_hub(hub: Path) -> None:
    (hub / "data").mkdir()
    for name, kind in (("data/a", ".jsonl"), ("data/b", ".csv"), ("c", ".json")):
        put(hub / f"{name}{kind}", WRITTEN[kind])
    put(hub / "data/d.parquet", as_parquet(ROWS))
    put(hub / "data/e.jsonl.gz", gzip.compress(as_lines(ROWS), mtime=0))
    put(hub / "README.md", b"# Rows")
    address = "hf://datasets/owner/name@v1"
    every = ["c.json", "data/a.jsonl", "data/b.csv", "data/d.parquet", "data/e.jsonl.gz"]
    for asked, names in (
        (address, every),
        (f"{address}/data", ["a.jsonl", "b.csv", "d.parquet", "e.jsonl.gz"]),
        (f"{address}/data/*.p*", ["d.parquet"]),
        (f"{address}/**/*.jsonl*", ["data/a.jsonl", "data/e.jsonl.gz"]),
        (f"{address}/data/b.csv", ["b.csv"]),
    ):
        listed = list_files(asked, "s")
        assert [file.name for file in listed] == names
        assert parsed(asked) == ROWS * len(names)
        assert all(file.address.startswith(f"{address}/") and file.size > 0 for file in listed)


@pytest.mark.usefixtures("hub")
def test_what_the_hub_does_not_have_is_said() -> None:
    with pytest.raises(StorageError, match=r"owner/other: there is no such file or folder; check the name .* HF_TOKEN"):
        list_files("hf://datasets/owner/other", "s")
    for address in ("hf://owner/name", "hf://datasets/owner", "hf://datasets/*/name", "hf://datasets/owner/"):
        with pytest.raises(StorageError, match="is written hf://datasets/OWNER/NAME"):
            list_files(address, "s")


def test_a_hub_that_cannot_be_reached_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "hub", lambda: HfFileSystem(endpoint="http://127.0.0.1:9"))
    with pytest.raises(StorageError, match=r"^hf://datasets/owner/name/x.jsonl: cannot be listed .*check the name and"):
        list_files("hf://datasets/owner/name/x.jsonl", "s")
