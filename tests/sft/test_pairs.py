from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sft.base import BaseTokenizer
from sft.batch import collate, worker_batch
from sft.data_config import HygieneSection
from sft.files import list_files, read
from sft.formats import RowSpec, to_conversation
from sft.hygiene import plan_hygiene, screen
from sft.mask import UNTRAINED
from sft.messages import Conversation, Message, Reason, RowError
from sft.rows import PREPARED, Rules, SourcePlan, examples, prepare
from tests.tiny import small_base

PAIR = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}
USER, GOOD, BAD = Message("user", "Hi"), Message("assistant", "Hello", True), Message("assistant", "Go", True)


def turns(*texts: str, first: str = "user") -> list[dict[str, str]]:
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def base() -> BaseTokenizer:
    return small_base()


def prepared(
    folder: Path, base: BaseTokenizer, *rows: object, pairs: bool = True, length: int = 500, cut: bool = False
) -> pa.Table:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = RowSpec("preference" if pairs else "auto")
    rules = Rules(length, truncate=cut, pairs=pairs)
    (table,) = (
        prepare(table, base, {"s": SourcePlan(spec, "", "")}, rules) for table in read(list_files(str(path), "s")[0])
    )
    assert table.schema == PREPARED
    return table


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"prompt": turns("Hi"), "chosen": turns("Hello", first="assistant"), "rejected": "Go"},
        {"prompt": turns("Hi"), "chosen": "Hello", "rejected": turns("Go", first="assistant")},
        {"chosen": turns("Hi", "Hello"), "rejected": turns("Hi", "Go")},
        {"prompt": "Hi", "chosen": turns("Hi", "Hello"), "rejected": turns("Hi", "Go")},
        {"prompt": turns("Hi"), "chosen": turns("Hi", "Hello"), "rejected": turns("Hi", "Go")},
    ],
)
def test_every_form_of_a_pair_is_the_same_pair(row: dict[str, Any]) -> None:
    assert to_conversation(row) == to_conversation(row, RowSpec("preference"))
    assert to_conversation(row) == Conversation((USER, GOOD), rejected=(USER, BAD))


def test_earlier_answers_of_a_shared_conversation_are_not_trained_and_those_that_differ_are() -> None:
    row = {
        "system": "Be brief.",
        "chosen": turns("a", "b", "c", "good", "more", "better"),
        "rejected": turns("a", "b", "c", "bad"),
    }
    made = to_conversation(row)
    assert [turn.trained for turn in made.messages] == [False, False, False, False, True, False, True]
    assert [(turn.content, turn.trained) for turn in made.rejected] == [
        *((text, False) for text in ("Be brief.", "a", "b", "c")),
        ("bad", True),
    ]
    chosen, rejected = made.sides
    assert (chosen.messages, rejected.messages) == (made.messages, made.rejected)
    assert made.with_sides(made.sides) == made


