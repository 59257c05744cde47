from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.checker import Score
from evals.promises import PROMISES, Measure, Promise, Side, suites_of, tuned_against_base
from evals.promises_proof import LeakError, Proof, Trained, prove_apart, trained_questions
from evals.promises_report import promises_page
from evals.promises_summary import PromiseResult, Tuned, promise_result
from evals.records import Record
from evals.scoring import Scored
from evals.statistics import crossed_bootstrap
from tests.evals.made import made_suite

KEYS = (
    "format_control",
    "task_specialisation",
    "multi_task",
    "zero_shot_transfer",
    "chain_of_thought",
    "prompt_engineering",
)
NOTHING = Proof(asked=0, trained=0, trained_tasks=[], trained_clusters=[], held_out_tasks=[], held_out_clusters=[])


def scored(model: str, suite: str, values: list[float | None], prompt_tokens: int = 10) -> list[Scored]:
    return [
        Scored(
            suite,
            model,
            f"r{number}",
            0,
            "" if value is not None else "timeout",
            value,
            {} if value is None else {"same": Score(value), "none": Score(0.0)},
            None,
            Record(suite, model, f"r{number}", 0, "", prompt_tokens=prompt_tokens),
        )
        for number, value in enumerate(values)
    ]


def result(measure: Measure, answers: list[Scored], seeds: tuple[int, ...] = (0, 1)) -> PromiseResult:
    promise = Promise("key", "Claims.", "one", (measure,))
    return promise_result(promise, answers, "base", Tuned("one", {seed: f"tuned-{seed}" for seed in seeds}), NOTHING)


def test_the_plan_names_the_six_promises_and_pairs_what_it_compares() -> None:
    assert tuple(promise.key for promise in PROMISES) == KEYS
    for promise in PROMISES:
        for measure in promise.measures:
            assert len(measure.before.suites) == len(measure.after.suites)
    assert suites_of("procedures") == ("procedures", "general", "prompt-long", "prompt-short")


def test_means_and_differences_over_seeds_and_rows() -> None:
    answers = (
        scored("base", "s", [1, 0, 0, 0]) + scored("tuned-0", "s", [1, 1, 0, 1]) + scored("tuned-1", "s", [0, 1, 0, 0])
    )
    found = result(tuned_against_base("m", "says", "s"), answers)
    first = found.measures[0]
    assert (found.base, found.tuned, found.difference, found.rows, found.seeds) == (0.25, 0.5, 0.25, 4, [0, 1])
    assert first.by_seed == {0: 0.5, 1: 0.0}
    assert (first.better, first.worse, first.asked) == (2, 1, 4)
    assert found.interval == crossed_bootstrap([[0, 1, 0, 1], [-1, 1, 0, 0]], (-1, 1))
    assert (found.kept, first.verdict) == (False, "no clear change")


def test_a_row_without_a_score_from_one_model_is_in_no_number() -> None:
    answers = (
        scored("base", "s", [1, None, 0]) + scored("tuned-0", "s", [1, 1, 1]) + scored("tuned-1", "s", [None, 1, 1])
    )
    found = result(tuned_against_base("m", "says", "s"), answers)
    assert (found.rows, found.measures[0].asked, found.base, found.tuned) == (1, 3, 0, 1)


def test_nothing_scored_is_said_so() -> None:
    found = result(tuned_against_base("m", "says", "s"), scored("base", "s", [1]))
    assert (found.kept, found.base, found.tuned, found.interval, found.rows) == (False, None, None, None, 0)
    assert found.verdict == "Not measured: no row has a score from every model."


@pytest.mark.parametrize(
    ("before", "after", "kept", "words"),
    [(0, 1, True, "Kept: +100.0 points"), (1, 0, False, "Broken: tuned is worse than base, -100.0 points")],
)
def test_a_promise_is_kept_or_broken_by_its_interval(before: float, after: float, kept: bool, words: str) -> None:
    answers = [one for model in ("tuned-0", "tuned-1") for one in scored(model, "s", [after] * 30)]
    found = result(tuned_against_base("m", "says", "s"), [*answers, *scored("base", "s", [before] * 30)])
    assert found.kept is kept
    assert found.verdict.startswith(words)


