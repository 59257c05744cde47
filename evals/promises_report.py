"""The six promises as one HTML page, whole in itself, with links to each adapter's own report beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evals.promises_summary import PromiseResult
from evals.report import style, template


def promises_page(results: Mapping[str, PromiseResult], about: Mapping[str, Any]) -> str:
    """Writes what came of the promises as HTML.

    Args:
        results: by key.
        about: base, seeds, machine, versions and seconds, as they stand in the summary.
    """
    return template("promises.html").render(results=results, about=about, style=style())
