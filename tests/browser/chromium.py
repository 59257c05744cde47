"""The chat page in a real browser, for tests of any gateway: one of this process, or a real application's address."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from playwright.async_api import Browser, ConsoleMessage, Error, Locator, Page, Request, async_playwright, expect

NAMES = ("chromium", "chromium-browser", "google-chrome")
VARIABLE = "RAYSFT_CHROMIUM"
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
LARGE = {"width": 1280, "height": 800}
PHONE = {"width": 320, "height": 640}
PATIENCE_S = 10.0
REFUSAL = re.compile(r"Failed to load resource: the server responded with a status of (\d+)")


def chromium_path() -> str:
    """Where this machine's Chromium is; skips the test where there is none."""
    found = os.environ.get(VARIABLE) or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no Chromium: install one (`apt install chromium`), or name one in {VARIABLE}")
    return found


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """A browser without a window."""
    path = chromium_path()
    expect.set_options(timeout=1000 * PATIENCE_S)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            yield browser
        finally:
            await browser.close()


class ChatPage:
    """The page as someone uses it, and what went wrong in it."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self._url = page, url
        self.prompt = page.get_by_label("Message", exact=True)
        self.faults: list[str] = []
        self.refusals: list[int] = []
        page.on("request", self._on_request)
        page.on("console", self._on_console)
        page.on("pageerror", self._on_error)

    async def ask(self, question: str) -> None:
        """Types a question and sends it by the keyboard."""
        await self.prompt.fill(question)
        await self.prompt.press("Enter")

    def answer(self, version: str) -> Locator:
        """The answers that the page says are of that version."""
        return self.page.get_by_role("region", name=f"Answer of {version}", exact=True)

    async def ended(self, answer: Locator, seconds: float = PATIENCE_S) -> str:
        """Waits for the end of an answer and returns its text."""
        await expect(answer).to_have_attribute("aria-busy", "false", timeout=1000 * seconds)
        return await answer.locator(".text").last.inner_text()

    async def compare(self, first: str, second: str) -> None:
        """Puts two models side by side."""
        await self.page.get_by_role("button", name="Compare two").click()
        await self.page.get_by_label("Model", exact=True).select_option(first)
        await self.page.get_by_label("Compared with").select_option(second)

    async def too_wide(self) -> int:
        """By how many pixels the page is wider than the window."""
        return int(await self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith((f"{self._url}/", "data:")):
            self.faults.append(f"asks for {request.url}")

    def _on_console(self, message: ConsoleMessage) -> None:
        refusal = REFUSAL.match(message.text)
        if refusal:
            self.refusals.append(int(refusal[1]))
        elif message.type in ("error", "warning"):
            self.faults.append(message.text)

    def _on_error(self, error: Error) -> None:
        self.faults.append(str(error))


@asynccontextmanager
async def open_chat(
    browser: Browser, url: str, *, refusals: Sequence[int] = (), **options: Any
) -> AsyncIterator[ChatPage]:
    """Opens the page, and checks in the end that nothing went wrong in it and that it asked nobody but its server.

    Args:
        browser: a browser.
        url: the gateway's address, without a slash at its end.
        refusals: the statuses above 399 that the page is expected to see, in their order.
        options: of the browser's context, such as `viewport`.
    """
    context = await browser.new_context(**{"viewport": LARGE, **options})
    try:
        context.set_default_timeout(1000 * PATIENCE_S)
        chat = ChatPage(await context.new_page(), url)
        await chat.page.goto(f"{url}/")
        yield chat
        assert (chat.faults, chat.refusals) == ([], list(refusals))
    finally:
        await context.close()