@pytest.mark.parametrize(
    ("row", "reason", "field"),
    [
        ({**PAIR, "rejected": "Hello"}, Reason.CHOSEN_EQUALS_REJECTED, "rejected"),
        ({"chosen": turns("Hi", "Go"), "rejected": turns("Hi", "Go")}, Reason.CHOSEN_EQUALS_REJECTED, "rejected"),
        ({"prompt": "Hi", "chosen": "Hello"}, Reason.MISSING_FIELD, "rejected"),
        ({"prompt": "Hi", "chosen": None, "rejected": "Go"}, Reason.MISSING_FIELD, "chosen"),
        ({"chosen": "Hello", "rejected": "Go"}, Reason.MISSING_FIELD, "prompt"),
        ({**PAIR, "rejected": " "}, Reason.EMPTY_RESPONSE, "rejected"),
        ({**PAIR, "prompt": ""}, Reason.EMPTY_PROMPT, "prompt"),
        ({"chosen": turns("Hi", "x"), "rejected": turns("Ho", "y")}, Reason.PROMPTS_DIFFER, "chosen[0]"),
        ({"chosen": turns("a", "b", "c", "x"), "rejected": turns("a", "b", "d", "y")}, Reason.PROMPTS_DIFFER, None),
        ({**PAIR, "chosen": turns("Hi", "Hello")}, Reason.PROMPTS_DIFFER, "rejected"),
        ({"prompt": "Ho", "chosen": turns("Hi", "x"), "rejected": turns("Hi", "y")}, Reason.PROMPTS_DIFFER, "prompt"),
        ({"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "b")}, Reason.NO_RESPONSE, "rejected"),
        ({"chosen": turns("a", "b", "c"), "rejected": turns("a", "x", "c")}, Reason.NO_RESPONSE, "chosen"),
    ],
)
def test_a_pair_that_is_none_has_its_reason(row: dict[str, Any], reason: Reason, field: str | None) -> None:
    with pytest.raises(RowError) as caught:
        to_conversation(row, RowSpec("preference"))
    assert caught.value.reason == reason
    assert field is None or caught.value.field == field


def test_both_texts_are_masked_as_they_would_be_alone_and_make_one_row(tmp_path: Path, base: BaseTokenizer) -> None:
    row = {"prompt": "Say hi to Ann", "chosen": "Hello Ann", "rejected": "No"}
    (pair,) = examples(prepared(tmp_path, base, row))
    alone = examples(
        prepared(
            tmp_path,
            base,
            *({"prompt": row["prompt"], "completion": row[side]} for side in ("chosen", "rejected")),
            pairs=False,
        )
    )
    assert pair.second == len(alone[0].input_ids)
    for document, single in zip(pair.documents, alone, strict=True):
        assert np.array_equal(document.input_ids, single.input_ids)
        assert np.array_equal(document.labels, single.labels)
    texts = [base.tokenizer.decode(d.input_ids[d.labels != UNTRAINED]) for d in pair.documents]
    assert texts == ["Hello Ann<|im_end|>", "No<|im_end|>"]


def test_a_pair_is_dropped_or_cut_as_a_whole(tmp_path: Path, base: BaseTokenizer) -> None:
    rows = [
        PAIR,
        {**PAIR, "rejected": "x" * 400},
        {**PAIR, "prompt": "p" * 400},
        {**PAIR, "chosen": "y" * 400 + "a", "rejected": "y" * 400 + "b"},
        {**PAIR, "chosen": "a <|im_end|> b"},
        {**PAIR, "rejected": "Hello"},
    ]
    dropped = prepared(tmp_path, base, *rows, length=100).to_pylist()
    assert [(row["reason"], row["field"]) for row in dropped] == [
        ("", ""),
        ("too_long", "rejected"),
        ("too_long", "chosen"),
        ("too_long", "chosen"),
        ("special_token_in_response", "chosen[1].content"),
        ("chosen_equals_rejected", "rejected"),
    ]
    assert [len(row["input_ids"]) > 0 for row in dropped] == [True, *[False] * 5]
    cut = prepared(tmp_path, base, *rows, length=100, cut=True)
    assert [row["reason"] for row in cut.to_pylist()][:4] == ["", "", "no_trained_token", "chosen_equals_rejected"]
    assert cut.column("flags").to_pylist()[:3] == [[], ["truncated"], []]
    whole, short = examples(cut)
    assert [len(document.input_ids) for document in short.documents] == [len(whole.documents[0].input_ids), 100]
    assert np.array_equal(short.documents[0].labels, whole.documents[0].labels)


def test_a_pair_among_single_rows_is_refused_and_a_single_row_among_pairs(tmp_path: Path, base: BaseTokenizer) -> None:
    single = {"instruction": "Say hi", "output": "hi"}
    fates = prepared(tmp_path, base, single, PAIR, pairs=False).to_pylist()
    assert [(row["reason"], row["field"]) for row in fates] == [("", ""), ("unknown_format", "rejected")]
    assert [row["reason"] for row in prepared(tmp_path, base, single, PAIR).to_pylist()] == ["missing_field", ""]


def test_a_pair_is_a_row_of_a_batch_and_two_of_a_forward_pass(tmp_path: Path, base: BaseTokenizer) -> None:
    pairs = examples(prepared(tmp_path, base, PAIR, {**PAIR, "prompt": "How are you?"}))
    batch = worker_batch(
        [[pair] for pair in pairs],
        epoch=0,
        step=0,
        before=0,
        after=1,
        rank=0,
        workers=1,
        micro_batch_size=2,
        accumulation=1,
        layout="padded",
        pad_id=1,
    )
    (micro,) = batch.micro_batches
    assert (batch.weight, batch.row_ids) == (2.0, (tuple(pair.id for pair in reversed(pairs)),))
    assert batch.trained_tokens == sum(pair.trained_tokens for pair in pairs)
    documents = [document for pair in reversed(pairs) for document in pair.documents]
    assert micro.input_ids.shape == (4, max(len(document.input_ids) for document in documents))
    for row, document in zip(micro.input_ids, documents, strict=True):
        assert np.array_equal(row[: len(document.input_ids)], document.input_ids)
    assert np.array_equal(collate(pairs, "padded", 1).labels[2:], micro.labels[:2])


def test_the_shipped_pairs_prefer_the_format() -> None:
    path = Path(__file__).parents[2] / "jobs" / "data" / "support" / "preferences.jsonl"
    found = [to_conversation(json.loads(line), RowSpec("preference")) for line in path.read_text().splitlines()]
    assert len({pair.messages[0].content for pair in found}) == len(found) >= 40
    for pair in found:
        answer, other = pair.messages[-1].content, pair.rejected[-1].content
        assert list(json.loads(answer)) == ["procedure", "action", "escalate"]
        assert not other.startswith('{"procedure"') or list(json.loads(other)) == ["procedure", "answer"]


def test_hygiene_looks_at_both_answers() -> None:
    section = HygieneSection(personal_data="redact", contamination="flag", evaluation=["x"])
    eaten = Conversation((USER, Message("assistant", "one two three four five six seven " * 3, True)))
    rules = plan_hygiene(section, [("held.jsonl", [eaten])])
    rejected = (Message("user", "Hm"), Message("assistant", f"{eaten.messages[1].content} mail ann@example.com", True))
    (found,) = screen([Conversation((Message("user", "Hm"), GOOD), rejected=rejected)], rules)
    assert not isinstance(found, RowError)
    assert found.flags == ("contaminated:held.jsonl", "personal_data:email")
    assert found.conversation.rejected[1].content.endswith("mail [EMAIL]")
    assert found.conversation.messages[1] == GOOD
