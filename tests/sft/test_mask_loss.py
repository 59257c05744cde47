"""What masks, padding and packs do to a real model's loss: a tiny random Llama in float32, on prepared rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from sft import loss
from sft.base import BaseTokenizer
from sft.batch import Layout, MicroBatch, collate
from sft.mask import UNTRAINED, Example
from sft.rows import Rules, SourcePlan, examples, prepare
from tests.templates.oracle import ANY_FORMAT, raw_table
from tests.templates.talks import TWO, talk

TALKS = (TWO, talk("Hi", "Hello"), talk("List two.", "- one\n- two 🙂", "More?", "No."))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture
def rows(base: BaseTokenizer) -> list[Example]:
    table = raw_table([{"messages": one} for one in TALKS])
    made = examples(prepare(table, base, {"s": SourcePlan(ANY_FORMAT, "", "")}, Rules(500, truncate=False)))
    assert len(made) == len(TALKS)
    return made


def logits(model: Any, batch: MicroBatch) -> Tensor:
    mask = None if batch.attention_mask is None else torch.from_numpy(batch.attention_mask)
    with torch.no_grad():
        made: Tensor = model(
            input_ids=torch.from_numpy(batch.input_ids),
            position_ids=torch.from_numpy(batch.position_ids),
            attention_mask=mask,
            use_cache=False,
        ).logits
    return made


def token_losses(model: Any, batch: MicroBatch) -> Tensor:
    """Shape (trained tokens,), in the order of the batch."""
    wanted = loss.targets(torch.from_numpy(batch.labels)).flatten()
    every = functional.cross_entropy(logits(model, batch).flatten(0, 1), wanted, reduction="none")
    return every[wanted != UNTRAINED]


def changed(batch: MicroBatch, place: int, token: int) -> MicroBatch:
    """The batch with another id at a place of its first row, and another label where that place is trained."""
    ids, labels = batch.input_ids.copy(), batch.labels.copy()
    ids[0, place] = token
    if labels[0, place] != UNTRAINED:
        labels[0, place] = token
    return MicroBatch(ids, labels, batch.position_ids, batch.attention_mask)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_every_trained_token_has_the_loss_it_has_alone(model: Any, rows: list[Example], layout: Layout) -> None:
    alone = torch.cat([token_losses(model, collate([row], "packed", 1)) for row in rows])
    assert len(alone) == sum(row.trained_tokens for row in rows)
    torch.testing.assert_close(token_losses(model, collate(rows, layout, 1)), alone, rtol=0, atol=1e-5)


def test_only_trained_labels_enter_the_loss(model: Any, rows: list[Example]) -> None:
    batch = collate(rows[:1], "packed", 1)
    before = token_losses(model, batch).sum()
    last = batch.labels.shape[1] - 1
    assert batch.labels[0, last] == UNTRAINED, "the template's newline after the last stop token"
    assert token_losses(model, changed(batch, last, 40)).sum() == before
    trained = np.flatnonzero(batch.labels[0] != UNTRAINED)
    for place in (trained[0], trained[-1]):
        assert token_losses(model, changed(batch, int(place), 40)).sum() != before


def test_a_disturbed_document_leaves_the_others_logits_alone(model: Any, rows: list[Example]) -> None:
    batch = collate(rows, "packed", 1)
    start = len(rows[0].input_ids)
    end = start + len(rows[1].input_ids)
    disturbed = batch
    for place in range(start, end):
        disturbed = changed(disturbed, place, 99)
    before, after = logits(model, batch)[0], logits(model, disturbed)[0]
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[end:], after[end:])
    assert not torch.equal(before[start:end], after[start:end])


def test_a_stop_token_that_is_also_the_padding_is_trained(base: BaseTokenizer, rows: list[Example]) -> None:
    assert base.stop_ids == (base.pad_id,)
    batch = collate(rows, "padded", base.pad_id)
    assert (batch.labels == base.pad_id).sum(axis=1).tolist() == [2, 1, 2]
    lengths = [len(row.input_ids) for row in rows]
    assert all((batch.labels[i, length:] == UNTRAINED).all() for i, length in enumerate(lengths))
    assert all((batch.input_ids[i, length:] == base.pad_id).all() for i, length in enumerate(lengths))
