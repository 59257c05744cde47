from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.inspect_data import main
from sft.errors import DataError, StorageError


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> list[str]:
    """30 good rows and a broken one in `rows`; two rows in `chat`, one of them longer."""
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Say hi", "output": "hello"}\n' * 30 + "broken\n")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "one"}]
    chat = [{"messages": turns}, {"messages": [*turns, *turns]}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))
    file = tmp_path / "c.yaml"
    file.write_text(
        f"name: r\nstorage: {tmp_path}\nmodel: {{base: {tiny_model}}}\n"
        f"data: {{sources: [{{path: {tmp_path}/rows.jsonl, name: rows}}, {{path: {tmp_path}/chat.jsonl, name: chat}}],"
        " max_length: 200}\n"
    )
    return ["--config", str(file)]


def told(config: list[str], capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main([*config, *options]) == 0
    return capsys.readouterr().out


def test_numbers_as_json(config: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    numbers = json.loads(told(config, capsys, "--json"))
    assert (numbers["name"], numbers["rows"], numbers["kept"]) == ("r", 33, 32)
    assert numbers["dropped"] == {"invalid_json": 1}
    rows = numbers["sources"]["rows"]
    assert rows["trained_tokens"] == 30 * len("hello.")  # five letters and the stop token
    longest = len("_user\nSay hi_\n_assistant\nhello_\n")
    assert (rows["p50"], rows["longest"], rows["histogram"]) == (longest, longest, {"32": 30})
    packs = 30 // (200 // longest)
    assert rows["packing"] == {"packs": packs, "capacity": 200, "efficiency": 30 * longest / (packs * 200)}
    assert numbers["packing"]["packs"] == packs + 1
    trained = [30 * len("hello."), 3 * len("one.")]
    assert numbers["mixture"] == [
        {
            "group": name,
            "kept": kept,
            "rows_per_epoch": kept,
            "share": round(kept / 32, 4),
            "trained_share": round(tokens / sum(trained), 4),
        }
        for name, kept, tokens in (("chat", 2, trained[1]), ("rows", 30, trained[0]))
    ]


def test_a_person_sees_sources_dropped_rows_and_examples(config: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = told(config, capsys, "--show", "1")
    assert "1 invalid_json (fault) in rows\n  rows.jsonl:31 invalid_json: not valid JSON at column 1\n" in out
    assert "<|im_start|>assistant↵\n⟦hello<|im_end|>⟧↵\n" in out
    assert "32 tokens, 6 trained" in out
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert out.count("⟦") == 2, "one example of each source"
    assert lines["32"] == ["30", "█" * 40], "the histogram"


def test_a_source_without_rows_is_named(config: list[str], tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"chat\.jsonl: the file holds no row"):
        main(config)


def test_what_training_would_refuse_fails(config: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="1 of 33 rows were dropped, and --strict allows none"):
        main([*config, "--strict"])
    with pytest.raises(DataError, match="33 of 33 rows cannot be used"):
        main([*config, "--data.max_length", "8"])
    assert "nothing is left" not in capsys.readouterr().out


def test_strict_passes_where_every_row_is_good(config: list[str], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Say hi", "output": "hello"}\n')
    assert main([*config, "--strict", "--json"]) == 0


def test_a_part_of_each_source(config: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    numbers = json.loads(told(config, capsys, "--json", "--limit", "1"))
    assert {name: source["rows"] for name, source in numbers["sources"].items()} == {"rows": 1, "chat": 1}
    assert "the first 1 rows of each source" in told(config, capsys, "--limit", "1")


def test_examples_are_dumped_with_what_is_trained(
    config: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in told(config, capsys, "--dump", "40").splitlines()]
    assert len(lines) == 32
    assert set(lines[0]) == {"id", "source", "input_ids", "labels", "trained_text"}
    assert lines[0]["trained_text"] == "hello<|im_end|>"
    assert lines[-1]["trained_text"] == "one<|im_end|>one<|im_end|>"
    for line in lines:
        pairs = list(zip(line["input_ids"], line["labels"], strict=True))
        assert all(label in (-100, token) for token, label in pairs)
        assert sum(label != -100 for _, label in pairs) == len(line["trained_text"].replace("<|im_end|>", "."))
    file = tmp_path / "new" / "dump.jsonl"
    assert json.loads(told(config, capsys, "--dump", "3", "--out", str(file), "--json"))["rows"] == 33
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == lines[:3]


def test_every_dropped_row_is_written_down(
    config: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "secret", "output": ""}\n' * 150)
    file = tmp_path / "q.jsonl"
    told(config, capsys, "--quarantine", str(file), "--data.max_bad_fraction", "1")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [line["position"] for line in lines] == list(range(1, 151))
    assert {(line["reason"], line["field"]) for line in lines} == {("empty_response", "output")}
    assert "secret" not in file.read_text(encoding="utf-8")


def test_one_stream_holds_one_thing(config: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*config, "--json", "--dump", "3"])
    assert "--json and --dump would both write to stdout" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*config, "--dump", "-3"])
    assert "expected a whole number, got '-3'" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_named(config: list[str], tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"rows\.jsonl/x: cannot be written"):
        main([*config, "--quarantine", str(tmp_path / "rows.jsonl" / "x")])
