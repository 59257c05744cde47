from __future__ import annotations

import json

import pytest

from jobs import keys
from serve.keys import parse_keys
from sft.errors import ConfigError


def test_a_key_is_shown_once_and_its_line_opens_the_door(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--id", "support-app", "--scope", "chat", "--models", "support", "support@*", "--concurrency", "4"]
    assert keys.main(["create", *words]) == 0
    shown = capsys.readouterr()
    secret = next(line for line in shown.err.splitlines() if line.startswith("raysft_"))
    assert secret not in shown.out
    found = parse_keys(shown.out, "keys").find(secret)
    assert found is not None
    assert (found.id, found.scopes, found.models) == ("support-app", ("chat",), ("support", "support@*"))
    assert (found.concurrency, found.requests_per_minute) == (4, None)


def test_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    keys.main(["create", "--id", "ops", "--scope", "admin", "metrics", "--json"])
    made = json.loads(capsys.readouterr().out)
    found = parse_keys(json.dumps(made["line"]), "keys").find(made["key"])
    assert found is not None
    assert (found.scopes, found.models) == (("admin", "metrics"), ("*",))


@pytest.mark.parametrize(
    ("words", "fault"),
    [(["--id", "No Name"], "--id: "), (["--id", "a", "--tokens_per_minute", "0"], "--tokens_per_minute: ")],
)
def test_faults_name_the_option(words: list[str], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        keys.main(["create", *words])


def test_a_scope_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        keys.main(["create", "--id", "a", "--scope", "root"])
    assert "invalid choice: 'root'" in capsys.readouterr().err
