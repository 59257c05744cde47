"""JSON documents -> the JSON text of each row, as it stands in the document.

A document is one array of rows, one object that holds them in a list (`data`, `instances`), a task file of
Super-NaturalInstructions, or one row. Its text is walked and never turned into objects as a whole.
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterator
from typing import Any

from sft.errors import DataError

_LISTS = ("data", "instances")
_SNI_LIST = "Instances"
_SNI_SHARED = ("Definition", "Categories")
"""What every row of a task file needs of it. Its examples stay out: they would be the same prompt text in each row."""

_SPACE = re.compile(r"[ \t\n\r]*")
# Numbers stay text and control characters pass: a row's own faults are found when it is parsed, and cost only that row.
_decoder = json.JSONDecoder(strict=False, parse_int=str, parse_float=str, parse_constant=str)


def document_rows(text: str, task: str) -> Iterator[str]:
    """Yields the JSON text of each row of a document, in order.

    Args:
        text: the document.
        task: what the rows of a Super-NaturalInstructions task file say their task is; other rows stay as they are.

    Raises:
        DataError: the document is no JSON, with the place, without the file's name.
    """
    walk = _Walk(text)
    try:
        if walk.sees("["):
            yield from walk.elements()
        elif not walk.done:
            yield from _object_rows(walk, task)
        if not walk.done:
            raise json.JSONDecodeError("text follows the end", text, walk.at)
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise DataError("not usable as JSON: a value is nested too deeply") from None


class _Walk:
    """A place in a JSON text that moves forward, from token to token."""

    def __init__(self, text: str, at: int = 0) -> None:
        self.text = text
        self._move(at)

    @property
    def done(self) -> bool:
        return self.at == len(self.text)

    def sees(self, mark: str) -> bool:
        return self.text.startswith(mark, self.at)

    def value(self) -> Any:
        """Passes a value and gives it."""
        value, end = _decoder.raw_decode(self.text, self.at)
        self._move(end)
        return value

    def elements(self) -> Iterator[str]:
        """Passes a list and gives the text of each element."""
        self.expect("[")
        more = not self.passes("]")
        while more:
            begin = self.at
            _, end = _decoder.raw_decode(self.text, begin)
            self._move(end)
            yield self.text[begin:end]
            more = self._another("]")

    def members(self) -> Iterator[tuple[str, int]]:
        """Passes an object and gives each field's name and where its value begins."""
        self.expect("{")
        more = not self.passes("}")
        while more:
            if not self.sees('"'):
                raise json.JSONDecodeError("a field's name is expected", self.text, self.at)
            name = self.value()
            self.expect(":")
            begin = self.at
            if self.sees("["):
                collections.deque(self.elements(), maxlen=0)
            else:
                self.value()
            yield name, begin
            more = self._another("}")

    def expect(self, mark: str) -> None:
        if not self.passes(mark):
            raise json.JSONDecodeError(f"{mark} is expected", self.text, self.at)

    def passes(self, mark: str) -> bool:
        seen = self.sees(mark)
        if seen:
            self._move(self.at + 1)
        return seen

    def _another(self, close: str) -> bool:
        """Passes a comma, or the end of the list or object."""
        if self.passes(close):
            return False
        self.expect(",")
        return True

    def _move(self, at: int) -> None:
        space = _SPACE.match(self.text, at)
        assert space is not None, "the pattern matches nothing, too"
        self.at = space.end()


def _object_rows(walk: _Walk, task: str) -> Iterator[str]:
    text, begin = walk.text, walk.at
    places = dict(walk.members())
    held = next((name for name in (_SNI_LIST, *_LISTS) if text.startswith("[", places.get(name, len(text)))), None)
    if held is None:
        yield text[begin : walk.at].rstrip()
        return
    elements = _Walk(text, places[held]).elements()
    if held != _SNI_LIST:
        yield from elements
        return
    shared = {name: _Walk(text, places[name]).value() for name in _SNI_SHARED if name in places}
    head = json.dumps({"task": task, **shared}, ensure_ascii=False)[:-1]
    for element in elements:
        yield f"{head}, {element[1:]}" if _has_fields(element) else element


def _has_fields(element: str) -> bool:
    return element.startswith("{") and element[1:].lstrip(" \t\n\r")[:1] == '"'
