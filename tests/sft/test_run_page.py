from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from sft import ending as module
from sft import storage
from sft.card import model_card
from sft.config import TrainConfig
from sft.curves import BUCKETS, HEIGHT, WIDTH, plot, round_ticks, short
from sft.ending import ending
from sft.record import RunRecord, evaluation_at, read_record
from sft.report import json_line
from sft.run import RunFolder
from sft.run_page import page
from sft.trackers import Trackers

EVIL = "<script>alert('x')</script>\" onload='x' | `a` [b](http://c) &amp;"


def step(number: int, total: int = 6, **changes: Any) -> dict[str, Any]:
    made = {
        "step": number,
        "total_steps": total,
        "epoch": number / total,
        "loss": 3.0 / number,
        "grad_norm": 0.5,
        "learning_rate": 1e-4,
        "tokens": 100,
        "trained_tokens": 40,
        "seconds": 2.0,
        "data_wait": 0.2,
        "memory": 3 << 29,
    }
    return made | changes


def evaluation(number: int, loss: float | None, answer: str, source: str = "held") -> dict[str, Any]:
    score = {"total": 0.0, "tokens": 20, "rows": 5, "loss": loss, "perplexity": 2.0}
    return {
        "step": number,
        "epoch": number / 6,
        "loss": loss,
        "perplexity": 2.0,
        "best": False,
        "seconds": 1.0,
        "sources": {} if loss is None else {source: score, "other": score},
        "samples": [{"prompt": f"Say {EVIL}", "answer": answer, "ended": True}],
    }


def record(name: str = "s", **changes: Any) -> RunRecord:
    config = TrainConfig.model_validate(
        {
            "name": "tiny",
            "storage": "/runs",
            "model": {"base": "owner/Base-7B"},
            "data": {"sources": [{"path": "hf://datasets/o/rows@v1/x.jsonl", "name": name}]},
        }
    ).model_dump(mode="json")
    count = {"rows": 30, "kept": 25, "tokens": 900, "trained_tokens": 300, "dropped": {"too_long": 5}, "flags": {}}
    survey = {
        **count,
        "fingerprint": "f" * 32,
        "sources": {name: count},
        "clusters": {"logic": {EVIL: {"rows": 3, "kept": 2}}},
    }
    values: dict[str, Any] = {
        "config": config,
        "survey": survey,
        "steps": tuple(step(n) for n in range(1, 7)),
        "evaluations": (evaluation(0, 3.0, "a"), evaluation(3, 1.0, EVIL, name), evaluation(6, 2.0, EVIL)),
    }
    return RunRecord(**{**values, **changes})


