from __future__ import annotations

import functools

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from jobs.audit import mixture
from jobs.audit_examples import MOST_SHOWN, ExamplePicker, ShownExample, dump, shown, visible
from sft.base import BaseTokenizer
from sft.rows import PREPARED
from sft.survey import survey
from tests.jobs.test_audit_page import row
from tests.tiny import CHATML, small_base


def sentencepiece() -> PreTrainedTokenizerFast:
    """Spaces as ▁, a first space that decoding takes off, and bytes for what is not in the vocabulary."""
    vocabulary = {**{f"<0x{i:02X}>": i for i in range(256)}, "▁": 256, "a": 257, "▁a": 258, "<|im_end|>": 259}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", chat_template=CHATML)


@functools.cache
def bases() -> tuple[BaseTokenizer, BaseTokenizer]:
    bytewise = small_base()
    return bytewise, BaseTokenizer(sentencepiece(), bytewise.template, (259,))


def example(base: BaseTokenizer, ids: list[int], trained: int) -> ShownExample:
    labels = [-100] * (len(ids) - trained) + ids[len(ids) - trained :]
    return shown(row(input_ids=ids, labels=labels), base)


@given(text=st.text(max_size=30), which=st.integers(0, 1))
def test_pieces_join_to_the_whole_text(text: str, which: int) -> None:
    base = bases()[which]
    ids = base.tokenizer(text.replace(" ", "▁") if which else text)["input_ids"]
    pieces = example(base, ids, 0).head
    assert [token for piece in pieces for token in piece.ids] == ids
    assert "".join(piece.text for piece in pieces) == base.tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, 255), min_size=1, max_size=20), which=st.integers(0, 1))
def test_no_bytes_are_lost_where_they_are_no_text(ids: list[int], which: int) -> None:
    made = example(bases()[which], ids, len(ids) - 1)
    assert [token for piece in made.head for token in piece.ids] == ids
    assert [label for piece in made.head for label in piece.labels] == [-100, *ids[1:]]


def test_a_character_of_several_tokens_is_one_piece(base: BaseTokenizer) -> None:
    ids = base.tokenizer("é☕x<|im_end|>")["input_ids"]
    pieces = example(base, ids, 3).head
    assert [(piece.text, len(piece.ids), piece.special) for piece in pieces] == [
        ("é", 2, False),
        ("☕", 3, False),
        ("x", 1, False),
        ("<|im_end|>", 1, True),
    ]
    assert [piece.weight for piece in pieces] == [0, 1, 1, 1]


def test_an_example_is_shortened_in_its_middle(base: BaseTokenizer) -> None:
    whole = example(base, base.tokenizer("abcdefghij")["input_ids"], 1)
    short = whole.shortened(3)
    assert "".join(piece.text for piece in short.head) == "abc"
    assert "".join(piece.text for piece in short.tail) == "hij"
    assert short.omitted == 4
    assert whole.shortened(5) == whole


def test_dumped_text_is_what_the_labels_say(base: BaseTokenizer) -> None:
    ids = base.tokenizer("qqanswer<|im_end|>qqyes<|im_end|>")["input_ids"]
    trained = [text == "t" for text in "ppttttttt" + "ppttt" + "t"]
    labels = [token if of else -100 for token, of in zip(ids, trained, strict=True)]
    assert dump(row(input_ids=ids, labels=labels), base) == {
        "id": "s/a.jsonl:1:x",
        "source": "s",
        "input_ids": ids,
        "labels": labels,
        "trained_text": "answer<|im_end|>yes<|im_end|>",
    }


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a b\n\tc", "a b↵\n⇥\tc"),
        ("\x1b[31m\r\x07", "⟨U+001B⟩[31m⟨U+000D⟩⟨U+0007⟩"),
        ("no\u00a0break, zero\u200bwidth, \u202eright", "no⟨U+00A0⟩break, zero⟨U+200B⟩width, ⟨U+202E⟩right"),
        ("naïve 日本語 👩\u200d🔬", "naïve 日本語 👩\u200d🔬"),
    ],
)
def test_nothing_is_invisible(text: str, seen: str) -> None:
    assert visible(text) == seen


def picked(rows: list[dict[str, object]], each: int, block: int = 3) -> list[str]:
    picker = ExamplePicker(each)
    for begin in range(0, len(rows), block):
        picker.add(pa.Table.from_pylist(rows[begin : begin + block], schema=PREPARED))
    return [str(one["id"]) for one in picker.rows]


def test_the_first_of_each_source_and_flag_are_picked() -> None:
    fates = ["s", "s!", "s", "s", "s truncated", "t", "s truncated", "t truncated", "t redacted", "t", "t"]
    rows = []
    for i, fate in enumerate(fates):
        source, *flags = fate.rstrip("!").split()
        reason = "too_long" if fate.endswith("!") else ""
        rows.append(row(id=str(i), source=source, reason=reason, flags=flags, input_ids=[1], labels=[1]))
    for block in (1, 3, 20):
        assert picked(rows, 2, block) == ["0", "2", "4", "5", "7", "8"]
    assert picked(rows, 0) == []


def test_examples_are_not_without_end() -> None:
    rows = [row(id=str(i), source=str(i), input_ids=[1], labels=[1]) for i in range(MOST_SHOWN + 10)]
    assert picked(rows, 5, 7) == [str(i) for i in range(MOST_SHOWN)]


def test_a_mixture_of_any_groups() -> None:
    cells = [("s", "add", "math")] * 4 + [("s", "rhyme", "")] * 2 + [("t", "", "")] * 2
    rows = [
        row(source=source, task=task, cluster=cluster, input_ids=[1, 2, 3], labels=[-100, 2, 3 if task else -100])
        for source, task, cluster in cells
    ]
    counted = survey([pa.Table.from_pylist(rows, schema=PREPARED)])
    assert [(share.group, share.kept, share.rows, share.share) for share in mixture(counted)] == [
        ("s", 6, 6, 0.75),
        ("t", 2, 2, 0.25),
    ]
    groups = [("math", [cells[0]], 1), ("rest", [cells[4], cells[6]], 3)]
    found = mixture(counted, groups)
    assert [(share.group, share.kept, share.rows, share.share) for share in found] == [
        ("math", 4, 1, 0.25),
        ("rest", 4, 3, 0.75),
    ]
    assert found[0].trained_share == pytest.approx(2 / (2 + 3 * 1.5))
