"""A promotion through a gate, against a real gateway in front of a stand-in engine; tests/engine has a real one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from evals.errors import GateError, SuiteError
from jobs import adapters, promotion
from serve.errors import BadRequestError, ConflictError, Failure, NotReadyError
from serve.items import Final
from serve.registry import Registry
from serve.traffic import Target
from serve.versions import VersionId
from sft.errors import ConfigError
from tests.ports import free_port
from tests.registries import filled_registry
from tests.serve.served import served
from tests.serve.stand_in import USAGE, Part, StandIn, StandInFleet, gateway_app

pytestmark = pytest.mark.anyio

V1, V2, V3 = (VersionId("support", number) for number in (1, 2, 3))
SUITE = """
name: polite
description: Says please.
checkers: {please: {kind: contains, reference: please}}
generation: {max_tokens: 8}
rows:
  - {id: one, prompt: The first.}
  - {id: two, prompt: The second.}
"""


class Speaker(StandIn):
    """Says please, but for the versions that are told to say something else."""

    def __init__(self) -> None:
        super().__init__()
        self.words: dict[str, str | Failure] = {}

    def own_items(self, target: Target) -> Sequence[Part]:
        word = self.words.get(str(target), "please")
        if isinstance(word, Failure):
            return [word]
        message = {"role": "assistant", "content": word}
        return [Final(json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}), USAGE)]


@dataclass
class Site:
    """A running server, and a gate beside it."""

    url: str
    registry: Registry
    engine: Speaker
    fleet: StandInFleet
    folder: Path

    def gate(self, rules: str = "[{suite: polite, at_least: 1, rows: 2}]", more: str = "suites: [polite.yaml]") -> Path:
        (self.folder / "polite.yaml").write_text(SUITE)
        path = self.folder / "gate.yaml"
        path.write_text(f"rules: {rules}\n{more}\n")
        return path

    async def promote(self, version: VersionId = V2, *, alias: str = "support", gate: Path | None = None) -> Any:
        call = (self.url, None, gate or self.gate(), alias, version, "why")
        return await asyncio.to_thread(promotion.promote, *call)

    def serves(self, alias: str = "support") -> tuple[int, VersionId] | None:
        entry = Registry.open(self.registry.address).alias(alias)
        return (entry.number, entry.version) if entry else None


@pytest.fixture
async def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    monkeypatch.setattr(promotion, "TRIES", 1)
    registry, engine, fleet = filled_registry(tmp_path / "registry"), Speaker(), StandInFleet()
    registry.promote("support", V1)
    log = {"access_file": str(tmp_path / "access.jsonl")}
    async with served(gateway_app(engine, registry, fleet=fleet, log=log)) as port:
        yield Site(f"http://127.0.0.1:{port}/v1", registry, engine, fleet, tmp_path)


async def test_a_good_version_is_promoted_and_its_evaluation_kept(site: Site) -> None:
    data, text = await site.promote()
    assert (data["version"], data["number"], data["evaluation"], data["moved"]) == ("support@v2", 2, 1, True)
    assert text.splitlines()[:4] == [
        "passed  polite score.mean at_least 1: score.mean is 1",
        "passed  every answer is scored: all 4 are",
        "evaluation 1 of support@v2, against support@v1",
        "support@v2 passed the gate",
    ]
    assert site.serves() == (2, V2)
    # Loaded before it is asked, asked by its exact name, loaded again before the alias moves.
    assert site.fleet.asked == [[V2], [V2]]
    assert sorted(str(target) for _, _, target in site.engine.asked) == ["support@v1"] * 2 + ["support@v2"] * 2
    (kept,) = site.registry.evaluations(V2)
    score = kept.suites["polite"]
    assert (kept.baseline, kept.passed, kept.reason, score.version.mean, score.difference) == (
        "support@v1",
        True,
        "why",
        1.0,
        0.0,
    )
    assert "ray" in kept.software


async def test_a_bad_version_stays_out_and_its_rows_are_named(site: Site) -> None:
    site.engine.words["support@v2"] = "no"
    with pytest.raises(GateError) as failed:
        await site.promote(gate=site.gate("[{suite: polite, at_least: 1}, {suite: polite, not_worse_by: 0.1}]"))
    lines = str(failed.value).splitlines()
    assert lines[:2] == ["FAILED  polite score.mean at_least 1: score.mean is 0", "        rows: one, two"]
    assert lines[2].startswith("FAILED  polite not_worse_by 0.1: -1.000 to support@v1 on 2 rows")
    assert lines[-1] == "support@v2 failed the gate: support stays at support@v1"
    assert site.serves() == (1, V1)
    assert [(one.number, one.passed) for one in site.registry.evaluations(V2)] == [(1, False)]
    # A person may still promote it: the gate binds only who asks for it.
    assert site.registry.promote("support", V2).evaluation is None


async def test_an_answer_without_a_score_fails_the_gate_whatever_its_rules(site: Site) -> None:
    for model in ("support@v1", "support@v2"):
        site.engine.words = {model: Failure(500, "broken", "server_error", None, "internal_error")}
        with pytest.raises(GateError, match=f"polite, {model}: only 0 of 2 \\(http_500: 2\\)"):
            await site.promote(gate=site.gate("[{suite: polite, metric: truncated, at_most: 9}]"))
    assert site.serves() == (1, V1)


async def test_the_baseline_is_the_base_model_where_nothing_is_served_yet(site: Site) -> None:
    gate = site.gate("[{suite: polite, not_worse_by: 1}]")
    data, _ = await site.promote(alias="new", gate=gate)
    assert (data["gate"]["baseline"], site.serves("new")) == ("base", (1, V2))
    data, _ = await site.promote(V3, gate=site.gate(more="suites: [polite.yaml]\nbaseline: support@v2"))
    assert data["gate"]["baseline"] == "support@v2"
    with pytest.raises(ConfigError, match="support@v2 is the version that is to be promoted"):
        await site.promote(V2, gate=site.gate(more="suites: [polite.yaml]\nbaseline: support@v2"))


async def test_who_moved_the_alias_meanwhile_wins(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = promotion._evaluate

    def moved_meanwhile(*arguments: Any) -> Any:
        Registry.open(site.registry.address).promote("support", V3)
        return whole(*arguments)

    monkeypatch.setattr(promotion, "_evaluate", moved_meanwhile)
    with pytest.raises((ConflictError, BadRequestError), match="support was moved meanwhile: it is at entry 2, no lon"):
        await site.promote()
    assert site.serves() == (2, V3)
    assert [one.passed for one in site.registry.evaluations(V2)] == [True]


async def test_a_version_that_is_served_already_is_not_asked(site: Site) -> None:
    data, text = await site.promote(V1)
    assert (data["moved"], text) == (False, "support serves support@v1 already; nothing changed")
    assert site.engine.asked == []


async def test_a_version_that_a_replica_refuses_is_not_asked(site: Site) -> None:
    site.fleet.refused = {V2: "support@v2 cannot be served: it has no effect"}
    with pytest.raises(BadRequestError, match="it has no effect"):
        await site.promote()
    assert (site.engine.asked, site.serves()) == ([], (1, V1))


async def test_a_server_that_is_gone_moves_nothing(site: Site) -> None:
    site.url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(NotReadyError, match="nobody answers"):
        await site.promote()
    assert site.serves() == (1, V1)


@pytest.mark.parametrize(
    ("rules", "more", "kind", "fault"),
    [
        ("[{suite: polite, at_least: 1}]", "", ConfigError, "suites: is missing"),
        ("[{suite: polite, at_least: 1}]", "suites: [none.yaml]", SuiteError, "none.yaml"),
        ("[{suite: rude, at_least: 1}]", "suites: [polite.yaml]", ConfigError, "rude is none of its suites"),
        ("[{suite: polite, at_least: 1, rows: 3}]", "suites: [polite.yaml]", ConfigError, "3 are asked for, and polit"),
    ],
)
async def test_a_wrong_gate_is_refused_before_anything_is_asked(
    site: Site, rules: str, more: str, kind: type[Exception], fault: str
) -> None:
    with pytest.raises(kind, match=fault):
        await site.promote(gate=site.gate(rules, more))
    assert (site.fleet.asked, site.engine.asked) == ([], [])


async def test_as_a_command(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["promote", "support@v2", "--gate", str(site.gate()), "--endpoint", site.url, "--json"]
    with pytest.raises(ConfigError, match="--gate asks the version on the engine that is to serve it: give --endpoint"):
        adapters.main(words[:4])
    site.engine.words["support@v2"] = "no"
    assert await asyncio.to_thread(adapters.main, words) == 1
    failed = json.loads(capsys.readouterr().out)
    assert (failed["passed"], failed["moved"], failed["rules"][0]["rows"]) == (False, False, ["one", "two"])
    site.engine.words = {}
    assert await asyncio.to_thread(adapters.main, words) == 0
    assert json.loads(capsys.readouterr().out)["evaluation"] == 2
    show = ["show", "support@v2", "--registry", site.registry.address]
    assert adapters.main([*show, "--json"]) == 0
    assert [one["passed"] for one in json.loads(capsys.readouterr().out)["evaluations"]] == [False, True]
    assert adapters.main(show) == 0
    lines = capsys.readouterr().out.splitlines()
    place = lines.index("  evaluations")
    assert lines[place + 1].startswith("    1: failed gate ")
    assert lines[place + 2] == "       polite: 0.0% of 2 rows, support@v1 100.0%"
    assert lines[place + 3].startswith("    2: passed gate ")
    assert adapters.main(["history", "support", "--registry", site.registry.address]) == 0
    heading, _, entry = capsys.readouterr().out.splitlines()
    assert heading.split()[-3:] == ["GATE", "BY", "REASON"]
    assert " evaluation 2 " in entry
