"""Checkers of plain text: equality, containment, numbers, choices, patterns, keywords, lengths and bullets."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, Self

import regex  # type: ignore[import-untyped]
from pydantic import Field, field_validator, model_validator

from evals.checker import RIGHT, Checker, Comparing, Score, right_if, wrong
from evals.errors import CheckError
from evals.words import bullets, occurrences, sentences, words

PATTERN_S = 2.0
"""Time limit of one search. A pattern that takes longer has no verdict: the row is then unscored, not wrong."""
NUMBER = re.compile(r"(?<![\w.])[-\u2212]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:(?<=\d)\.\d+|(?<!\d)\.\d+)?(?<=\d)")
ARTICLES = {"a", "an", "the"}


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and repeated white space."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(" " if unicodedata.category(letter)[0] in "PZC" else letter for letter in plain)
    return " ".join(word for word in kept.split() if word not in ARTICLES)


def numbers(text: str) -> list[Decimal]:
    """All numbers of a text, without the commas between thousands."""
    found = (match.group().replace(",", "").replace("\u2212", "-") for match in NUMBER.finditer(text))
    return [Decimal(one) for one in found]


class Exact(Comparing):
    """The answer is the reference."""

    kind: Literal["exact"]
    normalise: bool = Field(False, description="Ignore case, punctuation, articles and white space.")

    def compare(self, text: str, wanted: Any) -> Score:
        same = normalised(text) == normalised(wanted) if self.normalise else text.strip() == wanted.strip()
        return right_if(same, "is not the reference")


class Contains(Comparing):
    """The reference occurs in the answer, as whole words."""

    kind: Literal["contains"]
    case: bool = Field(False, description="Upper and lower case differ.")

    def compare(self, text: str, wanted: Any) -> Score:
        return right_if(bool(occurrences(text, wanted, self.case)), "does not hold the reference")


class Number(Comparing):
    """A number equals the reference; `of: final` reads only a marked answer, `of: whole` whatever comes last."""

    kind: Literal["number"]
    which: Literal["last", "first", "only"] = Field("last", description="Which number of the text counts.")
    tolerance: float = Field(0.0, ge=0, description="Largest difference that is still right.")

    def fault_of(self, wanted: Any) -> str | None:
        return None if _decimal(wanted) is not None else "needs a number to compare with"

    def compare(self, text: str, wanted: Any) -> Score:
        found = numbers(text)
        if not found:
            return wrong("holds no number")
        if self.which == "only" and len(found) > 1:
            return wrong(f"holds {len(found)} numbers, not 1")
        got = found[0 if self.which == "first" else -1]
        right = _decimal(wanted)
        close = right is not None and abs(got - right) <= Decimal(str(self.tolerance))
        return right_if(close, f"its {self.which} number is another one")


class Choice(Comparing):
    """A letter of a multiple choice."""

    kind: Literal["choice"]
    options: str = Field("ABCD", pattern=r"^[A-Z]{2,26}$", description="The letters that there are.")
    reading: Literal["strict", "flexible"] = Field(
        "strict",
        description="strict: the letter, alone or before `.`, `)` or `:`; flexible: the last one named.",
    )

    def fault_of(self, wanted: Any) -> str | None:
        fits = isinstance(wanted, str) and len(wanted) == 1 and wanted in self.options
        return None if fits else f"needs one letter of {self.options} to compare with"

    def compare(self, text: str, wanted: Any) -> Score:
        letters = f"[{self.options}]"
        if self.reading == "strict":
            found = re.match(rf"\W*({letters})(?:\W*$|[).:](?:\s|$))", text.strip())
            got = found[1] if found else None
        else:
            marked = re.findall(rf"\(({letters})\)|\b({letters})\)", text)
            plain = re.findall(rf"(?<![\w'\u2019])({letters})(?![\w'\u2019])", text)
            got = "".join(marked[-1]) if marked else plain[-1] if plain else None
        return right_if(got == wanted, "names no option" if got is None else "names another option")


class Pattern(Checker):
    """A regular expression fits the answer."""

    kind: Literal["regex"]
    pattern: str
    match: Literal["search", "full"] = Field("search", description="search: somewhere; full: from end to end.")
    ignore_case: bool = False
    none: bool = Field(False, description="The pattern must not fit.")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            regex.compile(pattern)
        except regex.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern

    def check_text(self, text: str, reference: Any) -> Score:  # noqa: ARG002
        compiled = regex.compile(self.pattern, regex.IGNORECASE if self.ignore_case else 0)
        find = compiled.fullmatch if self.match == "full" else compiled.search
        try:
            found = find(text.strip(), timeout=PATTERN_S) is not None
        except TimeoutError:
            raise CheckError(f"the pattern took longer than {PATTERN_S:g} s: write one that backtracks less") from None
        return right_if(found != self.none, "fits the pattern" if self.none else "does not fit the pattern")


class Keywords(Checker):
    """Words or phrases that must or must not occur."""

    kind: Literal["keywords"]
    all: list[str] = Field([])
    any: list[str] = Field([])
    none: list[str] = Field([])
    case: bool = Field(False, description="Upper and lower case differ.")

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not (self.all or self.any or self.none):
            raise ValueError("give keywords in all, any or none")
        if not all(word.strip() for word in (*self.all, *self.any, *self.none)):
            raise ValueError("a keyword is empty")
        return self

    def check_text(self, text: str, reference: Any) -> Score:  # noqa: ARG002
        there = {word: bool(occurrences(text, word, self.case)) for word in (*self.all, *self.any, *self.none)}
        missing = [word for word in self.all if not there[word]]
        unwanted = [word for word in self.none if there[word]]
        if missing:
            return wrong(f"lacks {', '.join(missing)}")
        if unwanted:
            return wrong(f"holds {', '.join(unwanted)}")
        return right_if(not self.any or any(there[word] for word in self.any), f"has none of {', '.join(self.any)}")


class Bounded(Checker):
    """Base of checkers that count something."""

    min: int | None = Field(None, ge=0)
    max: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self

    def bounded(self, count: int, unit: str) -> Score:
        """1 where the count is within the bounds."""
        if self.min is not None and count < self.min:
            return wrong(f"{count} {unit}, at least {self.min} asked")
        if self.max is not None and count > self.max:
            return wrong(f"{count} {unit}, at most {self.max} asked")
        return RIGHT


class Length(Bounded):
    """How long the answer is."""

    kind: Literal["length"]
    unit: Literal["words", "sentences", "characters", "lines"] = "words"

    def check_text(self, text: str, reference: Any) -> Score:  # noqa: ARG002
        count = {
            "words": lambda: len(words(text)),
            "sentences": lambda: sentences(text),
            "characters": lambda: len(text),
            "lines": lambda: sum(bool(line.strip()) for line in text.splitlines()),
        }[self.unit]()
        return self.bounded(count, self.unit)


class Bullets(Bounded):
    """How many bullets the answer has."""

    kind: Literal["bullets"]
    numbered: bool = Field(False, description="Count the lines of numbered lists (`1.`) instead of bullets (`-`).")
    only: bool = Field(False, description="Every line must be such a bullet: no introduction, no closing line.")

    def check_text(self, text: str, reference: Any) -> Score:  # noqa: ARG002
        count = bullets(text, self.numbered)
        if self.only and count != sum(bool(line.strip()) for line in text.splitlines()):
            return wrong("has lines that are no bullets")
        return self.bounded(count, "bullets")


def _decimal(value: Any) -> Decimal | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        found = Decimal(str(value).replace(",", ""))
    except InvalidOperation:
        return None
    return found if found.is_finite() else None
