from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs import adapters
from sft.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Golden, base_fingerprint, write_bundle
from sft.errors import AdapterError, StorageError
from sft.merge import INDEX, SINGLE, merge, read_updates, write_weights

IDS = torch.arange(3, 40)[None]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"


@dataclass(frozen=True)
class Trained:
    """An adapter's folder as PEFT writes it, and the logits of base + adapter."""

    folder: Path
    logits: Tensor


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trained(base: Path, folder: Path, **options: Any) -> Trained:
    torch.manual_seed(2)
    targets = options.pop("target_modules", "all-linear")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=targets, **options)
    model = get_peft_model(load(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder, save_embedding_layers=False)
    return Trained(folder, logits(model))


def bundled(adapter: Trained, base: Path, folder: Path) -> Path:
    write_bundle(
        folder,
        weights=adapter.folder / ADAPTER_WEIGHTS,
        peft_config=adapter.folder / ADAPTER_CONFIG,
        template=TEMPLATE,
        base_model="tiny",
        base_fingerprint=base_fingerprint(base),
        stop_ids=[1, 5],
        golden=[Golden(messages=({"role": "user", "content": "a"},), prompt_ids=(1,))],
        lineage={},
    )
    return folder


@pytest.fixture
def bundle(tiny_model: Path, tmp_path: Path) -> Path:
    return bundled(trained(tiny_model, tmp_path / "adapter"), tiny_model, tmp_path / "bundle")


@pytest.fixture
def sharded(tiny_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    model = load(tiny_model)
    model.save_pretrained(folder, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_merged_logits_are_the_adapter_s(tiny_model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    adapter = trained(tiny_model, tmp_path / "adapter", **options)
    merged = merge(bundled(adapter, tiny_model, tmp_path / "bundle"), tiny_model, tmp_path / "merged")
    assert merged.modules == 14
    found = logits(load(merged.folder))
    assert (found - adapter.logits).abs().max() < 1e-5
    assert (found - logits(load(tiny_model))).abs().max() > 0.1


def test_a_dora_s_weights_keep_their_length(sharded: Path, tmp_path: Path) -> None:
    adapter = trained(sharded, tmp_path / "adapter", use_dora=True)
    updates = read_updates(adapter.folder)
    assert all(update.magnitude is not None for update in updates.values())
    out = tmp_path / "merged"
    out.mkdir()
    write_weights(sharded, updates, out)
    (out / "config.json").write_text((sharded / "config.json").read_text())
    assert (logits(load(out)) - adapter.logits).abs().max() < 1e-5


def test_shards_stay_as_they_are(sharded: Path, tmp_path: Path) -> None:
    adapter = trained(sharded, tmp_path / "adapter", target_modules=["q_proj"])
    merged = merge(bundled(adapter, sharded, tmp_path / "bundle"), sharded, tmp_path / "merged").folder
    before, after = (json.loads((folder / INDEX).read_text()) for folder in (sharded, merged))
    assert after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"]
    old = {name: t for shard in sharded.glob("*.safetensors") for name, t in load_file(shard).items()}
    new = {name: t for shard in merged.glob("*.safetensors") for name, t in load_file(shard).items()}
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}


def test_a_tied_head_that_is_adapted_becomes_a_weight_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    base = tmp_path / "tied"
    model = load(tiny_model)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    assert "lm_head.weight" not in load_file(base / SINGLE)
    adapter = trained(base, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    merged = merge(bundled(adapter, base, tmp_path / "bundle"), base, tmp_path / "merged").folder
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    assert (logits(load(merged)) - adapter.logits).abs().max() < 1e-5


def test_a_type_is_rounded_to_once(tiny_model: Path, bundle: Path, tmp_path: Path) -> None:
    full = merge(bundle, tiny_model, tmp_path / "full").folder
    half = merge(bundle, tiny_model, tmp_path / "half", "bfloat16").folder
    weights, rounded = load_file(full / SINGLE), load_file(half / SINGLE)
    assert all(torch.equal(rounded[name], weights[name].bfloat16()) for name in weights)
    assert AutoModelForCausalLM.from_pretrained(half).dtype == torch.bfloat16


def test_template_and_stop_ids_are_the_bundle_s(tiny_model: Path, bundle: Path, tmp_path: Path) -> None:
    merged = merge(bundle, tiny_model, tmp_path / "merged").folder
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.encode("abc") == AutoTokenizer.from_pretrained(tiny_model).encode("abc")
    assert load(merged).generation_config.eos_token_id == [1, 5]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_another_base_is_refused(sharded: Path, bundle: Path, tmp_path: Path) -> None:
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    with pytest.raises(AdapterError, match=r"was trained on tiny .* is another base model"):
        merge(bundle, sharded, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_output_with_something_in_it_is_left_alone(tiny_model: Path, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    merge(bundle, tiny_model, tmp_path / "there")
    before = sorted(path.name for path in (tmp_path / "there").iterdir())
    with pytest.raises(StorageError, match="not empty; choose another --output"):
        merge(bundle, tiny_model, tmp_path / "there")
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == before


def test_a_full_disk_leaves_nothing(
    tiny_model: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free: Callable[[Any], Any] = lambda _: type("Usage", (), {"free": 1000})  # noqa: E731
    monkeypatch.setattr("sft.merge.shutil.disk_usage", free)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StorageError, match=r"are free; make .* GB of room"):
        merge(bundle, tiny_model, tmp_path / "merged")
    assert sorted(tmp_path.iterdir()) == before


def test_a_quantized_weight_is_refused(tiny_model: Path, bundle: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = load_file(tiny_model / SINGLE)
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].char()
    save_file(weights, tmp_path / SINGLE)
    with pytest.raises(AdapterError, match=r"found model.layers.0.mlp.up_proj.weight \(I8\); a quantized base"):
        write_weights(tmp_path, read_updates(bundle), tmp_path)


def test_the_job_merges_a_version(
    tiny_model: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = ["--registry", str(tmp_path / "registry")]
    adapters.main(["publish", str(bundle), "--name", "support", *registry])
    words = ["merge", "support@v1", "--base", str(tiny_model), "--output", str(tmp_path / "merged"), *registry]
    capsys.readouterr()
    assert adapters.main(words) == 0
    assert capsys.readouterr().out.startswith("merged support@v1 into tiny: 14 modules changed, ")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
