from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

import pyarrow as pa
import pytest

from jobs.audit import Audit, mixture, packing, packing_by_source, proofs
from jobs.audit_examples import ExamplePicker, shown
from jobs.audit_page import PAGES, page
from sft.base import BaseTokenizer
from sft.rows import PREPARED
from sft.survey import survey

EVIL = "<script>alert('x')</script>\" onload='x' &amp; <b>"
VOID = {"meta", "input"}


@dataclass
class Element:
    """One element of a page."""

    tag: str
    attributes: dict[str, str]
    parent: Element | None
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def find(self, tag: str = "", **attributes: str) -> Iterator[Element]:
        """All elements below of this tag that have these classes or attribute values."""
        for child in self.children:
            if isinstance(child, Element):
                given = {"class" if key == "kind" else key.replace("_", "-"): of for key, of in attributes.items()}
                mine = child.attributes
                if (not tag or child.tag == tag) and all(
                    value in mine.get(key, "").split() if key == "class" else mine.get(key) == value
                    for key, value in given.items()
                ):
                    yield child
                yield from child.find(tag, **attributes)

    def one(self, tag: str = "", **attributes: str) -> Element:
        (found,) = self.find(tag, **attributes)
        return found


class Reader(HTMLParser):
    """Builds the tree of a page, and fails where it is not well formed."""

    def __init__(self) -> None:
        super().__init__()
        self.root = self.here = Element("", {}, None)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {key: value or "" for key, value in attrs}, self.here)
        self.here.children.append(element)
        if tag not in VOID:
            self.here = element

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.here.children.append(Element(tag, {key: value or "" for key, value in attrs}, self.here))

    def handle_endtag(self, tag: str) -> None:
        assert self.here.tag == tag, f"<{self.here.tag}> is closed by </{tag}>"
        assert self.here.parent
        self.here = self.here.parent

    def handle_data(self, data: str) -> None:
        self.here.children.append(data)


def read(text: str) -> Element:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.here is reader.root, f"<{reader.here.tag}> is never closed"
    return reader.root


def kept(base: BaseTokenizer, prompt: str, answer: str, **fields: object) -> dict[str, Any]:
    ids = [base.tokenizer(text)["input_ids"] for text in (prompt, f"{answer}<|im_end|>")]
    return row(input_ids=ids[0] + ids[1], labels=[-100] * len(ids[0]) + ids[1], **fields)


def row(**fields: object) -> dict[str, Any]:
    return {
        "id": "s/a.jsonl:1:x",
        "source": "s",
        "file": "a.jsonl",
        "position": 1,
        "task": "",
        "cluster": "",
        "flags": [],
        "input_ids": [],
        "labels": [],
        "reason": "",
        "field": "",
        "message": "",
        **fields,
    }


def audit(base: BaseTokenizer, rows: list[dict[str, Any]], max_length: int = 64, **changed: Any) -> Audit:
    table = pa.Table.from_pylist(rows, schema=PREPARED)
    counted = survey([table])
    picker = ExamplePicker(2)
    picker.add(table)
    made: dict[str, Any] = {
        "name": "support",
        "base_model": "small",
        "template": "f" * 64,
        "proofs": proofs(base, "refuse"),
        "max_length": max_length,
        "max_bad_fraction": 0.5,
        "shuffle_window": 100,
        "limit": None,
        "without_rows": (),
        "survey": counted,
        "packing": packing(counted.kept_rows.lengths, 100, max_length),
        "packing_by_source": packing_by_source(counted, 100, max_length),
        "mixture": mixture(counted),
        "examples": tuple(shown(one, base) for one in picker.rows),
        **changed,
    }
    return Audit(**made)


@pytest.fixture
def messy(base: BaseTokenizer) -> Element:
    rows = [
        kept(base, "What is 2+2?\n", "four", flags=["truncated"], task="sum", cluster="arithmetic"),
        kept(base, "Say hi\n", "hi", source="t"),
        kept(base, "Say ho\n", "ho", source="t"),
        *(row(position=i, reason="empty_response", field="output", message="it is empty") for i in range(4, 34)),
        row(position=40, source="t", reason="duplicate", message="as row 2"),
    ]
    return read(page(audit(base, rows, without_rows=("u",), limit=50)))


def cells(line: Element) -> dict[str, str]:
    return {of.attributes["data-label"]: " ".join(of.text.split()) for of in line.find("td")}


def test_summary(messy: Element) -> None:
    tiles = {}
    for tile in messy.find("div", kind="tile"):
        value = tile.one("dd")
        tiles[tile.one("dt").text] = (value.children[0], "".join(more.text for more in value.find("small")))
    prompts, answers = len("What is 2+2?\nSay hi\nSay ho\n"), len("four.hi.ho.")
    assert tiles == {
        "Rows read": ("34", ""),
        "Kept": ("3", "8.8%"),
        "Faults": ("30", "88%"),
        "Left out as asked": ("1", "2.9%"),
        "Tokens": (str(prompts + answers), ""),
        "Trained tokens": (str(answers), "29%"),
        "Truncated": ("1", "33%"),
        "Packing": ("59%", "1 pack"),
    }
    assert "30 of 34 rows (88.2%) cannot be used; the limit is 50.0%" in messy.one("p", kind="verdict").text
    assert "Only the first 50 rows of each source were looked at." in messy.one("header").text


def test_sources(messy: Element) -> None:
    section = messy.one("section", id="sources")
    lines = {line.attributes["data-source"]: cells(line) for line in section.find("tr", data_item="")}
    assert list(lines) == ["s", "t"]
    assert lines["t"] == {
        "Rows": "3",
        "Kept": "2",
        "Faults": "0",
        "Left out": "1",
        "Tokens": "20",
        "Trained": "6 30%",
        "Truncated": "0",
        "Median, longest": "10, 10",
        "Packing": "31%",
        "Lengths": "",
    }
    assert section.one("p", id="without-rows").text == "No rows in u."


