"""Checkers of JSON: that it is valid, fits a schema, or holds the reference in a field."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema  # type: ignore[import-untyped]
import referencing
import regex  # type: ignore[import-untyped]
from pydantic import Field, field_validator

from evals.checker import RIGHT, Checker, Comparing, Score, right_if, wrong
from evals.errors import CheckError
from evals.text_checkers import PATTERN_S, normalised

FENCE = re.compile(r"\s*```(?:json)?[ \t]*\n(.*?)\n?```\s*", re.DOTALL | re.IGNORECASE)


def parse(text: str, fenced: bool = False) -> Any:
    """Reads JSON as its standard has it: no NaN, nothing around it.

    Args:
        text: the whole text.
        fenced: one Markdown code fence may be around it.

    Raises:
        ValueError: it is none; says where.
    """
    inside = FENCE.fullmatch(text) if fenced else None
    try:
        return json.loads(inside[1] if inside else text, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ValueError("no JSON: nested too deeply") from None


class Json(Checker):
    """The answer is JSON."""

    kind: Literal["json"]
    fenced: bool = Field(False, description="A Markdown code fence around it is allowed.")
    type: Literal["any", "object", "array"] = "any"
    fields: list[str] | None = Field(None, description="The fields that the object has, no more and no fewer.")

    def check_text(self, text: str, reference: Any) -> Score:  # noqa: ARG002
        try:
            value = parse(text, self.fenced)
        except ValueError as error:
            return wrong(str(error))
        if not isinstance(value, {"any": object, "object": dict, "array": list}[self.type]):
            return wrong(f"JSON, but no {self.type}")
        if self.fields is None:
            return RIGHT
        if not isinstance(value, dict):
            return wrong("JSON, but no object")
        return right_if(sorted(value) == sorted(self.fields), f"its fields are not {', '.join(self.fields)}")


class JsonSchema(Checker):
    """The answer is JSON that fits a JSON Schema (draft 2020-12)."""

    kind: Literal["json_schema"]
    fenced: bool = Field(False, description="A Markdown code fence around it is allowed.")
    schema_: dict[str, Any] = Field(alias="schema")

    @field_validator("schema_")
    @classmethod
    def _usable(cls, schema: dict[str, Any]) -> dict[str, Any]:
        try:
            jsonschema.Draft202012Validator.check_schema(schema)
        except jsonschema.SchemaError as error:
            raise ValueError(f"not a JSON Schema: {error.message} at {error.json_path}") from None
        outside = [found for found in _references(schema) if not found.startswith("#")]
        if outside:
            raise ValueError(f"$ref {outside[0]} leads out of the schema, and nothing is fetched: put it into $defs")
        return schema

    def check_text(self, text: str, reference: Any) -> Score:  # noqa: ARG002
        try:
            value = parse(text, self.fenced)
        except ValueError as error:
            return wrong(str(error))
        validator = _Validator(self.schema_, registry=referencing.Registry())
        try:
            fault = jsonschema.exceptions.best_match(validator.iter_errors(value))
        except (referencing.exceptions.Unresolvable, RecursionError) as broken:
            raise CheckError(f"the schema cannot be followed ({type(broken).__name__}): check its $ref") from None
        if fault is None:
            return RIGHT
        return wrong(f"JSON, but {fault.json_path} fails the schema's {fault.validator}")


class JsonField(Comparing):
    """The answer is a JSON object, and one of its fields is the reference."""

    kind: Literal["json_field"]
    field: str
    fenced: bool = Field(False, description="A Markdown code fence around it is allowed.")
    normalise: bool = Field(False, description="Ignore case, punctuation, articles and white space of text.")

    def fault_of(self, wanted: Any) -> str | None:
        return None if isinstance(wanted, (str, int, float)) else "needs a text or number to compare with"

    def compare(self, text: str, wanted: Any) -> Score:
        try:
            value = parse(text, self.fenced)
        except ValueError as error:
            return wrong(str(error))
        if not isinstance(value, dict) or self.field not in value:
            return wrong(f"no JSON object with a field {self.field}")
        got = value[self.field]
        if self.normalise and isinstance(got, str) and isinstance(wanted, str):
            got, wanted = normalised(got), normalised(wanted)
        return right_if(type(got) is type(wanted) and got == wanted, f"its {self.field} is not the reference")


def _refuse(constant: str) -> Any:
    raise ValueError(f"no JSON: {constant} is no value of it")


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def _pattern(_: Any, pattern: str, value: Any, __: Any) -> Iterator[Any]:
    """The keyword `pattern` with a time limit: a model writes the text that it searches."""
    if isinstance(value, str):
        try:
            found = regex.search(pattern, value, timeout=PATTERN_S)
        except TimeoutError:
            raise CheckError(f"the schema's pattern took longer than {PATTERN_S:g} s") from None
        except regex.error as error:
            raise CheckError(f"the schema's pattern cannot be used: {error}") from None
        if not found:
            yield jsonschema.ValidationError("does not fit the pattern")


_Validator: Any = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"pattern": _pattern})
