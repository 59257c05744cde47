"""A promotion through a gate: the version is asked on the engine that is to serve it, and moves only if it passes."""

from __future__ import annotations

import asyncio
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from evals.client import Client, Request
from evals.errors import GateError
from evals.gate import CURRENT, Gate, Verdict, judge, read_gate, read_gate_suites, suite_digest, unscored_reasons
from evals.records import Key, Record
from evals.scoring import score_all
from evals.suite import Suite
from evals.summary import ModelSummary, Summary, summarise
from jobs.adapter_text import moved, moved_text
from jobs.endpoint import get, post, read_key, root
from jobs.evaluate import to_ask
from serve.errors import NotReadyError
from serve.evaluations import Findings, ModelScore, RuleResult, SuiteScore
from serve.versions import AliasEntry, VersionId
from sft.errors import ConfigError

Found = TypeVar("Found")

CONCURRENCY = 8
TIMEOUT_S = 120.0
TRIES = 5
REPORT_S = 5.0
KEPT_ROWS = 200
"""So many rows of a rule are kept with an evaluation; the suite tells the others."""
WHOLE = "every answer is scored"


def promote(
    endpoint: str, key_file: Path | None, gate_file: Path, alias: str, version: VersionId, reason: str
) -> tuple[dict[str, Any], str]:
    """Promotes a version if it passes a gate, and keeps the evaluation with it either way.

    Every replica loads and proves the version first. Then the gate's suites are asked of it and of the baseline by
    their exact names, so no other client meets it. The alias moves only from the entry that it had at the start.

    Args:
        endpoint: the server's address.
        key_file: file with an API key with the scopes chat and admin; None takes that of the environment.
        gate_file: the gate.
        alias: what is to serve the version.
        version: the version.
        reason: why; kept with the evaluation and the move.

    Returns:
        What was found and done, as plain data and for people.

    Raises:
        ConfigError: the gate file is wrong.
        SuiteError: its suites are.
        GateError: the version did not pass.
        RaysftError: the server cannot be reached, refuses the version, or the alias was moved meanwhile.
    """
    gate = read_gate(gate_file)
    suites = read_gate_suites(gate, gate_file)
    server = _Server(endpoint, read_key(key_file))
    entry = server.alias(alias)
    if entry and entry.version == version:
        return {**entry.model_dump(mode="json"), "moved": False}, moved(entry, entry)
    prepared = server.prepare(version)
    baseline = _baseline(gate, gate_file, entry, version, str(prepared["base"]))
    summary = _evaluate(server, suites, baseline, str(version))
    verdict = judge(gate, summary, str(version))
    found = _findings(gate_file, suites, summary, verdict, dict(prepared["software"]))
    number = server.keep(version, found, reason)
    lines = [*_lines(found), f"evaluation {number} of {version}, against {baseline}"]
    data = {"evaluation": number, **found.model_dump(mode="json")}
    if not found.passed:
        stays = f"{alias} stays at {entry.version}" if entry else f"{alias} is not promoted"
        raise GateError("\n".join([*lines, f"{version} failed the gate: {stays}"]), {**data, "moved": False})
    fields = {"version": str(version), "expected": entry.number if entry else 0, "evaluation": number, "reason": reason}
    done = server.change(f"aliases/{alias}/promote", fields)
    text = "\n".join([*lines, f"{version} passed the gate", server.read(lambda: moved_text(done))])
    return {**done.pop("entry"), **done, "gate": data}, text