def test_lengths(messy: Element) -> None:
    plot = messy.one("figure").one("svg")
    bars = [(float(bar.attributes["height"]), bar.one("title").text) for bar in plot.find("rect")]
    assert bars == [
        (1, "examples of up to 10 tokens: 2"),
        (0, "examples of up to 12 tokens: 0"),
        (0, "examples of up to 14 tokens: 0"),
        (0, "examples of up to 16 tokens: 0"),
        (0.5, "examples of up to 20 tokens: 1"),
    ]
    markers = {marker.text: marker.attributes["style"] for marker in messy.find("span", kind="marker")}
    assert list(markers) == ["p50 10", "p90 18", "p99 18"]
    assert markers["p50 10"].startswith("left: 20.00%")


def test_dropped_rows_with_their_first_places(messy: Element) -> None:
    section = messy.one("section", id="dropped")
    groups = list(section.find("details"))
    assert [(of.attributes["data-source"], of.attributes["data-tag"]) for of in groups] == [
        ("s", "empty_response"),
        ("t", "duplicate"),
    ]
    assert " ".join(groups[0].one("summary").text.split()) == "30 empty_response fault in s"
    assert " ".join(groups[1].one("summary").text.split()) == "1 duplicate as asked in t"
    places = [" ".join(place.text.split()) for place in groups[0].find("li", data_text="")]
    assert places == [f"a.jsonl:{i} output it is empty" for i in range(4, 24)]
    assert "and 10 more" in groups[0].text
    assert messy.one("p", id="flags").text.strip() == "1 truncated"


def test_mixture(messy: Element) -> None:
    section = messy.one("section", id="mixture")
    lines = {line.attributes["data-source"]: cells(line) for line in section.find("tr", data_item="")}
    assert lines["s"] == {
        "Kept rows": "1",
        "Rows of an epoch": "1",
        "Passes": "1.00",
        "Share of the rows": "33%",
        "Share of the trained tokens": "45%",
    }
    assert "arithmetic: 1 task, 1 of 1 rows kept" in " ".join(section.text.split())


def test_examples_show_what_is_trained(messy: Element) -> None:
    articles = list(messy.find("article"))
    assert [article.attributes["data-source"] for article in articles] == ["s", "t", "t"]
    text = articles[0].one("div", kind="text")
    assert text.text == "What is 2+2?↵\nfour<|im_end|>"
    assert "".join(piece.text for piece in text.find("span", kind="t")) == "four<|im_end|>"
    stop = text.one("span", kind="s")
    assert (stop.text, stop.attributes["title"]) == ("<|im_end|>", "id 1, label 1")
    assert next(text.find("span", kind="u")).attributes["title"].endswith(", label -100")
    assert articles[0].attributes["data-tag"] == "truncated"


def test_every_token_left_out_is_counted(base: BaseTokenizer) -> None:
    long = kept(base, "q" * 1500, "a" * 700)
    root = read(page(audit(base, [long], max_length=4096)))
    text = root.one("article").one("div", kind="text")
    assert text.one("em").text == "201 tokens left out"
    assert len(list(text.find("span"))) == 2000


def test_prompt_text_with_a_weight(base: BaseTokenizer) -> None:
    one = kept(base, "q\n", "a")
    ids = one["input_ids"]
    table = pa.Table.from_pylist([one], schema=PREPARED)
    example = shown({**table.to_pylist()[0], "labels": [-100, *ids[1:]], "weights": [0, 0.25, 1, 1]}, base)
    root = read(page(audit(base, [one], examples=(example,))))
    piece = root.one("article").one("span", kind="w")
    assert (piece.text, piece.attributes["title"]) == ("↵\n", f"id {ids[1]}, label {ids[1]}, weight 0.25")
    assert root.one("div", kind="legend").one("span", kind="w").text == "trained with a weight"


def test_data_without_rows_makes_a_page(base: BaseTokenizer) -> None:
    root = read(page(audit(base, [])))
    assert "The data holds no rows." in root.one("p", kind="verdict").text
    assert list(root.find("article")) == []


def test_nothing_of_the_data_becomes_markup(base: BaseTokenizer) -> None:
    rows = [
        kept(base, EVIL, EVIL, id=EVIL, source=EVIL, file=EVIL, task=EVIL, cluster=EVIL, flags=[EVIL]),
        row(id=EVIL, source=EVIL, file=EVIL, reason=EVIL, field=EVIL, message=EVIL),
    ]
    text = page(audit(base, rows, max_length=200, name=EVIL, base_model=EVIL, template=EVIL, without_rows=(EVIL,)))
    root = read(text)
    script = root.one("script")
    assert script.text == (PAGES / "audit.js").read_text(encoding="utf-8")
    assert EVIL in root.one("h1").text
    assert root.one("article").one("div", kind="text").text == f"{EVIL}{EVIL}<|im_end|>"
    assert EVIL in root.one("li", data_text="").text
    assert root.one("article").attributes["data-source"] == EVIL
    elements = list(root.find())
    assert not [one.tag for one in elements if one.tag in ("img", "link", "iframe", "object", "base", "a")]
    assert not [key for one in elements for key in one.attributes if key.startswith("on") or key in ("src", "href")]


def test_the_page_loads_nothing_and_runs_its_own_script_alone(messy: Element) -> None:
    policy = messy.one("meta", http_equiv="Content-Security-Policy").attributes["content"]
    digest = base64.b64encode(hashlib.sha256(messy.one("script").text.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert "url(" not in messy.one("style").text
    assert "@import" not in messy.one("style").text
