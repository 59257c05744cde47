"""What each mode asks for, and what it makes of the answers, with literal replies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from evals.records import Record
from generate import prompts
from generate.candidate import Candidate, Outcome, Reason, Rejected
from generate.config import GenerateConfig
from generate.evolve import evolve
from generate.magpie import magpie
from generate.pool import Pool
from generate.round import Question, Reply, Round
from generate.run import MODES
from generate.seeds import SeedTask
from generate.self_instruct import self_instruct
from tests.generate.scripted import PREFIX, made_config

SEEDS = [
    SeedTask.model_validate(
        {
            "id": f"s{number}",
            "instruction": f"Seed{number} word{number} other{number} more{number}.",
            "classification": number < 3,
            "instances": [{"input": f"in{number}", "output": f"out{number}"}],
        }
    )
    for number in range(12)
]
Replies = dict[str, list[str | Reply]]


def run(
    mode: Callable[[Round], list[Outcome]], config: GenerateConfig, replies: Replies, rows: Sequence[Candidate] = ()
) -> tuple[list[Outcome], dict[str, Sequence[Question]]]:
    """One round; each stage's replies are given, in order."""
    asked: dict[str, Sequence[Question]] = {}

    def ask(stage: str, questions: Sequence[Question]) -> list[Reply]:
        asked[stage] = questions
        assert len(questions) == len(replies[stage]), stage
        return [Reply(one) if isinstance(one, str) else one for one in replies[stage]]

    pool = Pool(SEEDS, config.filters)
    for row in rows:
        assert pool.claim(row.id, row.instruction) is None
        assert pool.keep(row) is None
    return mode(Round.begin(1, config, pool, ask)), asked