def test_two_suites_are_read_together_and_two_prompts_against_each_other() -> None:
    answers = [*scored("base", "long", [1, 0], 700), *scored("base", "short", [0, 0], 40)]
    answers += [*scored("tuned-0", "short", [1, 1], 40), *scored("tuned-0", "long", [0, 0], 700)]
    across = Measure("m", "says", Side(("long",), checker="same"), Side(("short",), tuned=True, checker="same"))
    found = result(across, answers, (0,))
    assert (found.base, found.tuned, found.rows, found.measures[0].prompt_tokens_saved) == (0.5, 1.0, 2, 660)
    both = result(tuned_against_base("m", "says", "long", "short"), answers, (0,))
    assert (both.base, both.tuned, both.rows) == (0.25, 0.5, 4)
    assert both.measures[0].prompt_tokens_saved is None


def test_a_checker_is_read_in_place_of_the_score() -> None:
    answers = scored("base", "s", [1, 1]) + scored("tuned-0", "s", [1, 1])
    assert result(tuned_against_base("m", "says", "s", checker="none"), answers, (0,)).tuned == 0


def rows(*prompts: str) -> list[Trained]:
    return [Trained(prompt, "sum", "arithmetic") for prompt in prompts]


def test_apart_is_proven() -> None:
    proof = prove_apart([made_suite(3)], rows("What is two and two?", "yes"), {"maze": "games"})
    assert (proof.asked, proof.trained, proof.trained_clusters) == (3, 2, ["arithmetic"])
    assert (proof.held_out_tasks, proof.held_out_clusters) == (["maze"], ["games"])


@pytest.mark.parametrize(
    ("planted", "row"),
    [
        ("Yes 1", "r1"),
        ("Here is your next question:\n\nYES, 2!\n\nWhat is the answer?", "r2"),
    ],
)
def test_a_planted_question_is_found_in_any_case_and_template(planted: str, row: str) -> None:
    with pytest.raises(LeakError, match=f"the question of row {row} is in the training data") as caught:
        prove_apart([made_suite(4)], rows("another", planted))
    assert planted not in str(caught.value)


def test_a_longer_question_around_a_trained_one_is_found_but_a_short_one_is_anywhere() -> None:
    suite = made_suite(1, "tell me how many legs a spider has and why, yes")
    with pytest.raises(LeakError, match="row r0"):
        prove_apart([suite], rows("how many legs a spider has"))
    assert prove_apart([suite], rows("a spider has")).asked == 1


def test_a_part_of_a_word_is_no_leak() -> None:
    assert prove_apart([made_suite(2)], rows("Yes 10", "eyes 1")).asked == 2


def test_a_held_out_task_or_cluster_that_is_trained_is_found() -> None:
    with pytest.raises(LeakError, match="task sum is held out and trained"):
        prove_apart([made_suite()], rows("q"), {"sum": "games"})
    with pytest.raises(LeakError, match="cluster arithmetic is held out and trained"):
        prove_apart([made_suite()], rows("q"), {"gcd": "arithmetic"})


def test_trained_questions_are_told() -> None:
    assert trained_questions(["What is 1 + 2?", "What is 2 + 1?"], rows("Solve: what is 1 + 2")) == {"What is 1 + 2?"}


def test_the_page_tells_what_was_kept_and_loads_nothing() -> None:
    answers = [one for model in ("tuned-0", "tuned-1") for one in scored(model, "s", [1] * 30)]
    found = result(tuned_against_base("m", "<b>says</b>", "s"), [*answers, *scored("base", "s", [0] * 30)])
    about: dict[str, Any] = {
        "base": "smol",
        "seeds": [0, 1],
        "machine": {"cpu": "A processor", "cores": 2},
        "versions": {"torch": "2"},
        "seconds": {},
    }
    page = promises_page(
        {"format_control": found, "multi_task": result(tuned_against_base("m", "says", "t"), [])}, about
    )
    assert "1 of 2 promises kept by <b>smol</b>" in page
    assert "&lt;b&gt;says&lt;/b&gt;" in page
    assert "<script" not in page
    assert "src=" not in page


def test_shipped_training_rows_of_formats_and_steps_are_right() -> None:
    data = Path(__file__).parents[2] / "jobs" / "data"
    for path in sorted((data / "steps").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            answer = json.loads(line)["messages"][-1]["content"]
            *steps, last = answer.removesuffix(".").split(". ")
            values = [step.split(" = ") for step in steps]
            for sum_, value in values:
                left, sign, right = sum_.split(" ")
                numbers = int(left), int(right)
                assert (
                    int(value) == {"+": sum(numbers), "-": numbers[0] - numbers[1], "*": numbers[0] * numbers[1]}[sign]
                )
            assert not values or last == f"The answer is {values[-1][1]}"
            assert bool(values) == (path.stem == "with-rationale")
