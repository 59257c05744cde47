from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sft.base import load_tokenizer
from sft.errors import DataError
from sft.tokens import Encoded, Encoder, encode
from tests.tiny import CHATML, byte_tokenizer

texts = st.lists(st.text(st.characters(codec="utf-8"), max_size=40), min_size=1, max_size=5)
common = st.lists(st.text(st.characters(max_codepoint=0x2FFF, codec="utf-8"), max_size=40), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def real(demo_model: Path) -> Encoder:
    return load_tokenizer(demo_model).encoder


def ids(encoded: Encoded) -> list[list[int]]:
    edges = encoded.starts.tolist()
    return [encoded.ids[a:b].tolist() for a, b in itertools.pairwise(edges)]


@settings(derandomize=True)
@given(texts)
def test_ids_are_transformers_own(real: Encoder, texts: list[str]) -> None:
    assert real.is_quick
    assert ids(real.encode(texts)) == encode(real.tokenizer, texts)


@settings(derandomize=True)
@given(common)
def test_tokens_lie_where_their_bytes_are(real: Encoder, texts: list[str]) -> None:
    encoded = real.encode([*texts, "Hällo\n"])
    assert encoded.in_bytes[-1]
    for i, text in enumerate(texts):
        if not encoded.in_bytes[i]:
            continue  # this model has no token for some bytes; such a text is placed by characters
        place = slice(encoded.starts[i], encoded.starts[i + 1])
        begins, ends = encoded.begins[place].tolist(), encoded.ends[place].tolist()
        assert begins == [0, *ends[:-1]][: len(begins)]
        assert (ends[-1] if ends else 0) == len(text.encode())


def test_without_kitoken_the_answer_is_the_same(real: Encoder) -> None:
    slow = Encoder(real.tokenizer, quick=False)
    given = ["Hello <|im_start|>user\nä<|im_end|>", "", "  two  spaces\n"]
    assert not slow.is_quick
    fast, own = real.encode(given), slow.encode(given)
    assert fast.ids.tolist() == own.ids.tolist()
    assert fast.ends.tolist() == own.ends.tolist()


def test_a_text_that_the_tokenizer_normalises_is_placed_by_characters() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={"<s>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, merges=[]))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.add_special_tokens(["<s>"])
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=made))
    encoded = encoder.encode(["plain", "e\u0301", "\u00e9"])
    assert encoded.in_bytes.tolist() == [True, False, True]
    assert ids(encoded) == encode(encoder.tokenizer, ["plain", "e\u0301", "\u00e9"])
    assert encoded.ends[encoded.starts[1] : encoded.starts[2]].max() == 1


def test_a_tokenizer_that_is_not_byte_level_gives_its_own_offsets() -> None:
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=made))
    encoded = encoder.encode(["a  b", "x"])
    assert not encoder.is_quick
    assert ids(encoded) == [[0, 1], [2]]
    assert (encoded.begins.tolist(), encoded.ends.tolist()) == ([0, 3, 0], [1, 4, 1])
    assert encoded.in_bytes.tolist() == [False, False]


def test_a_row_on_which_the_two_differ_stops_the_run() -> None:
    encoder = Encoder(byte_tokenizer(CHATML))
    assert encoder.is_quick
    other = byte_tokenizer(CHATML, merges=[("a", "b")])
    encoder.tokenizer = other
    with pytest.raises(DataError, match=r"data\.tokenizer"):
        encoder.encode(["ab"])


def test_nothing_is_nothing(real: Encoder) -> None:
    assert ids(real.encode([])) == []
