from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from sft import loss


def test_targets_are_the_labels_one_step_earlier() -> None:
    labels = torch.tensor([[-100, 5, 6, -100, 7]])
    assert loss.targets(labels).tolist() == [[5, 6, -100, 7, -100]]


def test_a_packed_document_never_predicts_the_next_ones_first_token() -> None:
    two = torch.tensor([[-100, 5, -100, 6]])
    assert loss.targets(two).tolist() == [[5, -100, 6, -100]]


def test_positions_are_those_that_any_row_trains() -> None:
    wanted = torch.tensor([[5, -100, -100, 7], [-100, -100, 3, -100]])
    assert loss.trained_positions(wanted).tolist() == [0, 2, 3]
    assert loss.trained_positions(torch.full((2, 3), -100)).tolist() == [0]


def test_sum_over_trained_positions() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 11)
    wanted = torch.tensor([[4, -100, 1], [-100, -100, 9]])
    by_hand = -sum(functional.log_softmax(logits[r, p], -1)[t] for r, p, t in ((0, 0, 4), (0, 2, 1), (1, 2, 9)))
    assert loss.cross_entropy_sum(logits, wanted).item() == pytest.approx(float(by_hand), rel=1e-6)
    assert loss.cross_entropy_sum(logits[:, :1], torch.tensor([[-100], [-100]])).item() == 0.0


def test_a_masked_label_does_not_matter_and_a_trained_one_does() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 7)
    one = loss.cross_entropy_sum(logits, torch.tensor([[2, -100, 3, -100]]))
    assert one == loss.cross_entropy_sum(logits, torch.tensor([[2, -100, 3, -100]]))
    assert one != loss.cross_entropy_sum(logits, torch.tensor([[2, -100, 4, -100]]))


def test_weights_shift_with_their_labels_and_weigh_each_target() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 4, 7), torch.tensor([[-100, 2, 3, 4]])
    wanted = loss.targets(labels)
    weights = loss.target_weights(torch.tensor([[0.0, 0.25, 1.0, 1.0]]))
    assert weights.tolist() == [[0.25, 1.0, 1.0, 0.0]]
    by_hand = -sum(w * functional.log_softmax(logits[0, p], -1)[t] for p, t, w in ((0, 2, 0.25), (1, 3, 1), (2, 4, 1)))
    assert loss.cross_entropy_sum(logits, wanted, weights).item() == pytest.approx(float(by_hand), rel=1e-6)
    ones = torch.ones_like(weights)
    assert loss.cross_entropy_sum(logits, wanted, ones).item() == loss.cross_entropy_sum(logits, wanted).item()


def test_normaliser_undoes_the_mean_over_workers() -> None:
    assert loss.normaliser(10, 1) == 0.1
    assert loss.normaliser(10, 4) == 0.4
    assert loss.normaliser(0, 2) == 2.0


@pytest.mark.parametrize(("value", "good"), [(1.0, True), (float("nan"), False), (float("inf"), False)])
def test_finite(value: float, good: bool) -> None:
    assert loss.finite(value) is good
