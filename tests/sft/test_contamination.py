from __future__ import annotations

import pickle

from hypothesis import given
from hypothesis import strategies as st

from sft.contamination import COMMON_ROWS, index_evaluation
from sft.messages import Conversation, Message
from tests.sft.rows_of_text import conversation, several_turns

QUESTION = "A train leaves at nine and travels for three hours at sixty miles an hour. How far?"
RIDDLE = "What walks?"


def test_the_file_that_a_row_shares_text_with_is_named() -> None:
    index = index_evaluation(
        [
            ("a.jsonl", [conversation(QUESTION, "It travels 180 miles.")]),
            ("b.jsonl", [conversation(RIDDLE, "A man"), conversation(QUESTION, "180")]),
        ],
        ngram=8,
    )
    rows = {
        "same": (conversation(QUESTION, "no idea"), "a.jsonl"),
        "quoted": (conversation("Solve it", f"Well: {QUESTION.upper()}"), "a.jsonl"),
        "eight words": (conversation("x leaves, at NINE; and travels for three hours y", "z"), "a.jsonl"),
        "seven words": (conversation("x leaves at nine and travels for y", "z"), None),
        "answer with prompt": (conversation("So how far?", "It travels 180 miles. Far."), None),
        "short and the same": (conversation("what walks", "a dog"), "b.jsonl"),
        "short within another": (conversation("What walks? Tell me.", "a dog"), None),
        "short as an answer": (conversation("Give me a riddle", "What walks?"), None),
        "in the reasoning": (conversation("x", "y", reasoning=QUESTION), "a.jsonl"),
        "other": (conversation("Say hi", "hi"), None),
    }
    assert dict(zip(rows, index.find([row for row, _ in rows.values()]), strict=True)) == {
        name: file for name, (_, file) in rows.items()
    }


def test_common_words_are_a_template() -> None:
    template = "Read the text below and answer with one of the letters A, B, C or D."
    evaluation = [conversation(f"{template} Text {i}", f"{i}") for i in range(COMMON_ROWS + 1)]
    index = index_evaluation([("e", evaluation)], ngram=13)
    assert index.find([conversation(f"{template} Another", "A"), evaluation[3]]) == [None, "e"]
    few = index_evaluation([("e", evaluation[:-1])], ngram=13)
    assert few.find([conversation(f"{template} Another", "A")]) == ["e"]


def test_words_that_repeat_within_a_row_are_counted_once() -> None:
    song = "row row row your boat " * (COMMON_ROWS + 1)
    index = index_evaluation([("e", [conversation(song, "la")])], ngram=5)
    assert index.find([conversation("Sing row row row your boat", "no")]) == ["e"]


def test_a_shared_system_turn_is_no_overlap() -> None:
    system = "You are a careful assistant who answers in one short sentence and never lies."
    index = index_evaluation([("e", [several_turns("Who are you?", "A model", system=system)])], ngram=5)
    assert index.find([several_turns("Where are you?", "Here", system=system)]) == [None]
    assert index.find([several_turns("who ARE you", "Here")]) == ["e"]


def test_the_turns_before_the_last_one_are_the_prompt() -> None:
    index = index_evaluation([("e", [several_turns("Hi", "Hello", "Continue", "No")])], ngram=13)
    found = index.find([several_turns("Hi", "Hello", "Continue", "Yes"), several_turns("Continue", "Yes")])
    assert found == ["e", None]


def test_scripts_without_spaces_are_read_by_character() -> None:
    index = index_evaluation([("e", [conversation("从前有座山。山里有座庙。庙里有个老和尚。", "故事")])], ngram=13)
    long, short = conversation("请讲从前有座山山里有座庙庙里有个", "好"), conversation("从前有座山", "好")
    assert index.find([long, short]) == ["e", None]


def test_an_index_without_rows_finds_nothing() -> None:
    nothing = Conversation((Message("user", "?!"), Message("assistant", "...", trained=True)))
    empty: list[list[tuple[str, list[Conversation]]]] = [[], [("e", [])], [("e", [nothing])]]
    for files in empty:
        index = index_evaluation(files, ngram=5)
        assert index.find([conversation("a b c d e f", "g"), nothing]) == [None, None]
        assert index.find([]) == []


rows = st.lists(
    st.tuples(*[st.lists(st.sampled_from("abc"), min_size=1, max_size=9).map(" ".join)] * 2), min_size=1, max_size=6
)


@given(rows, rows)
def test_exactly_what_shares_words_is_found(evaluation: list[tuple[str, str]], trained: list[tuple[str, str]]) -> None:
    index = pickle.loads(pickle.dumps(index_evaluation([("e", [conversation(*row) for row in evaluation])], 5)))

    def grams(row: tuple[str, str]) -> set[tuple[str, ...]]:
        words = " ".join(row).split()
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    known = set().union(*map(grams, evaluation))
    prompts = {prompt for prompt, _ in evaluation}
    wanted = ["e" if row[0] in prompts or grams(row) & known else None for row in trained]
    assert index.find([conversation(*row) for row in trained]) == wanted
