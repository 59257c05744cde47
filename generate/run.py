"""A generation from end to end: rounds until there are enough rows, and files that are the same however it went."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import IO, Any

from evals.errors import EvaluationError
from evals.records import appended, read_records
from generate.asking import Asks, asks
from generate.candidate import Candidate, Fault, Outcome, Reason, Rejected
from generate.config import SHIPPED_SEEDS, GenerateConfig
from generate.evolve import evolve
from generate.magpie import magpie
from generate.pool import Pool
from generate.round import Round
from generate.seeds import SeedTask, read_seeds
from generate.self_instruct import self_instruct
from generate.summary import Summary, Tally
from generate.teacher import Teacher, TeacherError
from sft.errors import ConfigError

ROWS, REJECTED, ANSWERS, SUMMARY, SETTINGS = (
    "rows.jsonl",
    "rejected.jsonl",
    "answers.jsonl",
    "summary.json",
    "settings.json",
)
MODES: Mapping[str, Callable[[Round], list[Outcome]]] = {
    "self_instruct": self_instruct,
    "evolve": evolve,
    "magpie": magpie,
}
BARREN_ROUNDS = 5
"""After so many rounds in a row without a row kept, the teacher has no more to give."""
FREE: dict[str, Any] = {
    "output": True,
    "seeds": True,
    "target": True,
    "max_rounds": True,
    "teacher": {"url", "concurrency", "workers", "requests_per_minute", "timeout_s", "tries"},
    "ray": True,
}
"""What may change when a folder is gone on with: it changes no row, or only how many there are."""


def generate(
    config: GenerateConfig, key: str | None, say: Callable[[str], None] = print, ask: Asks | None = None
) -> Summary:
    """Makes rows, or goes on where the same command was stopped.

    Writes into the output folder `rows.jsonl`, `rejected.jsonl`, `answers.jsonl`, `summary.json` and `settings.json`.
    The first two depend on the settings and the teacher's answers alone.

    Args:
        config: the generation.
        key: the teacher's API key, if it wants one.
        say: takes a line every few seconds.
        ask: how requests are sent; by default as `config.teacher` says. Ray must be connected where it says so.

    Returns:
        What came of it. A teacher that failed is said in `stopped`.

    Raises:
        ConfigError: the seed tasks are wrong, or the folder belongs to other settings; before anything is asked.
        EvaluationError: the folder's answers cannot be read, or another job writes them; before anything is asked.
    """
    seeds = _prepare(config)
    tally = Tally(config.target, say)
    pool = Pool(seeds, config.filters)
    with (
        appended(config.output / ANSWERS) as file,
        (config.output / ROWS).open("w", encoding="utf-8") as rows,
        (config.output / REJECTED).open("w", encoding="utf-8") as rejected,
    ):
        answers = read_records(config.output / ANSWERS)
        asked = ask or asks(config.teacher, key)
        teacher = Teacher(config.teacher.model, config.teacher.extra, asked, answers, file, tally.hear)
        stopped = _rounds(config, pool, teacher, tally, partial(_write, config.form, rows, rejected))
    summary = tally.summary(config.mode, config.teacher.model, config.seed, teacher.asked, stopped)
    (config.output / SUMMARY).write_text(summary.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return summary


def _rounds(
    config: GenerateConfig, pool: Pool, teacher: Teacher, tally: Tally, write: Callable[[Sequence[Outcome]], None]
) -> str:
    """Runs rounds until the target is reached; returns why it was not, or nothing."""
    barren = 0
    for number in range(1, config.max_rounds + 1):
        tally.round = number
        before = len(pool.rows)
        this = Round.begin(number, config, pool, partial(teacher.ask, number))
        try:
            proposed = MODES[config.mode](this)
        except (TeacherError, EvaluationError) as error:
            return str(error)
        outcomes = [_judge(one, pool, config.target) for one in proposed]
        for outcome in outcomes:
            tally.add(outcome)
        write(outcomes)
        if len(pool.rows) == config.target:
            teacher.settle()
            return ""
        barren = barren + 1 if len(pool.rows) == before else 0
        if barren == BARREN_ROUNDS:
            return f"no row was kept in {BARREN_ROUNDS} rounds; {REJECTED} says why"
    return f"max_rounds {config.max_rounds} was reached"


def _judge(outcome: Outcome, pool: Pool, target: int) -> Outcome:
    if isinstance(outcome, Rejected):
        return outcome
    if len(pool.rows) == target:
        return Fault(Reason.SURPLUS, "the target was reached").of(outcome)
    fault = pool.keep(outcome)
    return fault.of(outcome) if fault else outcome


def _prepare(config: GenerateConfig) -> list[SeedTask]:
    """Reads the seeds, and makes the folder this generation's."""
    path = config.seeds or SHIPPED_SEEDS
    seeds = read_seeds(path)
    settings = config.model_dump(mode="json", exclude=FREE)
    settings["seeds_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    file = config.output / SETTINGS
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        config.output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return seeds
    except (OSError, ValueError) as error:
        raise ConfigError(str(file), [f"cannot be read ({error}); name another output"]) from None
    changed = _changed(before, settings)
    if changed:
        remedy = "name another output, or set it back"
        raise ConfigError(str(file), [f"{name}: is not what these rows were made with; {remedy}" for name in changed])
    return seeds


def _changed(before: Any, now: Any, name: str = "") -> list[str]:
    """Dotted names of what differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*now, *before])
        return [one for key in keys for one in _changed(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))]
    return [] if before == now else [name or "settings"]


def _write(form: str, rows: IO[str], rejected: IO[str], outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, Rejected):
            fault = {"reason": outcome.reason, "detail": outcome.detail}
            rejected.write(_line({**_row(outcome.candidate, "alpaca"), **fault}))
        else:
            rows.write(_line(_row(outcome, form)))
    rows.flush()
    rejected.flush()


def _row(row: Candidate, form: str) -> dict[str, Any]:
    if form == "messages":
        said = (("user", row.prompt), ("assistant", row.output))
        content: dict[str, Any] = {"messages": [{"role": role, "content": text} for role, text in said]}
    else:
        content = {"instruction": row.instruction, "input": row.input, "output": row.output}
    return {"id": row.id, "source": row.source, **content, **({"parents": row.parents} if row.parents else {})}


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
