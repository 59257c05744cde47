from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sft.batch import MicroBatch, collate
from sft.neftune import noise
from tests.sft.steps import examples

ROWS = examples(3, 4)
WIDTH = 16


def of(batch: MicroBatch, seed: int = 5, alpha: float = 3.0) -> Tensor:
    mask = None if batch.attention_mask is None else torch.from_numpy(batch.attention_mask)
    ids, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids)
    return noise(ids, positions, mask, width=WIDTH, alpha=alpha, seed=seed)


def test_a_document_s_noise_is_the_same_packed_padded_and_alone() -> None:
    packed, padded = of(collate(ROWS, "packed", 1)), of(collate(ROWS, "padded", 1))
    begin = 0
    for number, row in enumerate(ROWS):
        length = len(row.input_ids)
        alone = of(collate([row], "packed", 1))[0]
        assert torch.equal(packed[0, begin : begin + length], alone)
        assert torch.equal(padded[number, :length], alone)
        assert not padded[number, length:].any()
        begin += length


def test_it_is_uniform_within_a_bound_by_the_document_s_length() -> None:
    for row in ROWS:
        drawn, bound = of(collate([row], "packed", 1)), 3.0 / np.sqrt(len(row.input_ids) * WIDTH)
        assert 0.9 * bound < drawn.abs().max() <= bound
        assert drawn.abs().mean() < 0.6 * bound
        assert drawn.std() > 0.5 * bound


def test_it_changes_with_step_and_document_and_leaves_torch_s_generator_alone() -> None:
    before = torch.get_rng_state()
    batch = collate(ROWS[:1], "packed", 1)
    assert torch.equal(of(batch), of(batch))
    assert not torch.equal(of(batch), of(batch, seed=6))
    other = MicroBatch(batch.input_ids + 1, batch.labels, batch.position_ids, None)
    assert not torch.equal(of(batch), of(other))
    assert torch.equal(torch.get_rng_state(), before)