class Reader(HTMLParser):
    """Collects a page's tags and text, and fails where it is not well formed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("status", ["finished", "failed", "stopped"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"evaluations": ()},
        {"steps": (), "evaluations": (), "survey": None},
        {"steps": (step(1),), "evaluations": (evaluation(0, None, "x"),)},
        {"steps": tuple(step(n, 500, loss=None if n == 7 else 1.0) for n in range(1, 501))},
    ],
)
def test_a_page_is_whole_in_itself_at_any_time_of_a_run(status: Any, changes: dict[str, Any]) -> None:
    text = page(record(EVIL, **changes), status)
    read = Reader(text)
    assert {tag for tag, _ in read.tags} & {"script", "link", "img", "iframe"} == set()
    assert not [attributes for _, attributes in read.tags if {"src", "href", "onload"} & attributes.keys()]
    assert "url(" not in text
    assert "default-src 'none'; style-src 'unsafe-inline'" in text
    assert status.capitalize() in read.text


def test_a_page_shows_figures_curves_and_answers() -> None:
    read = Reader(page(record(), "finished"))
    for words in (
        "Finished after 6 steps.",
        "Best held-out loss",
        "perplexity 2.00, step 3",
        "240",
        "At step 3, the best",
    ):
        assert words in re.sub(r"\s+", " ", read.text), words
    captions = [attributes["aria-label"] for tag, attributes in read.tags if tag == "svg"]
    assert captions == [
        "Loss, nats per trained token: training ends at 0.5, held out ends at 2",
        "Held-out loss by source, nats per trained token: held ends at 2, other ends at 2",
        "Learning rate, of each step: learning rate ends at 0.0001",
        "Gradient norm, before clipping: gradient norm ends at 0.5",
        "Speed, tokens per second, all workers: all tokens ends at 50, trained tokens ends at 20",
        "Data wait, share of each step: data wait ends at 0.1",
    ]
    assert "steps 3 to 6" in read.text  # one answer, given twice
    assert read.text.count(EVIL) == 2  # in the prompt and in that answer


def test_a_run_that_ended_early_says_so() -> None:
    assert "before the 9 that were planned" in page(record(steps=(step(1, 9), step(2, 9))), "finished")


@example(0.0, 5e-324)
@example(1e-300, 3e-300)
@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
def test_ticks_are_round_and_hold_the_values(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    ticks = round_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    slack = max(ticks[-1] - ticks[0], abs(one), abs(other)) * 1e-6
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert ticks == sorted(set(ticks))


def test_ticks() -> None:
    assert round_ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert round_ticks(0.9, 2.43) == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert round_ticks(3.0, 3.0) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [short(value) for value in (0.0, 2e-4, 999.5, 12_970.0, 3.2e6, 4e9)] == [
        "0",
        "0.0002",
        "999.5",
        "12.97k",
        "3.2M",
        "4G",
    ]


def test_a_curve_is_drawn_in_its_plot() -> None:
    made = plot("T", "u", [("a", [(0, 0.0), (5, 1.0), (10, None)]), ("b", [(10, 0.5)]), ("c", [])], steps=10)
    assert made is not None
    assert [curve.name for curve in made.curves] == ["a", "b"]
    assert made.curves[0].line == f"M0.0 {HEIGHT:.1f}L{WIDTH / 2:.1f} 0.0"
    assert (made.curves[0].dots, made.curves[1].dots) == ((), ((WIDTH, HEIGHT / 2),))
    assert (made.curves[0].last, made.curves[0].band) == ("1", "")
    assert [tick.label for tick in made.rows] == ["0", "0.25", "0.5", "0.75", "1"]
    assert [readout.text for readout in made.readouts] == ["step 0: a 0", "step 5: a 1"]
    assert plot("T", "u", [("a", [(1, math.nan)])], steps=10) is None
    nothing = plot("T", "u", [("a", [(1, 0.0)])], steps=10, from_zero=True)
    assert nothing is not None
    assert [tick.label for tick in nothing.rows] == ["0", "0.25", "0.5", "0.75", "1"]


def test_many_steps_share_points_and_keep_their_range() -> None:
    made = plot("T", "u", [("a", [(n, float(n % 2)) for n in range(1, 10_001)])], steps=10_000)
    assert made is not None
    (curve,) = made.curves
    assert curve.line.count("L") + 1 <= BUCKETS
    assert {line.split()[1] for line in re.split("[ML]", curve.line)[1:]} == {f"{HEIGHT / 2:.1f}"}
    assert {part.split()[1] for part in re.split("[ML]", curve.band.rstrip("Z"))[1:]} == {"0.0", f"{HEIGHT:.1f}"}


def test_a_card_says_what_is_known_and_no_more() -> None:
    of = record()
    assert of.survey is not None
    card = model_card(of, 3, of.survey, "b" * 64)
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "base_model": "owner/Base-7B",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "sft", "raysft"],
        "datasets": ["o/rows"],
    }
    for line in (
        "# tiny",
        "| s | 30 | 25 | 900 | 300 |",
        "| too\\_long | 5 |",
        "| lora.rank | 16 |",
        "| train.learning\\_rate | 0.0002 |",
        "| Steps | 3 |",
        "| Training loss of the first and the last step | 3.0000, 1.0000 |",
        "| Trained tokens seen | 120 |",
        "| s | 5 | not measured | 1.0000 | 2.00 |",
        "| other | 5 | 3.0000 | 1.0000 | 2.00 |",
        "| all together |  | 3.0000 | 1.0000 | 2.00 |",
    ):
        assert line in body.splitlines(), line
    assert EVIL not in body
    assert "<script>" not in body.replace("\\<", "")
    assert "## Evaluation" not in model_card(record(evaluations=()), 3, of.survey, "b" * 64)
    assert "## Metrics" not in model_card(record(steps=()), 3, of.survey, "b" * 64)


def test_a_local_base_is_called_by_its_id() -> None:
    of = record()
    assert of.survey is not None
    of.config["model"] = {**of.config["model"], "base": "/models/tiny/", "base_id": None}
    assert "base_model: tiny\n" in model_card(of, 3, of.survey, "b" * 64)


def test_a_record_holds_each_step_once_and_passes_over_a_line_that_was_cut(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    assert read_record(folder) == RunRecord({}, None, (), ())
    lines = [json_line(step(n, loss=loss)) for n, loss in ((1, 3.0), (2, 2.0), (3, 1.0), (2, 2.5))]
    storage.write(folder.metrics, "".join(lines).encode() + b'{"step": 4, "lo')
    storage.write(folder.evaluations, "".join(json_line(e) for e in record().evaluations).encode())
    found = read_record(folder)
    assert [(made["step"], made["loss"]) for made in found.steps] == [(1, 3.0), (2, 2.5), (3, 1.0)]
    at = evaluation_at(found, 3)
    assert at is not None
    assert set(at) == {"step", "loss", "perplexity", "sources"}
    assert at["loss"] == 1.0
    assert evaluation_at(found, 4) is None


@pytest.mark.parametrize(
    ("error", "status"), [(None, "Finished"), (ValueError("x"), "Failed"), (KeyboardInterrupt(), "Stopped")]
)
def test_a_run_leaves_its_page_however_it_ends(tmp_path: Path, error: BaseException | None, status: str) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    storage.write(folder.config, yaml.safe_dump(record().config).encode())
    said: list[str] = []
    if error is None:
        with ending(folder, Trackers(()), said.append):
            pass
    else:
        with pytest.raises(type(error)), ending(folder, Trackers(()), said.append):
            raise error
    assert f"<b>{status}</b>" in Path(folder.report).read_text()
    assert said == [f"report in {folder.report}"]


def test_a_page_that_cannot_be_written_is_no_fault_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "page", lambda *_: 1 / 0)
    said: list[str] = []
    with ending(RunFolder(str(tmp_path / "run")), Trackers(()), said.append):
        pass
    assert said == ["warning: no report page could be written (ZeroDivisionError: division by zero)"]
