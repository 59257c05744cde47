from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serve.app import _check_port, _reason, app_builder, located
from serve.config import ServeConfig
from serve.deploy import deploy_file
from serve.errors import NotReadyError
from sft.errors import ConfigError, ModelError


def test_local_addresses_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    found = located(ServeConfig(registry="registry", base="model/"))
    assert (found.registry, found.base) == (str(tmp_path / "registry"), str(tmp_path / "model"))
    assert found.id == "model"


def test_addresses_elsewhere_stay() -> None:
    found = located(ServeConfig(registry="s3://bucket/registry", base="org/model"))
    assert (found.registry, found.base) == ("s3://bucket/registry", "org/model")


def test_files_of_keys_and_logs_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"registry": "r", "base": "org/model", "access": {"keys": "k"}, "log": {"access_file": "l"}}
    found = located(ServeConfig.model_validate(given))
    assert (found.access.keys, found.log.access_file) == (str(tmp_path / "k"), str(tmp_path / "l"))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"http": {"host": "0.0.0.0"}}, "reachable from other machines, and no API keys are configured"),
        ({"access": {"keys": "none"}}, "the API keys cannot be read: No such file"),
    ],
)
def test_a_server_that_everyone_could_ask_is_not_built(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        app_builder({"registry": str(tmp_path), "base": "org/model", **changes})


@pytest.mark.parametrize("base", ["/no/such/model", "build/no/such", "./model", "~/model"])
def test_a_missing_base_is_told(base: str) -> None:
    with pytest.raises(ModelError, match="there is no such folder"):
        located(ServeConfig(registry="r", base=base))


def test_a_folder_that_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        located(ServeConfig(registry="r", base=str(tmp_path)))


def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(NotReadyError, match=f"port {port} on 127.0.0.1 is taken by another program"):
            _check_port("127.0.0.1", port)
    _check_port("127.0.0.1", port)


def test_an_address_of_another_machine_is_told() -> None:
    with pytest.raises(NotReadyError, match="cannot be used"):
        _check_port("203.0.113.1", 8000)


def test_the_builder_tells_all_faults(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("registry: r\nengine: {max_loras: 0}\n")
    with pytest.raises(ConfigError) as caught:
        app_builder({"config": str(path), "http": {"port": -1}})
    assert len(caught.value.faults) == 3
    with pytest.raises(ConfigError, match="cannot be read"):
        app_builder({"config": str(tmp_path / "missing.yaml")})
    with pytest.raises(ModelError):
        app_builder({"registry": str(tmp_path), "base": "/no/such/model"})


def test_the_blamed_line_of_a_long_report() -> None:
    report = (
        "Deploying failed:\n  Traceback (most recent call last):\n  ValueError: one fault\n  max_model_len is too large"
    )
    assert _reason("Deploying failed: see below", report) == "ValueError: one fault max_model_len is too large"
    assert _reason("just this") == "just this"
    assert _reason() == "no reason given"


def test_the_file_of_serve_deploy_builds_the_same_application() -> None:
    config = ServeConfig.model_validate(
        {
            "registry": "s3://bucket/registry",
            "base": "org/model",
            "http": {"port": 8001},
            "scaling": {"max_replicas": 2},
        }
    )
    schema = ServeDeploySchema.model_validate(yaml.safe_load(deploy_file(config)))
    (application,) = schema.applications
    assert schema.http_options.port == 8001
    assert (application.name, application.route_prefix, application.import_path) == (
        "raysft",
        "/",
        "serve.app:app_builder",
    )
    assert ServeConfig.model_validate(application.args) == config.model_copy(update={"base_id": None})
