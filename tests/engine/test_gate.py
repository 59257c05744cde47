"""A bad version is stopped by its gate, or by the guard, on the real engine and while traffic goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import adapters
from serve.versions import VersionId
from tests.bundles import lora_bundle
from tests.engine.conftest import Endpoint
from tests.engine.test_serve import ask
from tests.load import Load, until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

GATE = """
suites: [capitals.yaml]
rules:
  - {suite: capitals, at_least: 0.75, rows: 4}
  - {suite: capitals, not_worse_by: 0.9}
"""
SUITE = """
name: capitals
description: Capitals, in a short sentence.
checkers: {right: {kind: contains}, brief: {kind: length, max: 8}}
generation: {max_tokens: 16}
rows:
  - {id: france, prompt: "What is the capital of France?", reference: Paris}
  - {id: japan, prompt: "What is the capital of Japan?", reference: Tokyo}
  - {id: italy, prompt: "What is the capital of Italy?", reference: Rome}
  - {id: germany, prompt: "What is the capital of Germany?", reference: Berlin}
"""


def test_a_gate_stops_a_bad_version_while_traffic_goes_on(
    endpoint: Endpoint, demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "capitals.yaml").write_text(SUITE)
    gate = tmp_path / "gate.yaml"
    gate.write_text(GATE)
    # With little noise the answers stay the base model's own, if to other log-probabilities.
    for seed, std in ((31, 0.02), (34, 1.0), (32, 0.02)):
        lora_bundle(tmp_path / str(seed), demo_model, seed=seed, std=std)
        endpoint.registry.publish(tmp_path / str(seed), "gated")
    good, bad, better = (VersionId("gated", number) for number in (1, 2, 3))

    def promote(version: VersionId) -> int:
        return adapters.main(["promote", str(version), "--gate", str(gate), "--endpoint", endpoint.url])

    assert promote(good) == 0  # where nothing is served yet, the base model is the baseline
    with Load(endpoint.url, ["gated"], 2) as load:
        load.more(2)
        capsys.readouterr()
        assert promote(bad) == 1
        lines = capsys.readouterr().out.splitlines()
        load.more(4)
        entry = endpoint.registry.alias("gated")
        assert entry
        assert (entry.number, entry.version) == (1, good)
        assert promote(better) == 0
        load.more(4)
    assert (load.faults, load.torn) == ([], [])
    assert {heard.version for heard in load.whole} == {str(good), str(better)}
    assert load.whole[-1].version == str(better)
    assert lines[0].startswith("FAILED  capitals score.mean at_least 0.75: score.mean is ")
    assert "france" in lines[1]
    assert lines[-1] == "gated@v2 failed the gate: gated stays at gated@v1"
    kept = {number: endpoint.registry.evaluations(VersionId("gated", number)) for number in (1, 2, 3)}
    assert {number: [one.passed for one in found] for number, found in kept.items()} == {
        1: [True],
        2: [False],
        3: [True],
    }
    assert (kept[2][0].baseline, kept[2][0].suites["capitals"].version.rows) == ("gated@v1", 4)
    moves = [(entry.version, entry.evaluation) for entry in endpoint.registry.history("gated")]
    assert moves == [(good, 1), (better, 1)]


def test_the_guard_takes_back_what_breaks_a_checker_on_live_traffic(
    endpoint: Endpoint, bundles: Callable[[int], Path]
) -> None:
    check_guard(endpoint, bundles)


def check_guard(endpoint: Endpoint, bundles: Callable[[int], Path]) -> None:
    """A version that speaks no JSON is promoted to `guarded`, and taken back once, while clients ask."""
    for seed in (1, 2):
        endpoint.registry.publish(bundles(seed), "guarded")
    first, second = (VersionId("guarded", number) for number in (1, 2))
    for version in (first, second):
        body = {"version": str(version)}
        moved = endpoint.client.post("/admin/aliases/guarded/promote", json=body)
        assert moved.status_code == 200, moved.text
    with Load(endpoint.url, ["guarded"], 2) as load:
        until(lambda: len(endpoint.registry.history("guarded")) == 3, 60)
        until(lambda: load.whole[-1].version == str(first), 30)
        load.more(6)
    assert (load.faults, load.torn) == ([], [])
    entry = endpoint.registry.history("guarded")[-1]
    assert (entry.action, entry.version, entry.by) == ("rollback", first, "guard")
    assert entry.reason.startswith("guarded@v2: checker json scores ")
    assert ask(endpoint, "guarded", max_tokens=1).headers["x-raysft-version"] == str(first)
    assert len(endpoint.registry.history("guarded")) == 3
    metrics = endpoint.client.get("/metrics").text
    assert 'raysft_guard_rollbacks_total{alias="guarded",reason="checker"' in metrics
