from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.lora.layers.utils import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from serve.cpu_worker import CpuWorker, groups, multiply

FIRST, LAST = 7, 9
"""Adapters in the first and the last of three slots."""
IN, OUT, RANK, VOCABULARY = 6, 4, 2, 11
MENDED = (
    "update_metadata",
    "add_lora_linear",
    "add_lora_logits",
    "_shrink_prefill",
    "_expand_slice_prefill",
    "_expand_prefill",
)


@pytest.fixture
def mend(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MENDED:
        monkeypatch.setattr(PunicaWrapperCPU, name, getattr(PunicaWrapperCPU, name))
    CpuWorker().group_by_slot()


def wrapped(*adapters: int) -> Any:
    """vLLM's wrapper in a batch with a token for each of these; 0 is the base model."""
    wrapper: Any = PunicaWrapperCPU(8, 8, "cpu")
    wrapper.update_metadata(LoRAMapping(adapters, adapters, is_prefill=True), [FIRST, None, LAST], 4, 100)
    return wrapper


def change(*adapters: int) -> list[float]:
    """What the adapters of a batch's tokens add to them."""
    down = torch.tensor([1.0, 0.0, 10.0]).reshape(3, 1, 1, 1).expand(3, 1, 2, 4).contiguous()
    added = torch.zeros(len(adapters), 4)
    up = torch.ones(3, 1, 4, 2)
    wrapped(*adapters).add_lora_linear(added, torch.ones(len(adapters), 4), (down,), (up,), 1.0, (4,))
    return added[:, 0].tolist()


def test_vllm_gives_the_base_model_the_last_slot() -> None:
    # Should this fail, vLLM has mended it: look whether it copies the weights for every token still.
    assert change(0, FIRST, 0, LAST) == [80.0, 8.0, 80.0, 80.0]


@pytest.mark.usefixtures("mend")
def test_the_base_model_is_kept_apart_from_the_last_slot() -> None:
    assert change(0, FIRST, 0, LAST) == [0.0, 8.0, 0.0, 80.0]
    assert change(0, 0) == [0.0, 0.0]
    assert change(LAST) == [80.0]


def all_products(*adapters: int) -> list[torch.Tensor]:
    """What a batch's layers add: one of two slices, the logits, and an embedding."""
    torch.manual_seed(0)
    rows = len(adapters)
    wrapper = wrapped(*adapters)
    x = torch.randn(rows, IN)
    down, up = ([torch.randn(3, 1, *shape) for _ in range(2)] for shape in ((RANK, IN), (OUT, RANK)))
    linear, logits, embedding = torch.randn(rows, 2 * OUT), torch.randn(rows, VOCABULARY), torch.randn(rows, OUT)
    wrapper.add_lora_linear(linear, x, tuple(down), tuple(up), 0.5, (OUT, OUT))
    # Weights of the logits are padded to more than the vocabulary.
    wrapper.add_lora_logits(logits, x, down[0], torch.randn(3, 1, VOCABULARY + 3, RANK), 0.5)
    wrapper.add_lora_embedding(embedding, x[:, :RANK], up[0])
    return [linear, logits, embedding]


@pytest.mark.parametrize("adapters", [(FIRST,), (LAST, LAST, LAST), (FIRST, LAST, LAST, FIRST), (LAST, FIRST)])
def test_adapters_add_what_vllm_makes_them_add(adapters: tuple[int, ...], request: pytest.FixtureRequest) -> None:
    expected = all_products(*adapters)
    request.getfixturevalue("mend")
    torch.testing.assert_close(all_products(*adapters), expected)


@pytest.mark.usefixtures("mend")
def test_rows_without_an_adapter_stay_as_they_are_in_every_kind_of_layer() -> None:
    batch, alone = all_products(0, FIRST, 0), all_products(0, 0, 0)
    for mixed, base in zip(batch, alone, strict=True):
        assert torch.equal(mixed[[0, 2]], base[[0, 2]])
        assert not torch.equal(mixed[1], base[1])


def test_rows_by_slot() -> None:
    assert groups(torch.tensor([-1, -1])) == []
    assert groups(torch.tensor([2, 2])) == [(2, None)]
    found = [(slot, None if rows is None else rows.tolist()) for slot, rows in groups(torch.tensor([2, -1, 0, 2]))]
    assert found == [(0, [2]), (2, [0, 3])]


def test_products_are_in_the_type_of_the_sums() -> None:
    sums, weights = torch.zeros(2, 3), torch.full((1, 1, 3, 2), 1.0, dtype=torch.bfloat16)
    multiply(sums, torch.tensor([[256.0, 1.0]] * 2, dtype=torch.bfloat16), weights, [(0, None)])
    assert sums.tolist() == [[257.0] * 3] * 2  # 256 in bfloat16
