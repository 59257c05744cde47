"""Conversation -> text and trained character spans, by a chat template."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import accumulate, pairwise
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from sft.errors import TemplateError
from sft.messages import Conversation, Message, Reason, RowError
from sft.shape import Shape, SymbolicTemplate, before_symbol, segment
from sft.spans import THINK_END, Rendered, Span, around_reasoning, find_spans, shared

History = Literal["refuse", "split"]
FROZEN_CLOCK = datetime(2024, 1, 1, tzinfo=UTC)
OTHER_CLOCK = datetime(2031, 8, 23, 19, 45, tzinfo=UTC)

_PROOFS: tuple[tuple[Message, ...], ...] = (
    (Message("user", "What is the time?"), Message("assistant", "Half past nine.", trained=True)),
    (
        Message("system", "You answer briefly."),
        Message("user", "Name a colour."),
        Message("assistant", "Blue.", trained=True),
        Message("user", "And another?"),
        Message("assistant", "Green, as in grass.", trained=True),
    ),
)


class ChatTemplate:
    """A chat template under a frozen clock.

    Args:
        tokenizer: the base model's tokenizer.
        stop_tokens: the texts of the tokens at which a server stops.
        source: a template to use in place of the tokenizer's own.

    Raises:
        TemplateError: the tokenizer has no chat template, or there is no stop token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_tokens: Sequence[str],
        source: str | None = None,
    ) -> None:
        found = source or tokenizer.chat_template
        if not isinstance(found, str):
            raise TemplateError(
                f"the tokenizer of {tokenizer.name_or_path} has no single chat template; "
                "use an instruct model's tokenizer, or name a template file in model.chat_template"
            )
        if not stop_tokens:
            raise TemplateError(
                f"{tokenizer.name_or_path} names no stop token: set eos_token_id in its generation_config.json"
            )
        self.source: str = found
        self.stop_tokens = tuple(stop_tokens)
        self._tokenizer = tokenizer
        self._thinks = "reasoning_content" in found
        marks = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special = sorted({*tokenizer.all_special_tokens, *marks, *stop_tokens}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)))
        self._symbolic = SymbolicTemplate(
            found, {**tokenizer.special_tokens_map, "strftime_now": FROZEN_CLOCK.strftime}
        )
        self._shapes: dict[tuple[tuple[str, bool], ...], Shape | None] = {}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the template's text, as a bundle and a checkpoint carry it."""
        return fingerprint(self.source)

    @property
    def has_generation_markers(self) -> bool:
        """Whether the template marks generated text; the marks are not needed, and not relied upon."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        generation_prompt: bool = False,
        clock: datetime = FROZEN_CLOCK,
    ) -> str:
        """Renders messages as text, without tokenising.

        Raises:
            RowError: the template refuses these messages.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                [self._turn(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                strftime_now=clock.strftime,
            )
        except Exception as error:
            # A template is a program of its own: what it makes of a row that its author did not think of is the row's
            # fate, not the run's.
            raise RowError(Reason.TEMPLATE_ERROR, "messages", f"the chat template says: {error}") from error
        assert isinstance(text, str)
        return text

    def render_prompt(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        """Renders the prompt that a server builds for OpenAI messages; None where the template refuses them."""
        roles = {"system": "system", "user": "user", "assistant": "assistant"}
        turns = [Message(roles[turn["role"]], turn["content"]) for turn in messages]  # type: ignore[arg-type]
        try:
            return self.render(turns, generation_prompt=True)
        except RowError:
            return None

    def examples(
        self, conversation: Conversation, *, history: History = "refuse", reasoning: bool = True
    ) -> list[Rendered]:
        """Renders a conversation and finds its trained spans.

        Args:
            conversation: what to render.
            history: what to do where the template rewrites earlier turns: refuse, or make a text of each trained turn.
            reasoning: whether the reasoning of trained turns is trained.

        Raises:
            RowError: a trained turn holds a special token, or its span cannot be known exactly.
        """
        messages = conversation.messages
        plain = reasoning and not conversation.tools
        for i, message in enumerate(messages):
            plain = plain and not (
                message.reasoning is not None or message.tool_calls or message.tool_call_id or message.name
            )
            if message.trained:
                self._check_content(i, message)
        if plain:
            quick = self._filled(messages)
            if quick is not None:
                return [quick]
        try:
            return [self._whole(messages, conversation.tools, reasoning)]
        except RowError as error:
            if history == "refuse" or error.reason is not Reason.NOT_MASKABLE:
                raise
        return list(self._split(messages, conversation.tools, reasoning))

    def prove(self, history: History = "refuse") -> list[Rendered]:
        """Proves on sample conversations that this template can be masked exactly.

        Returns:
            The sample conversations' texts.

        Raises:
            TemplateError: with the proof that failed and what to do.
        """
        bos = self._tokenizer.bos_token
        texts: list[Rendered] = []
        for messages in _PROOFS:
            try:
                rendered = self.examples(Conversation(messages), history=history)
            except RowError as error:
                if error.reason is Reason.TEMPLATE_ERROR and messages[0].role == "system":
                    continue  # a template may refuse system turns; rows that have one are then quarantined
                remedy = "use a template that only appends"
                if error.reason is Reason.NOT_MASKABLE and len(messages) > 2:
                    remedy = f"set data.mask.history to split (an example of each turn, as served), or {remedy}"
                raise TemplateError(f"the chat template cannot be masked exactly: {error.message}; {remedy}") from error
            if self.render(messages) != self.render(messages, clock=OTHER_CLOCK):
                raise TemplateError(
                    "the chat template prints the current date, so training and serving would differ from day to day; "
                    "name a template with a fixed date in model.chat_template"
                )
            counts = bos and bos not in self.stop_tokens and not self._opens_turns(bos, messages)
            if counts and rendered[-1].text.count(bos) > 1:
                raise TemplateError(f"the chat template writes the BOS token {bos} more than once")
            texts += rendered
        return texts

    def _turn(self, message: Message) -> dict[str, Any]:
        if message.reasoning is None or self._thinks:
            return message.to_dict()
        content = f"<think>\n{message.reasoning}\n{THINK_END}\n\n{message.content}"
        return replace(message, content=content, reasoning=None).to_dict()

    def _check_content(self, index: int, message: Message) -> None:
        texts: dict[str, str | None] = {"content": message.content}
        if message.reasoning or message.tool_calls:
            texts["reasoning_content"] = message.reasoning
            texts["tool_calls"] = json.dumps([call.arguments for call in message.tool_calls], ensure_ascii=False)
        for field, text in texts.items():
            found = self._special.search(text) if text else None
            if found is not None:
                raise RowError(
                    Reason.SPECIAL_TOKEN,
                    f"messages[{index}].{field}",
                    f"the response holds the special token {found[0]} as text",
                )

    def _opens_turns(self, token: str, messages: Sequence[Message]) -> bool:
        """Whether every turn begins with this token, as in ChatML models that name `<|im_start|>` their BOS."""
        asked = self.render(messages, generation_prompt=True)
        return token in asked[len(shared(asked, self.render(messages))) :]

    def _filled(self, messages: Sequence[Message]) -> Rendered | None:
        """The rendered conversation by its shape; None where the template looks at its contents."""
        key = tuple([(message.role, message.trained) for message in messages])
        if key not in self._shapes:
            self._shapes[key] = self._shape(messages)
        shape = self._shapes[key]
        segments = shape.fill([message.content for message in messages]) if shape else None
        if segments is None:
            return None
        edges = list(accumulate(map(len, segments)))
        trained = [message for message in messages if message.trained]
        return Rendered(
            "".join(segments),
            tuple(
                [Span(edges[2 * i], edges[2 * i + 1], message.role == "assistant") for i, message in enumerate(trained)]
            ),
        )

    def _shape(self, messages: Sequence[Message]) -> Shape | None:
        roles = [message.role for message in messages]
        asked: set[tuple[int, str, str, bool]] = set()

        def render(count: int, generation_prompt: bool) -> str:
            found = self._symbolic.render(roles[:count], generation_prompt=generation_prompt)
            if found is None:
                raise RowError(Reason.NOT_MASKABLE, "messages", "the template looks at contents")
            asked.update(found[1])
            return found[0]

        try:
            text, spans = find_spans(
                messages, self.stop_tokens, render, lambda i: before_symbol(render(i + 1, False), i)
            )
        except RowError:
            return None
        cuts = [0, *(edge for span in spans for edge in (span.start, span.end)), len(text)]
        segments = tuple(segment(text[a:b]) for a, b in pairwise(cuts))
        shape = Shape(segments, tuple(sorted(asked)))
        probe = [f"  {role} {i}\n" for i, role in enumerate(roles)]
        filled = shape.fill(probe)
        real = self.render([replace(m, content=text) for m, text in zip(messages, probe, strict=True)])
        return shape if filled is not None and "".join(filled) == real else None

    def _whole(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], reasoning: bool) -> Rendered:
        text, spans = find_spans(
            messages,
            self.stop_tokens,
            lambda count, prompt: self.render(messages[:count], tools=tools, generation_prompt=prompt),
            lambda turn: self._before_content(messages, tools, turn),
        )
        return Rendered(text, tuple(around_reasoning(text, messages, spans, trained=reasoning)))

    def _before_content(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], turn: int) -> str:
        """The text before a turn's content: what does not depend on it."""
        one, other = (
            self.render([*messages[:turn], replace(messages[turn], content=content)], tools=tools)
            for content in ("\ue000", "\ue001")
        )
        return shared(one, other)

    def _split(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], reasoning: bool
    ) -> Iterator[Rendered]:
        for i, message in enumerate(messages):
            if message.trained:
                earlier = [replace(turn, trained=False) for turn in messages[:i]]
                yield self._whole([*earlier, message], tools, reasoning)._replace(turn=i)


def fingerprint(template: str) -> str:
    """SHA-256 of a chat template's text, in hex."""
    return hashlib.sha256(template.encode()).hexdigest()
