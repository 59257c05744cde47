"""Tokenizers of the kinds that real models have, made in code: every kind speaks every family's special tokens."""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sft.base import BaseTokenizer
from sft.template import ChatTemplate
from tests.templates import Family

Kind = Literal["gpt2", "gpt4", "prepend", "metaspace", "seam"]
KINDS: tuple[Kind, ...] = ("gpt2", "gpt4", "prepend", "metaspace", "seam")
"""Byte-level BPE with GPT-2's and, over NFC, with a GPT-4-like regular expression; SentencePiece-like BPE with byte
fallback and a dummy prefix, before every piece between special tokens (as Llama 2) or before the first one alone; and a
byte-level BPE that merges across the edge between a header and an answer."""

BYTE_LEVEL = frozenset(("gpt2", "gpt4", "seam"))

Vocabulary = dict[str, int]
Merges = list[tuple[str, str]]

_WORDS = """The user asks the assistant, and the assistant answers: "Half past nine." Name a colour! Blue, as in a
sky. And another? Green, as in grass; it isn't red, they'll say so. You answer briefly.

system
You are a helpful assistant
user: what is 12 + 30?

assistant: It is 42, which isn't 1234567 or 3.14.
  - one line of a list
  - another line   with   gaps

[INST] Instruction [/INST] Response </INST> USER: hello ASSISTANT: Hello there, how are you today?
import os

def main():
\treturn {"name": "weather", "arguments": {"city": "Zürich"}}

日本語の文章 naïve café 🙂 🙂
"""
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEAM: Merges = [
    *(("Ċ", letter) for letter in "aeiouT"),
    *(("Ċ", "Ċ"), (":", "Ġ"), ("]", "Ġ"), ("Ġ", "B"), ("e", "."), ("e", "Ċ")),
]


@functools.cache
def make_base(family: Family, kind: Kind) -> BaseTokenizer:
    """A family's template on a tokenizer of that kind; not proved."""
    bare = _BACKENDS[kind]()
    marks = [*family.special, *family.stop]
    added = [AddedToken(text, special=True, normalized=False, rstrip=text in family.rstrip) for text in marks]
    bare.add_special_tokens(added)
    bare.add_tokens([AddedToken(text, special=False, normalized=False) for text in family.plain])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token=family.bos, eos_token=family.eos, pad_token=family.pad
    )
    fast.chat_template = family.template
    return BaseTokenizer(fast, ChatTemplate(fast, family.stop), tuple(fast.convert_tokens_to_ids(list(family.stop))))


def text_of(base: BaseTokenizer, kind: Kind, ids: Iterable[int]) -> str:
    """What ids stand for, byte by byte: nothing is stripped, as decoders do with a leading space."""
    return b"".join(pieces_of(base, kind, ids)).decode("utf-8")


def pieces_of(base: BaseTokenizer, kind: Kind, ids: Iterable[int]) -> list[bytes]:
    """The bytes that each id stands for."""
    added = base.tokenizer.get_added_vocab()
    table = _byte_table()
    made = []
    for token in base.tokenizer.convert_ids_to_tokens(list(ids)):
        if token in added:
            made.append(token.encode())
        elif kind in BYTE_LEVEL:
            made.append(bytes(table[symbol] for symbol in token))
        elif len(token) == 6 and token.startswith("<0x"):
            made.append(bytes([int(token[3:5], 16)]))
        else:
            made.append(token.replace("▁", " ").encode())
    return made


def as_read(base: BaseTokenizer, kind: Kind, text: str) -> str:
    """A text as a tokenizer understands it: what its normaliser makes of it, added tokens aside."""
    if kind in ("gpt2", "seam"):
        return text
    added = sorted(base.tokenizer.get_added_vocab(), key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, added)) + ")", text)
    parts[::2] = [
        unicodedata.normalize("NFC", part) if kind == "gpt4" else part.replace("▁", " ") for part in parts[::2]
    ]
    return "".join(parts)


def _byte_level(vocabulary: Vocabulary, merges: Merges, split: pre_tokenizers.PreTokenizer | None) -> Tokenizer:
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, level]) if split else level
    made.decoder = decoders.ByteLevel()
    return made


def _gpt2() -> Tokenizer:
    split = pre_tokenizers.Split(
        Regex(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated"
    )
    return _byte_level(*_trained_bytes("gpt2", split), split)


def _gpt4() -> Tokenizer:
    split = pre_tokenizers.Split(Regex(_GPT4), "isolated")
    made = _byte_level(*_trained_bytes("gpt4", split), split)
    made.normalizer = normalizers.NFC()
    return made


def _seam() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(alphabet)}
    for left, right in _SEAM:
        vocabulary[left + right] = len(vocabulary)
    return _byte_level(vocabulary, _SEAM, None)


def _prepend() -> Tokenizer:
    made = _sentencepiece()
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return made


def _metaspace() -> Tokenizer:
    made = _sentencepiece()
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    return made


def _sentencepiece() -> Tokenizer:
    vocabulary, merges = _trained_pieces()
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


_BACKENDS: dict[Kind, Callable[[], Tokenizer]] = {
    "gpt2": _gpt2,
    "gpt4": _gpt4,
    "prepend": _prepend,
    "metaspace": _metaspace,
    "seam": _seam,
}
_learned: dict[str, tuple[Vocabulary, Merges]] = {}


def _trained_bytes(name: str, split: pre_tokenizers.PreTokenizer) -> tuple[Vocabulary, Merges]:
    if name not in _learned:
        made = _byte_level({}, [], split)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        _learned[name] = _train(made, trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet))
    return _learned[name]


@functools.cache
def _trained_pieces() -> tuple[Vocabulary, Merges]:
    """Pieces that hold a space only at their beginning, as SentencePiece learns them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = ["▁", *(chr(code) for code in range(33, 127))]
    return _train(
        made, trainers.BpeTrainer(vocab_size=560, special_tokens=["<unk>", *fallback], initial_alphabet=letters)
    )


def _train(tokenizer: Tokenizer, trainer: trainers.BpeTrainer) -> tuple[Vocabulary, Merges]:
    trainer.show_progress = False
    tokenizer.train_from_iterator([_WORDS], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]


@functools.cache
def _byte_table() -> dict[str, int]:
    """Byte-level BPE's letters: printable Latin-1 stands for itself, the other bytes for U+0100 and on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
