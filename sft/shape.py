"""What a chat template writes around contents that it does not look at.

Most templates join contents with fixed text. For such a template a conversation's text depends on its contents only
by concatenation, so rendering once with symbols in their place gives the text of every conversation of the same shape
(the roles in their order). A symbol allows joining and stripping, notes simple questions as conditions that the real
content must meet, and stops at everything else. So the result is exact or there is none: then each row is rendered.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

_JOINED = (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock, nodes.Include, nodes.Import)
_FILTERS = frozenset({"trim", "string", "default", "d"})
_BESIDE = frozenset({"length", "count", "first", "last", "list", "selectattr", "rejectattr"})
"""Filters that take a list of messages and leave their contents alone."""
_TESTS = frozenset({"string", "none", "defined", "undefined", "mapping", "number", "boolean", "true", "false"})
_SYMBOL = re.compile("\ue000([0-9]+)([sSlr])\ue001")
_STRIPS: dict[str, Callable[[str], str]] = {"S": str.strip, "l": str.lstrip, "r": str.rstrip}

Questions = set[tuple[int, str, str, bool]]
"""What was asked: of which message's content, what (`in`, `startswith`, `endswith`, `bool`), of which text, and the
answer that was assumed."""


class _LooksInsideError(Exception):
    """The template looks at a content."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text: `form` with a `%s` for each of `slots`, the number of a message and how its content is
    stripped.
    """

    form: str
    slots: tuple[tuple[int, Callable[[str], str] | None], ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """The text of all conversations of one shape, cut at the edges of the trained turns.

    Rule: `segments` are prompt, turn, text between, turn, ..., rest: those at odd places are trained. It holds for
    contents that answer `questions` (message, what, of which text, answer) as assumed.
    """

    segments: tuple[Segment, ...]
    questions: tuple[tuple[int, str, str, bool], ...]

    def fill(self, contents: Sequence[str]) -> list[str] | None:
        """The segments' texts for these contents; None where a condition is not met."""
        for message, what, text, answer in self.questions:
            content = contents[message]
            if what == "in":
                held = text in content
            elif what == "bool":
                held = bool(content)
            else:
                held = content.startswith(text) if what == "startswith" else content.endswith(text)
            if held is not answer:
                return None
        return [
            segment.form % tuple([contents[i] if strip is None else strip(contents[i]) for i, strip in segment.slots])
            for segment in self.segments
        ]


def segment(text: str) -> Segment:
    """Takes a text of symbols apart."""
    slots = tuple((int(match[1]), _STRIPS.get(match[2])) for match in _SYMBOL.finditer(text))
    return Segment(_SYMBOL.sub("%s", text.replace("%", "%%")), slots)


def before_symbol(text: str, message: int) -> str:
    """What stands before the symbol of a message."""
    return next((text[: match.start()] for match in _SYMBOL.finditer(text) if int(match[1]) == message), text)


class SymbolicTemplate:
    """A chat template that is rendered with symbols in place of contents.

    Args:
        source: the template.
        variables: what else the template sees, such as the special tokens.
    """

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.globals["raise_exception"] = _refuse
        self._variables = variables
        self._template: Any = None
        try:
            tree = environment.parse(source)
            if not _looks_away(tree):
                return
            self._template = environment.from_string(_Joins().visit(tree))
        except JinjaError:
            return

    def render(self, roles: Sequence[str], *, generation_prompt: bool) -> tuple[str, Questions] | None:
        """Renders messages of these roles.

        Returns:
            The text with a symbol for each content, and what the template assumes of the contents; None where it
            looks at a content or refuses.
        """
        if self._template is None:
            return None
        questions: Questions = set()
        messages = [{"role": role, "content": _Symbol.content(number, questions)} for number, role in enumerate(roles)]
        try:
            text = self._template.render(
                messages=messages,
                add_generation_prompt=generation_prompt,
                tools=None,
                documents=None,
                **self._variables,
            )
        except (_LooksInsideError, JinjaError, TypeError, ValueError, KeyError, AttributeError):
            return None
        return text, questions


class _Text(str):
    """Text that a content has gone into: it may be joined and written, and nothing else."""

    __slots__ = ()

    def __add__(self, other: str) -> _Text:
        return _Text(str.__add__(str(self), _plain(other)))

    def __radd__(self, other: str) -> _Text:
        return _Text(str.__add__(_plain(other), str(self)))

    def __str__(self) -> str:
        return str.__str__(self)


