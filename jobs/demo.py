"""`python -m jobs.demo --config FILE`: the whole loop on one machine, and the proof that it worked.

Prepares a small real model, trains an adapter on the shipped procedures, publishes it, serves base and adapter, asks
both the same new questions over HTTP, and compares how often each answers in the trained format.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs import cli
from jobs.demo_model import prepare_demo_model
from jobs.phase import phase
from jobs.publish import publish_once
from serve.config import ServeConfig
from serve.registry import Registry
from serve.versions import Version
from sft.config import TrainConfig, read_config
from sft.errors import ConfigError, DataError, RaysftError
from sft.section import Section

DESCRIPTION = """Train, publish, serve and ask: the whole loop on this machine. Exit code 0 only if the tuned model
answers new questions in the trained format (at least 9 of 10) and the base model does not (fewer than 2 of 10).
"""
TUNED_AT_LEAST = 0.9
BASE_BELOW = 0.2
PARALLEL = 8
MAX_TOKENS = 72
PROCEDURE = re.compile(r"[A-Z]{3}-\d{2}")


class DemoConfig(Section):
    """What the demo trains, serves and asks."""

    train: Path
    serve: Path
    questions: Path
    output: Path


class DemoError(RaysftError):
    """The demo ran to its end, but its result is not as promised."""


class Question(Section):
    """A question that is in no training row, and the procedure that a support agent would name."""

    question: str
    procedure: str


class Answer(Section):
    """One question and what both models said."""

    question: str
    procedure: str
    base: str
    tuned: str


class DemoReport(Section):
    """What `result.json` holds. Rates are shares of the questions; speeds are of the run that made the adapter."""

    base_format_rate: float
    tuned_format_rate: float
    tuned_procedure_rate: float
    questions: int
    adapter: str
    train_steps: int
    train_tokens_per_s: float
    train_trained_tokens_per_s: float
    train_reused: bool
    seconds: dict[str, float]
    answers: list[Answer]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the demo; see the module's text."""
    made = cli.parser("demo", DESCRIPTION)
    made.add_argument("--keep", action="store_true", help="leave the endpoint up until Ctrl-C")
    arguments, config = cli.configure(made, DemoConfig, argv)
    training = read_config(TrainConfig, config.train)
    serving = read_config(ServeConfig, config.serve)
    questions = read_questions(config.questions)
    console = Console(soft_wrap=True, highlight=False)
    seconds: dict[str, float] = {}

    def say(line: str) -> None:
        console.print(line, markup=False)

    with phase(console, "model", seconds):
        made_now = prepare_demo_model(Path(training.model.base))
        say(f"{'made' if made_now else 'using'} {training.model.base}")
    with phase(console, "train", seconds):
        from sft.trainer import train  # PyTorch takes seconds to import, which --help need not wait for

        result = train(training, say)
    with phase(console, "publish", seconds):
        version = publish(training, result.bundle)
        say(f"{version.id} in {training.registry}, alias {training.alias}")

    import ray

    from serve import app

    try:
        with phase(console, "serve", seconds):
            url = app.start(serving, say)
        with phase(console, "ask", seconds):
            answers = ask(url, serving.id, str(training.alias), questions)
        report = DemoReport(
            base_format_rate=_share(follows_format(answer.base) for answer in answers),
            tuned_format_rate=_share(follows_format(answer.tuned) for answer in answers),
            tuned_procedure_rate=_share(names_procedure(answer.tuned, answer.procedure) for answer in answers),
            questions=len(answers),
            adapter=str(version.id),
            train_steps=result.steps,
            train_tokens_per_s=round(result.tokens_per_s, 1),
            train_trained_tokens_per_s=round(result.trained_tokens_per_s, 1),
            train_reused=result.reused,
            seconds={name: round(spent, 1) for name, spent in seconds.items()},
            answers=answers,
        )
        _write(config.output, report)
        show(console, report, serving.id)
        if arguments.keep:
            say(f"\nThe endpoint stays up until Ctrl-C. Ask it yourself:\n{curl(url, str(training.alias))}")
            threading.Event().wait()
    finally:
        if ray.is_initialized():
            app.stop()
            ray.shutdown()
    verdict(report)
    say(f"the loop works; details in {config.output}")


