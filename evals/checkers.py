"""All checkers that a suite can name."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from evals.following import Instructions
from evals.gym import ReasoningGym
from evals.json_checkers import Json, JsonField, JsonSchema
from evals.language import Language
from evals.text_checkers import Bullets, Choice, Contains, Exact, Keywords, Length, Number, Pattern

AnyChecker = Annotated[
    Exact
    | Contains
    | Number
    | Choice
    | Pattern
    | Keywords
    | Length
    | Bullets
    | Json
    | JsonSchema
    | JsonField
    | Language
    | Instructions
    | ReasoningGym,
    Field(discriminator="kind"),
]
