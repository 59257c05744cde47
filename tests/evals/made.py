"""Small suites, answers and summaries for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evals.checkers import AnyChecker
from evals.records import Key, Record
from evals.scoring import Scored, score_all
from evals.suite import Generation, Row, Suite, fingerprint
from evals.summary import Summary, summarise
from evals.text_checkers import Contains, Length

MODELS = ("base", "tuned")


def made_suite(rows: int = 4, name: str = "yes", against: str | None = None, samples: int = 1) -> Suite:
    """Every row is right where the answer holds `yes`, and short."""
    checkers: dict[str, AnyChecker] = {
        "yes": Contains(kind="contains", reference="yes"),
        "short": Length(kind="length", max=5),
    }
    made = tuple(Row(f"r{n}", ({"role": "user", "content": f"{name} {n}?"},), None, checkers) for n in range(rows))
    return Suite(name, "Says yes.", "all", against, Generation(temperature=1, samples=samples), made)


def answered(suite: Suite, answers: Mapping[str, Sequence[str | None]], prompt_tokens: int = 10) -> dict[Key, Record]:
    """Records of each model's answers, sample by sample of row by row; None is a request that timed out."""
    found = {}
    for model, texts in answers.items():
        places = [(row, sample) for row in suite.rows for sample in range(suite.generation.samples)]
        for (row, sample), text in zip(places, texts, strict=False):
            asked = fingerprint(suite.request(row, sample, None))
            record = Record(suite.name, model, row.id, sample, asked, failure="timeout", detail="no answer within 1 s")
            if text is not None:
                record = Record(suite.name, model, row.id, sample, asked, text, "", "stop", prompt_tokens, 2)
            found[record.key] = record
    return found


def summed(suites: Sequence[Suite], records: Mapping[Key, Record]) -> tuple[Summary, list[Scored]]:
    """Scores and sums up."""
    scored = list(score_all(suites, MODELS, records, None))
    return summarise(suites, MODELS, scored, None), scored
