"""`python -m jobs.evaluate --models BASE,TUNED --suite FILE --output FOLDER`: who follows instructions better?"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field, field_validator

from evals.client import Request
from evals.gate import Verdict, judge, read_gate
from evals.records import Key, Record, appended, read_records, write_record
from evals.report import page
from evals.scoring import Scored, score_all
from evals.suite import Suite, fingerprint, read_suites
from evals.summary import Paired, Summary, summarise
from jobs import cli
from jobs.endpoint import read_key
from jobs.evaluate_on_ray import Asking, ask, ask_on_ray, score_on_ray, workers_on_ray
from sft.section import Section

DESCRIPTION = """Ask models the same prompts over HTTP, score the answers, and compare each model with the first.
Any OpenAI-compatible endpoint will do; its API key is read from RAYSFT_API_KEY. Writes answers.jsonl, scores.jsonl,
summary.json and report.html into the output folder; run again, it asks only what is missing. Exit code 0 where every
answer was scored and every gate passed, 1 where not, 2 where the configuration or a suite is wrong.
"""
REPORT_S = 5.0


class EvaluateConfig(Section):
    """An evaluation."""

    url: str = Field("http://127.0.0.1:8000/v1", description="The endpoint's address, up to and with /v1.")
    models: list[str] = Field(min_length=1, description="Models to ask, the baseline first: base,support@v2.")
    suite: list[Path] = Field(min_length=1, description="Suite files, or folders of them.")
    output: Path = Field(description="Folder for answers, scores, summary and report.")
    gate: Path | None = Field(
        None, description="Gate file; every model but the baseline must pass it, and a single model."
    )
    concurrency: int = Field(8, gt=0, description="Requests at a time.")
    workers: int | None = Field(
        None, gt=0, description="Ask and score in so many tasks of Ray Data; the files come out the same."
    )
    timeout_s: float = Field(120.0, gt=0, description="Longest time for one answer.")
    tries: int = Field(5, gt=0, description="How often a request is sent before it counts as failed.")
    max_rows: int | None = Field(None, gt=0, description="Ask only the first rows of each suite.")
    thinking: bool | None = Field(None, description="Switch thinking on or off (enable_thinking of the chat template).")

    @field_validator("models")
    @classmethod
    def _differ(cls, models: list[str]) -> list[str]:
        if len(set(models)) < len(models) or not all(map(str.strip, models)):
            raise ValueError("each model must be named, and only once")
        return models


@dataclass
class Progress:
    """Prints a line every few seconds."""

    total: int
    begun: float = field(default_factory=time.monotonic)
    said: float = field(default_factory=time.monotonic)
    done: int = 0
    failed: int = 0

    def add(self, record: Record) -> None:
        """Counts a request that ended."""
        self.done += 1
        self.failed += bool(record.failure)
        now = time.monotonic()
        if now - self.said >= REPORT_S:
            self.said = now
            speed = self.done / (now - self.begun)
            left = (self.total - self.done) / speed
            print(
                f"asked {self.done:,} of {self.total:,}, {self.failed:,} failed, {speed:.1f}/s, "
                f"about {left:.0f} s to go ({record.suite}, {record.model})",
                flush=True,
            )


@dataclass(frozen=True)
class Evaluation:
    """What came of an evaluation; its files lie in the config's output folder."""

    scored: Sequence[Scored]
    summary: Summary
    verdicts: Sequence[Verdict]

    @property
    def passed(self) -> bool:
        """Whether every answer was scored and every gate passed."""
        return self.summary.complete and all(verdict.passed for verdict in self.verdicts)


def main(argv: Sequence[str] | None = None) -> int:
    """The job."""
    made = cli.parser("evaluate", DESCRIPTION)
    _, config = cli.configure(made, EvaluateConfig, argv)
    found = evaluate(config, read_suites(config.suite))
    for line in lines(found.summary):
        print(line)
    for verdict in found.verdicts:
        print("\n".join(verdict.lines()))
    print(f"report: {config.output / 'report.html'}")
    return 0 if found.passed else 1


