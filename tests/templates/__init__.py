"""Chat templates of real model families as test data, and what is known of each.

A template was written here from its published behaviour: it renders what the family's own renders for system, user
and assistant turns, and for function tools where `tools` says so.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LLAMA_3 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
)
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")  # noqa: RUF001
SENTENCEPIECE = ("<s>", "</s>")
TOOL_MARKS = ("<tool_call>", "</tool_call>")
THINK_MARKS = ("<think>", "</think>")


@dataclass(frozen=True, slots=True)
class Family:
    """One family's template and tokens.

    Args:
        name: of the file beside this one.
        turn: what follows the generation prompt for an answer `{}`, up to and with the stop token.
        stop: texts of the tokens at which the family's generation_config stops; the first ends an answer.
        special: texts of the special tokens.
        eos: the tokenizer's EOS token.
        bos: its BOS token, None where it has none.
        pad: its padding token, None where it has none.
        plain: added tokens that are not special, as `<think>` is in Qwen.
        rstrip: special tokens that take the white space after them.
        trims: whether white space around an answer is cut.
        supports_system: whether it takes a system turn.
        append_only: whether a conversation's text begins with the text of its earlier turns.
        thinking: whether `reasoning_content` is written out.
        tools: whether tools, tool calls and their results are written out.
        refusal: part of the message with which the proofs refuse it; empty where it can be masked exactly.
    """

    name: str
    turn: str
    stop: tuple[str, ...]
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    pad: str | None = None
    plain: tuple[str, ...] = ()
    rstrip: tuple[str, ...] = ()
    trims: bool = False
    supports_system: bool = True
    append_only: bool = True
    thinking: bool = False
    tools: bool = False
    refusal: str = ""

    @property
    def template(self) -> str:
        """The Jinja text."""
        return _read(self.name)

    @property
    def provable(self) -> bool:
        """Whether the proofs let it pass."""
        return not self.refusal

    def answer(self, content: str) -> str:
        """What an answer's trained turn reads."""
        return self.turn.replace("{}", content.strip() if self.trims else content)


@functools.cache
def _read(name: str) -> str:
    return (Path(__file__).parent / f"{name}.jinja").read_text(encoding="utf-8")


FAMILIES: tuple[Family, ...] = (
    Family(
        "qwen-2.5",
        "{}<|im_end|>",
        stop=("<|im_end|>", "<|endoftext|>"),
        special=CHATML,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        plain=TOOL_MARKS,
        tools=True,
    ),
    Family(
        "smollm2",
        "{}<|im_end|>",
        stop=("<|im_end|>",),
        special=CHATML,
        eos="<|im_end|>",
        bos="<|im_start|>",
        pad="<|im_end|>",
    ),
    Family("chatml-markers", "{}<|im_end|>", stop=("<|im_end|>",), special=CHATML, eos="<|im_end|>"),
    Family(
        "llama-3",
        "{}<|eot_id|>",
        stop=("<|eot_id|>", "<|end_of_text|>"),
        special=LLAMA_3,
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
        trims=True,
    ),
    Family(
        "llama-3.1",
        "{}<|eot_id|>",
        stop=("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
        special=LLAMA_3,
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
        trims=True,
        tools=True,
    ),
    Family(
        "llama-3.2",
        "{}<|eot_id|>",
        stop=("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
        special=LLAMA_3,
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
        trims=True,
        tools=True,
        refusal="prints the current date",
    ),
    Family(
        "llama-2",
        " {} </s>",
        stop=("</s>",),
        special=SENTENCEPIECE,
        eos="</s>",
        bos="<s>",
        trims=True,
        refusal="BOS token <s> more than once",
    ),
    Family("mistral-v1", " {}</s>", stop=("</s>",), special=SENTENCEPIECE, eos="</s>", bos="<s>"),
    Family(
        "mistral-v3",
        " {}</s>",
        stop=("</s>",),
        special=(
            *SENTENCEPIECE,
            *("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
        eos="</s>",
        bos="<s>",
        trims=True,
        append_only=False,
        tools=True,
        refusal="generation prompt is not how it opens this turn",
    ),
    Family(
        "gemma-2",
        "{}<end_of_turn>",
        stop=("<end_of_turn>", "<eos>"),
        special=("<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"),
        eos="<eos>",
        bos="<bos>",
        pad="<pad>",
        trims=True,
        supports_system=False,
    ),
    Family(
        "qwen-3",
        "<think>\n\n</think>\n\n{}<|im_end|>",
        stop=("<|im_end|>", "<|endoftext|>"),
        special=CHATML,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        plain=TOOL_MARKS + THINK_MARKS,
        append_only=False,
        thinking=True,
        tools=True,
        refusal="rewrites this turn when later turns follow",
    ),
    Family(
        "phi-3",
        "{}<|end|>",
        stop=("<|end|>", "<|assistant|>", "<|endoftext|>"),
        special=("<|endoftext|>", "<|assistant|>", "<|system|>", "<|user|>", "<|end|>"),
        eos="<|endoftext|>",
        bos="<s>",
        pad="<|endoftext|>",
        plain=("<s>",),
        rstrip=("<|assistant|>", "<|system|>", "<|user|>", "<|end|>"),
        append_only=False,
    ),
    Family(
        "phi-4",
        "{}<|im_end|>",
        stop=("<|im_end|>", "<|endoftext|>"),
        special=(*CHATML, "<|im_sep|>"),
        eos="<|im_end|>",
        bos="<|endoftext|>",
    ),
    Family(
        "deepseek-v2",
        " {}" + DEEPSEEK[1],
        stop=DEEPSEEK[1:2],
        special=DEEPSEEK[:2],
        eos=DEEPSEEK[1],
        bos=DEEPSEEK[0],
        pad=DEEPSEEK[1],
    ),
    Family("deepseek-v3", "{}" + DEEPSEEK[1], stop=DEEPSEEK[1:2], special=DEEPSEEK, eos=DEEPSEEK[1], bos=DEEPSEEK[0]),
    Family(
        "deepseek-r1",
        "{}" + DEEPSEEK[1],
        stop=DEEPSEEK[1:2],
        special=DEEPSEEK,
        eos=DEEPSEEK[1],
        bos=DEEPSEEK[0],
        plain=THINK_MARKS,
        append_only=False,
        refusal="generation prompt is not how it opens this turn",
    ),
    Family("zephyr", "{}</s>", stop=("</s>",), special=SENTENCEPIECE, eos="</s>", bos="<s>", pad="</s>"),
    Family("vicuna", " {}</s>", stop=("</s>",), special=SENTENCEPIECE, eos="</s>", bos="<s>", trims=True),
    Family(
        "openchat",
        " {}<|end_of_turn|>",
        stop=("<|end_of_turn|>",),
        special=(*SENTENCEPIECE, "<|end_of_turn|>"),
        eos="<|end_of_turn|>",
        bos="<s>",
    ),
    Family(
        "command-r",
        "{}<|END_OF_TURN_TOKEN|>",
        stop=("<|END_OF_TURN_TOKEN|>",),
        special=(
            *("<BOS_TOKEN>", "<PAD>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
            *("<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        ),
        eos="<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
        pad="<PAD>",
        trims=True,
    ),
    Family(
        "granite-3",
        "{}<|end_of_text|>",
        stop=("<|end_of_text|>",),
        special=("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
        eos="<|end_of_text|>",
        bos="<|end_of_text|>",
        pad="<|end_of_text|>",
    ),
)


LET_PASS = tuple(one for one in FAMILIES if one.provable)


def family(name: str) -> Family:
    """The family of that name."""
    return next(one for one in FAMILIES if one.name == name)
