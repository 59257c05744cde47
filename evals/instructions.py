"""Instructions that a program can verify: the 25 types of IFEval (arXiv 2311.07911), under their published names.

Our own implementation: fields have the published names, so published rows can be used as they are. Where the paper
leaves room (what a word or a sentence is, which language a text is in), `words.py` and `language.py` decide.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from typing import Annotated, Literal

from pydantic import Field, field_validator

from evals.json_checkers import parse
from evals.language import KNOWN, language
from evals.words import BULLET, occurrences, paragraphs, sentences, words
from sft.section import Section

Relation = Literal["at least", "less than"]
Words = Annotated[list[Annotated[str, Field(pattern=r"\S")]], Field(min_length=1)]
Text = Annotated[str, Field(pattern=r"\S")]
Count = Annotated[int, Field(ge=0)]

YES_NO_MAYBE = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


class Instruction(Section):
    """Base of all instructions: a published `type`, and whether a text follows it."""

    @abstractmethod
    def follows(self, text: str) -> bool:
        """Whether a text follows the instruction."""


class Existence(Instruction):
    """All keywords occur."""

    type: Literal["keywords:existence"]
    keywords: Words

    def follows(self, text: str) -> bool:
        return all(occurrences(text, word) for word in self.keywords)


class Frequency(Instruction):
    """A keyword occurs so often."""

    type: Literal["keywords:frequency"]
    keyword: Text
    frequency: Count
    relation: Relation

    def follows(self, text: str) -> bool:
        return _holds(occurrences(text, self.keyword), self.relation, self.frequency)


class Forbidden(Instruction):
    """None of the words occurs."""

    type: Literal["keywords:forbidden_words"]
    forbidden_words: Words

    def follows(self, text: str) -> bool:
        return not any(occurrences(text, word) for word in self.forbidden_words)


class LetterFrequency(Instruction):
    """A letter occurs so often, in either case."""

    type: Literal["keywords:letter_frequency"]
    letter: Annotated[str, Field(min_length=1, max_length=1)]
    let_frequency: Count
    let_relation: Relation

    def follows(self, text: str) -> bool:
        return _holds(text.casefold().count(self.letter.casefold()), self.let_relation, self.let_frequency)


class ResponseLanguage(Instruction):
    """The whole answer is in a language."""

    type: Literal["language:response_language"]
    language: str

    @field_validator("language")
    @classmethod
    def _is_known(cls, code: str) -> str:
        if code not in KNOWN:
            raise ValueError(f"is not known: use one of {', '.join(KNOWN)}")
        return code

    def follows(self, text: str) -> bool:
        return language(text) == self.language


class Sentences(Instruction):
    """So many sentences."""

    type: Literal["length_constraints:number_sentences"]
    num_sentences: Count
    relation: Relation

    def follows(self, text: str) -> bool:
        return _holds(sentences(text), self.relation, self.num_sentences)


class Paragraphs(Instruction):
    """Exactly so many paragraphs, divided by `***`."""

    type: Literal["length_constraints:number_paragraphs"]
    num_paragraphs: Count

    def follows(self, text: str) -> bool:
        parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
        inner = parts[bool(parts[0]) ^ 1 : len(parts) - (not parts[-1])]
        return all(inner) and len(inner) == self.num_paragraphs


class WordCount(Instruction):
    """So many words."""

    type: Literal["length_constraints:number_words"]
    num_words: Count
    relation: Relation

    def follows(self, text: str) -> bool:
        return _holds(len(words(text)), self.relation, self.num_words)


class FirstWord(Instruction):
    """So many paragraphs, divided by blank lines, and the first word of one of them."""

    type: Literal["length_constraints:nth_paragraph_first_word"]
    num_paragraphs: Annotated[int, Field(ge=1)]
    nth_paragraph: Annotated[int, Field(ge=1)]
    first_word: Text

    def follows(self, text: str) -> bool:
        found = paragraphs(text)
        if len(found) != self.num_paragraphs or self.nth_paragraph > len(found):
            return False
        begun = words(found[self.nth_paragraph - 1])
        return bool(begun) and begun[0].casefold() == self.first_word.casefold()


class Placeholders(Instruction):
    """At least so many placeholders, such as [address]."""

    type: Literal["detectable_content:number_placeholders"]
    num_placeholders: Count

    def follows(self, text: str) -> bool:
        return len(re.findall(r"\[[^\[\]]+\]", text)) >= self.num_placeholders


class Postscript(Instruction):
    """A postscript that begins with a marker, such as P.S."""

    type: Literal["detectable_content:postscript"]
    postscript_marker: Text = "P.S."

    def follows(self, text: str) -> bool:
        marker = r"\s*".join(map(re.escape, self.postscript_marker.replace(" ", "")))
        return re.search(rf"^\s*{marker}", text, re.IGNORECASE | re.MULTILINE) is not None


class BulletLists(Instruction):
    """Exactly so many bullets, `*` or `-`."""

    type: Literal["detectable_format:number_bullet_lists"]
    num_bullets: Count

    def follows(self, text: str) -> bool:
        return sum(BULLET.match(line) is not None for line in text.splitlines()) == self.num_bullets


class Constrained(Instruction):
    """One of three given sentences."""

    type: Literal["detectable_format:constrained_response"]

    def follows(self, text: str) -> bool:
        return any(sentence in text for sentence in YES_NO_MAYBE)


class Highlights(Instruction):
    """At least so many sections highlighted as *this* or **this**."""

    type: Literal["detectable_format:number_highlighted_sections"]
    num_highlights: Count

    def follows(self, text: str) -> bool:
        found = re.findall(r"\*\*([^\n*]+)\*\*|\*([^\n*]+)\*", text)
        return sum(bool("".join(one).strip()) for one in found) >= self.num_highlights


class Sections(Instruction):
    """At least so many sections, each marked by a word and a number, such as `Section 1`."""

    type: Literal["detectable_format:multiple_sections"]
    section_spliter: Text
    num_sections: Count

    def follows(self, text: str) -> bool:
        return len(re.findall(rf"\b{re.escape(self.section_spliter.strip())}\s+\d+", text)) >= self.num_sections


class JsonFormat(Instruction):
    """The whole answer is JSON; a code fence may be around it."""

    type: Literal["detectable_format:json_format"]

    def follows(self, text: str) -> bool:
        try:
            parse(text, fenced=True)
        except ValueError:
            return False
        return True


class Title(Instruction):
    """A title in double angular brackets, such as <<this>>."""

    type: Literal["detectable_format:title"]

    def follows(self, text: str) -> bool:
        return any(title.strip("<> ") for title in re.findall(r"<<[^\n]+?>>", text))


class TwoResponses(Instruction):
    """Two different answers, divided by `******`."""

    type: Literal["combination:two_responses"]

    def follows(self, text: str) -> bool:
        parts = [part.strip() for part in text.split("******")]
        inner = parts[not parts[0] : len(parts) - (not parts[-1])]
        return len(inner) == 2 and all(inner) and inner[0] != inner[1]


class RepeatPrompt(Instruction):
    """First the request, word for word, then the answer."""

    type: Literal["combination:repeat_prompt"]
    prompt_to_repeat: Text

    def follows(self, text: str) -> bool:
        return text.strip().casefold().startswith(self.prompt_to_repeat.strip().casefold())


class EndPhrase(Instruction):
    """The answer ends with a phrase."""

    type: Literal["startend:end_checker"]
    end_phrase: Text

    def follows(self, text: str) -> bool:
        return text.strip().strip('"').casefold().endswith(self.end_phrase.strip().casefold())


class Quotation(Instruction):
    """The whole answer is within double quotation marks."""

    type: Literal["startend:quotation"]

    def follows(self, text: str) -> bool:
        return len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"'


class CapitalWords(Instruction):
    """So many words in capital letters."""

    type: Literal["change_case:capital_word_frequency"]
    capital_frequency: Count
    capital_relation: Relation

    def follows(self, text: str) -> bool:
        return _holds(sum(word.isupper() for word in words(text)), self.capital_relation, self.capital_frequency)


class Capitals(Instruction):
    """English, in capital letters only."""

    type: Literal["change_case:english_capital"]

    def follows(self, text: str) -> bool:
        return text.isupper() and language(text) in ("en", None)


class Lowercase(Instruction):
    """English, in small letters only."""

    type: Literal["change_case:english_lowercase"]

    def follows(self, text: str) -> bool:
        return text.islower() and language(text) in ("en", None)


class NoComma(Instruction):
    """No comma anywhere."""

    type: Literal["punctuation:no_comma"]

    def follows(self, text: str) -> bool:
        return "," not in text


AnyInstruction = Annotated[
    Existence
    | Frequency
    | Forbidden
    | LetterFrequency
    | ResponseLanguage
    | Sentences
    | Paragraphs
    | WordCount
    | FirstWord
    | Placeholders
    | Postscript
    | BulletLists
    | Constrained
    | Highlights
    | Sections
    | JsonFormat
    | Title
    | TwoResponses
    | RepeatPrompt
    | EndPhrase
    | Quotation
    | CapitalWords
    | Capitals
    | Lowercase
    | NoComma,
    Field(discriminator="type"),
]


def _holds(count: int, relation: Relation, bound: int) -> bool:
    return count >= bound if relation == "at least" else count < bound
