"""A generation as a whole: the same files however it went, and counts that add up."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from pydantic import ValidationError

from evals.client import Request
from evals.errors import EvaluationError
from evals.records import Record
from generate.asking import here
from generate.config import SHIPPED_SEEDS, GenerateConfig
from generate.run import generate
from generate.summary import Summary
from jobs.generate import main
from sft.errors import ConfigError
from tests.evals.endpoint import Endpoint, served
from tests.generate.scripted import PREFIX, made_config, reply

MODES = ["self_instruct", "evolve", "magpie"]


class Killed(BaseException):
    """What ends a run from outside."""


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Some of the shipped tasks, of both kinds."""
    path = tmp_path_factory.mktemp("seeds") / "seeds.jsonl"
    path.write_text("".join(SHIPPED_SEEDS.read_text(encoding="utf-8").splitlines(keepends=True)[15:45]))
    return str(path)


def config(folder: Path, seeds: str | None, mode: str = "self_instruct", **changes: Any) -> GenerateConfig:
    changes = {"requests_per_round": 2 if mode == "self_instruct" else 6, "magpie": {"prefix": PREFIX}, **changes}
    return made_config(folder, seeds=seeds, mode=mode, **changes)


class Scripted:
    """Sends no requests: answers as the scripted teacher does, out of order, and is killed where asked."""

    def __init__(self, order: int = 0, killed_after: int | None = None) -> None:
        self.draw = Random(order)
        self.left = killed_after
        self.asked: list[Request] = []

    def __call__(self, requests: Sequence[Request]) -> Iterator[Record]:
        self.asked += requests
        for request in self.draw.sample(requests, len(requests)):
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    raise Killed
            yield _record(request)


def _record(request: Request) -> Record:
    found = reply({**request.body, "model": "teacher"})
    finish = "stop"
    if isinstance(found, tuple):
        choice = json.loads(found[2])["choices"][0]
        found, finish = choice.get("text") or choice["message"]["content"], choice["finish_reason"]
    return dataclasses.replace(request.record, text=found, finish_reason=finish, prompt_tokens=2, completion_tokens=1)


def run(made: GenerateConfig, ask: Any = None) -> Summary:
    return generate(made, None, lambda _: None, ask or Scripted())


def files(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "rows.jsonl").read_bytes(), (folder / "rejected.jsonl").read_bytes()


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_answers_changes_no_byte(tmp_path: Path, seeds: str, mode: str) -> None:
    made = [config(tmp_path / str(order), seeds, mode) for order in (1, 2)]
    summaries = [run(one, Scripted(order)) for order, one in enumerate(made)]
    assert files(made[0].output) == files(made[1].output)
    assert (summaries[0].kept, summaries[0].rounds > 1) == (12, True)
    assert {**summaries[0].model_dump(), "seconds": 0} == {**summaries[1].model_dump(), "seconds": 0}
    other = config(tmp_path / "other", seeds, mode, seed=1)
    run(other)
    assert files(other.output)[0] != files(made[0].output)[0]


def test_over_http_with_one_request_at_a_time_and_with_eight(tmp_path: Path, seeds: str) -> None:
    found = []
    for concurrency in (1, 8):
        # The first two requests meet, where two may be there at a time.
        calls, meeting = itertools.count(), threading.Barrier(min(concurrency, 2), timeout=60)

        def meet(
            body: dict[str, Any], before: int, calls: Iterator[int] = calls, meeting: threading.Barrier = meeting
        ) -> Any:
            if next(calls) < 2:
                meeting.wait()
            return reply(body, before)

        with served(Endpoint(meet)) as endpoint:
            made = config(tmp_path / str(concurrency), seeds, teacher={"url": endpoint.url, "concurrency": concurrency})
            summary = generate(made, "sk-teacher", lambda _: None)
        assert summary.complete
        assert endpoint.keys == {"Bearer sk-teacher"}
        assert (endpoint.most_at_once > 1) == (concurrency > 1)
        assert len(endpoint.asked) == summary.requests.asked
        found.append(files(made.output))
    assert found[0] == found[1]
    assert found[0] == _alone(tmp_path, seeds)