class _Server:
    """The routes of a raysft server that a gate needs."""

    def __init__(self, endpoint: str, key: str | None) -> None:
        self.endpoint, self.key = endpoint, key

    def alias(self, alias: str) -> AliasEntry | None:
        """The newest entry of an alias; None where there is none."""
        found = get(self.endpoint, self.key, "admin/aliases")
        return self.read(lambda: AliasEntry.model_validate(entry) if (entry := found["aliases"].get(alias)) else None)

    def prepare(self, version: VersionId) -> dict[str, Any]:
        """Has all replicas hold a version; says also what the base model and the software are."""
        found = self.change(f"versions/{version}/prepare", {})
        return self.read(lambda: {name: found[name] for name in ("base", "software")})

    def keep(self, version: VersionId, found: Findings, reason: str) -> int:
        """Keeps what was found with a version; returns the evaluation's number."""
        body = {"found": found.model_dump(mode="json"), "reason": reason}
        kept = self.change(f"versions/{version}/evaluations", body)
        return self.read(lambda: int(kept["number"]))

    def change(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Asks for a change."""
        return post(self.endpoint, self.key, f"admin/{path}", body)

    def read(self, take: Callable[[], Found]) -> Found:
        """Reads what the server sent.

        Raises:
            NotReadyError: it lacks what is taken of it.
        """
        try:
            return take()
        except (KeyError, TypeError, ValueError, AttributeError, ValidationError):
            raise NotReadyError(f"{self.endpoint} sent what no raysft server of this release sends") from None


def _baseline(gate: Gate, path: Path, entry: AliasEntry | None, version: VersionId, base: str) -> str:
    found = gate.baseline
    if found == CURRENT:
        found = str(entry.version) if entry else base
    if found == str(version):
        raise ConfigError(str(path), [f"baseline: {found} is the version that is to be promoted; name another model"])
    return found


def _evaluate(server: _Server, suites: Sequence[Suite], baseline: str, version: str) -> Summary:
    """Asks both models; what could not be asked has no score."""
    models = [baseline, version]
    missing = list(to_ask(suites, models, {}, None))
    print(f"asking {len(missing):,} answers of {version} and {baseline} ...", file=sys.stderr, flush=True)
    records = asyncio.run(_ask(server, missing))
    return summarise(suites, models, score_all(suites, models, records, None), None)


async def _ask(server: _Server, missing: Sequence[Request]) -> dict[Key, Record]:
    records: dict[Key, Record] = {}
    client = Client(f"{root(server.endpoint)}/v1", server.key, timeout_s=TIMEOUT_S, tries=TRIES)
    try:
        said = time.monotonic()
        async for record in client.ask_all(missing, CONCURRENCY):
            records[record.key] = record
            if time.monotonic() - said >= REPORT_S:
                said = time.monotonic()
                print(f"asked {len(records):,} of {len(missing):,} ...", file=sys.stderr, flush=True)
    finally:
        await client.close()
    return records


def _findings(
    path: Path, suites: Sequence[Suite], summary: Summary, verdict: Verdict, software: dict[str, str]
) -> Findings:
    """What is kept of an evaluation. Besides the gate's rules one holds always: an answer without a score fails it."""
    model, baseline = verdict.model, summary.baseline
    rules = [
        RuleResult(rule=str(one.rule), passed=one.passed, reason=one.reason, rows=one.rows[:KEPT_ROWS])
        for one in verdict.findings
    ]
    rules.append(_whole(summary))
    return Findings(
        gate=hashlib.sha256(path.read_bytes()).hexdigest(),
        baseline=baseline,
        suites={suite.name: _suite_score(suite, summary, model, baseline) for suite in suites},
        rules=tuple(rules),
        passed=all(rule.passed for rule in rules),
        software=software,
    )


def _whole(summary: Summary) -> RuleResult:
    found = [(name, model, of) for name, suite in summary.suites.items() for model, of in suite.models.items()]
    holes = [
        f"{name}, {model}: only {of.scored} of {of.asked}{unscored_reasons(of)}"
        for name, model, of in found
        if of.scored < of.asked
    ]
    asked = sum(of.asked for _, _, of in found)
    return RuleResult(rule=WHOLE, passed=not holes, reason="; ".join(holes) or f"all {asked} are")


def _suite_score(suite: Suite, summary: Summary, model: str, baseline: str) -> SuiteScore:
    models = summary.suites[suite.name].models
    paired = models[model].paired
    return SuiteScore(
        fingerprint=suite_digest(suite),
        version=_model_score(models[model]),
        baseline=_model_score(models[baseline]),
        difference=paired.difference if paired else None,
        interval=paired.interval if paired else None,
    )


def _model_score(of: ModelSummary) -> ModelScore:
    score = of.score
    return ModelScore(asked=of.asked, scored=of.scored, rows=score.rows, mean=score.mean, interval=score.interval)


def _lines(found: Findings) -> list[str]:
    lines = []
    for rule in found.rules:
        lines.append(f"{'passed' if rule.passed else 'FAILED'}  {rule.rule}: {rule.reason}")
        if rule.rows:
            lines.append(f"        rows: {', '.join(rule.rows)}")
    return lines
