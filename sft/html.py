"""Jinja templates of pages: what a page says is escaped, and a name that the template does not get is a fault."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template


def page_template(path: Path, filters: Mapping[str, Callable[..., Any]]) -> Template:
    """Reads a page's template; what it includes lies in the same folder.

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
