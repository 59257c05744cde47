"""The chat page in a real Chromium, in front of the real engine; tests/browser has every part of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from playwright.async_api import expect

from tests.browser.chromium import chromium, open_chat
from tests.engine.conftest import Endpoint

pytestmark = [pytest.mark.engine, pytest.mark.anyio, pytest.mark.timeout(300)]


async def test_two_versions_side_by_side_each_with_its_figures(endpoint: Endpoint) -> None:
    async with chromium() as browser, open_chat(browser, endpoint.url) as chat:
        await chat.compare("support@v1", "support@v2")
        await chat.page.get_by_label("Longest answer").fill("12")
        await chat.ask("Tell me a short story about a fox and a lighthouse.")
        said = []
        for version in ("support@v1", "support@v2"):
            answer = chat.answer(version)
            said.append(await chat.ended(answer, 60))
            for figure in ("to first token", "tokens/s"):
                await expect(answer).to_contain_text(figure)
        assert said[0] != said[1]
        if os.environ.get("RAYSFT_SCREENSHOTS"):
            await chat.page.screenshot(path=Path(os.environ["RAYSFT_SCREENSHOTS"]) / "chat.png")
