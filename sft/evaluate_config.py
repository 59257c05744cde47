"""The part of a run's config that says how it is evaluated while it trains."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sft.data_config import SourceSection
from sft.section import Section


class EarlyStoppingSection(Section):
    """When a run ends before its time."""

    patience: int = Field(3, gt=0, description="End after so many evaluations in a row without a better loss.")
    min_delta: float = Field(0.0, ge=0, description="How much lower a loss must be to count as better, in nats.")


class EvaluateSection(Section):
    """Held-out loss and sample answers while a run trains. Without rows and prompts nothing is evaluated."""

    sources: list[SourceSection] = Field(default_factory=list, description="Rows that are evaluated, never trained.")
    share: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="Share of the training rows that is set aside for evaluation and never trained; which rows these "
        "are depends on their content alone.",
    )
    every_steps: int | None = Field(
        None, gt=0, description="Evaluate every so many steps; in any case before the first step and after the last."
    )
    max_rows: int = Field(500, gt=0, description="Most examples of each source that are evaluated.")
    prompts: list[str] | str = Field(
        default_factory=list,
        description="User messages that the running weights answer; a list, or a text file with one a line.",
    )
    max_new_tokens: int = Field(64, gt=0, description="Longest sample answer, in tokens.")
    early_stopping: EarlyStoppingSection | None = Field(None, description="End the run when it gets no better.")
    keep_best: bool = Field(True, description="Keep the checkpoint with the lowest held-out loss beside the newest.")
    use: Literal["last", "best"] = Field("last", description="Which checkpoint becomes the adapter bundle.")

    @property
    def has_rows(self) -> bool:
        """Whether a held-out loss is measured."""
        return bool(self.sources) or self.share > 0

    @property
    def enabled(self) -> bool:
        """Whether anything is evaluated."""
        return self.has_rows or bool(self.prompts)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        faults = []
        unread = [source.label for source in self.sources if source.weight is not None or source.cap is not None]
        if unread:
            faults.append(f"weight and cap of {', '.join(unread)} are not read here: use evaluate.max_rows")
        asked = {"early_stopping": self.early_stopping is not None, "use: best": self.use == "best"}
        needing = [name for name, is_asked in asked.items() if is_asked]
        if not self.has_rows:
            faults += [f"{name} needs held-out rows: name sources, or set share" for name in needing]
        if self.every_steps is None:
            faults += [f"{name} needs every_steps, or there is nothing to compare" for name in needing]
        if self.use == "best" and not self.keep_best:
            faults.append("use: best needs keep_best")
        if faults:
            raise ValueError("; ".join(faults))
        return self
