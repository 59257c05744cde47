"""The output layer that knows the loss: cross-entropy from hidden states, without keeping logits.

Logits are the largest tensor of a step: 4,096 tokens of a 152,000-word vocabulary are 2.5 GB in float32, and autograd
keeps several of them. A sum of cross-entropies is linear in its factor, so the gradient of the hidden states can be
made right after the logits, a chunk of tokens at a time, and the logits thrown away. Nothing is computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutputWithPast

CHUNK = 1 << 26
"""Most logits that are alive at a time: 256 MiB in float32."""


class LossHead(nn.Linear):
    """An output layer that gives logits, or, where targets are named, the sum of their cross-entropy."""

    @classmethod
    def of(cls, head: nn.Linear) -> LossHead:
        """Takes over another layer's weights, which may be shared with the embedding."""
        made = cls(head.in_features, head.out_features, bias=False, device="meta")
        made.weight, made.bias = head.weight, head.bias
        return made

    def forward(
        self,
        hidden: Tensor,
        wanted: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        each: bool = False,
    ) -> Tensor:
        """Computes logits or a loss.

        Args:
            hidden: last hidden states, shape (..., width); with targets, shape (tokens, width).
            wanted: the token id that each must predict, shape (tokens,).
            weights: weights of those targets, shape (tokens,); None where all are 1.
            each: give the cross-entropy of every target and not their sum; the layer itself must be frozen.

        Returns:
            Logits of shape (..., vocabulary); with targets a float32 scalar, zero for no tokens, or shape (tokens,).
        """
        if wanted is None:
            return super().forward(hidden)
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight, bias = hidden.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
        if not torch.is_grad_enabled():
            weight, bias = weight.detach(), bias if bias is None else bias.detach()
        rows = max(1, CHUNK // self.out_features)
        made: Tensor = _HeadLoss.apply(hidden, weight, bias, wanted, weights, rows, each)  # type: ignore[no-untyped-call]
        return made


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        wanted: Tensor,
        weights: Tensor | None,
        rows: int,
        each: bool,
    ) -> Tensor:
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        # The factors of single targets are not known yet: a weight's gradient, a sum over targets, could not be made.
        assert not (each and (for_weight or for_bias))
        every = torch.zeros(len(hidden) if each else 0, dtype=torch.float32, device=hidden.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        # Sums over chunks are float32 whatever the layer's type, as a sum over all tokens at once would be.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and for_bias else None
        for begin in range(0, len(hidden), rows):
            part = slice(begin, begin + rows)
            logits = functional.linear(hidden[part], weight, bias).float()
            target = wanted[part, None]
            whole = logits.logsumexp(dim=1, keepdim=True)
            losses = whole - logits.gather(1, target)
            weighed = losses if weights is None else losses * weights[part, None]
            if each:
                every[part] = weighed[:, 0]
            else:
                total += weighed.sum()
            if not (for_hidden or for_weight or for_bias):
                continue
            slope = logits.sub_(whole).exp_()
            slope.scatter_add_(1, target, torch.full_like(losses, -1.0))
            if weights is not None:
                slope *= weights[part, None]
            if grad_bias is not None:
                grad_bias += slope.sum(dim=0)
            slope = slope.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(slope, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += slope.T @ hidden[part]
        ctx.gradients = (
            grad_hidden,
            grad_weight if grad_weight is None else grad_weight.to(weight.dtype),
            grad_bias if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        return every if each else total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        scale = factor[:, None] if factor.ndim else factor
        made = tuple(gradient if gradient is None else gradient.mul_(scale) for gradient in ctx.gradients)
        ctx.gradients = None
        return (*made, None, None, None, None)


def fit_head(model: Any) -> bool:
    """Gives a causal language model a `LossHead` where its logits are proven to be its output layer's and nothing else.

    Some families scale or cap logits, or prepare the decoder's inputs; they keep their layer.

    Returns:
        Whether the model has one now.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or not _is_plain(model, head):
        return False
    model.set_output_embeddings(LossHead.of(head))
    return True


class _Given(nn.Module):
    """Stands in for a decoder: gives what it was made with and keeps what it was asked."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden
        self.asked: dict[str, Any] = {}

    def forward(self, *values: Any, **named: Any) -> BaseModelOutputWithPast:
        self.asked = {str(number): value for number, value in enumerate(values)}
        self.asked |= {name: value for name, value in named.items() if value is not None}
        return BaseModelOutputWithPast(last_hidden_state=self.hidden)


def _is_plain(model: Any, head: nn.Linear) -> bool:
    prefix = model.base_model_prefix
    decoder = getattr(model, prefix, None)
    if not isinstance(decoder, nn.Module) or decoder is not model.base_model or decoder is model:
        return False
    weight = head.weight
    hidden = torch.linspace(-50, 50, 2 * head.in_features, device=weight.device).view(1, 2, -1).to(weight.dtype)
    ids = torch.zeros((1, 2), dtype=torch.int64, device=weight.device)
    given = {"input_ids": ids, "position_ids": torch.arange(2, device=weight.device)[None], "use_cache": False}
    stand_in = _Given(hidden)
    setattr(model, prefix, stand_in)
    try:
        with torch.no_grad():
            logits = model(**given).logits
            return stand_in.asked == given and torch.equal(logits, head(hidden))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        setattr(model, prefix, decoder)
