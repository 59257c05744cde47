"""Trained character spans -> token ids and labels, exactly, a whole batch at a time.

The text is tokenised once, whole; a token is trained when it lies inside a trained span. Two things are checked for
every span and never assumed: no token crosses its edge, and the ids before it are the ids that a server makes of the
same prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sft.messages import Reason, RowError
from sft.spans import Rendered
from sft.tokens import Encoded, Encoder, Ids, Places, encode

UNTRAINED = -100
"""The label of a token that is not trained (PyTorch's `ignore_index`)."""

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One training example: ids and labels, born together.

    Rule: all have shape (tokens,); `labels[i]` is `input_ids[i]` or -100, unshifted; the first label is -100; at least
    one label is trained. `weights` is each label's weight in the loss; None where all trained labels count the same.
    A pair holds two documents, of which each is as described: the chosen one, and from `second` on the rejected one.
    """

    id: str
    input_ids: Ids
    labels: Ids
    weights: npt.NDArray[np.float32] | None = None
    second: int | None = None

    @property
    def trained_tokens(self) -> int:
        """How many tokens carry a label."""
        return int(np.count_nonzero(self.labels != UNTRAINED))

    @property
    def documents(self) -> tuple[Example, ...]:
        """A pair as its two documents, the chosen one first; any other example as the one that it is."""
        if self.second is None:
            return (self,)
        parts = (slice(None, self.second), slice(self.second, None))
        return tuple(Example(self.id, self.input_ids[part], self.labels[part]) for part in parts)


@dataclass(frozen=True, slots=True, eq=False)
class Masked:
    """A batch's ids and labels, one text after the other.

    Rule: text `i` has the tokens `starts[i]:starts[i + 1]`, none where `errors[i]` says why; labels are unshifted.
    """

    ids: Ids
    labels: Ids
    weights: npt.NDArray[np.float32] | None
    starts: Places
    truncated: Flags
    errors: tuple[RowError | None, ...]


def mask(
    encoder: Encoder,
    rendered: Sequence[Rendered],
    *,
    max_length: int,
    truncate: bool,
    prompt_weight: float = 0.0,
    stop_ids: Sequence[int] = (),
) -> Masked:
    """Makes ids and labels of rendered conversations, or says of each why not.

    Args:
        encoder: the base model's tokenizer.
        rendered: the conversations.
        max_length: longest example, in tokens.
        truncate: cut the end off a longer example rather than refuse it.
        prompt_weight: weight in the loss of tokens that are not trained otherwise.
        stop_ids: ids that end an answer; such a token may swallow white space that follows it, as Phi-3's do.

    Raises:
        DataError: the tokenizers disagree.
    """
    encoded = encoder.encode([item.text for item in rendered])
    errors: list[RowError | None] = [None] * len(rendered)
    trained = _trained(encoder, encoded, rendered, stop_ids, errors)
    lengths = np.diff(encoded.starts)
    within = np.arange(len(encoded.ids)) - np.repeat(encoded.starts[:-1], lengths)
    trained &= within > 0
    long = lengths > max_length
    kept = within < max_length
    counts = np.bincount(np.repeat(np.arange(len(lengths)), lengths)[trained & kept], minlength=len(lengths))
    for i in np.flatnonzero(long) if not truncate else ():
        errors[i] = errors[i] or RowError(
            Reason.TOO_LONG, "messages", f"{lengths[i]} tokens; the limit is {max_length}"
        )
    for i in np.flatnonzero(counts == 0):
        errors[i] = errors[i] or RowError(
            Reason.NO_TRAINED_TOKEN, "messages", "no trained token is left in the first max_length tokens"
        )
    good = np.fromiter((error is None for error in errors), np.bool_, len(errors))
    kept &= np.repeat(good, lengths)
    ids, trained = encoded.ids[kept], trained[kept]
    weights = None
    if prompt_weight:
        weights = np.where(trained, np.float32(1), np.float32(prompt_weight)) * (within[kept] > 0)
        trained = weights > 0
    starts = np.concatenate([[0], np.cumsum(np.minimum(lengths, max_length) * good)])
    return Masked(ids, np.where(trained, ids, np.int32(UNTRAINED)), weights, starts, long & good, tuple(errors))


def _trained(
    encoder: Encoder,
    encoded: Encoded,
    rendered: Sequence[Rendered],
    stop_ids: Sequence[int],
    errors: list[RowError | None],
) -> Flags:
    """Which tokens are trained; writes down the rows whose spans cannot be known exactly."""
    spans = [
        (row, *_place(item.text, span.start, span.end, bool(encoded.in_bytes[row])), span.prompt, span.start)
        for row, item in enumerate(rendered)
        for span in item.spans
    ]
    delta = np.zeros(len(encoded.ids) + 1, np.int64)
    if not spans or not len(encoded.ids):
        return np.zeros(len(encoded.ids), np.bool_)
    row, start, end, prompt, character = (np.array(column) for column in zip(*spans, strict=True))
    # One scale for the whole batch, on which the texts follow each other with room between.
    lengths = np.diff(encoded.starts)
    room = np.array([4 * len(item.text) + 1 for item in rendered])
    base = np.cumsum(room) - room
    begins = encoded.begins + np.repeat(base, lengths)
    ends = encoded.ends + np.repeat(base, lengths)
    start, end = start + base[row], end + base[row]
    first = np.searchsorted(ends, start, "right")
    last = np.searchsorted(begins, end, "left")
    touched = first < last
    crosses = touched & (begins[np.minimum(first, len(begins) - 1)] < start)
    first += crosses & ~prompt
    past = (ends[last - 1] > end) & ~np.isin(encoded.ids[last - 1], np.asarray(stop_ids, np.int32))
    wrong = (crosses & prompt) | (touched & past) | (first >= last)
    for i in np.flatnonzero(wrong):
        errors[row[i]] = RowError(Reason.NOT_MASKABLE, "messages", "a token crosses the edge of a trained turn")
    checked = np.flatnonzero(prompt & ~wrong)
    for i in checked[~_as_served(encoder, encoded, rendered, row[checked], first[checked], character[checked])]:
        errors[row[i]] = errors[row[i]] or RowError(
            Reason.NOT_MASKABLE, "messages", "the ids before a trained turn are not those of the prompt alone"
        )
    np.add.at(delta, first[~wrong], 1)
    np.add.at(delta, last[~wrong], -1)
    return np.cumsum(delta[:-1]) > 0


def _as_served(
    encoder: Encoder, encoded: Encoded, rendered: Sequence[Rendered], row: Places, first: Places, character: Places
) -> Flags:
    """Whether the ids before each span are those of the prompt alone.

    Tokenisation restarts at a hard token, so only what follows the last one before the span must be looked at.
    """
    hard = np.flatnonzero(np.isin(encoded.ids, encoder.hard_ids))
    before = np.searchsorted(hard, first) - 1
    tail = np.where(before >= 0, hard[before] if len(hard) else 0, 0)
    tail = np.maximum(tail, encoded.starts[row])
    answers = np.zeros(len(row), np.bool_)
    texts: dict[str, list[tuple[int, bytes]]] = {}
    for i in range(len(row)):
        text, begin = rendered[row[i]].text, int(encoded.begins[tail[i]])
        if encoded.in_bytes[row[i]] and not text.isascii():
            begin = len(text.encode()[:begin].decode())
        found = encoded.ids[tail[i] : first[i]].tobytes()
        texts.setdefault(text[begin : character[i]], []).append((i, found))
    for alone, group in zip(encode(encoder.tokenizer, list(texts)), texts.values(), strict=True):
        wanted = np.asarray(alone, np.int32).tobytes()
        for i, found in group:
            answers[i] = found == wanted
    return answers


def _place(text: str, start: int, end: int, in_bytes: bool) -> tuple[int, int]:
    """A span in the unit of its text's tokens."""
    if not in_bytes or text.isascii():
        return start, end
    first = len(text[:start].encode())
    return first, first + len(text[start:end].encode())
