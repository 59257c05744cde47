from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import adapters
from serve.errors import BadRequestError, RegistryError, UnknownModelError
from sft.adapter import ADAPTER_WEIGHTS, MANIFEST
from sft.errors import AdapterError, ConfigError
from tests.bundles import tiny_bundle

Job = Callable[..., str]


@pytest.fixture
def registry(tmp_path: Path) -> str:
    return str(tmp_path / "registry")


@pytest.fixture
def bundle(tmp_path: Path) -> str:
    tiny_bundle(tmp_path / "bundle")
    return str(tmp_path / "bundle")


@pytest.fixture
def job(registry: str, capsys: pytest.CaptureFixture[str]) -> Job:
    def run(command: str, *words: str) -> str:
        assert adapters.main([command, *words, "--registry", registry]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def filled(job: Job, bundle: str) -> Job:
    job("publish", bundle, "--name", "support")
    job("publish", bundle, "--name", "support")
    return job


def data(text: str) -> Any:
    return json.loads(text)


def test_publish_says_what_it_did_and_what_is_next(job: Job, bundle: str) -> None:
    text = job("publish", bundle, "--name", "support")
    assert "published support@v1: rank 2" in text
    assert "promote support@v1" in text


def cells(line: str) -> list[str]:
    return re.split(r"  +", line)


def test_list_shows_versions_and_aliases(filled: Job) -> None:
    filled("promote", "support@v2")
    filled("promote", "support@v2", "--alias", "live")
    lines = filled("list").splitlines()
    assert cells(lines[0]) == ["VERSION", "ALIASES", "BASE", "RANK", "SIZE", "PUBLISHED", "BY"]
    assert [line.split()[0] for line in lines[1:3]] == ["support@v1", "support@v2"]
    assert "live, support" in lines[2]
    assert lines[3] == ""
    assert cells(lines[4]) == ["ALIAS", "SERVES", "CANARY", "SHADOW", "ENTRY", "SINCE", "BY"]
    assert [cells(line)[:5] for line in lines[5:]] == [
        ["live", "support@v2", "-", "-", "1"],
        ["support", "support@v2", "-", "-", "1"],
    ]
    listed = data(filled("list", "--json"))
    assert {alias: entry["version"] for alias, entry in listed["aliases"].items()} == {
        "live": "support@v2",
        "support": "support@v2",
    }
    assert [version["id"] for version in listed["versions"]] == ["support@v1", "support@v2"]


def test_list_tells_a_damaged_version_beside_the_others(filled: Job, registry: str) -> None:
    (Path(registry) / "versions/support/v1" / MANIFEST).write_text("{}")
    lines = filled("list").splitlines()
    assert lines[1].startswith("support@v2")
    assert lines[-1].startswith("support@v1 is damaged in the registry: ")
    assert len(data(filled("list", "--json"))["damaged"]) == 1


def test_show_tells_all_of_a_version_or_an_alias(filled: Job) -> None:
    filled("promote", "support@v1")
    filled("promote", "support@v2", "--alias", "live")
    filled("canary", "support@v1", "--alias", "live", "--weight", "0.5")
    text = filled("show", "support@v1")
    for line in (
        "support@v1",
        "  aliases    live (canary, entry 2), support (stable version, entry 1)",
        "  retired    no",
        "  adapter    rank 2 on q_proj",
        "    run: run-0",
        "    metrics:",
        "      loss: 1.5",
    ):
        assert line in text.splitlines()
    assert filled("show", "support") == text
    shown = data(filled("show", "support", "--json"))
    assert shown["lineage"]["run"] == "run-0"
    assert shown["aliases"] == {"live": "canary", "support": "stable version"}
    assert shown["files"].keys() == {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"}
    assert shown["retired"] is None


def test_every_move_says_what_changed(filled: Job) -> None:
    for words, text in (
        (["promote", "support@v1"], "support serves support@v1 since entry 1, promote\n"),
        (["promote", "support@v1"], "support serves support@v1 already; nothing changed\n"),
        (
            ["canary", "support@v2", "--alias", "support", "--weight", "0.125"],
            "support serves support@v1 (canary support@v2 12.5 %) since entry 2, canary\nbefore: support@v1, entry 1\n",
        ),
        (
            ["shadow", "support@v2", "--alias", "support", "--share", "1"],
            "support serves support@v1 (canary support@v2 12.5 %, shadow support@v2 100 %) since entry 3, shadow\n"
            "before: support@v1 (canary support@v2 12.5 %), entry 2\n",
        ),
        (
            ["rollback", "support"],
            "support serves support@v1 (canary support@v2 12.5 %) since entry 4, rollback\n"
            "before: support@v1 (canary support@v2 12.5 %, shadow support@v2 100 %), entry 3\n",
        ),
        (
            ["promote", "support@v2"],
            "support serves support@v2 since entry 5, promote\n"
            "before: support@v1 (canary support@v2 12.5 %), entry 4\n",
        ),
    ):
        assert filled(*words) == text


def test_a_reason_is_kept(filled: Job) -> None:
    for words in (
        ["promote", "support@v1"],
        ["canary", "support@v2", "--alias", "support", "--weight", "0.1"],
        ["shadow", "support@v2", "--alias", "support", "--share", "0.1"],
        ["rollback", "support"],
    ):
        entry = data(filled(*words, "--reason", f"why {words[0]}", "--json"))
        assert (entry["action"], entry["reason"]) == (words[0], f"why {words[0]}")
    lines = filled("history", "support").splitlines()
    assert cells(lines[0]) == ["ENTRY", "ACTION", "SERVES", "CANARY", "SHADOW", "AT", "GATE", "BY", "REASON"]
    assert [cells(line)[1:5] for line in lines[1:]] == [
        ["promote", "support@v1", "-", "-"],
        ["canary", "support@v1", "support@v2 10 %", "-"],
        ["shadow", "support@v1", "support@v2 10 %", "support@v2 10 %"],
        ["rollback", "support@v1", "support@v2 10 %", "-"],
    ]
    assert [cells(line)[-1] for line in lines[1:]] == ["why promote", "why canary", "why shadow", "why rollback"]


def test_a_reason_cannot_move_the_cursor(filled: Job) -> None:
    filled("promote", "support@v1", "--reason", "[red]\x1b[2J wiped\nout[/red]")
    assert filled("history", "support").splitlines()[1].endswith("[red]?[2J wiped?out[/red]")


def test_a_terminal_gets_a_table_that_fits(filled: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    filled("promote", "support@v1", "--reason", "[red]because[/red]")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    text = filled("history", "support")
    assert "[red]" in text
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in text.splitlines()) <= 60
    monkeypatch.setattr(adapters, "FITTED_ROWS", 0)
    assert "[red]because[/red]" in filled("history", "support")


def test_retire_ends_a_version(filled: Job) -> None:
    assert filled("retire", "support@v1", "--reason", "wrong answers").startswith("support@v1 is retired: it cannot be")
    assert re.fullmatch(
        r"support@v1 was retired already, by \S+ on .*Z; nothing changed\n", filled("retire", "support@v1")
    )
    assert cells(filled("list").splitlines()[1])[1] == "retired"
    assert [version["retired"] for version in data(filled("list", "--json"))["versions"]] == [True, False]
    assert "wrong answers" in filled("show", "support@v1")
    with pytest.raises(BadRequestError, match="support@v1 is retired, for good; publish its bundle again"):
        filled("promote", "support@v1")


def test_gc_shows_and_only_deletes_when_told(filled: Job, registry: str) -> None:
    assert filled("gc") == "no unfinished upload is older than 24 hours; nothing to clean up\n"
    folder = Path(registry) / "versions/support/v3"
    folder.mkdir()
    for name in ("reserved.json", ADAPTER_WEIGHTS):
        (folder / name).write_bytes(b"x" * 1500)
        os.utime(folder / name, (0, 0))
    lines = filled("gc").splitlines()
    assert cells(lines[1]) == ["support@v3", "1", "1.5 kB", "1970-01-01 00:00:00Z"]
    assert lines[2] == "unfinished uploads: 1, 1.5 kB; nothing was deleted: --delete does it"
    assert (folder / ADAPTER_WEIGHTS).exists()
    assert data(filled("gc", "--json"))["unfinished"][0]["bytes"] == 1500
    assert filled("gc", "--delete") == "unfinished uploads given up: 1; deleted 1.5 kB\n"
    assert not (folder / ADAPTER_WEIGHTS).exists()
    assert filled("gc", "--older_than", "0").startswith("no unfinished upload")
    with pytest.raises(BadRequestError, match="--older_than -1"):
        filled("gc", "--older_than", "-1")


def test_a_version_is_verified_where_it_lies(filled: Job, registry: str) -> None:
    assert filled("verify", "support@v2").startswith("support@v2 is whole and sound: rank 2")
    (Path(registry) / "versions/support/v2" / ADAPTER_WEIGHTS).write_bytes(b"x")
    for words in (["verify", "support@v2"], ["promote", "support@v2"]):
        with pytest.raises(AdapterError, match=f"support@v2 is damaged in the registry: {ADAPTER_WEIGHTS}"):
            filled(*words)


def test_verify_needs_no_registry(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert adapters.main(["verify", bundle]) == 0
    assert "whole and sound: rank 2" in capsys.readouterr().out
    (Path(bundle) / ADAPTER_WEIGHTS).write_bytes(b"x")
    with pytest.raises(AdapterError, match=ADAPTER_WEIGHTS):
        adapters.main(["verify", bundle])


@pytest.mark.usefixtures("filled")
def test_any_config_that_names_a_registry_will_do(
    registry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "any.yaml"
    config.write_text(f"name: other\nregistry: {registry}\ntrain: {{epochs: 1}}\n")
    assert adapters.main(["list", "--config", str(config)]) == 0
    assert "support@v2" in capsys.readouterr().out


def test_an_empty_registry_says_so(job: Job, registry: str) -> None:
    Path(registry).mkdir()
    assert "no versions yet" in job("list")


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (["show", "support@v9"], UnknownModelError, "support@v9"),
        (["show", "nothing"], UnknownModelError, "no alias nothing"),
        (["history", "nothing"], UnknownModelError, "no alias nothing"),
        (["promote", "support"], BadRequestError, "write NAME@vN"),
        (["promote", "support@v9"], UnknownModelError, "support@v9"),
        (["promote", "support@v1", "--alias", "../x"], BadRequestError, "no adapter or alias name"),
        (["rollback", "nothing"], UnknownModelError, "no alias nothing; promote a version to it first"),
        (["canary", "support@v1", "--alias", "new", "--weight", "0.1"], UnknownModelError, "no alias new; promote"),
        (["shadow", "support@v1", "--alias", "new", "--share", "2"], BadRequestError, r"share 2\.0: must be from 0"),
        (["retire", "support"], BadRequestError, "write NAME@vN"),
        (["retire", "support@v9"], UnknownModelError, "support@v9"),
        (["publish", "/no/such", "--name", "support"], AdapterError, "no adapter bundle"),
        (["verify", "/no/such"], AdapterError, "no adapter bundle"),
        (["list", "--regsitry", "x"], ConfigError, "--regsitry: no such option; did you mean registry"),
    ],
)
def test_bad_input_is_one_message(filled: Job, words: list[str], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        filled(*words)


def test_a_registry_must_be_named_and_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --registry"):
        adapters.main(["list"])
    with pytest.raises(RegistryError, match="no such folder"):
        adapters.main(["list", "--registry", str(tmp_path / "typo")])


def test_as_a_program_it_exits_with_one_line_and_a_code(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "jobs.adapters", "list", "--registry", str(tmp_path / "typo")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: registry ")
    assert len(done.stderr.splitlines()) == 1
    helped = subprocess.run([*words[:3], "--help"], capture_output=True, text=True, check=False)
    assert helped.returncode == 0
    assert all(command in helped.stdout for command in adapters.COMMANDS)