def publish(config: TrainConfig, bundle: Path) -> Version:
    """Publishes the run's bundle and points the alias at it; takes the version that holds this very bundle if any.

    Raises:
        ConfigError: the training config names no registry or alias.
    """
    if config.registry is None or config.alias is None:
        raise ConfigError("demo", ["the training config needs `registry` and `alias`"])
    registry = Registry.open(config.registry, create=True)
    version, _ = publish_once(registry, bundle, config.name)
    registry.promote(config.alias, version.id, reason="demo")
    return version


def read_questions(path: Path) -> list[Question]:
    """Reads the held-out questions.

    Raises:
        DataError: the file is missing or a line is no question.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [Question.model_validate_json(line) for line in lines if line.strip()]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        raise DataError(f"{path}: a line is no question: {error.errors()[0]['msg']}") from None


def ask(url: str, base: str, tuned: str, questions: Sequence[Question]) -> list[Answer]:
    """Asks both models all questions over HTTP, greedily.

    Raises:
        DemoError: the endpoint answered with an error.
    """

    def one(client: httpx.Client, model: str, question: str) -> str:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }
        response = client.post(f"{url}/chat/completions", json=body)
        if response.status_code != 200:
            raise DemoError(f"{model} answered {response.status_code}: {response.text[:300]}")
        return str(response.json()["choices"][0]["message"]["content"])

    logging.getLogger("httpx").setLevel(logging.WARNING)  # Serve's set-up turns a line per request on
    with httpx.Client(timeout=600) as client, ThreadPoolExecutor(PARALLEL) as pool:
        asked = [(model, q.question) for q in questions for model in (base, tuned)]
        said = list(pool.map(lambda pair: one(client, *pair), asked))
    return [
        Answer(question=q.question, procedure=q.procedure, base=said[2 * i], tuned=said[2 * i + 1])
        for i, q in enumerate(questions)
    ]


def parsed(answer: str) -> dict[str, object] | None:
    """The answer as the trained format has it: one JSON object with just these three fields; None for anything else."""
    try:
        value = json.loads(answer)
    except ValueError:
        return None
    if not isinstance(value, dict) or list(value) != ["procedure", "action", "escalate"]:
        return None
    procedure, action, escalate = value.values()
    if not isinstance(procedure, str) or not PROCEDURE.fullmatch(procedure):
        return None
    return value if isinstance(action, str) and action.strip() and isinstance(escalate, bool) else None


def follows_format(answer: str) -> bool:
    """Whether an answer is in the trained format."""
    return parsed(answer) is not None


def names_procedure(answer: str, procedure: str) -> bool:
    """Whether an answer is in the trained format and names the right procedure."""
    value = parsed(answer)
    return value is not None and value["procedure"] == procedure


def verdict(report: DemoReport) -> None:
    """Holds the result against the demo's promise.

    Raises:
        DemoError: it falls short.
    """
    if report.tuned_format_rate < TUNED_AT_LEAST or report.base_format_rate >= BASE_BELOW:
        raise DemoError(
            f"answers in the trained format: base {report.base_format_rate:.0%} (wanted below {BASE_BELOW:.0%}), "
            f"tuned {report.tuned_format_rate:.0%} (wanted at least {TUNED_AT_LEAST:.0%})"
        )


def show(console: Console, report: DemoReport, base: str) -> None:
    """Prints both models' answers side by side, then the rates."""
    table = Table(title="The same questions, none of them in the training data", show_lines=True)
    for column in ("question", base, report.adapter):
        table.add_column(column, overflow="fold", ratio=1)
    for answer in report.answers:
        table.add_row(Text(answer.question), Text(answer.base), Text(answer.tuned))
    console.print(table)
    for name, rate in (("base", report.base_format_rate), ("tuned", report.tuned_format_rate)):
        console.print(f"{name:>6}: {rate:4.0%} of {report.questions} answers in the trained format")
    console.print(f"        {report.tuned_procedure_rate:4.0%} of the tuned answers name the right procedure")
    from sft.report import clock

    console.print("        " + ", ".join(f"{name} {clock(spent)}" for name, spent in report.seconds.items()))


def curl(url: str, model: str) -> str:
    """A command line that asks the endpoint."""
    body = {"model": model, "messages": [{"role": "user", "content": "My parcel says delivered but it is not here."}]}
    return f"curl -s {url}/chat/completions -H 'content-type: application/json' -d {shlex.quote(json.dumps(body))}"


def _share(hits: Iterable[bool]) -> float:
    found = list(hits)
    return sum(found) / len(found) if found else 0.0


def _write(path: Path, report: DemoReport) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
