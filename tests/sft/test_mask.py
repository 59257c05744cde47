from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sft.base import BaseTokenizer, load_tokenizer
from sft.mask import UNTRAINED, Example, mask
from sft.messages import Conversation, Message, Reason, RowError
from sft.tokens import encode
from tests.tiny import small_base

text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=30)
answers = text.filter(lambda t: bool(t.strip()) and "<|im_" not in t)


def one(
    base: BaseTokenizer, *messages: Message, max_length: int = 10_000, truncate: bool = False, weight: float = 0.0
) -> Example | RowError:
    rendered = base.template.examples(Conversation(messages))
    masked = mask(base.encoder, rendered, max_length=max_length, truncate=truncate, prompt_weight=weight)
    return masked.errors[0] or Example("id", masked.ids, masked.labels, masked.weights)


def trained_text(base: BaseTokenizer, example: Example) -> str:
    return str(base.tokenizer.decode(example.input_ids[example.labels != UNTRAINED].tolist()))


def test_ids_and_labels_literally(base: BaseTokenizer) -> None:
    made = one(base, Message("user", "q"), Message("assistant", "ab", trained=True))
    assert isinstance(made, Example)
    prompt = encode(base.tokenizer, ["<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"])[0]
    a, b, newline = (base.tokenizer.convert_tokens_to_ids(t) for t in ("a", "b", "Ċ"))
    assert made.input_ids.tolist() == [*prompt, a, b, 1, newline]
    assert made.labels.tolist() == [UNTRAINED] * len(prompt) + [a, b, 1, UNTRAINED]
    assert {str(made.input_ids.dtype), str(made.labels.dtype)} == {"int32"}
    assert made.trained_tokens == 3


@given(question=text, answer=answers, question2=text, answer2=answers)
def test_only_the_answers_and_their_stop_tokens_are_trained(
    base: BaseTokenizer, question: str, answer: str, question2: str, answer2: str
) -> None:
    turns = (
        Message("user", question),
        Message("assistant", answer, trained=True),
        Message("user", question2),
        Message("assistant", answer2, trained=True),
    )
    made = one(base, *turns)
    assert isinstance(made, Example)
    assert trained_text(base, made) == f"{answer}<|im_end|>{answer2}<|im_end|>"
    changed = one(base, Message("user", "<|im_start|>assistant"), turns[1], turns[2], turns[3])
    assert isinstance(changed, Example)
    assert changed.labels[changed.labels != UNTRAINED].tolist() == made.labels[made.labels != UNTRAINED].tolist()
    first = int(np.argmax(made.labels != UNTRAINED))
    served = base.template.render(turns[:1], generation_prompt=True)
    assert made.input_ids[:first].tolist() == encode(base.tokenizer, [served])[0]


def test_a_merge_across_the_edge_is_refused_never_guessed() -> None:
    merging = small_base(merges=[("Ċ", "a")])
    made = one(merging, Message("user", "q"), Message("assistant", "ab", trained=True))
    assert isinstance(made, RowError)
    assert made.reason is Reason.NOT_MASKABLE
    assert isinstance(one(merging, Message("user", "q"), Message("assistant", "ba", trained=True)), Example)


def test_too_long_is_refused_or_cut_without_a_made_up_end(base: BaseTokenizer) -> None:
    turns = (Message("user", "q"), Message("assistant", "abcdef", trained=True))
    whole = one(base, *turns)
    assert isinstance(whole, Example)
    limit = len(whole.input_ids) - 4  # cuts the newline, the stop token and two letters
    refused = one(base, *turns, max_length=limit)
    assert isinstance(refused, RowError)
    assert (refused.reason, refused.message) == (
        Reason.TOO_LONG,
        f"{len(whole.input_ids)} tokens; the limit is {limit}",
    )
    cut = one(base, *turns, max_length=limit, truncate=True)
    assert isinstance(cut, Example)
    assert cut.input_ids.tolist() == whole.input_ids[:limit].tolist()
    assert cut.labels.tolist() == whole.labels[:limit].tolist()
    assert trained_text(base, cut) == "abcd"


def test_a_prompt_that_fills_the_window_is_refused(base: BaseTokenizer) -> None:
    made = one(
        base, Message("user", "long" * 50), Message("assistant", "a", trained=True), max_length=64, truncate=True
    )
    assert isinstance(made, RowError)
    assert made.reason is Reason.NO_TRAINED_TOKEN


def test_rows_are_masked_alike_alone_and_together(base: BaseTokenizer) -> None:
    rendered = [
        base.template.examples(Conversation((Message("user", "ü" * i), Message("assistant", "a" * i, trained=True))))[0]
        for i in range(1, 6)
    ]
    together = mask(base.encoder, rendered, max_length=100, truncate=False)
    for i, item in enumerate(rendered):
        alone = mask(base.encoder, [item], max_length=100, truncate=False)
        place = slice(together.starts[i], together.starts[i + 1])
        assert alone.ids.tolist() == together.ids[place].tolist()
        assert alone.labels.tolist() == together.labels[place].tolist()


def test_nothing_gives_nothing(base: BaseTokenizer) -> None:
    masked = mask(base.encoder, [], max_length=8, truncate=False)
    assert (masked.ids.tolist(), masked.starts.tolist(), masked.errors) == ([], [0], ())


def test_a_weight_trains_the_prompt_a_little_and_never_the_first_token(base: BaseTokenizer) -> None:
    turns = (Message("user", "q"), Message("assistant", "ab", trained=True))
    plain, weighed = one(base, *turns), one(base, *turns, weight=0.25)
    assert isinstance(plain, Example)
    assert isinstance(weighed, Example)
    assert weighed.weights is not None
    assert weighed.input_ids.tolist() == plain.input_ids.tolist()
    assert weighed.labels.tolist() == [UNTRAINED, *plain.input_ids.tolist()[1:]]
    assert weighed.weights.tolist() == [0.0, *(1.0 if label != UNTRAINED else 0.25 for label in plain.labels[1:])]


def test_the_demo_models_pad_token_is_its_stop_token_and_still_trained(demo_model: Path) -> None:
    real = load_tokenizer(demo_model)
    assert real.pad_id == real.stop_ids[0] == 2
    made = one(real, Message("user", "Hi"), Message("assistant", "Hello.", trained=True))
    assert isinstance(made, Example)
    assert trained_text(real, made) == "Hello.<|im_end|>"
