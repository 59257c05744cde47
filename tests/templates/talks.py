"""Conversations to try templates with: plain ones, and odd ones for hypothesis."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from tests.templates import Family
from tests.templates.oracle import Talk


def talk(*contents: str, system: str | None = None) -> Talk:
    """A conversation of user and assistant in turn."""
    opening = [] if system is None else [{"role": "system", "content": system}]
    return opening + [
        {"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(contents)
    ]


TWO = talk("Name a colour.", "Blue.", "And another?", "Green, as in grass.")
PLAIN: tuple[Talk, ...] = (
    talk("What is 12 + 30?", "It is 42."),
    TWO,
    talk("Hi", "Hello", "Bye", "See you", "Now?", "Now.", "Sure?", "Quite sure: 1234567."),
    talk("List two things.", "Here:\n\n- one\n- two", "In Japanese?", "一つ、二つ 🙂"),
    talk("  Mind the gaps \n", "Fine.\n\n\n    def f(): return 3.14"),
)
"""Conversations that every template and every ordinary tokenizer can mask exactly."""

_ATOMS = (
    *("Blue", "and", "a", "I", "don't", "1234567", "3.14", "-", ":", ".", "...", "]", ">", "Zürich", "日本語", "ﬁ"),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2003", "\u200b", "\u2028", "\ufeff", "\x00", "\x1c"),
    *("🙂", "👩‍👩‍👧", "e\u0301", "\u0301", "\u202e", "Å", "▁", "Ġ", "<0x41>", "ß", "\U0001d518", "क्षि"),
    *("[INST]x", "USER: ", "ASSISTANT: ", "### Response:\n", "<|nothing|>", "assistant\n", "{{ messages }}", "Human:"),
)


def texts(atoms: Sequence[str]) -> st.SearchStrategy[str]:
    """Texts that are not blank, of these atoms and of any letters."""
    letters = st.text(st.characters(codec="utf-8"), max_size=3)
    return (
        st.lists(st.sampled_from(atoms) | letters, min_size=1, max_size=6)
        .map("".join)
        .filter(lambda text: bool(text.strip()))
    )


def marks(family: Family) -> list[str]:
    """A family's own marks, and the opening of an answer."""
    return [*family.special, *family.stop, *family.plain, family.stop[0] + "\n<|im_start|>assistant\n"]


@st.composite
def odd_talks(draw: st.DrawFn, family: Family) -> tuple[Talk, Talk]:
    """A conversation of one to four exchanges, and the same one with other user and system texts."""
    reserved = {*family.special, *family.stop, family.bos, family.eos, family.pad} - {None}
    prompts = texts([*_ATOMS, *marks(family)])
    responses = texts(_ATOMS).filter(lambda text: not any(mark in text for mark in reserved if mark))
    system = family.supports_system and draw(st.booleans())
    roles = ["system"] * system + ["user", "assistant"] * draw(st.integers(1, 4))
    one: Talk = []
    other: Talk = []
    for role in roles:
        content = draw(responses if role == "assistant" else prompts)
        one.append({"role": role, "content": content})
        other.append({"role": role, "content": content if role == "assistant" else draw(prompts)})
    return one, other
