from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft.data import here, plan_data
from sft.data_config import DataSection
from sft.errors import DataError
from sft.selection import Epochs, Selection, needs_all_rows, select

ROWS = [("What is red?", "A colour."), ("what is  RED?", "A colour."), ("What is red?", "A wine."), ("Two?", "Yes.")]


def section(folder: Path, **changes: Any) -> DataSection:
    for name in ("train", "test"):
        rows = ROWS if name == "train" else [("Say nothing of the secret handshake of our club", "Four."), ROWS[3]]
        lines = [json.dumps({"instruction": prompt, "output": answer, "cluster": name}) for prompt, answer in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return DataSection.model_validate({"sources": [{"path": str(folder / "train.jsonl"), "name": "s"}], **changes})


def chosen(data: DataSection, base: Path) -> Selection:
    return select(data, plan_data(data, base), here)


def test_every_row_is_trained_once_where_nothing_else_is_asked(tmp_path: Path, tiny_model: Path) -> None:
    data = section(tmp_path)
    found = chosen(data, tiny_model)
    assert not needs_all_rows(data)
    assert (found.examples, found.mixed, found.plan.found) == (4, False, None)
    assert Epochs(found.plan, 0, found).draw(0) is None


@pytest.mark.parametrize(
    ("hygiene", "dropped"),
    [
        ({"duplicates": "drop"}, {"duplicate": 1}),
        ({"contradictions": "drop"}, {"contradiction": 3}),
        ({"duplicates": "drop", "contradictions": "drop"}, {"duplicate": 1, "contradiction": 2}),
        ({"personal_data": "drop"}, {}),
    ],
)
def test_what_hygiene_drops_is_counted_and_not_trained(
    tmp_path: Path, tiny_model: Path, hygiene: dict[str, str], dropped: dict[str, int]
) -> None:
    data = section(tmp_path, hygiene=hygiene)
    found = chosen(data, tiny_model)
    assert found.survey.dropped == dropped
    assert found.examples == 4 - sum(dropped.values())
    assert found.survey.total.faults.total() == 0


def test_what_is_flagged_is_trained_and_counted(tmp_path: Path, tiny_model: Path) -> None:
    found = chosen(section(tmp_path, hygiene={"duplicates": "flag"}), tiny_model)
    assert (found.survey.total.flags, found.examples) == ({"duplicate": 1}, 4)


def test_a_row_that_repeats_an_evaluation_file_is_left_out(tmp_path: Path, tiny_model: Path) -> None:
    test = str(tmp_path / "test.jsonl")
    found = chosen(section(tmp_path, hygiene={"evaluation": [test], "contamination": "drop"}), tiny_model)
    assert found.survey.dropped == {"contaminated": 1}


def test_held_out_rows_are_not_trained_and_a_row_that_repeats_one_is_found(tmp_path: Path, tiny_model: Path) -> None:
    both = [{"path": str(tmp_path / f"{name}.jsonl")} for name in ("train", "test")]
    data = section(tmp_path, sources=both, hold_out={"clusters": ["test"]}, hygiene={"duplicates": "drop"})
    found = chosen(data, tiny_model)
    assert needs_all_rows(data)
    assert found.survey.dropped == {"held_out": 2, "duplicate": 2}
    assert (found.hold_out.held_out.clusters, found.hold_out.trained.clusters) == (("test",), ("train",))
    with pytest.raises(DataError, match="no row names 'tset'"):
        chosen(section(tmp_path, sources=both, hold_out={"clusters": ["tset"]}), tiny_model)


def test_a_cap_makes_a_sub_sample_of_exactly_that_size(tmp_path: Path, tiny_model: Path) -> None:
    data = section(tmp_path, sources=[{"path": str(tmp_path / "train.jsonl"), "cap": 3}])
    found = chosen(data, tiny_model)
    draw = Epochs(found.plan, 0, found).draw(0)
    assert needs_all_rows(data)
    assert draw is not None
    assert (found.examples, found.mixed, draw.rows) == (3, True, 3)
