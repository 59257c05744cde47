"""The held-out loss of a base model and of adapters on it, row by row, masked and computed as in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from sft.adapter import TEMPLATE, base_fingerprint, verify_bundle
from sft.base import load_tokenizer
from sft.batch import collate
from sft.data import here, plan_data
from sft.data_config import DataSection, SourceSection
from sft.errors import ModelError
from sft.evaluate_config import EvaluateSection
from sft.evaluation_rows import held_out_examples
from sft.mask import Example
from sft.model import Dtype, LossModel, resolve_dtype
from sft.objective import tensors


def read_examples(
    base: Path, sources: Sequence[SourceSection], template: str | None, max_length: int, max_rows: int
) -> dict[str, tuple[Example, ...]]:
    """Reads rows as a run reads its `evaluate.sources`.

    Args:
        base: the base model's folder.
        sources: where the rows are.
        template: text of a chat template to use in place of the tokenizer's own.
        max_length: longest example, in tokens; longer ones are left out, and too many of them are a fault.
        max_rows: most examples of each source.

    Raises:
        RaysftError: a source is not there, or too many rows are bad.
    """
    section = EvaluateSection(sources=list(sources), max_rows=max_rows)
    data = DataSection(sources=list(sources), max_length=max_length)
    return held_out_examples(section, data, plan_data(data, base, template), template, here)


def row_losses(
    base: Path, bundles: Mapping[str, Path], examples: Sequence[Example], dtype: Dtype = "auto"
) -> Iterator[tuple[str | None, list[float]]]:
    """Computes each example's cross-entropy, summed over its trained tokens, in nats: one pass an example.

    Args:
        base: the base model's folder.
        bundles: adapter bundles by name.
        examples: what is computed.
        dtype: type of the base, as in training.

    Yields:
        None with the base's losses, then each adapter's name with its.

    Raises:
        ModelError: the base cannot be loaded, or a bundle is of another base or of another chat template.
        AdapterError: a bundle is damaged.
    """
    check_bundles(base, bundles)
    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=resolve_dtype(dtype, torch.device("cpu")))
    except (OSError, ValueError) as error:
        raise ModelError(f"{base}: the base model cannot be loaded ({error})") from error
    pad_id = load_tokenizer(base).pad_id
    yield None, _losses(LossModel(model.eval()), examples, pad_id)
    for name, bundle in bundles.items():
        adapted = PeftModel.from_pretrained(model, bundle)
        yield name, _losses(LossModel(adapted.eval()), examples, pad_id)
        model = adapted.unload()


def check_bundles(base: Path, bundles: Mapping[str, Path]) -> None:
    """Makes sure that bundles are whole, of this base, and of one chat template.

    Raises:
        AdapterError: a bundle is damaged.
        ModelError: one is of another base, or not all are of one template.
    """
    found = {name: verify_bundle(bundle) for name, bundle in bundles.items()}
    fingerprint = base_fingerprint(base)
    for name, one in found.items():
        if one.base_fingerprint != fingerprint:
            raise ModelError(f"{name} was tuned on {one.base_model}, which is another model than the one in {base}")
    if len({one.template_fingerprint for one in found.values()}) > 1:
        raise ModelError("the adapters were trained with different chat templates: compare them one by one")


def template_of(bundles: Mapping[str, Path]) -> str | None:
    """The chat template that the bundles were trained with; None where there are no bundles."""
    return next((bundle.joinpath(TEMPLATE).read_text(encoding="utf-8") for bundle in bundles.values()), None)


@torch.no_grad()
def _losses(model: LossModel, examples: Sequence[Example], pad_id: int) -> list[float]:
    device = torch.device("cpu")
    return [float(model(**tensors(collate([example], "packed", pad_id), device))) for example in examples]