def _alone(tmp_path: Path, seeds: str) -> tuple[bytes, bytes]:
    run(config(tmp_path / "alone", seeds))
    return files(tmp_path / "alone")


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_run_goes_on_to_the_same_files_and_asks_nothing_twice(tmp_path: Path, seeds: str, mode: str) -> None:
    whole = config(tmp_path / "whole", seeds, mode)
    straight = Scripted()
    run(whole, straight)
    for killed_after in (3, len(straight.asked) // 2, len(straight.asked) - 1):
        made = config(tmp_path / str(killed_after), seeds, mode)
        with pytest.raises(Killed):
            run(made, Scripted(5, killed_after))
        with (made.output / "answers.jsonl").open("a") as file:
            file.write('{"suite": "cut o')
        before = len((made.output / "answers.jsonl").read_text().splitlines()) - 1
        assert before == killed_after
        second = Scripted(6)
        summary = run(made, second)
        assert files(made.output) == files(whole.output)
        assert len(second.asked) == len(straight.asked) - killed_after
        assert summary.requests.from_record == killed_after
        assert summary.tokens.prompt == 2 * len(straight.asked)


def test_a_larger_target_goes_on_where_the_smaller_one_ended(tmp_path: Path, seeds: str) -> None:
    small, large = (config(tmp_path / "one", seeds, target=target) for target in (5, 12))
    run(small)
    five = files(small.output)[0]
    assert len(rows(small.output / "rows.jsonl")) == 5
    run(large)
    assert files(large.output)[0].startswith(five)
    assert files(large.output) == _alone(tmp_path, seeds)


@pytest.mark.parametrize("mode", MODES)
def test_every_candidate_is_counted(tmp_path: Path, seeds: str, mode: str) -> None:
    made = config(tmp_path, seeds, mode)
    summary = run(made)
    kept, rejected = (rows(tmp_path / name) for name in ("rows.jsonl", "rejected.jsonl"))
    assert json.loads((tmp_path / "summary.json").read_text()) == summary.model_dump()
    assert (summary.kept, summary.candidates) == (len(kept), len(kept) + len(rejected)) == (12, summary.candidates)
    assert summary.rejected == dict(Counter(one["reason"] for one in rejected).most_common())
    assert len({one["id"] for one in kept + rejected}) == summary.candidates
    for name, source in summary.by_source.items():
        of = [one["reason"] for one in rejected if one["source"] == name]
        assert source.kept == sum(one["source"] == name for one in kept)
        assert (source.candidates, source.rejected) == (source.kept + len(of), dict(sorted(Counter(of).items())))
    assert {*summary.by_source} == {one["source"] for one in kept + rejected}
    least = {"self_instruct": 6, "evolve": 5, "magpie": 2}[mode]
    assert len(summary.rejected) >= least


def test_passing_faults_are_asked_again_and_lasting_ones_are_counted(tmp_path: Path, seeds: str) -> None:
    def flaky(body: dict[str, Any], before: int) -> Any:
        number = body["seed"] % 5
        if number == 0 and before == 0:
            return 503, {"Retry-After": "0"}, ""
        return (400, {}, '{"error": {"message": "too long"}}') if number == 1 else reply(body)

    with served(Endpoint(flaky)) as endpoint:
        made = config(tmp_path, seeds, target=8, teacher={"url": endpoint.url, "tries": 2})
        summary = generate(made, None, lambda _: None)
        first = files(tmp_path)
        endpoint.asked.clear()
        again = generate(made, None, lambda _: None)
        assert endpoint.asked == []
    assert summary.complete
    assert summary.requests.failed.keys() == {"http_400"}
    assert "teacher_failed" in summary.rejected
    assert (again.requests.from_record, files(tmp_path)) == (summary.requests.asked, first)


def test_a_dead_teacher_stops_it_and_the_same_command_goes_on(
    tmp_path: Path, seeds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("evals.client", "generate.teacher"):
        monkeypatch.setattr(f"{module}.FAILED_IN_A_ROW", 3)
    alive = 12

    def dying(body: dict[str, Any], _: int) -> Any:
        return reply(body) if len(endpoint.asked) <= alive else (500, {}, "")

    with served(Endpoint(dying)) as endpoint:
        made = config(tmp_path / "dying", seeds, teacher={"url": endpoint.url, "tries": 1, "concurrency": 1})
        summary = generate(made, None, lambda _: None)
        assert not summary.complete
        assert "the teacher failed 3 times in a row, the last time with http_500" in summary.stopped
        assert len(endpoint.asked) == alive + 3
        assert 'failure": "http' not in (made.output / "answers.jsonl").read_text()
        assert len(rows(made.output / "rows.jsonl")) == summary.kept
        alive = 10**6
        assert generate(made, None, lambda _: None).complete
    assert files(made.output) == _alone(tmp_path, seeds)


def test_a_teacher_that_repeats_itself_ends_it(tmp_path: Path, seeds: str) -> None:
    def ask(requests: Sequence[Request]) -> Iterator[Record]:
        yield from (dataclasses.replace(one.record, text="Hello") for one in requests)

    summary = run(config(tmp_path / "barren", seeds), ask)
    assert (summary.kept, summary.rounds, summary.rejected) == (0, 5, {"unreadable": 10})
    assert "no row was kept in 5 rounds" in summary.stopped
    summary = run(config(tmp_path / "short", seeds, max_rounds=1))
    assert (summary.complete, summary.stopped) == (False, "max_rounds 1 was reached")


def options(folder: Path, url: str, *more: str) -> list[str]:
    teacher = ["--teacher.url", url, "--teacher.model", "teacher", "--teacher.workers", "0"]
    return ["--output", str(folder), "--target", "3", "--requests_per_round", "4", *teacher, *more]


def test_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("generate.summary.REPORT_S", 0.0)
    monkeypatch.setenv("RAYSFT_API_KEY", "sk-job")
    with served(Endpoint(reply)) as endpoint:
        assert main(options(tmp_path, endpoint.url)) == 0
    said = capsys.readouterr().out.splitlines()
    assert endpoint.keys == {"Bearer sk-job"}
    assert said[0] == f"self_instruct: 3 rows from teacher at {endpoint.url}"
    assert said[1].startswith("round 1: tasks 1 of 4; kept 0 of 3 rows, rejected 0; ")
    assert any(line.startswith("kept 3 of ") for line in said)
    assert said[-1] == f"rows: {tmp_path / 'rows.jsonl'}"


def test_a_refusing_teacher_is_exit_code_1_and_said_in_the_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(Endpoint(lambda *_: (404, {}, '{"error": {"message": "no model teacher"}}'))) as endpoint:
        assert main(options(tmp_path, endpoint.url)) == 1
    assert "no model teacher" in capsys.readouterr().out
    assert "no model teacher" in json.loads((tmp_path / "summary.json").read_text())["stopped"]


def test_all_faults_of_the_config_at_once(tmp_path: Path) -> None:
    path = tmp_path / "generate.yaml"
    path.write_text(
        "mode: telepathy\ntarget: 0\nteacher: {model: m, concurrency: 2, workers: 3, extra: {seed: 1, top_k: 5}}\n"
        "filters: {rogue: 0.7, language: xx, checks: [{when: '(', checker: {kind: json}}, "
        "{when: x, checker: {kind: exact}}]}\n"
    )
    with pytest.raises(ConfigError) as caught:
        main(["--config", str(path), "--concurency", "4"])
    said = "\n".join(caught.value.faults)
    for part in (
        "output: is missing",
        "target: ",
        "mode: ",
        "filters.rogue: no such key; did you mean filters.rouge?",
        "filters.language: language 'xx' is not known",
        "filters.checks.0.when: not a regular expression",
        "filters.checks.1: checker exact needs a reference",
        "teacher.extra: seed cannot be given here",
        "--concurency: no such option",
    ):
        assert part in said
    assert caught.value.exit_code == 2
    with pytest.raises(ValidationError, match=r"workers 3 is above concurrency 2"):
        made_config(tmp_path, teacher={"workers": 3, "concurrency": 2})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "magpie"}, "needs magpie.prefix"),
        ({"self_instruct": {"written": 0, "generated": 0}}, "needs a task in context"),
        ({"filters": {"min_words": 9, "max_words": 5}}, "min_words 9 is above max_words 5"),
        ({"filters": {"keywords": [" "]}}, "a keyword is empty"),
    ],
)
def test_what_does_not_fit_together(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        made_config(tmp_path, **values)


def test_a_folder_belongs_to_its_settings(tmp_path: Path, seeds: str) -> None:
    run(config(tmp_path, seeds, target=3))
    before = files(tmp_path)
    nobody = Scripted(killed_after=0)
    changed = config(tmp_path, seeds, seed=7, filters={"rouge": 0.6}, teacher={"model": "other", "url": "http://x/v1"})
    with pytest.raises(ConfigError) as caught:
        run(changed, nobody)
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["seed", "teacher.model", "filters.rouge"]
    with pytest.raises(ConfigError, match="seeds_sha256"):
        run(config(tmp_path, None, target=3), nobody)
    assert (nobody.asked, files(tmp_path)) == ([], before)
    free = {"url": "http://elsewhere/v1", "concurrency": 3, "tries": 9, "timeout_s": 7.0}
    assert run(config(tmp_path, seeds, target=3, teacher=free), nobody).complete


def test_the_clients_refusal_ends_the_asking(tmp_path: Path) -> None:
    request = Request(Record("s", "m", "r", 0, "f"), {"messages": [{"role": "user", "content": "x"}]})
    with (
        served(Endpoint(lambda *_: (401, {}, ""))) as endpoint,
        pytest.raises(EvaluationError, match="RAYSFT_API_KEY"),
    ):
        list(here([request], made_config(tmp_path, endpoint.url).teacher, None))
