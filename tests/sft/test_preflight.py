from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs import train
from jobs.preflight_text import lines
from sft.config import TrainConfig, read_config
from sft.nodes import Node, differences, versions
from sft.preflight import Finding, Preflight, preflight
from tests.sft.test_memory import QWEN2_7B

GOOD = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4, as ever."}]}
BAD = {"messages": [{"role": "user", "content": "2 + 2?"}]}
OWN = versions()


@pytest.fixture
def values(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    rows(tmp_path / "rows.jsonl", [GOOD] * 40)
    return {
        "name": "run",
        "storage": str(tmp_path / "new" / "runs"),
        "model": {"base": str(tiny_model), "dtype": "float32"},
        "data": {"sources": [{"path": str(tmp_path / "rows.jsonl")}], "max_length": 64},
        "train": {"global_batch_size": 4, "micro_batch_size": 2},
    }


def rows(path: Path, made: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))


def found(values: dict[str, Any], **sections: Any) -> Preflight:
    return preflight(read_config(TrainConfig, None, {**values, **sections}))


def states(made: Preflight) -> dict[str, str]:
    return {finding.check: finding.state for finding in made.findings}


def of(made: Preflight, check: str) -> Finding:
    (only,) = (finding for finding in made.findings if finding.check == check)
    return only


