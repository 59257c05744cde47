from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from serve.config import FIXED_ENGINE_KEYS, OWN_ENGINE_KEYS, ServeConfig
from sft.config import read_config
from sft.errors import ConfigError

SMALL: dict[str, Any] = {"registry": "build/registry", "base": "org/base-1b"}


def test_two_keys_are_enough() -> None:
    config = ServeConfig.model_validate(SMALL)
    assert (config.id, config.http.host, config.http.port) == ("base-1b", "127.0.0.1", 8000)
    assert config.engine.accelerator_type is None


@pytest.mark.parametrize(("base", "id_"), [("org/base-1b", "base-1b"), ("/models/base/", "base"), ("base", "base")])
def test_the_id_is_the_last_part_of_the_base(base: str, id_: str) -> None:
    assert ServeConfig.model_validate({**SMALL, "base": base}).id == id_
    assert ServeConfig.model_validate({**SMALL, "base": base, "base_id": "mine"}).id == "mine"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"base_id": "a:b"}, "without ':' and '@'"),
        ({"base_id": "a@v1"}, "without ':' and '@'"),
        ({"engine": {"accelerator_type": "A100"}}, "accelerator_type A100 needs use_gpu"),
        ({"engine": {"tensor_parallel_size": 2}}, "tensor_parallel_size 2 needs use_gpu"),
        ({"engine": {"max_lora_rank": 12}}, "8, 16, 32"),
        ({"scaling": {"min_replicas": 2}}, "max_replicas 1 is below min_replicas 2"),
        ({"http": {"port": 0}}, "greater than 0"),
        ({"engine": {"max_lorras": 4}}, "Extra inputs"),
        *(({"engine": {"extra": {key: 1}}}, f"extra.{key}: set {own}") for key, own in OWN_ENGINE_KEYS.items()),
        *(({"engine": {"extra": {key: 1}}}, f"extra.{key}: is not yours") for key in FIXED_ENGINE_KEYS),
    ],
)
def test_faults_are_named(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        ServeConfig.model_validate({**SMALL, **changes})


def test_all_faults_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("registry: r\nengine: {max_loras: 0, max_lora: 2}\nhttp: {prot: 1}\n")
    with pytest.raises(ConfigError) as caught:
        read_config(ServeConfig, path)
    faults = "\n".join(caught.value.faults)
    assert len(caught.value.faults) == 4
    assert "base: is missing" in faults
    assert "did you mean engine.max_loras?" in faults
    assert "did you mean http.port?" in faults


def test_every_field_is_described() -> None:
    for name, field in ServeConfig.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        if inner is None:
            assert field.description, name
        else:
            assert all(part.description for part in inner.values()), name


def test_the_demo_config_is_valid() -> None:
    config = read_config(ServeConfig, Path("jobs/configs/demo-serve.yaml"))
    assert (config.id, config.engine.use_gpu, config.http.host) == ("smollm2-135m-instruct", False, "127.0.0.1")
