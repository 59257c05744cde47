"""A teacher that answers as a function of the request, with all that real teachers do wrong."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from evals.suite import fingerprint
from generate.config import GenerateConfig

# fmt: off
WORDS = [
    "river", "lantern", "market", "winter", "engine", "garden", "letter", "bridge", "doctor", "island",
    "window", "teacher", "forest", "kitchen", "planet", "story", "travel", "measure", "explain", "compare",
    "describe", "collect", "repair", "arrange", "invent", "calculate", "translate", "summarise", "improve",
    "discover", "observe", "protect", "silver", "quiet", "ancient", "modern", "gentle", "broken", "hidden",
    "distant", "bright", "careful", "simple", "rapid",
]
# fmt: on
PREFIX = "<|im_start|>user\n"


def reply(body: dict[str, Any], _: int = 0) -> Any:
    """The text of an answer, or a whole response where it was cut off or is no chat."""
    draw = Random(fingerprint({name: value for name, value in body.items() if name != "model"}))
    if "prompt" in body:
        return completion(said(draw, 9), draw.choice(["stop", "stop", "length"]))
    prompt = body["messages"][-1]["content"]
    if prompt.startswith("Below is a list"):
        return tasks(draw)
    if prompt.startswith("A classification task"):
        return draw.choice(["Yes.", "yes", "No.", "**No**", "no, it is open", "Perhaps."])
    if prompt.startswith("Give examples of a task"):
        return instances(draw, "Input", "Output")
    if prompt.startswith("Give examples of a classification"):
        return instances(draw, "Label", "Input")
    if prompt.startswith("Rewrite a task"):
        leaking, same = "The new task: " + said(draw, 9), prompt.rsplit("\n", 1)[-1]
        return draw.choice([*(said(draw, 12) for _ in range(6)), leaking, same])
    if prompt.startswith("Two tasks:"):
        return draw.choice(["Different.", "different", "different", "Equal", "Hm."])
    return draw.choice(
        [said(draw, 20), said(draw, 30), said(draw, 40), "I am sorry, I cannot.", "It is what it is.", ""]
    )


def said(draw: Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words)).capitalize()


def tasks(draw: Random) -> Any:
    items = [said(draw, draw.choice([2, 7, 9, 11])) for _ in range(6)]
    items += ["Draw the " + said(draw, 5).lower(), "What is the difference between weather and climate?"]
    text = "Sure!\n" + "\n".join(f"{number}. {item}" for number, item in enumerate(items, 9))
    return draw.choice([text, text, text, chat(text, "length"), "I have no ideas."])


def instances(draw: Random, first: str, second: str) -> Any:
    pairs = [(said(draw, draw.choice([1, 6])), said(draw, draw.choice([5, 8]))) for _ in range(draw.choice([1, 2, 4]))]
    pairs += draw.choice([[], [], [pairs[0]], [(pairs[0][0], "Another")], [("None", "Something else.")]])
    text = "\n".join(f"{first}: {one}\n{second}: {other}" for one, other in pairs)
    return draw.choice([text, text, chat(text, "length"), "Here you are."])


def chat(text: str, finish: str) -> tuple[int, dict[str, str], str]:
    message = {"role": "assistant", "content": text}
    return 200, {}, json.dumps({"choices": [{"message": message, "finish_reason": finish}]})


def completion(text: str, finish: str) -> tuple[int, dict[str, str], str]:
    usage = {"prompt_tokens": 4, "completion_tokens": 9}
    return 200, {}, json.dumps({"choices": [{"text": text, "finish_reason": finish}], "usage": usage})


def made_config(folder: Path, url: str = "http://127.0.0.1:9/v1", **changes: Any) -> GenerateConfig:
    """A small generation that asks from this process."""
    teacher = {"url": url, "model": "teacher", "workers": 0, **changes.pop("teacher", {})}
    values = {"output": folder, "target": 25, "requests_per_round": 4, "teacher": teacher, **changes}
    return GenerateConfig.model_validate(values)
