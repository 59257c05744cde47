"""`python -m jobs.losses --base FOLDER --models A,B --rows FILE --output FOLDER`: held-out loss, base against tuned."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import Field

from evals.losses import RowLoss, SourceLoss, sum_losses
from jobs import cli
from serve.registry import Registry
from serve.versions import VersionId
from sft.data_config import SourceSection
from sft.errors import ConfigError
from sft.section import Section

DESCRIPTION = """Measure the loss of a base model and of adapters on held-out rows: the mean cross-entropy per trained
token, in nats, masked and computed as in training. Each adapter is compared with the base row by row. Writes
losses.jsonl and losses.json into the output folder. No endpoint is asked: it runs in this process, on CPU.
"""
BASE = "base"


class LossesConfig(Section):
    """What is measured on what."""

    base: Path = Field(description="Folder of the base model.")
    models: list[str] = Field([], description="Adapters: folders of bundles, or versions of the registry (support@v2).")
    registry: str | None = Field(None, description="Registry of the versions.")
    rows: list[str] = Field(min_length=1, description="Files of rows in any format of docs/data.md.")
    output: Path = Field(description="Folder for the losses.")
    max_length: int = Field(2048, ge=8, description="Longest row, in tokens.")
    max_rows: int = Field(500, gt=0, description="Most rows of each file.")


def main(argv: Sequence[str] | None = None) -> int:
    """The job."""
    made = cli.parser("losses", DESCRIPTION)
    _, config = cli.configure(made, LossesConfig, argv)
    with tempfile.TemporaryDirectory(prefix="raysft-") as scratch:
        losses = list(measure(config, bundles(config, Path(scratch))))
    summary = sum_losses(losses)
    config.output.mkdir(parents=True, exist_ok=True)
    rows = "".join(json.dumps(dataclasses.asdict(one)) + "\n" for one in losses)
    (config.output / "losses.jsonl").write_text(rows, encoding="utf-8")
    plain = {source: of.model_dump(mode="json") for source, of in summary.items()}
    (config.output / "losses.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    for line in lines(summary):
        print(line)
    return 0


def bundles(config: LossesConfig, scratch: Path) -> dict[str, Path]:
    """The adapters' folders by name; versions are fetched from the registry.

    Raises:
        ConfigError: a version is named, and no registry.
        RaysftError: a version is not there, or damaged.
    """
    found = {}
    for number, what in enumerate(config.models):
        folder = Path(what)
        if "@" in what and not folder.exists():
            if config.registry is None:
                raise ConfigError("losses", [f"models: {what} is a version; name its --registry"])
            registry = Registry.open(config.registry)
            folder = registry.download(registry.get(VersionId.parse(what)), scratch / str(number))
        found[what] = folder
    return found


def measure(config: LossesConfig, adapters: Mapping[str, Path]) -> Iterator[RowLoss]:
    """Yields every row's loss under the base, then under each adapter."""
    # PyTorch takes seconds to import, which --help need not wait for.
    from sft.row_losses import read_examples, row_losses, template_of

    sources = [SourceSection(path=path) for path in config.rows]
    read = read_examples(config.base, sources, template_of(adapters), config.max_length, config.max_rows)
    places = [(source, example) for source, examples in read.items() for example in examples]
    print(f"{len(places):,} rows of {len(read)} files, base and {len(adapters)} adapters", flush=True)
    for name, losses in row_losses(config.base, adapters, [example for _, example in places]):
        for (source, example), total in zip(places, losses, strict=True):
            yield RowLoss(source, name or BASE, example.id, total, example.trained_tokens)
        print(f"{name or BASE}: done", flush=True)


def lines(summary: Mapping[str, SourceLoss]) -> Iterator[str]:
    """The losses for people."""
    for source, of in summary.items():
        yield f"{source}: {of.rows} rows, {of.tokens:,} trained tokens"
        for model, found in of.models.items():
            moved = ""
            if found.interval is not None:
                low, high = found.interval
                moved = f", {found.difference:+.4f} ({low:+.4f} to {high:+.4f}), {found.better} rows better"
            yield f"  {model}: {found.loss:.4f} nats a token, perplexity {found.perplexity:.2f}{moved}"


if __name__ == "__main__":
    cli.run(main)
