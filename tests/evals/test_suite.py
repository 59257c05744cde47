from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from evals.errors import SuiteError
from evals.suite import Row, Suite, fingerprint, read_suites

SUITE: dict[str, Any] = {
    "name": "capitals",
    "description": "Capitals.",
    "checkers": {"right": {"kind": "contains"}},
    "rows": [{"id": 1, "prompt": "Capital of France?", "reference": "Paris"}],
}


def write(folder: Path, file: str = "one.yaml", /, **changed: Any) -> Path:
    path = folder / file
    path.write_text(yaml.safe_dump({**SUITE, **changed}), encoding="utf-8")
    return path


def faults(*paths: Path) -> list[str]:
    with pytest.raises(SuiteError) as caught:
        read_suites(paths)
    root = str(paths[0].parent if paths[0].suffix else paths[0])
    return [fault.replace(f"{root}/", "") for fault in caught.value.faults]


def test_a_suite_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, system="Be brief.", generation={"max_tokens": 9, "stop": ["\n"], "seed": 4})
    (suite,) = read_suites([path])
    row = suite.rows[0]
    assert (suite.name, suite.score, row.id, row.reference, list(row.checkers)) == (
        "capitals",
        "all",
        "1",
        "Paris",
        ["right"],
    )
    assert suite.request(row, 0, None) == {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital of France?"}],
        "max_tokens": 9,
        "temperature": 0.0,
        "seed": 4,
        "stop": ["\n"],
    }
    assert suite.request(row, 2, False)["seed"] == 6
    assert suite.request(row, 2, False)["chat_template_kwargs"] == {"enable_thinking": False}


def test_rows_lie_in_a_file_beside_it_and_folders_hold_suites(tmp_path: Path) -> None:
    rows = [
        {
            "id": "a",
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            "reference": "x",
        },
        {"id": "b", "prompt": "p", "reference": ["x", "y"], "checkers": {"brief": {"kind": "length", "max": 3}}},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    write(tmp_path, "b.yaml", rows="rows.jsonl", system="ignored where a row has its own")
    write(tmp_path, "a.yaml", name="other")
    other, suite = read_suites([tmp_path])
    assert (other.name, suite.name) == ("other", "capitals")
    assert [message["content"] for message in suite.rows[0].messages] == ["s", "u"]
    assert list(suite.rows[1].checkers) == ["right", "brief"]
    assert [row.id for row in suite.first(1).rows] == ["a"]
    assert suite.first(None) is suite


def test_all_faults_of_all_files_are_reported_at_once(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "prompt": "p"},
        {"prompt": "p", "reference": "x"},
        {"id": "c", "prompt": "p", "reference": "x", "checkers": {"judge": {"kind": "judge"}}},
        {"id": "d", "prompt": "p", "messages": [{"role": "user", "content": "secret"}], "reference": "x"},
        {"id": "e", "prompt": 7, "reference": "x", "answer": "secret"},
        {"id": "f", "prompt": "p", "reference": "x", "checkers": {"long": {"kind": "length", "max": "secret"}}},
        {"id": "g", "prompt": "p", "reference": "x"},
        {"id": "g", "prompt": "p", "reference": "x"},
        {
            "id": "h",
            "messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}],
            "reference": "x",
        },
    ]
    write(tmp_path, "a.yaml", rows=rows)
    write(tmp_path, "b.yaml", checkrs={}, checkers={"right": {"kind": "exct"}})
    write(tmp_path, "c.yaml", rows="none.jsonl")
    (tmp_path / "d.jsonl").write_text('{"id": "a", "prompt": "p", "reference": "x"}\n{"id": \n', encoding="utf-8")
    write(tmp_path, "d.yaml", rows="d.jsonl")
    write(tmp_path, "e.yaml", checkers={}, score="mean")
    write(tmp_path, "f.yaml", score="wright")
    write(tmp_path, "g.yaml", rows=[])
    found = faults(tmp_path)
    expected = [
        "a.yaml row 1 (a): checker right needs a reference: give the row (or the checker) one",
        "a.yaml row 2: id: is missing",
        "a.yaml row 3: checkers.judge: Input tag 'judge' found using 'kind'",
        "a.yaml row 4: give either prompt or messages",
        "a.yaml row 5: prompt: Input should be a valid string",
        "a.yaml row 5: answer: no such field",
        "a.yaml row 6: checkers.long.length.max: Input should be a valid integer",
        "a.yaml row 9: the last of messages must be the user's",
        "a.yaml: 2 rows have the id g",
        "b.yaml: checkers.right: Input tag 'exct' found using 'kind'",
        "b.yaml: checkrs: no such key; did you mean checkers?",
        "c.yaml",
        "d.jsonl line 2: no JSON",
        "e.yaml row 1 (1): nothing is checked",
        "f.yaml row 1 (1): has no checker wright, which is the suite's score",
        "g.yaml: there are no rows",
    ]
    expected[11] = "none.jsonl: the rows cannot be read: No such file or directory"
    assert [fault[: len(start)] for fault, start in zip(found, expected, strict=True)] == expected
    assert "secret" not in "".join(found)


def test_suites_fit_together(tmp_path: Path) -> None:
    two = [*SUITE["rows"], {"id": 2, "prompt": "p", "reference": "x"}]
    write(tmp_path, "a.yaml", against="long")
    write(tmp_path, "b.yaml", name="long", rows=two)
    write(tmp_path, "c.yaml")
    assert faults(tmp_path) == [
        "2 suites are named capitals: give each a name of its own",
        "a.yaml: its rows have other ids than those of long, which it is compared against",
    ]


def test_nothing_to_ask_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert faults(tmp_path / "empty") == [f"{tmp_path}/empty: the folder holds no *.yaml file"]
    assert faults(tmp_path / "none.yaml") == ["none.yaml: there is no such file"]
    with pytest.raises(SuiteError, match="name files or folders"):
        read_suites([])


def test_samples_of_greedy_answers_are_refused(tmp_path: Path) -> None:
    assert "would all be the same answer" in faults(write(tmp_path, generation={"samples": 3}))[0]


def test_a_fingerprint_is_of_what_is_asked(tmp_path: Path) -> None:
    (suite,) = read_suites([write(tmp_path)])
    (warmer,) = read_suites([write(tmp_path, generation={"temperature": 0.5})])
    (checked,) = read_suites([write(tmp_path, description="Others.", checkers={"right": {"kind": "exact"}})])

    def of(suite: Suite, row: Row, thinking: bool | None = None) -> str:
        return fingerprint(suite.request(row, 0, thinking))

    assert of(suite, suite.rows[0]) == of(checked, checked.rows[0])
    assert len({of(suite, suite.rows[0]), of(warmer, warmer.rows[0]), of(suite, suite.rows[0], True)}) == 3
