"""The configuration of a generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import regex  # type: ignore[import-untyped]
from pydantic import Field, field_validator, model_validator

from evals.checkers import AnyChecker
from evals.language import KNOWN
from sft.config import RaySection
from sft.section import Section

SHIPPED_SEEDS = Path(__file__).parent / "seeds" / "tasks.jsonl"
# fmt: off
KEYWORDS = [
    "image", "images", "picture", "pictures", "photo", "photos", "graph", "graphs", "diagram",
    "diagrams", "flowchart", "flowcharts", "file", "files", "map", "maps", "draw", "plot", "video",
    "videos", "audio", "music",
]
# fmt: on
"""What a model of text can neither be shown nor show."""
RESERVED = frozenset(
    {"model", "messages", "prompt", "stream", "n", "temperature", "top_p", "max_tokens", "seed", "stop"}
)


class TeacherSection(Section):
    """The endpoint that is asked."""

    url: str = Field("http://127.0.0.1:8000/v1", description="The endpoint's address, up to and with /v1.")
    model: str = Field(min_length=1, description="The model to ask; one of our own versions will do (support@v2).")
    concurrency: int = Field(8, gt=0, description="Requests at a time, over all workers.")
    workers: int = Field(1, ge=0, description="Ray Data tasks that ask side by side; 0 asks from here, without Ray.")
    requests_per_minute: float | None = Field(None, gt=0, description="Most requests a minute; null for no limit.")
    timeout_s: float = Field(120.0, gt=0, description="Longest time for one answer.")
    tries: int = Field(5, gt=0, description="How often a request is sent before it counts as failed.")
    extra: dict[str, Any] = Field(
        default_factory=dict,
        description="Further fields of every request, as {chat_template_kwargs: {enable_thinking: false}}.",
    )

    @field_validator("extra")
    @classmethod
    def _not_ours(cls, extra: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(RESERVED & extra.keys())
        if taken:
            raise ValueError(f"{', '.join(taken)} cannot be given here: the job sets it")
        return extra

    @model_validator(mode="after")
    def _work_for_all(self) -> Self:
        if self.workers > self.concurrency:
            raise ValueError(f"workers {self.workers} is above concurrency {self.concurrency}: each needs a request")
        return self


class SamplingSection(Section):
    """How the teacher's answers are drawn."""

    temperature: float = Field(1.0, ge=0, description="0 always takes the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling.")
    max_tokens: int = Field(1024, gt=0, description="Longest answer, in tokens.")


class SelfInstructSection(Section):
    """Self-Instruct: new tasks from a list of tasks."""

    written: int = Field(6, ge=0, description="Seed tasks in context.")
    generated: int = Field(2, ge=0, description="Kept rows in context; while there are too few, more seed tasks.")
    tasks: int = Field(8, gt=0, le=20, description="New tasks that a request asks for.")
    instances: int = Field(3, gt=0, description="Most examples of one task.")

    @model_validator(mode="after")
    def _some_context(self) -> Self:
        if self.written + self.generated < 1:
            raise ValueError("written and generated are both 0: the teacher needs a task in context")
        return self


class EvolveSection(Section):
    """Evol-Instruct: tasks made harder, or turned into others."""

    generations: int = Field(4, gt=0, description="How often a task is evolved at most, one from the other.")


class MagpieSection(Section):
    """Magpie: the teacher continues its own template with what a user may say."""

    prefix: str = Field(
        "", description="The teacher's template up to where a user's text begins, as `<|im_start|>user\\n`."
    )
    stop: list[str] = Field([], description="Texts that end a user's turn, as `<|im_end|>`.")


class CheckSection(Section):
    """A checker of the evaluation, for the rows that it is meant for."""

    when: str = Field(description="A regular expression that finds the instructions whose output is checked.")
    checker: AnyChecker

    @field_validator("when")
    @classmethod
    def _compiles(cls, when: str) -> str:
        try:
            regex.compile(when)
        except regex.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return when

    @model_validator(mode="after")
    def _usable(self) -> Self:
        fault = self.checker.fault(None)
        if fault:
            raise ValueError(f"checker {self.checker.kind} {fault}")
        return self


class FiltersSection(Section):
    """What a row must be like to be kept."""

    rouge: float = Field(0.7, gt=0, le=1, description="ROUGE-L with any instruction of the pool must be below this.")
    near_duplicates: float = Field(0.8, gt=0, le=1, description="Jaccard similarity from which a row is a repetition.")
    min_words: int = Field(4, ge=1, description="Fewest words of an instruction.")
    max_words: int = Field(150, gt=0, description="Most words of an instruction.")
    max_output_words: int = Field(1000, gt=0, description="Most words of an output.")
    keywords: list[str] = Field(KEYWORDS, description="Words that an instruction must not hold.")
    language: str | None = Field(None, description="Language that instruction or row must be in, as en; null for any.")
    checks: list[CheckSection] = Field([], description="Formats that outputs must have where they are asked for.")

    @field_validator("language")
    @classmethod
    def _is_known(cls, language: str | None) -> str | None:
        if language is not None and language not in KNOWN:
            raise ValueError(f"language {language!r} is not known: use one of {', '.join(KNOWN)}")
        return language

    @field_validator("keywords")
    @classmethod
    def _are_words(cls, keywords: list[str]) -> list[str]:
        if not all(word.strip() for word in keywords):
            raise ValueError("a keyword is empty")
        return keywords

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} is above max_words {self.max_words}")
        return self


class GenerateConfig(Section):
    """A generation, whole."""

    output: Path = Field(description="Folder for rows, rejected candidates, answers and summary.")
    target: int = Field(gt=0, description="Rows to make.")
    mode: Literal["self_instruct", "evolve", "magpie"] = Field("self_instruct", description="How rows are made.")
    seed: int = Field(0, ge=0, description="Another seed, other rows.")
    seeds: Path | None = Field(None, description="JSONL file of seed tasks; null takes those that ship.")
    form: Literal["alpaca", "messages"] = Field("alpaca", description="Form of the rows.")
    requests_per_round: int = Field(32, gt=0, description="Requests between two looks at the pool.")
    max_rounds: int = Field(1000, gt=0, description="Rounds after which to stop short of the target.")
    teacher: TeacherSection
    inventing: SamplingSection = Field(SamplingSection(), description="Sampling of instructions.")
    answering: SamplingSection = Field(SamplingSection(temperature=0.0), description="Sampling of all else.")
    self_instruct: SelfInstructSection = SelfInstructSection()
    evolve: EvolveSection = EvolveSection()
    magpie: MagpieSection = MagpieSection()
    filters: FiltersSection = FiltersSection()
    ray: RaySection = RaySection()

    @model_validator(mode="after")
    def _magpie_has_a_prefix(self) -> Self:
        if self.mode == "magpie" and not self.magpie.prefix:
            raise ValueError("mode magpie needs magpie.prefix: the teacher's template up to where a user's text begins")
        return self
