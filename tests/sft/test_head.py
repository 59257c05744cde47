from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from sft import head
from sft.head import LossHead, fit_head

TOKENS, WIDTH, WORDS = 13, 8, 50


def inputs() -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        nn.Linear(WIDTH, WORDS),
        torch.randn(TOKENS, WIDTH, requires_grad=True),
        torch.randint(0, WORDS, (TOKENS,)),
        torch.rand(TOKENS),
    )


def results(layer: nn.Linear, hidden: Tensor, summed: Tensor) -> list[Tensor]:
    """The loss and the gradients of hidden states, weight and bias."""
    gradients = torch.autograd.grad(3.0 * summed, (hidden, layer.weight, layer.bias))
    return [summed.detach(), *gradients]


@pytest.mark.parametrize("chunk", [1, 3 * WORDS, 1 << 26])
@pytest.mark.parametrize("weighed", [False, True])
def test_loss_and_gradients_are_those_of_all_logits_at_once(
    monkeypatch: pytest.MonkeyPatch, chunk: int, weighed: bool
) -> None:
    monkeypatch.setattr(head, "CHUNK", chunk)
    layer, hidden, wanted, weights = inputs()
    each = functional.cross_entropy(layer(hidden), wanted, reduction="none")
    whole = results(layer, hidden, (each * weights if weighed else each).sum())
    made = LossHead.of(layer)
    parts = results(made, hidden, made(hidden, wanted, weights if weighed else None))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)


def test_no_tokens_give_zero_and_a_gradient_of_zero() -> None:
    layer, hidden, wanted, _ = inputs()
    none = torch.zeros(TOKENS, dtype=torch.bool)
    made = LossHead.of(layer)
    summed, *gradients = results(made, hidden, made(hidden[none], wanted[none]))
    assert summed.item() == 0.0
    assert all(not gradient.any() for gradient in gradients)


def test_a_frozen_layer_and_evaluation_make_no_gradient_of_it() -> None:
    layer, hidden, wanted, _ = inputs()
    made = LossHead.of(layer).requires_grad_(False)
    made(hidden, wanted).backward()
    assert hidden.grad is not None
    assert made.weight.grad is None
    with torch.no_grad():
        assert not made.requires_grad_(True)(hidden, wanted).requires_grad


def test_under_autocast_it_computes_in_the_lower_type_and_gives_float32_gradients() -> None:
    layer, hidden, wanted, _ = inputs()
    made = LossHead.of(layer)
    exact = results(made, hidden, made(hidden, wanted))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = results(made, hidden, made(hidden, wanted))
    for one, other in zip(exact, rounded, strict=True):
        assert other.dtype == torch.float32
        assert not torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=5e-2, atol=5e-2)


def test_logits_stay_the_layer_s_own() -> None:
    layer, hidden, _, _ = inputs()
    assert torch.equal(LossHead.of(layer)(hidden), layer(hidden))


SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def test_a_model_whose_logits_are_its_layer_s_gets_one(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.arange(6)[None]
    before, weight = model(input_ids=ids).logits, model.lm_head.weight
    assert fit_head(model)
    assert model.lm_head.weight is weight
    assert torch.equal(model(input_ids=ids).logits, before)


def test_a_head_that_shares_the_embedding_s_weight_adds_to_its_gradient(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, tie_word_embeddings=True)
    model.lm_head.weight = model.model.embed_tokens.weight
    ids, wanted = torch.arange(6)[None], torch.arange(1, 7)
    weight = model.get_input_embeddings().weight
    whole = functional.cross_entropy(model(input_ids=ids).logits[0], wanted, reduction="sum")
    (expected,) = torch.autograd.grad(whole, weight)
    assert fit_head(model)
    summed = model.lm_head(model.model(input_ids=ids).last_hidden_state[0], wanted)
    torch.testing.assert_close(torch.autograd.grad(summed, weight), (expected,), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_models_that_cap_or_scale_logits_keep_their_layer(tied: bool) -> None:
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(Gemma2Config(**SMALL, tie_word_embeddings=tied))
    scaled = GraniteForCausalLM(GraniteConfig(**{**SMALL, "logits_scaling": 2.0}, tie_word_embeddings=tied))
    assert not fit_head(capped)
    assert not fit_head(scaled)
    assert type(capped.lm_head) is type(scaled.lm_head) is nn.Linear