class _Symbol(_Text):
    """Stands for the content of one message."""

    __slots__ = ("_number", "_questions")
    _number: int
    _questions: Questions

    @classmethod
    def content(cls, number: int, questions: Questions, strip: str = "s") -> _Symbol:
        made = cls(f"\ue000{number}{strip}\ue001")
        made._number, made._questions = number, questions
        return made

    def _ask(self, what: str, text: str, answer: bool) -> bool:
        if not str(self).endswith("s\ue001") or type(text) is not str:
            raise _LooksInsideError
        self._questions.add((self._number, what, text, answer))
        return answer

    def _stripped(self, how: str, chars: str | None) -> _Symbol:
        if chars is not None or not str(self).endswith("s\ue001"):
            raise _LooksInsideError
        return _Symbol.content(self._number, self._questions, how)

    def strip(self, chars: str | None = None) -> str:
        return self._stripped("S", chars)

    def lstrip(self, chars: str | None = None) -> str:
        return self._stripped("l", chars)

    def rstrip(self, chars: str | None = None) -> str:
        return self._stripped("r", chars)

    def __contains__(self, text: object) -> bool:
        return self._ask("in", text, False)  # type: ignore[arg-type]

    def startswith(self, text: str) -> bool:  # type: ignore[override]
        return self._ask("startswith", text, False)

    def endswith(self, text: str) -> bool:  # type: ignore[override]
        return self._ask("endswith", text, False)

    def __bool__(self) -> bool:
        return self._ask("bool", "", True)


def _stop(*_: object, **__: object) -> NoReturn:
    raise _LooksInsideError


def _close(text: type[str], but: frozenset[str]) -> None:
    """Takes from a kind of text every method of `str` that it does not define itself."""
    for name in dir(str):
        if callable(getattr(str, name)) and name not in vars(text) and name not in but:
            setattr(text, name, _stop)


_KEPT = frozenset(
    {"__new__", "__init__", "__class__", "__getattribute__", "__setattr__", "__init_subclass__", "__subclasshook__"}
)
_close(_Text, _KEPT)
_Text.__bool__ = _stop  # type: ignore[attr-defined]


def _plain(value: object) -> str:
    if not isinstance(value, str):
        raise _LooksInsideError
    return str(value)


def _holds(value: object) -> bool:
    """Whether a content is somewhere in a value."""
    if isinstance(value, _Text):
        return True
    if isinstance(value, Mapping):
        return any(map(_holds, value.values()))
    return isinstance(value, list | tuple) and any(map(_holds, value))


def _guarded(function: Any, name: str, allowed: frozenset[str]) -> Any:
    """A filter or test that stops at contents, unless it is known not to look at them."""
    if name in allowed:
        return function

    @functools.wraps(function)
    def guarded(*values: Any, **named: Any) -> Any:
        beside = name in _BESIDE and not any(isinstance(value, _Text) for value in values)
        if not beside and any(map(_holds, [*values, *named.values()])):
            raise _LooksInsideError
        return function(*values, **named)

    return guarded


class _Environment(ImmutableSandboxedEnvironment):
    """The environment of chat templates, in which every operation on a content is seen."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters = {name: _guarded(function, name, _FILTERS) for name, function in self.filters.items()}
        self.tests = {name: _guarded(function, name, _TESTS) for name, function in self.tests.items()}

    def call(self, context: Any, function: Any, *values: Any, **named: Any) -> Any:
        if function is not Namespace and any(map(_holds, [*values, *named.values()])):
            raise _LooksInsideError
        return super().call(context, function, *values, **named)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator != "+" and (_holds(left) or _holds(right)):
            raise _LooksInsideError
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """Reads `{% generation %}` blocks, which only mark what they hold."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Joins(NodeTransformer):
    """Writes `a ~ b` as a sum of strings, which can be seen."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:  # noqa: N802
        texts: list[nodes.Expr] = [nodes.Filter(self.visit(part), "string", [], [], None, None) for part in node.nodes]
        return functools.reduce(nodes.Add, texts)


def _looks_away(tree: nodes.Template) -> bool:
    """Whether all operations of a template can be seen: no joined blocks, no search for a content in a text."""
    if next(tree.find_all(_JOINED), None) is not None:
        return False
    for comparison in tree.find_all(nodes.Compare):
        for operand in comparison.ops:
            if operand.op in ("in", "notin") and not (
                isinstance(comparison.expr, nodes.Const) or isinstance(operand.expr, nodes.List | nodes.Tuple)
            ):
                return False
    return True


def _refuse(message: str) -> NoReturn:
    raise JinjaError(message)
