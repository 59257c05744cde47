from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from sft.data import epoch_on_ray, here, on_ray, plan_data, prepare_rows
from sft.data_config import DataSection
from sft.selection import Epochs, select

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
    alone = pa.concat_tables(here(plan, prepare_rows))
    assert alone.num_rows == 2100
    assert pa.concat_tables(here(plan, prepare_rows, processes=2)).equals(alone)
    assert pa.concat_tables(on_ray(plan, prepare_rows)).equals(alone)

    epochs = Epochs(plan, 5, None)
    first, again, second = (ids(epoch_on_ray(plan, epochs.order(epoch), None)) for epoch in (0, 0, 1))
    assert first == again != second
    assert sorted(first) == sorted(second) == sorted(alone.column("id").to_pylist())
    # The files are read side by side: every stretch of the epoch holds some of each.
    assert {name.split("/")[1][0] for name in first[300:600]} == {"0", "1", "2"}


def test_an_epoch_holds_exactly_the_mixture(rows: Path, tiny_model: Path) -> None:
    section = DataSection.model_validate(
        {
            "sources": [
                {"path": str(rows / "0.jsonl"), "name": "a", "weight": 3},
                {"path": str(rows / "1.jsonl"), "name": "b", "weight": 1},
                {"path": str(rows / "2.jsonl"), "name": "c", "cluster": "secret", "weight": 1},
            ],
            "mixture": {"mode": "explicit", "rows": 1200},
            "hold_out": {"clusters": ["secret"]},
        }
    )
    chosen = select(section, plan_data(section, tiny_model), on_ray)
    assert (chosen.survey.kept, chosen.survey.dropped["held_out"], chosen.examples) == (2 * 699, 699, 1200)
    epochs = Epochs(chosen.plan, 5, chosen)
    first, again, second = (
        ids(epoch_on_ray(chosen.plan, epochs.order(epoch), epochs.draw(epoch))) for epoch in (0, 0, 1)
    )
    assert first == again
    for drawn in (first, second):
        assert Counter(name.split("/")[0] for name in drawn) == {"a": 900, "b": 300}
        assert set(Counter(name for name in drawn if name[0] == "a").values()) == {1, 2}
    assert {name for name in first if name[0] == "b"} != {name for name in second if name[0] == "b"}


def ids(tables: Iterator[pa.Table]) -> list[str]:
    return [name for table in tables for name in table.column("id").to_pylist()]