def evaluate(config: EvaluateConfig, suites: Sequence[Suite]) -> Evaluation:
    """Asks what has no answer yet, scores all answers, and writes them with summary and report.

    Args:
        config: whom to ask, and how.
        suites: what to ask; `config.suite` is not read again.

    Raises:
        RaysftError: the gate or the answers on file are wrong, or the endpoint is no use.
    """
    suites = [suite.first(config.max_rows) for suite in suites]
    gate = read_gate(config.gate) if config.gate else None
    key = read_key(None)
    answers = config.output / "answers.jsonl"
    with appended(answers) as file:
        records = read_records(answers)
        requests = list(to_ask(suites, config.models, records, config.thinking))
        asked = sum(len(suite.rows) * suite.generation.samples for suite in suites) * len(config.models)
        print(
            f"{len(suites)} suites, {len(config.models)} models, {asked:,} answers: "
            f"{asked - len(requests):,} are there, {len(requests):,} to ask at {config.url}",
            flush=True,
        )
        progress = Progress(len(requests))

        def keep(record: Record) -> None:
            records[record.key] = record
            write_record(file, record)
            progress.add(record)

        asking = Asking(config.url, key, config.timeout_s, config.tries, config.concurrency)
        if config.workers:
            with workers_on_ray(config.workers):
                for record in ask_on_ray(asking, requests, config.workers):
                    keep(record)
                scored = list(score_on_ray(suites, config.models, records, config.thinking, config.workers))
        else:
            asyncio.run(ask(asking, requests, keep))
            scored = list(score_all(suites, config.models, records, config.thinking))
        summary = summarise(suites, config.models, scored, config.thinking)
        verdicts = [judge(gate, summary, model) for model in config.models[1:] or config.models] if gate else []
        _write(config.output, summary, suites, scored, verdicts)
    return Evaluation(scored, summary, verdicts)


def missing(config: EvaluateConfig, suites: Sequence[Suite]) -> int:
    """How many answers are not there yet."""
    records = read_records(config.output / "answers.jsonl")
    return len(
        list(to_ask([suite.first(config.max_rows) for suite in suites], config.models, records, config.thinking))
    )


def to_ask(
    suites: Sequence[Suite], models: Sequence[str], records: Mapping[Key, Record], thinking: bool | None
) -> Iterable[Request]:
    """Yields what has no answer yet, or only one to another request; all models are asked of a row in turn."""
    for suite in suites:
        for row in suite.rows:
            for sample in range(suite.generation.samples):
                body = suite.request(row, sample, thinking)
                wanted = fingerprint(body)
                for model in models:
                    record = records.get((suite.name, model, row.id, sample))
                    if record is None or record.failure or record.request != wanted:
                        yield Request(Record(suite.name, model, row.id, sample, wanted), body)


def lines(summary: Summary) -> Iterable[str]:
    """The summary for people: a line for each suite and model."""
    for name, suite in summary.suites.items():
        yield f"{name}: {suite.rows} rows"
        for model, of in suite.models.items():
            interval = of.score.interval
            found = f"{of.score.mean:.1%} ({interval[0]:.1%} to {interval[1]:.1%})" if interval else "no score"
            holes = "".join(f", {count} unscored: {reason}" for reason, count in of.unscored.items())
            yield f"  {model}: {found}{holes}"
            for paired in filter(None, (of.paired, of.across)):
                yield f"    {_against(paired, name)}"


def _against(paired: Paired, suite: str) -> str:
    where = "" if paired.suite == suite else f" on {paired.suite}"
    if paired.interval is None or paired.difference is None:
        return f"to {paired.model}{where}: no row has both scores"
    low, high = (100 * end for end in paired.interval)
    chance = "" if paired.p is None else f", p {paired.p:.3g}"
    return (
        f"to {paired.model}{where}: {100 * paired.difference:+.1f} points ({low:+.1f} to {high:+.1f}{chance}), "
        f"{len(paired.better)} rows up, {len(paired.worse)} down"
    )


def _write(
    folder: Path, summary: Summary, suites: Sequence[Suite], scored: Sequence[Scored], verdicts: Sequence[Verdict]
) -> None:
    rows = "".join(json.dumps(one.to_dict(), ensure_ascii=False) + "\n" for one in scored)
    (folder / "scores.jsonl").write_text(rows, encoding="utf-8")
    (folder / "summary.json").write_text(summary.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page(summary, suites, scored, verdicts), encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
