from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.inspect_data import main
from sft.errors import DataError


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> list[str]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "Say hi", "output": "hello"}\n' * 30 + "broken\n")
    file = tmp_path / "c.yaml"
    file.write_text(
        f"name: r\nstorage: {tmp_path}\nmodel: {{base: {tiny_model}}}\n"
        f"data: {{sources: [{{path: {rows}, name: rows}}]}}\n"
    )
    return ["--config", str(file)]


def test_numbers_as_json(config: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*config, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["kept"], told["dropped"]) == (31, 30, {"invalid_json": 1})
    assert told["trained_tokens"] == 30 * len("hello.")  # five letters and the stop token


def test_a_person_sees_sources_refused_rows_and_examples(config: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([*config, "--show", "1"])
    out = capsys.readouterr().out
    assert "rows/rows.jsonl:31  invalid_json  row: not valid JSON at column 1" in out
    assert "<|im_start|>assistant\nhello<|im_end|>" in out
    assert "6 trained" in out


def test_what_training_would_refuse_fails(config: list[str]) -> None:
    with pytest.raises(DataError, match="--strict allows none"):
        main([*config, "--strict"])
    with pytest.raises(DataError, match="31 of 31 rows cannot be used"):
        main([*config, "--data.max_length", "8"])