def test_a_sound_run_has_one_line_for_each_check(values: dict[str, Any], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    made = found(values)
    checks = ("config", "base", "template", "data", "storage", "cluster", "memory")
    assert states(made) == dict.fromkeys(checks, "ok")
    assert made.sound
    assert (
        of(made, "config").text == "run run: 4 rows a step = 1 worker(s) x 2 micro-batch(es) of up to 2, ZeRO stage 0"
    )
    assert "of the first 40 rows 40 are kept, " in of(made, "data").text
    assert sorted(tmp_path.rglob("*")) == before


def test_every_check_is_made_whatever_the_others_found(values: dict[str, Any], tmp_path: Path) -> None:
    made = found(
        values,
        storage=str(tmp_path / "rows.jsonl" / "runs"),
        model={"base": str(tmp_path / "none")},
        data={"sources": [{"path": str(tmp_path / "none.jsonl")}]},
    )
    assert states(made) == {"config": "ok", "base": "fault", "data": "fault", "storage": "fault", "cluster": "ok"}
    assert not made.sound
    assert "no config.json there" in of(made, "base").text
    assert "none.jsonl: there is no such file" in of(made, "data").text
    assert "cannot be written" in of(made, "storage").text
    assert sum(line.startswith("fault ") for line in lines(made)) == 3


def test_bad_rows_are_a_warning_up_to_the_limit(values: dict[str, Any], tmp_path: Path) -> None:
    rows(tmp_path / "rows.jsonl", [GOOD] * 39 + [BAD])
    few = of(found(values), "data")
    assert (few.state, few.remedy) == ("warning", "python -m jobs.inspect_data --quarantine FILE names the rows")
    assert "1 cannot be used" in few.text
    rows(tmp_path / "rows.jsonl", [GOOD, BAD])
    many = of(found(values), "data")
    assert many.state == "fault"
    assert "1 of 2 rows cannot be used" in many.text


def test_only_the_first_rows_of_every_source_are_read(values: dict[str, Any], tmp_path: Path) -> None:
    rows(tmp_path / "rows.jsonl", [GOOD] * 1500)
    rows(tmp_path / "more.jsonl", [GOOD] * 3)
    sources = [{"name": name, "path": str(tmp_path / f"{name}.jsonl")} for name in ("rows", "more")]
    assert "of the first 503 rows 503 are kept" in of(found(values, data={"sources": sources}), "data").text


def test_a_run_of_the_same_name_may_not_differ(values: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "new" / "runs" / "run"
    folder.mkdir(parents=True)
    resolved = read_config(TrainConfig, None, values).model_dump_json()
    (folder / "config.yaml").write_text(resolved)
    assert "which goes on from its last checkpoint" in of(found(values), "config").text
    other = of(found(values, lora={"rank": 3}), "config")
    assert other.state == "fault"
    assert "lora.rank: was 16, now 3" in other.remedy


def seven(values: dict[str, Any], tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    """A run of a 7B model on a GPU, whose sizes alone are a 7B's."""
    base = tmp_path / "seven"
    shutil.copytree(tiny_model, base)
    (base / "config.json").write_text(json.dumps(QWEN2_7B))
    model = {"base": str(base), "gradient_checkpointing": True}
    scaling = {"use_gpu": True, "num_workers": 1}
    return {**values, "model": model, "scaling": scaling, "data": {**values["data"], "max_length": 1024}}


def joined(monkeypatch: pytest.MonkeyPatch, *found: Node) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "there:6379")
    monkeypatch.setattr("sft.preflight.connect", lambda *_, **__: False)
    monkeypatch.setattr("sft.preflight.nodes", lambda: list(found))


def test_which_cards_a_7b_fits(
    values: dict[str, Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined(monkeypatch, Node("10.0.0.1", {"CPU": 8, "GPU": 1, "accelerator_type:T4": 1}, OWN))
    made = found(seven(values, tiny_model, tmp_path))
    told = {verdict.card: (verdict.verdict, verdict.changes) for verdict in made.verdicts}
    assert {told[card][0] for card in ("A10G", "L4", "RTX 4090", "A100 40 GB", "H100", "H200")} == {"fits"}
    assert told["T4"][0] == "too small"
    assert told["T4"][1][-1] == "model.quantization: nf4"
    own = of(made, "memory")
    assert own.state == "fault"
    assert "too small on the cluster's T4" in own.text
    assert "model.quantization: nf4" in own.remedy


def test_nodes_must_have_the_driver_s_versions(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    worker = {"CPU": 4.0}
    joined(
        monkeypatch,
        Node("10.0.0.1", worker, OWN),
        Node("10.0.0.2", worker, {**OWN, "torch": "1.0"}),
        Node("10.0.0.3", {"memory": 1.0}, {"python": OWN["python"]}),
        Node("10.0.0.4", worker),
    )
    made = [finding for finding in found(values).findings if finding.check == "versions"]
    assert [(finding.state, finding.text.partition(";")[0]) for finding in made] == [
        ("fault", f"node 10.0.0.2: torch 1.0, here {OWN['torch']}"),
        ("warning", f"node 10.0.0.3: ray none, here {OWN['ray']}"),
        ("fault", "node 10.0.0.4: it did not answer within 120 s"),
        ("ok", f"1 of 4 node(s) have {', '.join(f'{name} {number}' for name, number in OWN.items())}"),
    ]


def test_a_patch_of_python_may_differ() -> None:
    minor = OWN["python"].rpartition(".")[0]
    assert differences(Node("n", {}, {**OWN, "python": f"{minor}.99"}), OWN) == []
    assert differences(Node("n", {}, {**OWN, "python": "2.7.1"}), OWN) == [f"python 2.7, here {minor}"]


@pytest.mark.parametrize(
    ("cpus", "state", "text"),
    [
        ([8.0], "ok", "2 worker(s) of 3 CPU fit; the cluster of 1 node(s) has 8 CPU"),
        ([2.0, 2.0, 2.0], "fault", "the cluster of 3 node(s) has 6 CPU, which holds 0; the run would wait 600 s"),
        ([3.0, 3.0], "fault", "leave no CPU for reading the data"),
    ],
)
def test_workers_must_find_room_on_nodes(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, cpus: list[float], state: str, text: str
) -> None:
    memory = float(1 << 40)
    joined(monkeypatch, *(Node(f"10.0.0.{i}", {"CPU": n, "memory": memory}, OWN) for i, n in enumerate(cpus)))
    room = of(found(values, scaling={"num_workers": 2, "cpus_per_worker": 3}), "cluster")
    assert room.state == state
    assert text in room.text


def test_the_job_prints_and_exits(values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(json.dumps({**values, "registry": str(tmp_path / "registry")}))
    assert train.main(["--config", str(file), "--preflight"]) == 0
    text = capsys.readouterr().out
    assert [line.split()[1] for line in text.splitlines() if line.startswith("ok ")][-3:-1] == ["registry", "cluster"]
    assert text.endswith("\n0 fault(s), 0 warning(s): the run can start\n")
    assert not [path for path in (tmp_path / "registry").rglob("*") if path.is_file()]
    assert train.main(["--config", str(file), "--preflight", "--json", "--data.max_bad_fraction", "0"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sound"] is True
    assert told["memory"]["total"] > told["memory"]["overhead"] > 0
    with pytest.raises(SystemExit):
        train.main(["--config", str(file), "--json"])
