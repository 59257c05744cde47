from __future__ import annotations

from pathlib import Path

import pytest

from sft.base import load_tokenizer, locate
from sft.errors import ModelError


def test_a_folder_is_taken_as_it_is(tiny_model: Path) -> None:
    assert locate(str(tiny_model)) == tiny_model


@pytest.mark.parametrize("base", ["./nothing", "/no/where", "a/b/c", "plain"])
def test_what_is_neither_folder_nor_id_is_refused(base: str) -> None:
    with pytest.raises(ModelError, match=r"no config\.json there"):
        locate(base)


def test_an_id_that_cannot_be_had_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="nobody/nothing: no such folder, and not to be had from the hub"):
        locate("nobody/nothing")


def test_the_tokenizer_comes_with_its_stop_ids_and_proven_template(tiny_model: Path) -> None:
    loaded = load_tokenizer(tiny_model)
    assert (loaded.stop_ids, loaded.pad_id, loaded.template.stop_tokens) == ((1,), 1, ("<|im_end|>",))


def test_a_folder_without_tokenizer_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(tmp_path)
