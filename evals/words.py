"""Counting in text: words, sentences, paragraphs, bullets, and whole words found in it."""

from __future__ import annotations

import re

WORD = re.compile(r"[^\W_]+(?:['\u2019\-][^\W_]+)*")
ENDING = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]]*(?=\s|$)|[\u3002\uff01\uff1f]+")
SHORT = re.compile(r"(?:\b(?:mr|mrs|ms|dr|prof|st|vs|e\.g|i\.e|etc|no|approx)|\b[a-z])\.$", re.IGNORECASE)
BULLET = re.compile(r"[ \t]*[-*+\u2022\u2013][ \t]+\S")
NUMBERED = re.compile(r"[ \t]*\d+[.)][ \t]+\S")


def words(text: str) -> list[str]:
    """The words of a text; `it's` and `well-known` are one each."""
    return WORD.findall(text)


def sentences(text: str) -> int:
    """How many sentences a text has. A heading or bullet without a full stop counts as one as well."""
    count = 0
    for line in text.splitlines():
        begun = 0
        for ending in ENDING.finditer(line):
            piece = line[begun : ending.end()]
            if ending.end() < len(line) and SHORT.search(piece):
                continue
            count += bool(WORD.search(piece))
            begun = ending.end()
        count += bool(WORD.search(line[begun:]))
    return count


def paragraphs(text: str) -> list[str]:
    """The blocks between blank lines."""
    return [block for block in re.split(r"\n[ \t]*\n", text) if block.strip()]


def bullets(text: str, numbered: bool = False) -> int:
    """How many lines are bullets; with `numbered`, those of numbered lists."""
    return sum(bool((NUMBERED if numbered else BULLET).match(line)) for line in text.splitlines())


def occurrences(text: str, phrase: str, case: bool = False) -> int:
    """How often a word or phrase occurs as whole words; any white space fits any other."""
    pattern = r"\s+".join(map(re.escape, phrase.split()))
    return len(re.findall(rf"(?<!\w){pattern}(?!\w)", text, 0 if case else re.IGNORECASE))
