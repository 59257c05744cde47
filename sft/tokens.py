"""Texts -> token ids with each token's place in its text, a whole batch at a time.

Two tokenizers give the same ids: transformers' own, which is always right, and kitoken, which is several times faster
and is used only where it was proven to agree: on texts made to tell tokenizers apart, on a sample of the run's own
rows, and on one row of every batch.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import kitoken
import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from sft.errors import DataError

Ids = npt.NDArray[np.int32]
Places = npt.NDArray[np.int64]

_TELLING = (
    "Hello, world! It's 12:30; isn't it? 1234567890 3.14159 0x1F",
    "  leading,  double   triple    spaces and trailing  ",
    "\n\n\nlines\r\n\r\n\ttabs\t\tand\n   indented\n\n",
    "naïve café Ünïcödé ÀÉÎ ß Ω ж я 漢字かな交じり文 한국어 العربية עברית हिन्दी ไทย",
    "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 é (combining) ﬁ ligature \u200b zero width \u00a0 nbsp \u2028 line",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # comment\n",
    '{"procedure": "P-12", "steps": ["one", "two"], "ok": true, "n": null}',
    "https://example.com/path?q=1&r=%20#frag user@example.com <b>html</b> &amp; $x^2$ \\frac{1}{2}",
    "don't we'll I've they'RE HE'S 'quoted' \"double\" ``tex'' ... --- ___ ### *** ~~~ ||| <<< >>>",
    "A" * 300 + " " + "ab" * 200 + "." * 100 + " " * 50 + "x",
)


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Token ids of a batch of texts, one after the other.

    Rule: text `i` has the tokens `starts[i]:starts[i + 1]`; `begins` and `ends` give each token's place in its own
    text, in UTF-8 bytes where `in_bytes[i]`, else in characters.
    """

    ids: Ids
    starts: Places
    begins: Places
    ends: Places
    in_bytes: npt.NDArray[np.bool_]


