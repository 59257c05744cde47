"""The base model as a folder: where it lies, its tokenizer, its stop tokens."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from sft.errors import ModelError, TemplateError
from sft.mask import mask
from sft.template import ChatTemplate, History
from sft.tokens import Encoder


@dataclass(frozen=True)
class BaseTokenizer:
    """A base model's tokenizer with what masking and serving need to know of it.

    Rule: `stop_ids` are the ids at which a server ends an answer: generation_config's, else the tokenizer's EOS.
    """

    tokenizer: PreTrainedTokenizerFast
    template: ChatTemplate
    stop_ids: tuple[int, ...]
    quick: bool = True

    @functools.cached_property
    def encoder(self) -> Encoder:
        """Turns rendered texts into ids."""
        return Encoder(self.tokenizer, quick=self.quick)

    def prove(self, history: History = "refuse") -> None:
        """Proves on sample conversations that template and tokenizer together can be masked exactly.

        Raises:
            TemplateError: with the proof that failed and what to do.
        """
        proofs = self.template.prove(history)
        masked = mask(self.encoder, proofs, max_length=1 << 20, truncate=False, stop_ids=self.stop_ids)
        if all(masked.errors):
            raise TemplateError(
                f"no sample conversation can be masked exactly with this tokenizer: {masked.errors[0]}; "
                "use a template that puts a special token between prompt and answer"
            )

    @property
    def pad_id(self) -> int:
        """An id to fill padding with. It may equal a stop id: padding is masked by position, never by id."""
        return int(self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.stop_ids[0])


def locate(base: str, *, weights: bool = True) -> Path:
    """Finds a base model: a local folder as it is, a Hugging Face id as a local snapshot.

    Args:
        base: a folder or an id.
        weights: whether a snapshot must hold the weights; without them it is there in seconds.

    Raises:
        ModelError: neither is there.
    """
    folder = Path(base)
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or base.startswith((".", "/", "~")) or base.count("/") != 1:
        raise ModelError(
            f"base model {base}: no config.json there; name a checkpoint folder or a Hugging Face model id"
        )
    try:
        left_out = ["*.bin", "*.pth", "*.gguf", "original/*", *([] if weights else ["*.safetensors"])]
        return Path(snapshot_download(base, ignore_patterns=left_out))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"base model {base}: no such folder, and not to be had from the hub ({reason})") from None


def read_template(path: str | None) -> str | None:
    """Reads a chat template's file; None where none is named.

    Raises:
        TemplateError: there is no such file, or no text in it.
    """
    if path is None:
        return None
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"model.chat_template {path}: cannot be read ({error})") from None
    if not text.strip():
        raise TemplateError(f"model.chat_template {path}: the file is empty; it must hold a Jinja chat template")
    return text


@functools.lru_cache(maxsize=4)
def load_tokenizer(
    folder: Path, template: str | None = None, *, history: History = "refuse", quick: bool = True
) -> BaseTokenizer:
    """Loads a base model's tokenizer and proves its chat template.

    Args:
        folder: the base model.
        template: text of a chat template to use in place of the tokenizer's own.
        history: what becomes of conversations whose earlier turns the template rewrites.
        quick: whether a faster tokenizer may be used where it proves to give the same ids.

    Raises:
        ModelError: the folder holds no fast tokenizer.
        TemplateError: the chat template cannot be masked exactly.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: the tokenizer cannot be loaded ({error})") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(f"{folder}: needs a fast tokenizer (tokenizer.json), got {type(tokenizer).__name__}")
    ids = _stop_ids(folder, tokenizer)
    stops = [str(token) for token in tokenizer.convert_ids_to_tokens(list(ids))]
    chat = ChatTemplate(tokenizer, stops, template)
    made = BaseTokenizer(tokenizer, chat, ids, quick)
    made.prove(history)
    return made


def _stop_ids(folder: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    found: int | list[int] | None = None
    if (folder / "generation_config.json").is_file():
        found = GenerationConfig.from_pretrained(folder).eos_token_id
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        return ()
    return (found,) if isinstance(found, int) else tuple(found)
