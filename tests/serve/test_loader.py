from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.errors import UnknownModelError, VersionRefusedError
from serve.loader import AdapterLoader, Limits, base_folder
from serve.registry import Registry
from serve.versions import VersionId
from sft.adapter import ADAPTER_WEIGHTS, GOLDEN_MESSAGES, Golden, base_fingerprint, verify_bundle
from sft.errors import ModelError
from tests.bundles import tiny_bundle

V1 = VersionId("support", 1)
MODULE = "model.layers.0.self_attn.q_proj"
GOLDEN = Golden(messages=GOLDEN_MESSAGES[0], prompt_ids=(1,))
LIMITS = Limits("base-1b", "f" * 64, 8)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry.open(tmp_path / "registry", create=True)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder that is just enough of a checkpoint to have a fingerprint, a chat template and one module."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "base"
    words = Tokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({f"{MODULE}.weight": np.zeros((8, 8), np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def loader(registry: Registry, base: Path, tmp_path: Path) -> AdapterLoader:
    return AdapterLoader(registry.address, str(base), "base-1b", 8, tmp_path / "cache")


def publish(registry: Registry, tmp_path: Path, base: Path, **changes: Any) -> VersionId:
    folder = tmp_path / f"bundle-{len(registry.version_ids())}"
    tiny_bundle(folder, **{"base_fingerprint": base_fingerprint(base), "golden": [GOLDEN], **changes})
    return registry.publish(folder, "support").id


@pytest.mark.anyio
async def test_a_version_becomes_a_verified_folder(
    loader: AdapterLoader, registry: Registry, base: Path, tmp_path: Path
) -> None:
    version = publish(registry, tmp_path, base, template="{{ messages }}")
    loaded = await loader.load(version)
    assert (loaded.version, loaded.bundle) == (version, registry.get(version).bundle)
    assert verify_bundle(loaded.folder) == loaded.bundle
    assert await loader.load(version) == loaded


@pytest.mark.parametrize(("template", "own"), [("{{ messages }}", None), ("a {{ messages }}", "a {{ messages }}")])
def test_the_template_of_training_comes_along_where_it_is_another(
    registry: Registry, base: Path, tmp_path: Path, template: str, own: str | None
) -> None:
    made = AdapterLoader(registry.address, str(base), "base-1b", 8, tmp_path / "cache")
    ids = made._base.tokenizer.apply_chat_template(
        list(GOLDEN.messages), chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    version = publish(
        registry, tmp_path, base, template=template, golden=[Golden(messages=GOLDEN.messages, prompt_ids=tuple(ids))]
    )
    assert made.fetch(version).template == own


def test_only_stop_ids_that_the_base_lacks_are_added(registry: Registry, base: Path, tmp_path: Path) -> None:
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [1]}))
    version = publish(registry, tmp_path, base, stop_ids=(0, 1))
    made = AdapterLoader(registry.address, str(base), "base-1b", 8, tmp_path / "cache")
    assert made.fetch(version).stop_ids == (0,)


def test_a_registry_made_anew_is_not_mistaken_for_the_old_one(
    loader: AdapterLoader, registry: Registry, base: Path, tmp_path: Path
) -> None:
    version = publish(registry, tmp_path, base)
    before = loader.fetch(version).folder
    shutil.rmtree(registry.address)
    shutil.rmtree(tmp_path / "bundle-0")
    anew = Registry.open(registry.address, create=True)
    publish(anew, tmp_path, base, seed=9)
    after = AdapterLoader(registry.address, str(base), "base-1b", 8, tmp_path / "cache").fetch(version).folder
    assert after != before
    assert verify_bundle(after) == anew.get(version).bundle


def test_a_damaged_version_is_refused_without_a_path(
    loader: AdapterLoader, registry: Registry, base: Path, tmp_path: Path
) -> None:
    version = publish(registry, tmp_path, base)
    (Path(registry.address) / "versions/support/v1" / ADAPTER_WEIGHTS).write_bytes(b"x")
    with pytest.raises(
        VersionRefusedError, match=f"support@v1 is damaged in the registry: {ADAPTER_WEIGHTS}"
    ) as caught:
        loader.fetch(version)
    assert "/" not in str(caught.value)


def test_an_unknown_version_is_told_apart(loader: AdapterLoader) -> None:
    with pytest.raises(UnknownModelError, match="support@v1"):
        loader.fetch(V1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"base_fingerprint": "0" * 64, "base_model": "other"},
            r"bundle\.json: base_fingerprint: it was trained on another base \(other\) than base-1b",
        ),
        ({"rank": 9}, r"bundle\.json: rank: its rank 9 is above engine.max_lora_rank 8"),
    ],
)
def test_a_version_that_does_not_fit_is_refused(
    loader: AdapterLoader, registry: Registry, base: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    version = publish(registry, tmp_path, base, **changes)
    with pytest.raises(VersionRefusedError, match=reason):
        loader.fetch(version)


def test_weights_that_do_not_fit_the_base_are_refused(registry: Registry, base: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({f"{MODULE}.weight": np.zeros((8, 16), np.float32)}, base / "model.safetensors")
    version = publish(registry, tmp_path, base)
    loader = AdapterLoader(registry.address, str(base), "base-1b", 8, tmp_path / "cache")
    tensor = f"base_model.model.{MODULE}.lora_A.weight"
    with pytest.raises(VersionRefusedError) as caught:
        loader.fetch(version)
    assert str(caught.value) == (
        f"support@v1 cannot be served: {ADAPTER_WEIGHTS}: {tensor}: its shape [2, 8] does not fit the base model's "
        f"{MODULE}.weight [8, 16]"
    )


def test_other_prompt_ids_than_in_training_are_refused(
    loader: AdapterLoader, registry: Registry, base: Path, tmp_path: Path
) -> None:
    other = Golden(messages=GOLDEN_MESSAGES[0], prompt_ids=(1, 2))
    version = publish(registry, tmp_path, base, golden=[GOLDEN, other])
    with pytest.raises(VersionRefusedError) as caught:
        loader.fetch(version)
    assert str(caught.value) == (
        "support@v1 cannot be served: bundle.json: golden.1.prompt_ids: the same messages give other prompt ids here "
        "than in training"
    )


def test_all_reasons_are_told(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle", rank=9, base_fingerprint="0" * 64)
    with pytest.raises(VersionRefusedError, match=r"another base .*; rank: its rank 9"):
        LIMITS.check(V1, bundle)


def test_a_base_is_a_folder_or_a_known_model(base: Path, tmp_path: Path) -> None:
    assert base_folder(str(base)) == base
    for missing in (str(tmp_path / "nothing"), "no-such-org/no-such-model"):
        with pytest.raises(ModelError, match="no checkpoint there"):
            base_folder(missing)
