"""Trained character spans -> token ids and labels, exactly.

The text is tokenised once, whole; a token is trained when it lies inside a trained span. Two things are checked for
every span and never assumed: no token crosses its edge, and the ids before it are the ids that a server makes of the
same prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from sft.messages import Reason, RowError
from sft.template import Rendered

UNTRAINED = -100
"""The label of a token that is not trained (PyTorch's `ignore_index`)."""

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One training example: ids and labels, born together.

    Rule: both have shape (tokens,); `labels[i]` is `input_ids[i]` or -100, unshifted; the first label is -100; at
    least one label is trained.
    """

    id: str
    input_ids: Ids
    labels: Ids

    @property
    def trained_tokens(self) -> int:
        """How many tokens carry a label."""
        return int(np.count_nonzero(self.labels != UNTRAINED))


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Tokenises rendered texts as the server does: special tokens are in the text, none are added."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return ids


def mask(
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[tuple[str, Rendered]],
    *,
    max_length: int,
    truncate: bool,
) -> list[Example | RowError]:
    """Makes an example of each rendered conversation, or says why not; the answer is in the order of the rows.

    Args:
        tokenizer: the base model's tokenizer.
        rows: row id and rendered conversation.
        max_length: longest example, in tokens.
        truncate: cut the end off a longer example rather than refuse it.
    """
    if not rows:
        return []
    whole = tokenizer(
        [rendered.text for _, rendered in rows],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
    )
    prompts = encode(tokenizer, [rendered.text[:start] for _, rendered in rows for start, _ in rendered.spans])
    made: list[Example | RowError] = []
    taken = 0
    for (row_id, rendered), ids, offsets in zip(rows, whole["input_ids"], whole["offset_mapping"], strict=True):
        own = prompts[taken : taken + len(rendered.spans)]
        taken += len(rendered.spans)
        try:
            labels = _labels(np.asarray(ids, np.int32), np.asarray(offsets, np.int64).reshape(-1, 2), rendered, own)
            made.append(_fit(row_id, np.asarray(ids, np.int32), labels, max_length, truncate))
        except RowError as error:
            made.append(error)
    return made


def _labels(
    ids: Ids, offsets: npt.NDArray[np.int64], rendered: Rendered, prompts: Sequence[Sequence[int]]
) -> npt.NDArray[np.int32]:
    labels = np.full(len(ids), UNTRAINED, np.int32)
    begins, ends = offsets[:, 0], offsets[:, 1]
    for (start, end), prompt in zip(rendered.spans, prompts, strict=True):
        inside = (begins >= start) & (ends <= end) & (ends > begins)
        touching = (begins < end) & (ends > start)
        if not np.array_equal(inside, touching):
            raise RowError(Reason.NOT_MASKABLE, "messages", "a token crosses the edge of a trained turn")
        first = int(np.argmax(inside)) if inside.any() else len(ids)
        if not np.array_equal(ids[:first], np.asarray(prompt, np.int32)):
            raise RowError(
                Reason.NOT_MASKABLE, "messages", "the ids before a trained turn are not those of the prompt alone"
            )
        labels[inside] = ids[inside]
    return labels


def _fit(row_id: str, ids: Ids, labels: Ids, max_length: int, truncate: bool) -> Example:
    if len(ids) > max_length:
        if not truncate:
            raise RowError(Reason.TOO_LONG, "messages", f"{len(ids)} tokens; the limit is {max_length}")
        ids, labels = ids[:max_length], labels[:max_length]
    if not np.any(labels[1:] != UNTRAINED):
        raise RowError(Reason.NO_TRAINED_TOKEN, "messages", "no trained token is left in the first max_length tokens")
    assert labels[0] == UNTRAINED, "the first token of an example is never trained"
    return Example(row_id, ids, labels)