class Encoder:
    """A base model's tokenizer for rendered texts: special tokens are in the text, none are added.

    Args:
        tokenizer: the base model's tokenizer.
        quick: whether kitoken may be used, if it passes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, quick: bool = True) -> None:
        self.tokenizer = tokenizer
        definition = json.loads(tokenizer.backend_tokenizer.to_str())
        added = definition["added_tokens"]
        hard = [token for token in added if not (token["normalized"] or token["lstrip"] or token["rstrip"])]
        unknown = definition["model"].get("unk_token")  # stands for text as well
        hard = [token for token in hard if not token["single_word"]]
        self._hard = {token["content"]: int(token["id"]) for token in hard if token["content"] != unknown}
        self._lengths = _byte_lengths(definition) if len(hard) == len(added) else None
        self._normalized = "NFC" if _normalizers(definition) == ["NFC"] else None
        self._quick: Any = self._proven(definition) if quick and self._lengths is not None else None

    @property
    def is_quick(self) -> bool:
        """Whether kitoken is used."""
        return self._quick is not None

    @property
    def hard_ids(self) -> Ids:
        """Ids of tokens that text on one side cannot tell from what is on the other: tokenisation restarts there."""
        return np.fromiter(self._hard.values(), np.int32, len(self._hard))

    def agrees(self, texts: Sequence[str]) -> bool:
        """Whether kitoken gives transformers' ids for these texts."""
        return bool(self._quick.encode_all(list(texts), True) == encode(self.tokenizer, texts))

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encodes a batch.

        Raises:
            DataError: the two tokenizers disagree on a row of the run.
        """
        if self._lengths is None or not texts:
            return self._by_offsets(texts)
        flat, starts = self._flat(texts)
        ends = np.cumsum(self._lengths[flat], dtype=np.int64)
        before = np.concatenate([[0], ends])[starts]
        sizes = np.fromiter((len(t) if t.isascii() else len(t.encode()) for t in texts), np.int64, len(texts))
        ends -= np.repeat(before[:-1], np.diff(starts))
        whole = np.diff(before) == sizes
        if self._normalized is not None:
            changed = [i for i, t in enumerate(texts) if not (t.isascii() or unicodedata.is_normalized("NFC", t))]
            whole[changed] = False
        encoded = Encoded(flat, starts, ends - self._lengths[flat], ends, np.ones(len(texts), np.bool_))
        return encoded if whole.all() else self._mended(encoded, texts, np.flatnonzero(~whole))

    def _flat(self, texts: Sequence[str]) -> tuple[Ids, Places]:
        if self._quick is None:
            return _joined(encode(self.tokenizer, texts))
        if not self.agrees(texts[:1]):
            raise DataError(
                "the fast tokenizer gives other ids than the base model's own for a row of this data; "
                "set data.tokenizer to transformers"
            )
        separator = next((token for token in self._hard if not any(token in text for text in texts)), None)
        if separator is None:
            return _joined(self._quick.encode_all(list(texts), True))
        # One call for the whole batch is twice as fast as one for each text.
        ids = self._quick.encode(separator.join(texts), True)
        flat = np.fromiter(ids, np.int32, len(ids))
        between = np.flatnonzero(flat == self._hard[separator])
        if len(between) != len(texts) - 1:
            return _joined(self._quick.encode_all(list(texts), True))
        starts = np.concatenate([[0], between - np.arange(len(between)), [len(flat) - len(between)]])
        return np.delete(flat, between), starts.astype(np.int64)

    def _by_offsets(self, texts: Sequence[str]) -> Encoded:
        if not texts:
            return Encoded(*_joined([]), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.bool_))
        made = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True
        )
        flat, starts = _joined(made["input_ids"])
        places = np.array(list(itertools.chain.from_iterable(made["offset_mapping"])), np.int64).reshape(-1, 2)
        return Encoded(flat, starts, places[:, 0], places[:, 1], np.zeros(len(texts), np.bool_))

    def _mended(self, encoded: Encoded, texts: Sequence[str], rows: Places) -> Encoded:
        """Takes the texts whose bytes the tokenizer changed by their offsets."""
        others = self._by_offsets([texts[i] for i in rows])
        lengths = np.diff(encoded.starts)
        lengths[rows] = np.diff(others.starts)
        in_bytes = encoded.in_bytes.copy()
        in_bytes[rows] = False
        position = {int(row): i for i, row in enumerate(rows)}
        parts = []
        for i in range(len(texts)):
            origin, j = (others, position[i]) if i in position else (encoded, i)
            place = slice(origin.starts[j], origin.starts[j + 1])
            parts.append((origin.ids[place], origin.begins[place], origin.ends[place]))
        ids, begins, ends = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Encoded(ids, np.concatenate([[0], np.cumsum(lengths)]), begins, ends, in_bytes)

    def _proven(self, definition: dict[str, Any]) -> Any:
        """A kitoken of this tokenizer if it agrees on texts made to tell tokenizers apart."""
        try:
            self._quick = kitoken.Kitoken.from_tokenizers(json.dumps(definition).encode())
            marks = [token["content"] for token in definition["added_tokens"]]
            texts = [*_TELLING, *marks, *(f"{mark}a {mark}\n{mark} b{mark}" for mark in marks), "".join(_TELLING)]
            return self._quick if self.agrees(texts) else None
        except (ValueError, TypeError, RuntimeError, OSError):
            return None


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Tokenises rendered texts as the server does, by transformers' own tokenizer."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return ids


def _joined(lists: Sequence[Sequence[int]]) -> tuple[Ids, Places]:
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids in lists], dtype=np.int64)]).astype(np.int64)
    return np.fromiter(itertools.chain.from_iterable(lists), np.int32, int(starts[-1])), starts


def _byte_lengths(definition: dict[str, Any]) -> Places | None:
    """Bytes of each token, where a tokenizer's tokens are pieces of the text's own bytes; else None."""
    steps = definition["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    kinds = {step.get("type") for step in steps}
    model = definition["model"]
    if (
        not byte_level
        or any(step["add_prefix_space"] for step in byte_level)
        or not kinds <= {"ByteLevel", "Split", "Digits"}
    ):
        return None
    if model["type"] != "BPE" or model.get("dropout") or _normalizers(definition) not in ([], ["NFC"]):
        return None
    if any(step.get("behavior") == "Removed" for step in steps):
        return None
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    lengths = np.zeros(1 + max([*model["vocab"].values(), *(t["id"] for t in definition["added_tokens"])]), np.int64)
    for token, number in model["vocab"].items():
        lengths[number] = len(token)
    for token in definition["added_tokens"]:
        lengths[token["id"]] = len(token["content"].encode())
    return lengths


def _normalizers(definition: dict[str, Any]) -> list[str]:
    found = definition["normalizer"] or {}
    return [step["type"] for step in found.get("normalizers", [found] if found else [])]
