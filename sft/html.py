"""What all pages are made with: a template that escapes, and the style that they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

BASE = Path(__file__).with_name("pages") / "base.css"


def page_template(path: Path, filters: Mapping[str, Callable[..., Any]]) -> Template:
    """Reads a page's template, which escapes what it says; what it includes lies in the same folder.

    A name that the template does not get is a fault.

    Args:
        path: the template.
        filters: what it formats values with, beside Jinja's own; `number` is always there.
    """
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": "{:,}".format, **filters}
    return environment.get_template(path.name)


def page_style(path: Path) -> str:
    """The style of a page: what all pages share, and then its own file."""
    return BASE.read_text(encoding="utf-8") + path.read_text(encoding="utf-8")
