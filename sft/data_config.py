"""The part of a run's config that says what is trained on."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sft.formats import FormatName, known_fields
from sft.messages import Role
from sft.section import Section


class SourceSection(Section):
    """One source of rows."""

    path: str = Field(
        description="A file, a folder or a glob of .jsonl, .json, .csv, .tsv or .parquet, compressed or not; local, "
        "s3://, gs:// or hf://datasets/OWNER/NAME[@REVISION][/PATH]."
    )
    format: FormatName = Field("auto", description="Row format; auto looks at each row's fields.")
    name: str | None = Field(None, description="Name in reports; by default the file or folder name.")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Columns that are called otherwise: the format's field to the column, dotted for nested ones "
        "(`answers.text.0`).",
    )
    task: str | None = Field(None, description="Task of all rows that name none themselves.")
    cluster: str | None = Field(None, description="Cluster of tasks, such as FLAN's, of all rows that name none.")
    weight: float | None = Field(None, gt=0, description="Share in an explicit mixture.")
    cap: int | None = Field(None, gt=0, description="Most rows of this source in one epoch.")

    @model_validator(mode="after")
    def _columns_are_fields(self) -> Self:
        known = known_fields(self.format)
        unknown = sorted(set(self.columns) - known)
        if unknown:
            format_name = "any format" if self.format == "auto" else f"format {self.format}"
            raise ValueError(
                f"columns: {', '.join(unknown)} is no field of {format_name}; allowed: {', '.join(sorted(known))}"
            )
        return self

    @property
    def label(self) -> str:
        """The source's name in reports."""
        return self.name or self.path.rstrip("/").rsplit("/", 1)[-1]


class MaskSection(Section):
    """Which tokens are trained."""

    roles: list[Role] = Field(["assistant"], description="Roles whose turns are trained, where a row does not say.")
    reasoning: bool = Field(True, description="Train the reasoning of trained turns, or only what follows it.")
    prompt_weight: float = Field(
        0.0, ge=0, le=1, description="Weight of untrained tokens in the loss (arXiv 2405.14394); 0 leaves them out."
    )
    history: Literal["refuse", "split"] = Field(
        "refuse",
        description="Rows whose earlier turns the template rewrites: quarantine, or make an example of each turn.",
    )


class MixtureSection(Section):
    """How much of each source or task an epoch holds; without it every row once, up to the sources' caps."""

    over: Literal["source", "task"] = Field(
        "source",
        description="What has a share: each source, or each task of each source, for which the source's weight and cap "
        "then hold.",
    )
    mode: Literal["proportional", "temperature", "explicit"] = Field(
        "proportional",
        description="Shares by the capped sizes n, by n ** (1 / temperature), or by weights.",
    )
    temperature: float | None = Field(None, ge=1, description="Flattens the shares; 1 is proportional.")
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="Weights of single tasks in an explicit mixture, in place of their source's."
    )
    cap: int | None = Field(None, gt=0, description="Size above which a source or task counts no more (FLAN's K).")
    rows: int | None = Field(None, gt=0, description="Rows of an epoch; by default the sum of the capped sizes.")

    @model_validator(mode="after")
    def _keys_that_the_mode_reads(self) -> Self:
        faults = []
        if self.mode == "temperature" and self.temperature is None:
            faults.append("mode temperature needs `temperature`; T5 found 2 to work well")
        if self.mode != "temperature" and self.temperature is not None:
            faults.append(f"temperature is not read in mode {self.mode}: set mode temperature, or leave it out")
        if self.mode == "explicit" and self.cap is not None:
            faults.append("cap is not read in mode explicit: leave it out, or limit a source by its own `cap`")
        if self.weights and (self.mode, self.over) != ("explicit", "task"):
            faults.append("weights of tasks are read only with mode explicit and over task")
        if faults:
            raise ValueError("; ".join(faults))
        return self


class HoldOutSection(Section):
    """What never reaches training. Every name must occur in the data: a misspelt one would hold out nothing."""

    tasks: list[str] = Field(default_factory=list, description="Tasks that are not trained.")
    clusters: list[str] = Field(default_factory=list, description="Clusters that are not trained.")


Action = Literal["keep", "flag", "drop"]


class HygieneSection(Section):
    """What is looked for in the rows before they are trained; all of it is counted in the survey.

    `keep` looks for nothing, `flag` counts and names the rows, `drop` leaves them out as well.
    """

    duplicates: Action = Field("keep", description="Rows whose normalised prompt and response came before.")
    near_duplicates: Action = Field(
        "keep",
        description="Rows that nearly repeat an earlier one, as a whole and in the answer (MinHash over 5-grams).",
    )
    near_threshold: float = Field(0.8, ge=0.5, le=0.95, description="Jaccard similarity from which rows nearly repeat.")
    contradictions: Action = Field("keep", description="Rows with one prompt and different answers, all of them.")
    contamination: Action = Field("flag", description="Rows that share text with the `evaluation` files.")
    evaluation: list[str] = Field(default_factory=list, description="Files whose text must not be trained.")
    ngram: int = Field(13, ge=5, le=50, description="Words in a row that make an overlap with an evaluation file.")
    personal_data: Literal["keep", "flag", "redact", "drop"] = Field(
        "keep",
        description="E-mail and IP addresses, telephone, card and account numbers; redact puts [EMAIL] and the like.",
    )


class DataSection(Section):
    """What to train on."""

    sources: list[SourceSection] = Field(description="Where the rows are.")
    max_length: int = Field(2048, ge=8, description="Longest example, in tokens.")
    too_long: Literal["drop", "truncate"] = Field(
        "drop", description="What to do with a longer example: quarantine it, or cut its end off."
    )
    max_bad_fraction: float = Field(0.05, ge=0, le=1, description="Share of unusable rows at which a run is refused.")
    mask: MaskSection = Field(default_factory=MaskSection)
    mixture: MixtureSection = Field(default_factory=MixtureSection)
    hold_out: HoldOutSection = Field(default_factory=HoldOutSection)
    hygiene: HygieneSection = Field(default_factory=HygieneSection)
    tokenizer: Literal["auto", "transformers"] = Field(
        "auto", description="auto uses a faster tokenizer where it proves to give the same ids."
    )
    shuffle_window: int = Field(10_000, gt=0, description="Rows that are shuffled together; bounds memory.")

    @model_validator(mode="after")
    def _sources_differ(self) -> Self:
        if not self.sources:
            raise ValueError("name at least one source")
        labels = [source.label for source in self.sources]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"two sources are called {', '.join(twice)}; give each its own `name`")
        return self

    @model_validator(mode="after")
    def _weights_where_they_are_read(self) -> Self:
        if self.mixture.mode != "explicit":
            named = [source.label for source in self.sources if source.weight is not None]
            if named:
                raise ValueError(
                    f"the weight of {', '.join(named)} is not read in mode {self.mixture.mode}: set mixture.mode "
                    "explicit, or leave it out"
                )
        elif self.mixture.over == "source":
            held = (*self.hold_out.tasks, *self.hold_out.clusters)
            bare = [s.label for s in self.sources if s.weight is None and not {s.task, s.cluster}.intersection(held)]
            if bare:
                raise ValueError(f"mixture.mode explicit needs a weight for {', '.join(bare)}")
        return self
