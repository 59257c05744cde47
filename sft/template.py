"""Conversation -> text and trained character spans, by the base model's own chat template.

The whole conversation is rendered once. A trained span is found by string differences: the prompt that the server
would build for a turn must be a prefix of the whole text, and so must the conversation up to the end of that turn.
Where a template rewrites history this does not hold, and the row or the run is refused: never guessed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from jinja2 import TemplateError as JinjaError
from transformers import PreTrainedTokenizerBase

from sft.errors import TemplateError
from sft.messages import Message, Reason, RowError

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


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text.

    Rule: `spans` are half-open character ranges, ascending and disjoint; each is one trained turn's content and its
    stop token; `text[:start]` is exactly the prompt that a server would build for that turn.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


class ChatTemplate:
    """A tokenizer's chat template under a frozen clock.

    Args:
        tokenizer: the base model's tokenizer; its own template is used.
        stop_tokens: the texts of the tokens at which a server stops.

    Raises:
        TemplateError: the tokenizer has no chat template, or there is no stop token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_tokens: Sequence[str]) -> None:
        if not isinstance(tokenizer.chat_template, str):
            raise TemplateError(
                f"the tokenizer of {tokenizer.name_or_path} has no single chat template; "
                "use an instruct model's tokenizer, or set chat_template in its tokenizer_config.json"
            )
        if not stop_tokens:
            raise TemplateError(
                f"{tokenizer.name_or_path} names no stop token: set eos_token_id in its generation_config.json"
            )
        self.source: str = tokenizer.chat_template
        self.stop_tokens = tuple(stop_tokens)
        self._tokenizer = tokenizer
        self._special = tuple(sorted({*tokenizer.all_special_tokens, *stop_tokens}))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the template's text, as a bundle and a checkpoint carry it."""
        return fingerprint(self.source)

    def render(
        self, messages: Sequence[Message], *, generation_prompt: bool = False, clock: datetime = FROZEN_CLOCK
    ) -> str:
        """Renders messages as text, without tokenising.

        Raises:
            RowError: the template refuses these messages.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                [message.to_dict() for message in messages],
                tokenize=False,
                add_generation_prompt=generation_prompt,
                strftime_now=clock.strftime,
            )
        except JinjaError as error:
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

    def spans(self, messages: Sequence[Message]) -> Rendered:
        """Renders a conversation and finds its trained spans.

        Raises:
            RowError: a trained turn holds a special token, or its span cannot be known exactly.
        """
        text = self.render(messages)
        found = [self._span(messages, i, text) for i, message in enumerate(messages) if message.trained]
        return Rendered(text, tuple(found))

    def prove(self) -> None:
        """Proves on sample conversations that this template can be masked exactly.

        Raises:
            TemplateError: with the proof that failed and what to do.
        """
        bos = self._tokenizer.bos_token
        for messages in _PROOFS:
            try:
                rendered = self.spans(messages)
            except RowError as error:
                if error.reason is Reason.TEMPLATE_ERROR and messages[0].role == "system":
                    continue  # a template may refuse system turns; rows that have one are then quarantined
                raise TemplateError(
                    f"the chat template cannot be masked exactly: {error.message}; use a template that only appends"
                ) from error
            if rendered.text != self.render(messages, clock=OTHER_CLOCK):
                raise TemplateError(
                    "the chat template prints the current date, so training and serving would differ from day to day; "
                    "give the tokenizer a template with a fixed date"
                )
            if bos and rendered.text.count(bos) > 1 and not self._opens_turns(bos, messages):
                raise TemplateError(f"the chat template writes the BOS token {bos} more than once")

    def _opens_turns(self, token: str, messages: Sequence[Message]) -> bool:
        """Whether every turn begins with this token, as in ChatML models that name `<|im_start|>` their BOS."""
        bare = self.render(messages)
        return token in self.render(messages, generation_prompt=True)[len(bare) :]

    def _span(self, messages: Sequence[Message], index: int, text: str) -> tuple[int, int]:
        where = f"messages[{index}]"
        found = next((token for token in self._special if token in messages[index].content), None)
        if found is not None:
            raise RowError(
                Reason.SPECIAL_TOKEN, f"{where}.content", f"the response holds the special token {found} as text"
            )
        prompt = self.render(messages[:index], generation_prompt=True)
        through = text if index == len(messages) - 1 else self.render(messages[: index + 1])
        if not text.startswith(through):
            raise RowError(Reason.NOT_MASKABLE, where, "the template rewrites this turn when later turns follow")
        if not through.startswith(prompt):
            raise RowError(Reason.NOT_MASKABLE, where, "the template's generation prompt is not how it opens this turn")
        turn = through[len(prompt) :]
        stop, token = max((turn.rfind(token), token) for token in self.stop_tokens)
        if stop < 0 or turn[stop + len(token) :].strip():
            raise RowError(Reason.NOT_MASKABLE, where, "the template does not end this turn with a stop token")
        return len(prompt), len(prompt) + stop + len(token)


def fingerprint(template: str) -> str:
    """SHA-256 of a chat template's text, in hex."""
    return hashlib.sha256(template.encode()).hexdigest()
