"""Each family's template literally: what it renders, what is trained of it, and which are refused and why."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from sft.errors import TemplateError
from tests.templates import DEEPSEEK, FAMILIES, LET_PASS, Family
from tests.templates.oracle import prepare_talks, render
from tests.templates.talks import TWO, talk
from tests.templates.tokenizers import make_base, text_of

BEGIN, END, USER, ASSISTANT = DEEPSEEK
BRIEF = talk(" Hi ", " Ho ", system=" Be brief. ")
CLOCKS = (datetime(2024, 1, 1), datetime(2031, 8, 23, 19, 45))

# The conversation TWO.
EXCHANGES: dict[str, str] = {
    "qwen-2.5": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\nBlue.<|im_end|>\n"
        "<|im_start|>user\nAnd another?<|im_end|>\n"
        "<|im_start|>assistant\nGreen, as in grass.<|im_end|>\n"
    ),
    "smollm2": (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\nBlue.<|im_end|>\n"
        "<|im_start|>user\nAnd another?<|im_end|>\n"
        "<|im_start|>assistant\nGreen, as in grass.<|im_end|>\n"
    ),
    "chatml-markers": (
        "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\nBlue.<|im_end|>\n"
        "<|im_start|>user\nAnd another?<|im_end|>\n"
        "<|im_start|>assistant\nGreen, as in grass.<|im_end|>\n"
    ),
    "llama-3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nName a colour.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nBlue.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd another?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nGreen, as in grass.<|eot_id|>"
    ),
    "llama-3.1": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nName a colour.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nBlue.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd another?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nGreen, as in grass.<|eot_id|>"
    ),
    "llama-3.2": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 01 Jan 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nName a colour.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nBlue.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd another?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nGreen, as in grass.<|eot_id|>"
    ),
    "llama-2": ("<s>[INST] Name a colour. [/INST] Blue. </s><s>[INST] And another? [/INST] Green, as in grass. </s>"),
    "mistral-v1": ("<s> [INST] Name a colour. [/INST] Blue.</s> [INST] And another? [/INST] Green, as in grass.</s>"),
    "mistral-v3": "<s>[INST] Name a colour.[/INST] Blue.</s>[INST] And another?[/INST] Green, as in grass.</s>",
    "gemma-2": (
        "<bos><start_of_turn>user\nName a colour.<end_of_turn>\n"
        "<start_of_turn>model\nBlue.<end_of_turn>\n<start_of_turn>user\nAnd another?<end_of_turn>\n"
        "<start_of_turn>model\nGreen, as in grass.<end_of_turn>\n"
    ),
    "qwen-3": (
        "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\nBlue.<|im_end|>\n"
        "<|im_start|>user\nAnd another?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nGreen, as in grass.<|im_end|>\n"
    ),
    "phi-3": (
        "<|user|>\nName a colour.<|end|>\n<|assistant|>\nBlue.<|end|>\n<|user|>\nAnd another?<|end|>\n"
        "<|assistant|>\nGreen, as in grass.<|end|>\n<|endoftext|>"
    ),
    "phi-4": (
        "<|im_start|>user<|im_sep|>Name a colour.<|im_end|>"
        "<|im_start|>assistant<|im_sep|>Blue.<|im_end|><|im_start|>user<|im_sep|>And another?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>Green, as in grass.<|im_end|>"
    ),
    "deepseek-v2": (
        f"{BEGIN}User: Name a colour.\n\nAssistant: Blue.{END}User: And another?\n\nAssistant: Green, as in grass.{END}"
    ),
    "deepseek-v3": (
        f"{BEGIN}{USER}Name a colour.{ASSISTANT}Blue.{END}{USER}And another?{ASSISTANT}Green, as in grass.{END}"
    ),
    "deepseek-r1": (
        f"{BEGIN}{USER}Name a colour.{ASSISTANT}Blue.{END}{USER}And another?{ASSISTANT}Green, as in grass.{END}"
    ),
    "zephyr": (
        "<|user|>\nName a colour.</s>\n<|assistant|>\nBlue.</s>\n<|user|>\nAnd another?</s>\n"
        "<|assistant|>\nGreen, as in grass.</s>\n"
    ),
    "vicuna": (
        "<s>A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: Name a colour. ASSISTANT: Blue.</s>"
        "USER: And another? ASSISTANT: Green, as in grass.</s>"
    ),
    "openchat": (
        "<s>GPT4 Correct User: Name a colour.<|end_of_turn|>"
        "GPT4 Correct Assistant: Blue.<|end_of_turn|>GPT4 Correct User: And another?<|end_of_turn|>"
        "GPT4 Correct Assistant: Green, as in grass.<|end_of_turn|>"
    ),
    "command-r": (
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Name a colour.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Blue.<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>And another?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Green, as in grass.<|END_OF_TURN_TOKEN|>"
    ),
    "granite-3": (
        "<|start_of_role|>user<|end_of_role|>Name a colour.<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>Blue.<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>And another?<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>Green, as in grass.<|end_of_text|>\n"
    ),
}

# The conversation BRIEF.
WITH_SYSTEM: dict[str, str] = {
    "qwen-2.5": (
        "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n"
        "<|im_start|>assistant\n Ho <|im_end|>\n"
    ),
    "smollm2": (
        "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n"
        "<|im_start|>assistant\n Ho <|im_end|>\n"
    ),
    "chatml-markers": (
        "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n"
        "<|im_start|>assistant\n Ho <|im_end|>\n"
    ),
    "llama-3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHo<|eot_id|>"
    ),
    "llama-3.1": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHo<|eot_id|>"
    ),
    "llama-3.2": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 01 Jan 2024\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHo<|eot_id|>"
    ),
    "llama-2": "<s>[INST] <<SYS>>\n Be brief. \n<</SYS>>\n\n Hi [/INST] Ho </s>",
    "mistral-v1": "<s> [INST]  Be brief. \n\n Hi  [/INST]  Ho </s>",
    "mistral-v3": "<s>[INST]  Hi [/INST] Ho</s>",
    "qwen-3": (
        "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n Ho <|im_end|>\n"
    ),
    "phi-3": ("<|system|>\n Be brief. <|end|>\n<|user|>\n Hi <|end|>\n<|assistant|>\n Ho <|end|>\n<|endoftext|>"),
    "phi-4": (
        "<|im_start|>system<|im_sep|> Be brief. <|im_end|><|im_start|>user<|im_sep|> Hi <|im_end|>"
        "<|im_start|>assistant<|im_sep|> Ho <|im_end|>"
    ),
    "deepseek-v2": f"{BEGIN} Be brief. \n\nUser:  Hi \n\nAssistant:  Ho {END}",
    "deepseek-v3": f"{BEGIN} Be brief. {USER} Hi {ASSISTANT} Ho {END}",
    "deepseek-r1": f"{BEGIN} Be brief. {USER} Hi {ASSISTANT} Ho {END}",
    "zephyr": "<|system|>\n Be brief. </s>\n<|user|>\n Hi </s>\n<|assistant|>\n Ho </s>\n",
    "vicuna": "<s>Be brief. USER: Hi ASSISTANT: Ho</s>",
    "openchat": (
        "<s>GPT4 Correct System:  Be brief. <|end_of_turn|>GPT4 Correct User:  Hi <|end_of_turn|>"
        "GPT4 Correct Assistant:  Ho <|end_of_turn|>"
    ),
    "command-r": (
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|> Be brief. <|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Ho<|END_OF_TURN_TOKEN|>"
    ),
    "granite-3": (
        "<|start_of_role|>system<|end_of_role|> Be brief. <|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|> Hi <|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|> Ho <|end_of_text|>\n"
    ),
}

# What follows a user's last word where an answer is asked for.
OPENING: dict[str, str] = {
    "qwen-2.5": "<|im_end|>\n<|im_start|>assistant\n",
    "smollm2": "<|im_end|>\n<|im_start|>assistant\n",
    "chatml-markers": "<|im_end|>\n<|im_start|>assistant\n",
    "llama-3": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama-3.1": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama-3.2": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama-2": " [/INST]",
    "mistral-v1": " [/INST]",
    "mistral-v3": "[/INST]",
    "gemma-2": "<end_of_turn>\n<start_of_turn>model\n",
    "qwen-3": "<|im_end|>\n<|im_start|>assistant\n",
    "phi-3": "<|end|>\n<|assistant|>\n",
    "phi-4": "<|im_end|><|im_start|>assistant<|im_sep|>",
    "deepseek-v2": "\n\nAssistant:",
    "deepseek-v3": f"{ASSISTANT}",
    "deepseek-r1": f"{ASSISTANT}<think>\n",
    "zephyr": "</s>\n<|assistant|>\n",
    "vicuna": " ASSISTANT:",
    "openchat": "<|end_of_turn|>GPT4 Correct Assistant:",
    "command-r": "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "granite-3": "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
}

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.name)


def test_every_template_has_its_family() -> None:
    files = (Path(__file__).parents[1] / "templates").glob("*.jinja")
    assert sorted(one.name for one in FAMILIES) == sorted(path.stem for path in files)


@every_family
def test_two_exchanges_read_as_published(family: Family) -> None:
    base = make_base(family, "gpt2")
    now = CLOCKS[0].strftime
    assert render(base, TWO, prompt=False, strftime_now=now) == EXCHANGES[family.name]
    asked = render(base, TWO[:3], prompt=True, strftime_now=now)
    assert asked[asked.rindex("And another?") :] == f"And another?{OPENING[family.name]}"


@every_family
def test_a_system_turn_reads_as_published_or_is_refused(family: Family) -> None:
    base = make_base(family, "gpt2")
    if family.supports_system:
        now = CLOCKS[0].strftime
        assert render(base, BRIEF, prompt=False, strftime_now=now) == WITH_SYSTEM[family.name]
    else:
        (row,) = prepare_talks(base, [BRIEF])
        assert row.reason == "template_error"


@every_family
def test_templates_that_rewrite_history_are_known(family: Family) -> None:
    base = make_base(family, "gpt2")
    talks = [TWO, [{"role": "system", "content": "Be brief."}, *TWO]][: 1 + family.supports_system]
    now = CLOCKS[0].strftime
    kept = [
        render(base, one, prompt=False, strftime_now=now).startswith(
            render(base, one[:end], prompt=one[end - 1]["role"] == "user", strftime_now=now)
        )
        for one in talks
        for end in range(1, len(one))
        if one[end - 1]["role"] != "system"
    ]
    assert all(kept) == family.append_only


@every_family
def test_only_refused_templates_tell_the_time(family: Family) -> None:
    base = make_base(family, "gpt2")
    texts = {render(base, TWO, prompt=False, strftime_now=clock.strftime) for clock in CLOCKS}
    assert (len(texts) == 2) == ("date" in family.refusal)


@pytest.mark.parametrize("family", LET_PASS, ids=lambda one: one.name)
def test_what_can_be_masked_exactly_passes_the_proofs(family: Family) -> None:
    for kind in ("gpt2", "prepend"):
        make_base(family, kind).template.prove()


@pytest.mark.parametrize(
    "family", [one for one in FAMILIES if not one.provable], ids=lambda one: f"{one.name}: {one.refusal}"
)
def test_what_cannot_is_refused_with_a_reason(family: Family) -> None:
    with pytest.raises(TemplateError, match=family.refusal):
        make_base(family, "gpt2").template.prove()


@pytest.mark.parametrize("family", LET_PASS, ids=lambda one: one.name)
def test_the_trained_text_is_the_answers_and_their_stop_tokens(family: Family) -> None:
    base = make_base(family, "gpt2")
    (row,) = prepare_talks(base, [TWO])
    trained = [text_of(base, "gpt2", row.ids[start:end]) for start, end in row.runs]
    assert trained == [family.answer("Blue."), family.answer("Green, as in grass.")]
    if not family.rstrip:  # such marks swallow the white space that follows them
        assert EXCHANGES[family.name].startswith(text_of(base, "gpt2", row.ids))
