"""The chat page in a real Chromium, in front of a real gateway whose engine is a stand-in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal

import pytest
from playwright.async_api import Browser, expect

from serve.errors import Failure
from serve.registry import Registry
from tests.browser.chromium import PHONE, ChatPage, open_chat
from tests.browser.storyteller import Storyteller, ending, event
from tests.serve.served import served, until
from tests.serve.stand_in import Keys, gateway_app

pytestmark = pytest.mark.anyio


@pytest.fixture
async def chat(browser: Browser, url: str) -> AsyncIterator[ChatPage]:
    async with open_chat(browser, url) as chat:
        yield chat


async def test_the_models_are_listed_with_what_their_aliases_serve(chat: ChatPage) -> None:
    model = chat.page.get_by_label("Model", exact=True)
    await expect(model).to_have_value("support")
    options = await model.locator("option").all_inner_texts()
    assert options == ["support → support@v1", "support@v2", "support@v1", "base"]
    await expect(chat.page.get_by_role("heading", name="Ask support")).to_be_visible()
    await model.select_option("support@v2")
    await expect(chat.page.locator("#start")).to_contain_text("run-2")


async def test_an_answer_grows_while_it_is_made_and_ends_with_its_figures(chat: ChatPage, engine: Storyteller) -> None:
    engine.go_on.clear()
    await chat.ask("Tell me a story")
    answer = chat.answer("support@v1")
    await expect(answer.locator(".text")).to_have_text("Once upon")
    await expect(answer).to_contain_text("to first token")
    assert await answer.get_attribute("aria-busy") == "true"
    engine.go_on.set()
    assert await chat.ended(answer) == "Once upon a time, said support@v1."
    for figure in ("asked as support", "to first token", "6 tokens", "tokens/s", "in all"):
        await expect(answer).to_contain_text(figure)


@pytest.mark.parametrize("by", ["key", "button"])
async def test_stop_stops_the_engine_and_keeps_what_was_said(chat: ChatPage, engine: Storyteller, by: str) -> None:
    engine.go_on.clear()
    await chat.ask("Tell me a story")
    answer = chat.answer("support@v1")
    await expect(answer.locator(".text")).to_have_text("Once upon")
    assert engine.stopped == 0
    if by == "key":
        await chat.page.keyboard.press("Escape")
    else:
        await chat.page.get_by_role("button", name="Stop").click()
    await until(lambda: engine.stopped == 1)
    assert await chat.ended(answer) == "Once upon"
    await expect(answer).to_contain_text("stopped")
    engine.go_on.set()
    await chat.ask("Go on")
    await until(lambda: len(engine.asked) == 2)
    said = [message["content"] for message in engine.asked[1][1]["messages"]]
    assert said == ["Tell me a story", "Once upon", "Go on"]
    await chat.ended(answer.last)


async def test_two_versions_answer_one_prompt_side_by_side(chat: ChatPage, engine: Storyteller) -> None:
    await chat.compare("support", "support@v2")
    engine.go_on.clear()
    await chat.ask("Tell me a story")
    answers = [chat.answer("support@v1"), chat.answer("support@v2")]
    for answer in answers:
        await expect(answer.locator(".text")).to_have_text("Once upon")
    engine.go_on.set()
    for answer, version in zip(answers, ("support@v1", "support@v2"), strict=True):
        assert await chat.ended(answer) == f"Once upon a time, said {version}."
        await expect(answer).to_contain_text("6 tokens")
        await expect(answer).to_contain_text("to first token")
    left, right = [await answer.bounding_box() for answer in answers]
    assert left is not None
    assert right is not None
    assert (left["y"], left["width"]) == (right["y"], right["width"])
    assert left["x"] + left["width"] < right["x"]
    assert [(body["model"], str(target)) for _, body, target in engine.asked] == [
        ("support", "support@v1"),
        ("support@v2", "support@v2"),
    ]


async def test_each_side_goes_on_with_what_it_said_itself(chat: ChatPage, engine: Storyteller) -> None:
    await chat.ask("First")
    await chat.ended(chat.answer("support@v1"))
    await chat.compare("support", "support@v2")
    for question in ("Second", "Third"):
        await chat.ask(question)
        for version in ("support@v1", "support@v2"):
            await chat.ended(chat.answer(version).last)
    await until(lambda: len(engine.asked) == 5)
    one, two = "Once upon a time, said support@v1.", "Once upon a time, said support@v2."
    said = {str(target): [message["content"] for message in body["messages"]] for _, body, target in engine.asked}
    assert said == {
        "support@v1": ["First", one, "Second", one, "Third"],
        "support@v2": ["First", one, "Second", two, "Third"],
    }


async def test_the_settings_reach_the_engine(chat: ChatPage, engine: Storyteller) -> None:
    await chat.page.get_by_label("System prompt").fill("Be brief.")
    await chat.page.get_by_label("Temperature").fill("0.7")
    await chat.page.get_by_label("Longest answer").fill("64")
    await chat.ask("Hello")
    await chat.ended(chat.answer("support@v1"))
    body = engine.asked[0][1]
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert (body["temperature"], body["max_tokens"], body["stream"]) == (0.7, 64, True)


async def test_a_new_chat_forgets_the_old_one(chat: ChatPage, engine: Storyteller) -> None:
    for _ in range(2):
        await chat.ask("Hello")
        await chat.ended(chat.answer("support@v1"))
        await chat.page.get_by_role("button", name="New chat").click()
        await expect(chat.answer("support@v1")).to_have_count(0)
    assert [len(body["messages"]) for _, body, _ in engine.asked] == [1, 1]
    assert len({body["user"] for _, body, _ in engine.asked}) == 2


async def test_what_a_model_says_is_text_and_nothing_else(chat: ChatPage, engine: Storyteller) -> None:
    engine.story = "<script>document.title = 'taken'</script><img src=x onerror=alert(1)> &amp;\n  two"
    await chat.ask("<b>bold</b>")
    assert await chat.ended(chat.answer("support@v1")) == f"{engine.story}, said support@v1."
    await expect(chat.page.locator("article .prompt")).to_have_text("<b>bold</b>")
    assert await chat.page.locator("article script, article img, article .prompt b").count() == 0
    assert await chat.page.title() == "raysft chat"


async def test_reasoning_is_apart_from_the_answer(chat: ChatPage, engine: Storyteller) -> None:
    engine.items = [event({"reasoning": "Hm, "}), event({"reasoning": "yes."}), event({"content": "Four."}), ending(5)]
    await chat.ask("2 + 2?")
    answer = chat.answer("support@v1")
    assert await chat.ended(answer) == "Four."
    await answer.get_by_text("Reasoning").click()
    await expect(answer.locator("details p")).to_have_text("Hm, yes.")


async def test_an_answer_that_was_cut_says_so(chat: ChatPage, engine: Storyteller) -> None:
    engine.items = [event({"content": "Once"}), ending(1, "length")]
    await chat.ask("Hello")
    await chat.ended(chat.answer("support@v1"))
    await expect(chat.answer("support@v1")).to_contain_text("cut at the longest length")


async def test_a_refusal_is_one_line_and_can_be_tried_again(browser: Browser, url: str, engine: Storyteller) -> None:
    async with open_chat(browser, url, refusals=[400]) as chat:
        engine.items = [Failure(400, "the prompt has 600 tokens, above 512", "invalid_request_error", "messages")]
        await chat.ask("Hello")
        refused = chat.answer("support")
        await expect(refused.locator(".error")).to_contain_text("the prompt has 600 tokens, above 512")
        engine.items = None
        await refused.get_by_role("button", name="Try again").click()
        assert await chat.ended(chat.answer("support@v1")) == "Once upon a time, said support@v1."
        await expect(chat.page.locator(".error:visible")).to_have_count(0)


async def test_a_stream_that_breaks_shows_what_came_and_why(chat: ChatPage, engine: Storyteller) -> None:
    engine.items = [event({"content": "Once"}), Failure(503, "the engine was lost", "server_error")]
    await chat.ask("Hello")
    answer = chat.answer("support@v1")
    assert await chat.ended(answer) == "Once"
    await expect(answer.locator(".error")).to_contain_text("the engine was lost")
    engine.items = None
    await chat.ask("And now?")
    await chat.ended(answer.last)
    assert [message["content"] for message in engine.asked[1][1]["messages"]] == ["And now?"]


async def test_a_key_is_asked_for_and_kept_in_the_tab_alone(
    browser: Browser, engine: Storyteller, registry: Registry
) -> None:
    keys = Keys()
    key = keys.add("app", models=("support",))["authorization"].removeprefix("Bearer ")
    async with (
        served(gateway_app(engine, registry, keys.text)) as port,
        open_chat(browser, f"http://127.0.0.1:{port}", refusals=[401, 401]) as chat,
    ):
        field = chat.page.get_by_label("Key", exact=True)
        await expect(field).to_be_focused()
        await field.fill("raysft_app_wrong")
        await field.press("Enter")
        await expect(chat.page.get_by_role("alert")).to_have_text("the API key is unknown")
        await field.fill(key)
        await field.press("Enter")
        await expect(chat.page.get_by_role("dialog")).to_have_count(0)
        await chat.ask("Hello")
        await chat.ended(chat.answer("support@v1"))
        assert await chat.page.get_by_label("Model", exact=True).locator("option").count() == 1
        assert await chat.page.evaluate("Object.values(sessionStorage)") == [key]
        assert await chat.page.evaluate("[localStorage.length, document.cookie]") == [0, ""]


async def test_all_can_be_done_by_keyboard(chat: ChatPage, engine: Storyteller) -> None:
    keyboard, focused = chat.page.keyboard, chat.page.locator(":focus")
    await expect(chat.prompt).to_be_focused()
    await expect(chat.page.get_by_role("button", name="Compare two")).to_be_enabled()
    await keyboard.type("One")
    await keyboard.press("Shift+Enter")
    await keyboard.type("two")
    await keyboard.press("Enter")
    await chat.ended(chat.answer("support@v1"))
    assert engine.asked[0][1]["messages"] == [{"role": "user", "content": "One\ntwo"}]
    await expect(chat.prompt).to_be_focused()
    names = []
    for _ in range(7):
        await keyboard.press("Shift+Tab")
        names.append(await focused.evaluate("it => (it.labels?.[0] ?? it).textContent.trim()"))
        assert await focused.evaluate("it => getComputedStyle(it).outlineStyle") == "solid"
        if names[-1] == "Compare two":
            await keyboard.press("Enter")
    settings = ["Longest answer, in tokens", "Temperature", "System prompt"]
    assert names == [*settings, "New chat", "Compare two", "Compared with", "Model"]


async def test_a_phone_shows_all_of_it_without_scrolling_sideways(
    browser: Browser, url: str, engine: Storyteller
) -> None:
    engine.story = "A" + "h" * 200
    async with open_chat(browser, url, viewport=PHONE, has_touch=True, is_mobile=True) as chat:
        await expect(chat.page.get_by_label("Model", exact=True)).to_have_value("support")
        assert await chat.too_wide() == 0
        await chat.compare("support", "support@v2")
        await chat.ask("O" + "h" * 200)
        first, second = chat.answer("support@v1"), chat.answer("support@v2")
        await chat.ended(first)
        await chat.ended(second)
        above, below = await first.bounding_box(), await second.bounding_box()
        assert above is not None
        assert below is not None
        assert above["x"] == below["x"]
        assert above["y"] + above["height"] < below["y"]
        await expect(chat.prompt).to_be_in_viewport(ratio=1)
        await chat.page.get_by_role("button", name="Settings").click()
        await expect(chat.page.get_by_label("System prompt")).to_be_visible()
        assert await chat.too_wide() == 0


async def test_it_is_dark_where_the_reader_wants_it_dark(chat: ChatPage) -> None:
    shades = []
    schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    for scheme in schemes:
        await chat.page.emulate_media(color_scheme=scheme)
        shades.append(await chat.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert shades == ["rgb(246, 245, 241)", "rgb(20, 23, 26)"]
