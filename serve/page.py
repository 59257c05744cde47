"""The chat page: one document, whole in itself. It needs no key; all that it asks for does.

Style and script stand in the document and are named by their hashes. So a browser runs these and no others, and a page
never meets the script of another release, whichever gateway replica answers and whatever path a proxy puts in front.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

from fastapi.responses import HTMLResponse, Response

PAGES = Path(__file__).parent / "pages"


async def chat_page() -> Response:
    """The page, for `GET /`."""
    document, headers = _made()
    return HTMLResponse(document, headers=headers)


@cache
def _made() -> tuple[str, dict[str, str]]:
    document, style, script = ((PAGES / f"chat.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    rules = {
        "default-src": "'none'",
        "style-src": _hash(style),
        "script-src": _hash(script),
        "connect-src": "'self'",
        "img-src": "data:",  # its own icon
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        # The browser refuses to make HTML of any text, so that no answer can become a part of the page.
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    headers = {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in rules.items()),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    return document.replace("{{ style }}", style).replace("{{ script }}", script), headers


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
