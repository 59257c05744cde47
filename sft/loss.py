"""The only place that shifts, and the only place that normalises.

The loss of a step is the sum of the cross-entropy over the trained tokens of the global batch, divided by their
number (with prompt weights, both sums are weighted); of pairs it is the sum of their losses divided by their number. So
it does not depend on how the batch is cut into micro-batches, accumulated or spread over workers.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

from sft.mask import UNTRAINED


def targets(labels: Tensor) -> Tensor:
    """Shifts labels: what each position must predict.

    Args:
        labels: unshifted labels, shape (rows, tokens).

    Returns:
        Shape (rows, tokens); position t holds the label of t + 1, the last position -100. The first label of a
        packed document is -100, so no document is asked to predict the next one's first token.
    """
    return functional.pad(labels[:, 1:], (0, 1), value=UNTRAINED)


def target_weights(weights: Tensor) -> Tensor:
    """Shifts the labels' weights as `targets` shifts the labels."""
    return functional.pad(weights[:, 1:], (0, 1), value=0.0)


def trained_positions(wanted: Tensor) -> Tensor:
    """Positions at which logits are needed: where some row of `targets` is trained; at least one, so that a
    micro-batch without trained tokens still runs its backward pass on every worker.

    Returns:
        Ascending indices, shape (positions,).
    """
    positions = (wanted != UNTRAINED).any(dim=0).nonzero().flatten()
    return positions if len(positions) else positions.new_zeros(1)


def cross_entropy_sum(logits: Tensor, wanted: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum of the cross-entropy over trained positions, in float32.

    Args:
        logits: shape (rows, positions, vocabulary).
        wanted: targets of those positions, shape (rows, positions); -100 is left out.
        weights: weights of those targets, shape (rows, positions); None where all are 1.
    """
    flat, targets = logits.flatten(0, 1).float(), wanted.flatten()
    if weights is None:
        return functional.cross_entropy(flat, targets, ignore_index=UNTRAINED, reduction="sum")
    each = functional.cross_entropy(flat, targets, ignore_index=UNTRAINED, reduction="none")
    return (each * weights.flatten()).sum()


def cross_entropies(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of each target, in float32.

    Args:
        logits: shape (tokens, vocabulary).
        wanted: targets, shape (tokens,); none is -100.

    Returns:
        Shape (tokens,).
    """
    return functional.cross_entropy(logits.float(), wanted, reduction="none")


def row_sums(values: Tensor, wanted: Tensor) -> Tensor:
    """Sums what belongs to the trained positions of each row, the same sum every time.

    Args:
        values: of the trained positions, in order, shape (trained,).
        wanted: targets, shape (rows, tokens); -100 where nothing is trained.

    Returns:
        Shape (rows,).
    """
    places = (wanted != UNTRAINED).flatten().nonzero().flatten()
    return values.new_zeros(wanted.numel()).index_copy(0, places, values).view(wanted.shape).sum(dim=1)


def pair_losses(margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The DPO loss of pairs (arXiv 2305.18290, equation 7; smoothed as in its conservative variant).

    Args:
        margins: by how much the chosen answers' rewards are above the rejected ones'; a reward is beta times the
            log-probability of an answer's trained tokens, less that under the reference.
        label_smoothing: share of pairs that are taken to be labelled the wrong way round.
    """
    return -((1 - label_smoothing) * functional.logsigmoid(margins) + label_smoothing * functional.logsigmoid(-margins))


def normaliser(weight: float, workers: int) -> float:
    """Factor on each worker's loss sum, where gradients are averaged over the workers.

    Args:
        weight: of all labels of the whole global batch; their number, where each counts as one; or its pairs' number.
        workers: number of workers whose gradients are averaged.
    """
    return workers / (weight or 1.0)


def finite(loss: float) -> bool:
    """Whether a loss is a usable number."""
    return math.isfinite(loss)