def fates(outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    return [(one.candidate.id, str(one.reason)) if isinstance(one, Rejected) else (one.id, "") for one in outcomes]


def prompt(question: Question) -> str:
    return str(question.body["messages"][0]["content"])


def test_self_instruct(tmp_path: Path) -> None:
    listed = "13. Tell a story about snow.\n14. Is the number odd?\n15. Short one\n16. Cut off in the middle of"
    instances = "Input: 3\nOutput: x\nInput: 4\nOutput: y\nInput: 5\nOutput: z\nInput: 6\nOutput: zz"
    outcomes, asked = run(
        self_instruct,
        made_config(tmp_path, requests_per_round=3),
        {
            "tasks": [Reply(listed, cut_off=True), "I have none.", Reply("", failure="http_400")],
            "kinds": ["No.", "Yes, it is."],
            "instances": [instances, "Label: odd\nInput: 3\nLabel: even\nInput: 3\nLabel: odd\nInput: 7"],
        },
    )
    assert fates(outcomes) == [
        ("1-0-0-0", ""),
        ("1-0-0-1", ""),
        ("1-0-0-2", ""),
        ("1-0-0-3", "surplus"),
        ("1-0-1-0", "contradiction"),
        ("1-0-1-1", "contradiction"),
        ("1-0-1-2", ""),
        ("1-0-2", "instruction_too_short"),
        ("1-0-3", "cut_off"),
        ("1-1-0", "unreadable"),
        ("1-2-0", "teacher_failed"),
    ]
    assert outcomes[0] == Candidate("1-0-0-0", "self_instruct/open", "Tell a story about snow.", "3", "x")
    assert outcomes[6] == Candidate("1-0-1-2", "self_instruct/classification", "Is the number odd?", "7", "odd")
    assert prompt(asked["tasks"][0]).count("\n8. Seed") == 1
    assert "numbered from 9." in prompt(asked["tasks"][0])
    story, odd = map(prompt, asked["instances"])
    assert "Input: in" in story
    assert "Label: " not in story.split("Task: Tell")[0]
    assert story.index("Input: in") < story.index("Output: out")
    assert odd.index("Label: out") < odd.index("Input: in")
    assert "Task: Tell a story about snow.\nClassification:" in prompt(asked["kinds"][0])


def test_written_and_generated_tasks_are_in_context(tmp_path: Path) -> None:
    kept = [Candidate(f"k{n}", "x", f"Kept{n} task{n} about{n} nothing{n}", "", f"Answer{n} to it.") for n in range(3)]
    replies: Replies = {"tasks": ["no"] * 4, "kinds": [], "instances": []}
    for rows, generated in ((kept, 2), (kept[:1], 1), ([], 0)):
        _, asked = run(self_instruct, made_config(tmp_path), replies, rows)
        for question in asked["tasks"]:
            assert prompt(question).count(". Kept") == generated
            assert prompt(question).count(". Seed") == 8 - generated
    alpaca = made_config(tmp_path, self_instruct={"written": 3, "generated": 0, "tasks": 20})
    _, asked = run(self_instruct, alpaca, replies, kept)
    assert "with 20 new tasks, numbered from 4." in prompt(asked["tasks"][0])


def test_a_kind_or_an_instance_that_cannot_be_read(tmp_path: Path) -> None:
    outcomes, _ = run(
        self_instruct,
        made_config(tmp_path, requests_per_round=1),
        {
            "tasks": ["1. Tell a story about snow.\n2. Explain how bread is made.\n3. List four old rivers there."],
            "kinds": ["Hm.", "no", Reply("", failure="timeout")],
            "instances": [Reply("Input: none\nOutput: First\nInput: a\nOutput: cut", cut_off=True)],
        },
    )
    assert fates(outcomes) == [
        ("1-0-0", "unreadable"),
        ("1-0-1-0", ""),
        ("1-0-1-1", "cut_off"),
        ("1-0-2", "teacher_failed"),
    ]


def test_evolve_in_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("generate.evolve.OPERATIONS", ("deepen",))
    outcomes, asked = run(
        evolve,
        made_config(tmp_path, requests_per_round=8),
        {
            "evolve": [
                "Explain how bread is made in space.",
                "The new task: explain how bread is made.",
                "Explain why glass is blown by hand.",
                Reply("Cut off in the", cut_off=True),
                Reply("", failure="http_400"),
                "Compare four old rivers with two lakes.",
                "Invent a game for very long evenings.",
                "Count all words of the following poem.",
            ],
            "gains": ["Equal.", "Different", "different.", "Hm.", Reply("", failure="timeout")],
            "answers": ["Sorry, no.", "The lakes are deeper."],
        },
    )
    assert fates(outcomes) == [
        ("1-0", "no_gain"),
        ("1-1", "prompt_leak"),
        ("1-2", "refusal"),
        ("1-3", "cut_off"),
        ("1-4", "teacher_failed"),
        ("1-5", ""),
        ("1-6", "unreadable"),
        ("1-7", "teacher_failed"),
    ]
    kept = outcomes[5]
    assert isinstance(kept, Candidate)
    (parent,) = (task.rows()[0].prompt for task in SEEDS if (task.id,) == kept.parents)
    assert (kept.source, kept.input, kept.output) == ("evolve/deepen", "", "The lakes are deeper.")
    assert prompt(asked["evolve"][5]).endswith(f"The task:\n{parent}")
    assert prompts.DEPTH["deepen"] in prompt(asked["evolve"][5])
    assert f"First: {parent}\n\nSecond: {kept.instruction}" in prompt(asked["gains"][2])
    assert prompt(asked["answers"][1]) == kept.instruction


def test_evolve_in_breadth_is_compared_with_the_pool_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("generate.evolve.OPERATIONS", ("mutate",))
    outcomes, _ = run(
        evolve,
        made_config(tmp_path, requests_per_round=2),
        {
            "evolve": ["Explain how bread is made in space.", "Explain how bread is made in Spain."],
            "gains": [],
            "answers": ["In free fall."],
        },
    )
    assert fates(outcomes) == [("1-0", ""), ("1-1", "rouge")]


def test_an_evolved_row_may_be_like_its_ancestors_alone_and_is_evolved_no_further_than_asked(tmp_path: Path) -> None:
    first = Candidate("a", "evolve/deepen", "Explain how bread is made of rye and water", "", "x y z", ("s1",))
    second = Candidate("b", "evolve/deepen", "Name the oldest bridges of a northern town", "", "u v w", ("s2", "q"))
    pool = Pool(SEEDS, made_config(tmp_path).filters)
    for row in (first, second):
        assert pool.claim(row.id, row.instruction) is None
        assert pool.keep(row) is None
    drawn = {row.id for seed in range(9) for row in pool.parents(Random(seed), 2, 9)}
    assert drawn == {"a", *(task.id for task in SEEDS)}
    deeper = "Explain how bread is made of rye and salted water"
    fault = pool.claim("c", deeper)
    assert fault is not None
    assert fault.reason == Reason.ROUGE
    assert pool.claim("c", deeper, family=("s1", "a")) is None


def test_magpie(tmp_path: Path) -> None:
    config = made_config(tmp_path, mode="magpie", magpie={"prefix": PREFIX, "stop": ["<|im_end|>"]})
    outcomes, asked = run(
        magpie,
        config,
        {
            "users": [
                " How do I bake bread at home?\n",
                Reply("Cut off in the middle", cut_off=True),
                "Hi",
                "How do I bake bread at home",
            ],
            "answers": ["With flour."],
        },
    )
    assert fates(outcomes) == [
        ("1-0", ""),
        ("1-1", "cut_off"),
        ("1-2", "instruction_too_short"),
        ("1-3", "rouge"),
    ]
    assert outcomes[0] == Candidate("1-0", "magpie", "How do I bake bread at home?", "", "With flour.")
    first, second, *_ = asked["users"]
    assert first.route == "completions"
    body: dict[str, Any] = {
        "prompt": PREFIX,
        "stop": ["<|im_end|>"],
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": 1024,
    }
    assert {**first.body, "seed": 0} == {**body, "seed": 0}
    assert first.body["seed"] != second.body["seed"]
    (answer,) = asked["answers"]
    assert (answer.route, prompt(answer), answer.body["temperature"]) == (
        "chat/completions",
        "How do I bake bread at home?",
        0.0,
    )


def test_thinking_is_no_part_of_an_answer() -> None:
    def reply(text: str, reasoning: str = "", failure: str = "") -> Reply:
        return Reply.of(Record("s", "m", "r", 0, "f", text, reasoning, "length", failure=failure))

    assert reply("<think>Hm.</think> Yes.") == Reply("Yes.", cut_off=True)
    assert reply("Yes.", "Hm.") == Reply("Yes.", cut_off=True)
    assert reply("<think>Hm") == Reply("", cut_off=True)
    assert reply("", failure="timeout").fault is not None


def test_all_modes_are_there() -> None:
    assert set(MODES) == {"self_instruct", "evolve", "magpie"}
