"""The base of every config section."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every config model: frozen, and unknown keys are faults."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
