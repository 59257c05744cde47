"""What was generated is read and masked by the path that training uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from generate.run import generate
from sft.base import load_tokenizer
from sft.data import here, plan_data, prepare_rows
from sft.data_config import DataSection
from sft.mask import UNTRAINED
from tests.generate.scripted import made_config
from tests.generate.test_run import Scripted


@pytest.mark.parametrize("form", ["alpaca", "messages"])
def test_every_row_is_trained_on_its_output(tmp_path: Path, tiny_model: Path, form: str) -> None:
    made = made_config(tmp_path, form=form, target=12)
    assert generate(made, None, lambda _: None, Scripted()).complete
    path = tmp_path / "rows.jsonl"
    data = DataSection.model_validate({"sources": [{"path": str(path)}], "max_length": 2048})
    prepared = [row for table in here(plan_data(data, tiny_model), prepare_rows) for row in table.to_pylist()]
    written = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["reason"] for row in prepared] == [""] * 12
    base = load_tokenizer(tiny_model)
    for row, source in zip(prepared, written, strict=True):
        prompt, output = _sides(source)
        trained = [id for id, label in zip(row["input_ids"], row["labels"], strict=True) if label != UNTRAINED]
        assert base.tokenizer.decode(trained) == f"{output}<|im_end|>"
        assert prompt in base.tokenizer.decode(row["input_ids"])
    assert any(_sides(source)[0].count("\n\n") for source in written)


def _sides(row: dict[str, Any]) -> tuple[str, str]:
    if "messages" in row:
        asked, answered = row["messages"]
        return str(asked["content"]), str(answered["content"])
    given = f"\n\n{row['input']}" if row["input"] else ""
    return row["instruction"] + given, row["output"]
