from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.messages import Conversation, Message
from sft.shape import SymbolicTemplate
from sft.template import ChatTemplate
from tests.tiny import CHATML, byte_tokenizer

LOOP = "{%% for m in messages %%}%s{%% endfor %%}"
ROLES = ("user", "assistant")


def rendered(body: str) -> str | None:
    found = SymbolicTemplate(LOOP % body, {}).render(ROLES, generation_prompt=False)
    return None if found is None else found[0]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("{{ m.content }}", "\ue0000s\ue001\ue0001s\ue001"),
        ("{{ '<' ~ m.role ~ '>' + m['content'] | trim + '\n' }}", "<user>\ue0000S\ue001\n<assistant>\ue0001S\ue001\n"),
        ("{{ m.content.rstrip() }}", "\ue0000r\ue001\ue0001r\ue001"),
        ("{% generation %}{{ m.content }}{% endgeneration %}", "\ue0000s\ue001\ue0001s\ue001"),
        ("{% if m.content is string %}{{ m.content }}{% endif %}", "\ue0000s\ue001\ue0001s\ue001"),
        ("{% if '<t>' in m.content %}!{% endif %}{{ m.content }}", "\ue0000s\ue001\ue0001s\ue001"),
    ],
)
def test_joining_and_stripping_are_seen_through(body: str, text: str) -> None:
    assert rendered(body) == text


@pytest.mark.parametrize(
    "body",
    [
        "{{ m.content | upper }}",
        "{{ m.content | tojson }}",
        "{{ m | tojson }}",
        "{{ m.content | length }}",
        "{{ m.content[1:] }}",
        "{{ m.content.split('a')[0] }}",
        "{{ (m.content + 'x') | trim }}",
        "{{ m.content.strip('x') }}",
        "{{ '%s' % m.content }}",
        "{{ ','.join([m.content]) }}",
        "{{ 'y' if m.content == 'x' }}",
        "{{ 'y' if m.content in 'xyz' }}",
        "{% for c in m.content %}{{ c }}{% endfor %}",
        "{% set x %}{{ m.content }}{% endset %}{{ x | trim }}",
        "{% filter upper %}{{ m.content }}{% endfilter %}",
        "{{ {m.content: 1} }}",
        "{{ 'y' if m.content is in ['x'] }}",
        "{{ raise_exception(m.content) }}",
    ],
)
def test_whoever_looks_at_a_content_is_rendered_row_by_row(body: str) -> None:
    assert rendered(body) is None


TEMPLATES = (
    CHATML,
    CHATML.replace("m['content']", "m['content'] | trim"),
    CHATML.replace("m['content']", "(m['content'] if '<t>' not in m['content'] else m['content'].split('<t>')[-1])"),
    CHATML.replace("m['content']", "('' if not m['content'] else m['content'])"),
    CHATML.replace("m['content']", "(m['content'][1:] if m['content'].startswith('!') else m['content'].lstrip())"),
)
contents = st.sampled_from(["a", " a ", "<t>", "x<t>y", "!x", "\n", "\ue0001s\ue001"]) | st.text(max_size=8)


@settings(derandomize=True)
@given(st.sampled_from(TEMPLATES), st.lists(contents, min_size=2, max_size=4).filter(lambda c: len(c) % 2 == 0))
def test_a_filled_shape_is_the_rendered_conversation(source: str, given: list[str]) -> None:
    template = ChatTemplate(byte_tokenizer(source), ["<|im_end|>"])
    messages = tuple(
        Message(ROLES[i % 2], content, trained=i % 2 == 1)  # type: ignore[arg-type]
        for i, content in enumerate(given)
    )
    (made,) = template.examples(Conversation(messages))
    assert made.text == template.render(messages)
    assert made == template._whole(messages, (), True)
