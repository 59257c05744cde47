from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from sft.config import DataSection
from sft.data import dataset, plan_data, stream_here, tables

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    for number in range(3):
        lines = [json.dumps({"instruction": f"q{i}", "output": f"a{i}" * (i % 5 + 1)}) for i in range(700)]
        lines[10] = "broken"
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_ray_data_prepares_the_same_rows_in_the_same_order_as_one_process(rows: Path, tiny_model: Path) -> None:
    plan = plan_data(DataSection.model_validate({"sources": [{"path": str(rows)}]}), tiny_model)
    here = pa.concat_tables(stream_here(plan))
    there = pa.concat_tables(tables(dataset(plan)))
    assert here.num_rows == 2100
    assert there.equals(here)
    backwards = pa.concat_tables(tables(dataset(plan, order=[2, 0, 1])))
    assert backwards.column("id").to_pylist() == [
        row for number in (2, 0, 1) for row in here.column("id").to_pylist() if f"/{number}.jsonl:" in row
    ]
