from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import adapters
from serve.errors import BadRequestError, RegistryError, UnknownModelError
from sft.adapter import ADAPTER_WEIGHTS
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


def test_list_shows_versions_and_aliases(filled: Job) -> None:
    filled("promote", "support@v2")
    filled("promote", "support@v2", "--alias", "live")
    lines = filled("list").splitlines()
    assert lines[0].split() == ["VERSION", "ALIASES", "BASE", "RANK", "PUBLISHED", "BY"]
    assert [line.split()[0] for line in lines[1:]] == ["support@v1", "support@v2"]
    assert "live, support" in lines[2]
    listed = data(filled("list", "--json"))
    assert listed["aliases"] == {"live": "support@v2", "support": "support@v2"}
    assert [version["id"] for version in listed["versions"]] == ["support@v1", "support@v2"]


def test_show_tells_the_lineage_of_a_version_or_an_alias(filled: Job) -> None:
    filled("promote", "support@v1")
    assert "run-0" in filled("show", "support@v1")
    assert filled("show", "support") == filled("show", "support@v1")
    assert data(filled("show", "support", "--json"))["lineage"]["run"] == "run-0"


def test_promote_and_rollback_say_what_moved(filled: Job) -> None:
    assert filled("promote", "support@v1") == "support moved to support@v1 (entry 1, promote)\n"
    assert filled("promote", "support@v1") == "support serves support@v1 already; nothing changed\n"
    assert filled("promote", "support@v2") == "support moved from support@v1 to support@v2 (entry 2, promote)\n"
    moved = data(filled("rollback", "support", "--reason", "worse answers", "--json"))
    assert (moved["version"], moved["previous"], moved["reason"]) == ("support@v1", "support@v2", "worse answers")
    lines = filled("history", "support").splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["promote", "promote", "rollback"]
    assert lines[3].endswith("worse answers")


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
        (["rollback", "nothing"], UnknownModelError, "no alias nothing"),
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
