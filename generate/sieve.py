"""The filters: what is wrong with an instruction before it is answered, and with a row after."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import regex  # type: ignore[import-untyped]

from evals.answer import Answer
from evals.errors import CheckError
from evals.language import COMMON_WORDS, language
from evals.words import occurrences
from generate.candidate import Candidate, Fault, Reason
from generate.config import CheckSection, FiltersSection
from sft.shingles import plain, words

TEMPLATE_TOKEN = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>")
"""Marks of chat templates. In a row they would end a turn where there is none."""
PATTERN_S = 2.0
SORRY_WORDS = 80
"""A shorter answer that says sorry is a refusal (Evol-Instruct)."""


def instruction_fault(text: str, filters: FiltersSection) -> Fault | None:
    """What is wrong with an instruction by itself."""
    count = len(text.split())
    if not text.strip():
        return Fault(Reason.EMPTY)
    if TEMPLATE_TOKEN.search(text):
        return Fault(Reason.TEMPLATE_TOKEN)
    if count < filters.min_words:
        return Fault(Reason.INSTRUCTION_TOO_SHORT, f"{count} words")
    if count > filters.max_words:
        return Fault(Reason.INSTRUCTION_TOO_LONG, f"{count} words")
    if unicodedata.category(text.lstrip()[0])[0] in "PS":
        return Fault(Reason.LEADING_PUNCTUATION)
    found = next((word for word in filters.keywords if occurrences(text, word)), None)
    if found is not None:
        return Fault(Reason.KEYWORD, found)
    return None


def row_fault(row: Candidate, filters: FiltersSection) -> Fault | None:
    """What is wrong with a row by itself; its instruction has passed."""
    output = row.output.strip()
    if not output:
        return Fault(Reason.EMPTY)
    if TEMPLATE_TOKEN.search(row.output) or TEMPLATE_TOKEN.search(row.input):
        return Fault(Reason.TEMPLATE_TOKEN)
    if plain(row.output) in (plain(row.input), plain(row.instruction)):
        return Fault(Reason.ECHO)
    if output.endswith(":") or row.input.rstrip().endswith(":"):
        return Fault(Reason.INCOMPLETE, "ends with a colon")
    count = len(output.split())
    if count > filters.max_output_words:
        return Fault(Reason.OUTPUT_TOO_LONG, f"{count} words")
    if filters.language:
        # A short instruction may look like another language by a word or two, and a translation ends in one.
        spoken = [language(row.instruction), language(f"{row.prompt}\n{row.output}")]
        if all(one not in (None, filters.language) for one in spoken):
            return Fault(Reason.LANGUAGE, str(spoken[-1]))
    return next(filter(None, (_format_fault(row, check) for check in filters.checks)), None)


def answer_fault(text: str) -> Fault | None:
    """What Evol-Instruct finds wrong with the answer to an evolved instruction."""
    if len(text.split()) < SORRY_WORDS and occurrences(text, "sorry"):
        return Fault(Reason.REFUSAL)
    found = words(text).split()
    if text.strip() and all(word in COMMON_WORDS["en"] for word in found):
        return Fault(Reason.ONLY_STOP_WORDS)
    return None


def instance_faults(instances: Sequence[tuple[str, str]]) -> list[Fault | None]:
    """What is wrong with pairs of input and output beside each other: the same twice, or the same input with another
    output. Of a pair that contradicts another neither is kept: which one is right cannot be told.
    """
    forms = [(plain(given), plain(output)) for given, output in instances]
    outputs: dict[str, set[str]] = {}
    for given, output in forms:
        outputs.setdefault(given, set()).add(output)
    faults: list[Fault | None] = []
    for place, (given, output) in enumerate(forms):
        if len(outputs[given]) > 1:
            faults.append(Fault(Reason.CONTRADICTION, "the same input with another output"))
        else:
            faults.append(Fault(Reason.DUPLICATE) if (given, output) in forms[:place] else None)
    return faults


def _format_fault(row: Candidate, check: CheckSection) -> Fault | None:
    kind = check.checker.kind
    try:
        if regex.search(check.when, row.prompt, timeout=PATTERN_S) is None:
            return None
        score = check.checker.check(Answer(row.output, "", row.output, None), None)
    except (CheckError, TimeoutError):
        return Fault(Reason.FORMAT, f"{kind}: no verdict")
    return Fault(Reason.FORMAT, f"{kind}: {score.reason}") if score.value < 1 else None
