"""The rows that a run is evaluated on: those of `evaluate.sources`, and those that `evaluate.share` sets aside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from sft.base import BaseTokenizer
from sft.batch import Layout
from sft.data import DataPlan, Stream, plan_data, prepare_rows
from sft.data_config import DataSection, HygieneSection
from sft.errors import ConfigError, DataError
from sft.evaluate_config import EvaluateSection
from sft.evaluation import EvaluationPlan
from sft.mask import Example
from sft.rows import examples
from sft.set_aside import content_hash, is_set_aside, place
from sft.survey import Survey
from sft.tokens import encode


def plan_evaluation(
    section: EvaluateSection,
    data: DataSection,
    plan: DataPlan,
    template: str | None,
    layout: Layout,
    stream: Stream,
) -> EvaluationPlan | None:
    """Reads all that a run is evaluated on; None where the config asks for nothing.

    Args:
        section: what is evaluated.
        data: what is trained, and by which rules.
        plan: its files.
        template: text of a chat template to use in place of the tokenizer's own.
        layout: how training lays out its rows.
        stream: runs a task over all rows.

    Raises:
        RaysftError: as `held_out_examples` and `prompt_ids`.
    """
    if not section.enabled:
        return None
    tokenizer = plan.tokenizer()
    return EvaluationPlan(
        sources=held_out_examples(section, data, plan, template, stream),
        prompts=prompt_ids(section, tokenizer),
        max_new_tokens=section.max_new_tokens,
        stop_ids=frozenset(tokenizer.stop_ids),
        layout=layout,
        length=data.max_length,
        pad_id=tokenizer.pad_id,
    )


def held_out_examples(
    section: EvaluateSection, data: DataSection, plan: DataPlan, template: str | None, stream: Stream
) -> dict[str, tuple[Example, ...]]:
    """Reads the rows that are evaluated, masked as the trained ones are; prompts have no weight.

    Args:
        section: what is evaluated.
        data: what is trained, and by which rules.
        plan: its files.
        template: text of a chat template to use in place of the tokenizer's own.
        stream: runs a task over all rows.

    Returns:
        Examples by source, at most `max_rows` of each: those of the first places (`sft.set_aside`), in their order,
        so the same rows give the same examples in any order of files.

    Raises:
        DataError: too many rows of `sources` are bad, or there is nothing to evaluate.
        StorageError: a source is not there.
    """
    found: dict[str, tuple[Example, ...]] = {}
    if section.sources:
        own = plan_data(_data_section(section, data), plan.base, template, pairs=plan.rules.pairs)
        counted = Survey()
        found |= _first(_counted(stream(_without_weights(own), prepare_rows), counted), section.max_rows)
        try:
            counted.check(data.max_bad_fraction)
        except DataError as error:
            raise DataError(f"evaluate.sources: {error}") from None
    if section.share:
        found |= _first(stream(_without_weights(plan), _set_aside_rows), section.max_rows)
        if not found.keys() & plan.sources.keys():
            raise DataError(
                f"evaluate.share {section.share:g} sets no usable row aside: raise it, or name evaluate.sources"
            )
    return dict(sorted(found.items()))


def prompt_ids(section: EvaluateSection, tokenizer: BaseTokenizer) -> dict[str, tuple[int, ...]]:
    """The prompts that the running weights answer: text to ids, as a server would make them of one user message.

    Raises:
        ConfigError: the file cannot be read, or the template refuses a prompt.
    """
    made: dict[str, tuple[int, ...]] = {}
    for number, text in enumerate(_prompts(section)):
        rendered = tokenizer.template.render_prompt([{"role": "user", "content": text}])
        if rendered is None:
            raise ConfigError("evaluate.prompts", [f"the chat template renders no prompt of number {number + 1}"])
        made[text] = tuple(encode(tokenizer.tokenizer, [rendered])[0])
    return made


def _prompts(section: EvaluateSection) -> list[str]:
    if not isinstance(section.prompts, str):
        return section.prompts
    try:
        lines = Path(section.prompts).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("evaluate.prompts", [f"{section.prompts}: cannot be read ({error})"]) from None
    return [line for line in lines if line.strip()]


def _data_section(section: EvaluateSection, data: DataSection) -> DataSection:
    """The rules of the training data for other files; rows are neither compared nor held out."""
    hygiene = HygieneSection(contamination="keep", personal_data=data.hygiene.personal_data)
    fields = ("max_length", "too_long", "max_bad_fraction", "mask", "tokenizer")
    return DataSection(sources=section.sources, hygiene=hygiene, **{name: getattr(data, name) for name in fields})


def _without_weights(plan: DataPlan) -> DataPlan:
    """A held-out loss is that of the trained tokens alone, so that runs with other weights can be compared."""
    return replace(plan, rules=replace(plan.rules, prompt_weight=0.0), found=None)


def _set_aside_rows(table: pa.Table, plan: DataPlan) -> pa.Table:
    """Prepares what training leaves out; the other rows are not even parsed."""
    chosen = [is_set_aside(f":{content_hash(raw)}", plan.set_aside) for raw in table.column("raw").to_pylist()]
    return prepare_rows(table.filter(pa.array(chosen, pa.bool_())), replace(plan, set_aside=0.0))


def _counted(tables: Iterable[pa.Table], counted: Survey) -> Iterator[pa.Table]:
    for table in tables:
        counted.add(table)
        yield table


def _first(tables: Iterable[pa.Table], most: int) -> Mapping[str, tuple[Example, ...]]:
    """The examples of each source with the smallest places; holds no more than twice as many."""
    held: dict[str, list[Example]] = {}
    for table in tables:
        kept = table.filter(pa.compute.equal(table.column("reason"), ""))
        for source, example in zip(kept.column("source").to_pylist(), examples(kept), strict=True):
            of_source = held.setdefault(source, [])
            # A view would keep the whole table in memory.
            of_source.append(replace(example, input_ids=example.input_ids.copy(), labels=example.labels.copy()))
            if len(of_source) >= 2 * most:
                of_source.sort(key=_place)
                del of_source[most:]
    return {source: tuple(sorted(of_source, key=_place)[:most]) for source, of_source in held.items()}


def _place(example: Example) -> tuple[float, str]:
    return place(example.id), example.id
