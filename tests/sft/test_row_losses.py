from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from sft.data_config import SourceSection
from sft.errors import ModelError
from sft.row_losses import read_examples, row_losses, template_of
from tests.bundles import lora_bundle, tiny_bundle


def rows(folder: Path) -> SourceSection:
    path = folder / "rows.jsonl"
    lines = [{"instruction": f"Say {word}.", "output": word} for word in ("one", "two and two", "three")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return SourceSection(path=str(path), name="held")


def test_a_rows_loss_is_the_cross_entropy_of_its_trained_tokens(tiny_model: Path, tmp_path: Path) -> None:
    examples = read_examples(tiny_model, [rows(tmp_path)], None, 256, 10)["held"]
    found = dict(row_losses(tiny_model, {}, examples))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for example, loss in zip(examples, found[None], strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(example.input_ids, dtype=torch.int64)[None]).logits[0]
        wanted = torch.tensor(example.labels, dtype=torch.int64)[1:]
        assert loss == pytest.approx(
            float(cross_entropy(logits[:-1], wanted, ignore_index=-100, reduction="sum")), rel=1e-4
        )
    assert len(examples) == 3
    assert len(read_examples(tiny_model, [rows(tmp_path)], None, 256, 2)["held"]) == 2


def test_adapters_change_the_loss_each_in_its_own_way(tiny_model: Path, tmp_path: Path) -> None:
    bundles = {f"a@v{seed}": tmp_path / f"bundle-{seed}" for seed in (1, 2)}
    for seed, folder in enumerate(bundles.values(), 1):
        lora_bundle(folder, tiny_model, seed=seed)
    examples = read_examples(tiny_model, [rows(tmp_path)], template_of(bundles), 256, 10)["held"]
    both = dict(row_losses(tiny_model, bundles, examples))
    assert list(both) == [None, "a@v1", "a@v2"]
    assert len({tuple(losses) for losses in both.values()}) == 3
    alone = dict(row_losses(tiny_model, {"a@v2": bundles["a@v2"]}, examples))
    assert alone["a@v2"] == both["a@v2"]
    assert alone[None] == both[None]


def test_an_adapter_of_another_base_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "other")
    with pytest.raises(ModelError, match="other was tuned on tiny, which is another model"):
        next(row_losses(tiny_model, {"other": tmp_path / "other"}, []))
