"""Small stand-ins for a base model: real tokenizers and a real, random Llama, made in milliseconds."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sft.base import BaseTokenizer
from sft.template import ChatTemplate

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(template: str, merges: list[tuple[str, str]] | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE over printable ASCII; `merges` add tokens of two symbols."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|im_start|>": 0, "<|im_end|>": 1, **{symbol: i + 2 for i, symbol in enumerate(alphabet)}}
    for left, right in merges or []:
        vocabulary.setdefault(left + right, len(vocabulary))
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges or []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = template
    return fast


def small_base(template: str = CHATML, merges: list[tuple[str, str]] | None = None) -> BaseTokenizer:
    """A small tokenizer with a template; by default ChatML with pad == eos, as the demo's model has it."""
    tokenizer = byte_tokenizer(template, merges)
    return BaseTokenizer(tokenizer, ChatTemplate(tokenizer, ["<|im_end|>"]), (1,))


def write_tiny_model(folder: Path) -> Path:
    """Writes a random Llama of two layers with the small tokenizer, as an ordinary checkpoint."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer(CHATML)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
