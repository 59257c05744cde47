from __future__ import annotations

import math

import pytest

from evals.losses import RowLoss, sum_losses
from evals.statistics import ratio_interval


def losses(model: str, *totals: float) -> list[RowLoss]:
    return [RowLoss("held", model, f"r{number}", total, 2 + number) for number, total in enumerate(totals)]


def test_losses_are_per_trained_token_and_differences_by_row() -> None:
    found = sum_losses([*losses("base", 4.0, 6.0, 8.0), *losses("tuned", 2.0, 7.0, 4.5)])["held"]
    base, tuned = found.models["base"], found.models["tuned"]
    assert (found.rows, found.tokens, base.loss, tuned.loss) == (3, 9, 2.0, 1.5)
    assert base.perplexity == math.exp(2)
    assert (base.difference, base.interval, base.better) == (None, None, None)
    assert (tuned.difference, tuned.better) == (-0.5, 2)
    assert tuned.interval == ratio_interval([-2.0, 1.0, -3.5], [2, 3, 4])


def test_the_first_model_is_what_others_are_compared_with() -> None:
    found = sum_losses([*losses("tuned", 1.0), *losses("base", 2.0)])["held"]
    assert (found.models["tuned"].difference, found.models["base"].difference) == (None, 0.5)


def test_a_ratio_of_rows_that_agree_is_sure_and_else_lies_between_its_rows() -> None:
    assert ratio_interval([1.0, 2.0], [2, 4]) == (0.5, 0.5)
    low, high = ratio_interval([1.0, 8.0, 1.0, 8.0], [2, 4, 2, 4])
    assert (low, high) == (0.5, 2.0)
    assert ratio_interval([1.0] * 50 + [3.0] * 50, [2] * 100) == pytest.approx((0.9, 1.1), abs=0.01)
