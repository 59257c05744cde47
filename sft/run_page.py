"""A run as one HTML page, whole in itself: it loads nothing, runs no script, and all text is escaped."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sft.curves import HEIGHT, WIDTH, Plot, plot, short
from sft.html import page_style, page_template
from sft.record import RunRecord
from sft.report import clock
from sft.trackers import Status

PAGES = Path(__file__).parent / "pages"
SOURCES_DRAWN = 8
"""Sources that have a curve of their own; the table has all."""
ANSWERS_SHOWN = 12
"""Answers to one prompt that are shown."""


@dataclass(frozen=True, slots=True)
class Totals:
    """What all steps of a run come to; times in seconds, memory in bytes."""

    steps: int
    epoch: float
    tokens: int
    trained_tokens: int
    seconds: float
    data_wait: float
    evaluating: float
    memory: int


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to a prompt, the same from one step to another; `ended` says that a stop token ended it."""

    first: int
    last: int
    text: str
    ended: bool


def page(record: RunRecord, status: Status) -> str:
    """Writes a run as HTML."""
    filters: dict[str, Callable[..., Any]] = {
        "digits": _digits,
        "percent": _percent,
        "short": short,
        "clock": clock,
        "value": _value,
    }
    evaluations = [made for made in record.evaluations if made["loss"] is not None]
    return page_template(PAGES / "run.html", filters).render(
        config=record.config,
        status=status,
        survey=record.survey,
        steps=record.steps,
        totals=_totals(record),
        plots=_plots(record),
        plot_width=WIDTH,
        plot_height=HEIGHT,
        evaluations=evaluations,
        best=min((made for made in evaluations if made["step"] > 0), key=lambda made: made["loss"], default=None),
        samples=_samples(record.evaluations),
        settings=_settings(record.config),
        on_pairs=_on_pairs(record.config),
        style=page_style(PAGES / "run.css"),
    )


def _totals(record: RunRecord) -> Totals:
    steps = record.steps
    return Totals(
        steps=steps[-1]["step"] if steps else 0,
        epoch=steps[-1]["epoch"] if steps else 0.0,
        tokens=sum(step["tokens"] for step in steps),
        trained_tokens=sum(step["trained_tokens"] for step in steps),
        seconds=sum(step["seconds"] for step in steps),
        data_wait=sum(step["data_wait"] for step in steps),
        evaluating=sum(made["seconds"] for made in record.evaluations),
        memory=max((step["memory"] for step in steps), default=0),
    )


def _plots(record: RunRecord) -> list[Plot]:
    steps, evaluations = record.steps, record.evaluations
    last = max([made["step"] for made in (*steps, *evaluations)], default=0)
    draw = functools.partial(plot, steps=float(last))

    def of(key: str, divided_by: str | None = None) -> list[tuple[float, float | None]]:
        return [(step["step"], step[key] / max(step[divided_by], 1e-9) if divided_by else step[key]) for step in steps]

    held_out = [(made["step"], made["loss"]) for made in evaluations]
    sources = list(evaluations[-1]["sources"])[:SOURCES_DRAWN] if evaluations else []
    by_source = [
        (name, [(made["step"], made["sources"][name]["loss"]) for made in evaluations if name in made["sources"]])
        for name in sources
    ]
    unit = "of a pair" if _on_pairs(record.config) else "nats per trained token"
    plots = [
        draw("Loss", unit, [("training", of("loss")), ("held out", held_out)], dotted=["held out"]),
        draw("Held-out loss by source", unit, by_source, dotted=sources) if len(sources) > 1 else None,
        *_preference_plots(record, draw),
        draw("Learning rate", "of each step", [("learning rate", of("learning_rate"))], from_zero=True),
        draw("Gradient norm", "before clipping", [("gradient norm", of("grad_norm"))], from_zero=True),
        draw(
            "Speed",
            "tokens per second, all workers",
            [("all tokens", of("tokens", "seconds")), ("trained tokens", of("trained_tokens", "seconds"))],
            from_zero=True,
        ),
        draw("Data wait", "share of each step", [("data wait", of("data_wait", "seconds"))], from_zero=True),
    ]
    return [made for made in plots if made is not None]


def _preference_plots(record: RunRecord, draw: Callable[..., Plot | None]) -> list[Plot | None]:
    """What a run on pairs tells beside its loss."""
    if not _on_pairs(record.config):
        return []

    def of(name: str) -> list[tuple[float, float | None]]:
        return [(step["step"], step["figures"][name]) for step in record.steps]

    held_out = [(made["step"], made["accuracy"]) for made in record.evaluations if made["loss"] is not None]
    rewards = [("chosen", of("chosen_reward")), ("rejected", of("rejected_reward")), ("margin", of("margin"))]
    right = [("training", of("accuracy")), ("held out", held_out)]
    return [
        draw("Rewards", "gain on the start, times beta", rewards),
        draw("Accuracy", "pairs whose chosen answer gained more", right, dotted=["held out"], from_zero=True),
    ]


def _on_pairs(config: Mapping[str, Any]) -> bool:
    on_pairs: bool = config.get("train", {}).get("stage") == "dpo"
    return on_pairs


def _samples(evaluations: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Answer]]]:
    """Prompts, each with its answers over time."""
    prompts: dict[str, list[Answer]] = {}
    for made in evaluations:
        for sample in made["samples"]:
            answers = prompts.setdefault(sample["prompt"], [])
            step, text, ended = made["step"], sample["answer"], sample["ended"]
            if answers and (answers[-1].text, answers[-1].ended) == (text, ended):
                answers[-1] = replace(answers[-1], last=step)
            else:
                answers.append(Answer(step, step, text, ended))
    return [(prompt, _some(answers)) for prompt, answers in prompts.items()]


def _some(answers: Sequence[Answer]) -> list[Answer]:
    """The first, the last, and evenly between."""
    count = min(len(answers), ANSWERS_SHOWN)
    return [answers[round(place * (len(answers) - 1) / max(count - 1, 1))] for place in range(count)]


def _settings(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """The config by section; what stands outside of one comes first."""
    sections: dict[str, Mapping[str, Any]] = {
        "run": {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    }
    sections.update({key: value for key, value in config.items() if isinstance(value, Mapping)})
    return [(name, list(_dotted(values))) for name, values in sections.items()]


def _dotted(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    made: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            made += _dotted(value, f"{prefix}{key}.")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            for number, item in enumerate(value):
                made += _dotted({name: inner for name, inner in item.items() if inner}, f"{prefix}{key}.{number}.")
        else:
            made.append((f"{prefix}{key}", value))
    return made


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _digits(value: float | None, digits: int = 4) -> str:
    return "\u2013" if value is None else f"{value:,.{digits}f}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share in (0, 1) or 0.1 <= share < 0.995 else f"{share:.1%}"
