"""What a stage minimises: the loss of a micro-batch, and what else is told of it.

The training loop and the evaluation ask an objective and know no more of it. It gives sums over a micro-batch; the loop
divides them by the global batch's weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sft import loss
from sft.batch import MicroBatch
from sft.engine import Engine
from sft.mask import UNTRAINED

ACCURACY = "accuracy"


class Objective(Protocol):
    """The loss of a stage, in sums over a micro-batch."""

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of what is told beside the loss."""
        ...

    def __call__(self, engine: Engine, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Runs a micro-batch forward. All workers must call it equally often.

        Returns:
            The loss summed over the micro-batch, a scalar to go back from; and the sums of the figures without their
            graph, shape (figures,).
        """
        ...


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """Supervised tuning: the cross-entropy of every trained token."""

    @property
    def figures(self) -> tuple[str, ...]:
        """Nothing but the loss."""
        return ()

    def __call__(self, engine: Engine, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """The cross-entropy sum."""
        summed = engine.forward(**tensors(micro, engine.device))
        return summed, summed.new_zeros(0)


CROSS_ENTROPY = CrossEntropy()


@dataclass(frozen=True, slots=True)
class Preference:
    """DPO on pairs (arXiv 2305.18290): a chosen answer shall gain on a rejected one, measured against the reference.

    Rule: an answer's reward is `beta` times the log-probability of its trained tokens, their sum and not their mean,
    less that under the reference. `label_smoothing` is the share of pairs that are taken to be labelled wrongly.
    """

    beta: float
    label_smoothing: float = 0.0

    @property
    def figures(self) -> tuple[str, ...]:
        """By how much chosen rewards are above rejected ones, the share of pairs where they are, and both rewards."""
        return ("margin", ACCURACY, "chosen_reward", "rejected_reward")

    def __call__(self, engine: Engine, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """The pairs' losses and figures; an empty micro-batch has none, and runs as well."""
        inputs = tensors(micro, engine.device)
        with engine.reference():
            before = engine.forward(**inputs, by_row=True)
        rewards = self.beta * (before - engine.forward(**inputs, by_row=True))  # a cross-entropy is -log p
        if not (micro.labels != UNTRAINED).any():
            return rewards.sum(), rewards.new_zeros(len(self.figures))
        chosen, rejected = rewards[0::2], rewards[1::2]
        margins = chosen - rejected
        figures = torch.stack([margins.sum(), (margins > 0).sum(), chosen.sum(), rejected.sum()])
        return loss.pair_losses(margins, self.label_smoothing).sum(), figures.detach()


def tensors(micro: MicroBatch, device: torch.device) -> dict[str, Tensor | None]:
    """A micro-batch as the model's arguments."""
    arrays = {
        "input_ids": micro.input_ids,
        "labels": micro.labels,
        "position_ids": micro.position_ids,
        "attention_mask": micro.attention_mask,
        "weights": micro.weights,
    }
    return {name: None if array is None else torch.tensor(array, device=device) for name, array in arrays.items()}
