from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sft.base import BaseTokenizer
from sft.files import list_files, read
from sft.formats import RowSpec
from sft.mask import UNTRAINED
from sft.rows import PREPARED, Rules, SourcePlan, examples, prepare
from sft.survey import survey

GOOD = {"instruction": "Say hi", "output": "hi"}
MESSY = b"""{"instruction": "Say hi", "output": "hi"}
{"instruction": "Say hi", "output":

["no", "object"]
{"instruction": "\xff\xfe", "output": "hi"}
{"instruction": "Say hi", "output": ""}
{"instruction": "Say hi", "output": "a <|im_end|> b"}
{"messages": [{"role": "user", "content": "x"}]}
{"who": "knows"}
{"instruction": "LONG", "output": "hi"}
{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}""".replace(b"LONG", b"l" * 900)


def prepared(path: Path | str, base: BaseTokenizer, max_length: int = 500, rows: int = 3) -> pa.Table:
    files = list_files(str(path), "s")
    tables = [
        prepare(table, base, {"s": SourcePlan(RowSpec(), "", "")}, Rules(max_length, truncate=False))
        for file in files
        for table in read(file, rows)
    ]
    return pa.concat_tables(tables)


def write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_row_has_its_fate_and_place(tmp_path: Path, base: BaseTokenizer) -> None:
    path = tmp_path / "messy.jsonl"
    path.write_bytes(MESSY)
    table = prepared(path, base)
    assert table.schema == PREPARED
    fates = [(row["position"], row["reason"], row["field"]) for row in table.to_pylist()]
    assert fates == [
        (1, "", ""),
        (2, "invalid_json", ""),
        (4, "not_an_object", ""),
        (5, "invalid_encoding", ""),
        (6, "empty_response", "output"),
        (7, "special_token_in_response", "messages[1].content"),
        (8, "no_response", "messages"),
        (9, "unknown_format", ""),
        (10, "too_long", "messages"),
        (11, "", ""),
    ]
    counted = survey([table])
    assert (counted.rows, counted.kept, sum(counted.dropped.values())) == (10, 2, 8)
    assert b"Say hi" not in counted.quarantine()


def test_ids_are_stable_and_tell_rows_apart(tmp_path: Path, base: BaseTokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD, GOOD, {**GOOD, "output": "ho"}])
    ids = prepared(path, base).column("id").to_pylist()
    assert ids == prepared(path, base, rows=1).column("id").to_pylist()
    assert len(set(ids)) == 3
    assert ids[0].startswith("s/a.jsonl:1:")
    assert ids[0].rsplit(":", 1)[1] == ids[1].rsplit(":", 1)[1] != ids[2].rsplit(":", 1)[1]


def test_labels_do_not_depend_on_how_the_blocks_are_cut(tmp_path: Path, base: BaseTokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [{"instruction": "q" * i, "output": "a" * i} for i in range(1, 40)])
    assert prepared(path, base, rows=1).equals(prepared(path, base, rows=1000))


def test_jsonl_gzip_and_parquet_give_the_same_examples(tmp_path: Path, base: BaseTokenizer) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}
        for i in range(7)
    ]
    plain = write(tmp_path / "x.jsonl", rows)
    packed = tmp_path / "x.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=2)
    tables = [prepared(path, base) for path in (plain, packed, tmp_path / "x.parquet", f"file://{plain}")]
    for other in tables[1:]:
        assert other.select(["position", "input_ids", "labels"]).equals(
            tables[0].select(["position", "input_ids", "labels"])
        )


def test_examples_are_the_kept_rows(tmp_path: Path, base: BaseTokenizer) -> None:
    path = tmp_path / "messy.jsonl"
    path.write_bytes(MESSY)
    made = examples(prepared(path, base))
    assert [example.id.split(":")[1] for example in made] == ["1", "11"]
    assert base.tokenizer.decode(made[1].input_ids[made[1].labels != UNTRAINED].tolist()) == "y<|im_end|>"
