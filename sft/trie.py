"""Documents that are computed together, without what they have in common and without what no label needs.

A token's hidden state depends on the tokens before it in its document alone. So where documents begin alike (a
system prompt, an instruction), their common beginning is computed once, and every document goes on from there; and
what follows the last position that predicts a trained token is not computed at all. The loss and its gradients are
the same, up to the order of summation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sft.mask import UNTRAINED


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """What a document adds to the ones before it.

    Rule: `first` to `last` (exclusive) are its own tokens among those computed; `path` are all the document's tokens
    among those, shape (document tokens,), its own ones last. `mask`, shape (own tokens, document tokens), says which
    tokens each of its own sees; None where all of the path is its own, and plain causal attention does.
    """

    first: int
    last: int
    path: Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Trie:
    """What is computed of some documents.

    Rule: `tokens` are indices into the flattened ids, shape (computed,), in order; `branches` cover them one after
    the other. No token that predicts a trained one is left out or shared, so targets and weights are picked likewise.
    """

    tokens: Tensor
    branches: tuple[Branch, ...]


def make_trie(ids: Tensor, wanted: Tensor, starts: Sequence[int], ends: Sequence[int]) -> Trie:
    """Finds what must be computed.

    Args:
        ids: token ids, flattened.
        wanted: what each of them must predict, flattened; -100 where nothing.
        starts: first index of each document; at least one.
        ends: index after the last of each document.

    Returns:
        The trie; of documents without a trained token only the first is in it, and only if there is no other.
    """
    values, trained = ids.tolist(), (wanted != UNTRAINED).tolist()
    known: dict[tuple[int, int], int] = {}
    tokens: list[int] = []
    branches: list[Branch] = []
    cut = [_needed(trained, start, end) for start, end in zip(starts, ends, strict=True)]
    if not any(cut):
        cut[0] = ends[0] - starts[0]
    for start, length in zip(starts, cut, strict=True):
        path: list[int] = []
        node, first = -1, len(tokens)
        for index in range(start, start + length):
            step = (node, values[index])
            found = None if trained[index] else known.get(step)
            if found is None:
                found = len(tokens)
                tokens.append(index)
                if not trained[index]:
                    known[step] = found
            node = found
            path.append(node)
        own = len(tokens) - first
        if own:
            seen = torch.ones(own, length, dtype=torch.bool).tril(length - own) if own < length else None
            branches.append(Branch(first, len(tokens), torch.tensor(path), seen))
    return Trie(torch.tensor(tokens), tuple(branches))


def _needed(trained: list[bool], start: int, end: int) -> int:
    """How many tokens of a document there are up to the last one that predicts a trained one."""
    return next((index + 1 - start for index in range(end - 1, start - 1, -1) if trained[index]), 0)
