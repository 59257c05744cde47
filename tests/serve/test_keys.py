from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.keys import CHECK_EVERY_S, Key, KeySource, hash_key, new_key, parse_keys
from sft.errors import ConfigError


def line(name: str = "app", text: str = "raysft_app_secret", **fields: object) -> str:
    return json.dumps({"id": name, "hash": hash_key(text), **fields})


def write(path: Path, text: str) -> None:
    """Replaces a file as editors do, so that its stamp surely changes."""
    path.with_suffix(".new").write_text(text)
    os.replace(path.with_suffix(".new"), path)


names = st.from_regex(r"[a-z0-9][a-z0-9-]{0,10}", fullmatch=True)


@given(st.sets(names, min_size=1, max_size=5))
def test_a_key_is_found_by_its_own_text_only(ids: set[str]) -> None:
    texts = {name: new_key(name) for name in ids}
    ring = parse_keys("\n".join(line(name, text) for name, text in texts.items()), "keys")
    assert len(ring) == len(ids)
    for name, text in texts.items():
        found = ring.find(text)
        assert found is not None
        assert found.id == name
        assert ring.find(text[:-1]) is None
        assert ring.find(f"{text}0") is None
        assert ring.find(text.upper()) is None


@given(st.text())
def test_no_other_text_is_a_key(text: str) -> None:
    assert parse_keys(line(), "keys").find(text) is None


@given(names)
def test_a_secret_does_not_fit_another_id(name: str) -> None:
    text = new_key("app")
    ring = parse_keys(f"{line('app', text)}\n{line('other', new_key('other'))}", "keys")
    assert ring.find(text.replace("raysft_app_", f"raysft_{name}_")) is (ring.find(text) if name == "app" else None)


def test_keys_are_long_and_never_the_same() -> None:
    first, second = new_key("app"), new_key("app")
    assert first != second
    assert len(first.rpartition("_")[2]) == 64
    assert hash_key("a") == "sha256:ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"


@pytest.mark.parametrize(
    ("models", "allowed", "refused"),
    [
        (("*",), ["base", "support@v1", "a/b"], []),
        (("support",), ["support"], ["support@v1", "supports", "my-support", "SUPPORT", "support\n"]),
        (("support@*",), ["support@v1", "support@v22"], ["support"]),
        (("base", "support*"), ["base", "support", "support@v1"], ["base2", "x"]),
        (("a.b",), ["a.b"], ["aab"]),
    ],
)
def test_models_are_names_or_patterns(models: tuple[str, ...], allowed: list[str], refused: list[str]) -> None:
    key = Key(id="app", hash=hash_key(""), models=models)
    assert [model for model in [*allowed, *refused] if key.may_use(model)] == allowed


def test_empty_lines_and_remarks_are_passed_over() -> None:
    ring = parse_keys(f"# the support team\n\n  {line(concurrency=3)}  \n", "keys")
    key = ring.find("raysft_app_secret")
    assert key is not None
    assert (key.scopes, key.models, key.concurrency, key.tokens_per_minute) == (("chat",), ("*",), 3, None)


def test_all_faults_are_told_by_line_and_none_tells_a_hash() -> None:
    text = "\n".join(
        [
            line(),
            line(),
            "nonsense",
            "[1]",
            line("Big"),
            line("b", scopes=["root"]),
            line("c", models=[]),
            line("d", rate=1),
            line("e", concurrency=0),
            '{"id": "f", "hash": "raysft_f_secret"}',
        ]
    )
    with pytest.raises(ConfigError) as caught:
        parse_keys(text, "keys.jsonl")
    starts = [
        "line 2: the id app is taken",
        "line 3: is no JSON object",
        "line 4: the line: ",
        "line 5: id: ",
        "line 6: scopes.0: ",
        "line 6: scopes: ",
        "line 7: models: ",
        "line 8: rate: ",
        "line 9: concurrency: ",
        "line 10: hash: ",
    ]
    assert [fault.startswith(start) for fault, start in zip(caught.value.faults, starts, strict=True)] == [True] * 10
    assert "secret" not in str(caught.value)
    assert hash_key("raysft_app_secret") not in str(caught.value)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys.jsonl", Clock()
    write(path, line())
    source = KeySource(str(path), clock=clock)
    assert source.configured
    before = source.ring()
    write(path, line("other", "raysft_other_secret"))
    assert source.ring() is before
    clock.now += CHECK_EVERY_S
    after = source.ring()
    assert (after.find("raysft_app_secret"), after.find("raysft_other_secret") is None) == (None, False)
    clock.now += CHECK_EVERY_S
    assert source.ring() is after


@pytest.mark.parametrize("fault", ["gone", "broken"])
def test_a_file_with_faults_leaves_the_keys_in_force(tmp_path: Path, fault: str) -> None:
    path, clock = tmp_path / "keys.jsonl", Clock()
    write(path, line())
    source = KeySource(str(path), clock=clock)
    if fault == "gone":
        path.unlink()
    else:
        write(path, "nonsense")
    clock.now += CHECK_EVERY_S
    assert source.ring().find("raysft_app_secret") is not None
    write(path, "")
    clock.now += CHECK_EVERY_S
    assert len(source.ring()) == 0
    assert source.configured


def test_keys_of_the_environment_come_beside_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    write(path, line())
    assert len(KeySource(str(path), line("other")).ring()) == 2
    assert len(KeySource(None, line("other")).ring()) == 1
    assert not KeySource(None, " \n").configured


def test_a_file_that_cannot_be_read_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the API keys cannot be read: No such file"):
        KeySource(str(tmp_path / "none"))
    (tmp_path / "bytes").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="it is no UTF-8 text"):
        KeySource(str(tmp_path / "bytes"))
