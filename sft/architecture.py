"""A base model's sizes, from its config.json alone: no weight is read and no module built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sft.errors import ModelError

Reads = Literal["attention", "context", "mlp", "product"]
"""What a linear module reads: the normalised hidden states before attention or before the MLP, what attention made, or
the product of the MLP's two halves."""


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear module of a layer."""

    name: str
    inputs: int
    outputs: int
    reads: Reads
    bias: bool = False

    @property
    def weights(self) -> int:
        """Numbers in its weight, the bias apart."""
        return self.inputs * self.outputs


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder of equal layers with a gated MLP.

    Rule: `norms` counts a layer's norms over the hidden states; `head_norms` says whether queries and keys have one.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    tied: bool
    norms: int
    head_norms: bool
    linears: tuple[Linear, ...]

    @property
    def queries(self) -> int:
        """Width of all queries together."""
        return self.heads * self.head_width

    @property
    def keys(self) -> int:
        """Width of all keys together, before they are repeated for groups of queries."""
        return self.kv_heads * self.head_width

    @property
    def linear_weights(self) -> int:
        """Numbers in the weights of all layers' linear modules: what a 4-bit base packs."""
        return self.layers * sum(linear.weights for linear in self.linears)

    @property
    def other_parameters(self) -> int:
        """All other numbers: embedding, head, norms and biases."""
        embedding = self.vocabulary * self.hidden * (1 if self.tied else 2)
        biases = sum(linear.outputs for linear in self.linears if linear.bias)
        norms = self.norms * self.hidden + (2 * self.head_width if self.head_norms else 0)
        return embedding + self.layers * (biases + norms) + self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.linear_weights + self.other_parameters


@dataclass(frozen=True, slots=True)
class _Family:
    """How a model type differs from Llama."""

    query_bias: bool | None = None
    """Whether queries, keys and values have a bias, whatever the config says."""
    norms: int = 2
    head_norms: bool = False
    fused: bool = False
    tied: bool = False
    """Whether head and embedding share their weight where the config does not say."""


FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(query_bias=False),
    "smollm3": _Family(tied=True),
    "granite": _Family(),
    "qwen2": _Family(query_bias=True),
    "qwen3": _Family(head_norms=True),
    "gemma": _Family(tied=True),
    "gemma2": _Family(norms=4, tied=True),
    "gemma3_text": _Family(norms=4, head_norms=True, tied=True),
    "phi3": _Family(query_bias=False, fused=True),
}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Reads a model's sizes from its Hugging Face config.

    Args:
        config: content of config.json; of a model with images, the part of the text decoder is read.

    Raises:
        ModelError: the model type is unknown here, or a size is missing.
    """
    values = config.get("text_config", config)
    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise ModelError(f"the sizes of model type {kind} are not known; known are {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[kind]
    try:
        hidden, intermediate = values["hidden_size"], values["intermediate_size"]
        layers, heads, vocabulary = (values[key] for key in ("num_hidden_layers", "num_attention_heads", "vocab_size"))
    except KeyError as error:
        raise ModelError(f"config.json of model type {kind} has no {error.args[0]}") from None
    kv_heads = values.get("num_key_value_heads") or heads
    width = values.get("head_dim") or hidden // heads
    bias = values.get("attention_bias", False)
    read_bias = bias if family.query_bias is None else family.query_bias
    write_bias = bias if family.query_bias is None else False
    mlp_bias = values.get("mlp_bias", False)
    queries, keys = heads * width, kv_heads * width
    linears: tuple[Linear, ...]
    if family.fused:
        linears = (
            Linear("qkv_proj", hidden, queries + 2 * keys, "attention"),
            Linear("o_proj", queries, hidden, "context"),
            Linear("gate_up_proj", hidden, 2 * intermediate, "mlp"),
            Linear("down_proj", intermediate, hidden, "product"),
        )
    else:
        linears = (
            Linear("q_proj", hidden, queries, "attention", read_bias),
            Linear("k_proj", hidden, keys, "attention", read_bias),
            Linear("v_proj", hidden, keys, "attention", read_bias),
            Linear("o_proj", queries, hidden, "context", write_bias),
            Linear("gate_proj", hidden, intermediate, "mlp", mlp_bias),
            Linear("up_proj", hidden, intermediate, "mlp", mlp_bias),
            Linear("down_proj", intermediate, hidden, "product", mlp_bias),
        )
    return Architecture(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_width=width,
        vocabulary=vocabulary,
        tied=config.get("tie_word_embeddings", values.get("tie_word_embeddings", family.tied)),
        norms=family.norms,
        head_norms=family.head_norms,
        linears=linears,
    )
