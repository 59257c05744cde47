"""Chats with any OpenAI-compatible endpoint from a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict, Field

from jobs.cli import configure, parser, run
from jobs.endpoint import answered, message_of, parsed
from serve.errors import NotReadyError, UnknownModelError
from sft.errors import RaysftError

COMMANDS = "/model NAME  /models  /reset  /quit"


class ChatConfig(BaseModel):
    """A chat."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field("http://127.0.0.1:8000/v1", description="The endpoint's address, up to and with /v1.")
    model: str | None = Field(None, description="Model to talk to; by default the endpoint's first.")
    system: str | None = Field(None, description="System prompt.")
    temperature: float = Field(0.0, ge=0, description="Sampling temperature; 0 always takes the likeliest token.")
    max_tokens: int | None = Field(None, gt=0, description="Longest answer, in tokens.")
    api_key_env: str = Field("OPENAI_API_KEY", description="Environment variable that holds the API key, if any.")
    timeout_s: float = Field(120.0, gt=0, description="How long to wait for the next piece of an answer.")


class Chat:
    """A conversation with one endpoint."""

    def __init__(self, config: ChatConfig, client: httpx.Client) -> None:
        self._config, self._client = config, client
        self.model = config.model or self.models()[0]
        self.reset()

    def reset(self) -> None:
        """Forgets the conversation, not the system prompt."""
        system = self._config.system
        self._messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []

    def models(self) -> list[str]:
        """The ids of the endpoint's models.

        Raises:
            RaysftError: the endpoint cannot be reached, or has none.
        """
        with answered(self._client, "GET", self._config.url, "models") as response:
            response.read()
            data = parsed(response.text).get("data")
        if not isinstance(data, list) or not data:
            raise NotReadyError(f"{self._config.url} lists no models")
        return [str(card["id"]) for card in data]

    def ask(self, question: str) -> Iterator[str]:
        """Yields the answer's pieces; a failed question leaves the conversation as it was.

        Raises:
            RaysftError: the endpoint cannot be reached, refuses, or breaks off.
        """
        messages = [*self._messages, {"role": "user", "content": question}]
        body: dict[str, Any] = {"model": self.model, "messages": messages, "stream": True}
        body["temperature"] = self._config.temperature
        if self._config.max_tokens is not None:
            body["max_tokens"] = self._config.max_tokens
        pieces: list[str] = []
        whole = False
        with answered(self._client, "POST", self._config.url, "chat/completions", body) as response:
            for line in response.iter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    whole = True
                    break
                event = parsed(data)
                if "error" in event:
                    raise NotReadyError(f"the answer broke off: {message_of(event)}")
                for choice in event.get("choices", []):
                    piece = choice.get("delta", {}).get("content") or ""
                    pieces.append(piece)
                    yield piece
        if not whole:
            raise NotReadyError("the answer broke off: the connection ended early")
        self._messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]


def main(argv: Sequence[str] | None = None) -> int:
    """The job."""
    made = parser("chat", f"Chat with an OpenAI-compatible endpoint. In the chat: {COMMANDS}")
    made.add_argument("--once", metavar="QUESTION", help="ask one question, print the answer and leave")
    arguments, config = configure(made, ChatConfig, argv)
    key = os.environ.get(config.api_key_env)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(headers=headers, timeout=config.timeout_s) as client:
        chat = Chat(config, client)
        if arguments.once is not None:
            _print(chat.ask(arguments.once))
        else:
            _converse(chat)
    return 0


def _converse(chat: Chat) -> None:
    print(f"talking to {chat.model}    {COMMANDS}")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        try:
            if line == "/quit":
                return
            if line:
                _obey(chat, line)
        except RaysftError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)


def _obey(chat: Chat, line: str) -> None:
    command, _, rest = line.partition(" ")
    if command == "/reset":
        chat.reset()
        print("the conversation starts anew")
    elif command == "/models":
        print("\n".join(chat.models()))
    elif command == "/model" and rest:
        if rest not in chat.models():
            raise UnknownModelError(f"the endpoint has no model {rest}; /models lists what it has")
        chat.model = rest
        print(f"talking to {rest}; the conversation goes on, /reset starts anew")
    elif line.startswith("/"):
        print(f"commands: {COMMANDS}")
    else:
        _print(chat.ask(line))


def _print(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


if __name__ == "__main__":
    run(main)
