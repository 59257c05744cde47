"""Config -> Serve application, for jobs, `serve run serve.app:app_builder ...` and `serve deploy`."""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import yaml
from pydantic import ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.config import HTTPOptions

from serve.config import ServeConfig
from serve.door import check_exposure
from serve.errors import NotReadyError
from serve.keys import ENVIRONMENT, KeySource
from serve.registry import Registry
from sft.errors import ConfigError, ModelError

APP = "raysft"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def build(config: ServeConfig) -> Application:
    """Builds the application: gateways in front of engine replicas.

    Raises:
        ConfigError: other machines could ask, and there are no API keys; or the keys cannot be read.
        ModelError: the base model is neither a checkpoint's folder nor a hub id.
        RegistryError: the registry cannot be opened.
    """
    config = located(config)
    further_keys = _further_keys(config)
    Registry.open(config.registry, create=True).version_ids()
    # vLLM takes seconds to import, which --help and a faulty config need not wait for.
    from serve.gateway import GatewayServer
    from serve.server import bind_engine

    deployment: Any = serve.deployment(GatewayServer)
    gateway = deployment.options(
        name="gateway",
        num_replicas=config.scaling.gateway_replicas,
        # Above what the gateway itself takes on: it is to say that it is full, rather than let requests wait unseen.
        max_ongoing_requests=2 * config.total_concurrency,
        ray_actor_options={"num_cpus": 0.1},
    )
    application: Application = gateway.bind(config, further_keys, bind_engine(config))
    return application


def app_builder(arguments: dict[str, Any]) -> Application:
    """Builds the application from the arguments of `serve run` or of a Serve config file.

    Args:
        arguments: the keys of a `ServeConfig`; or `config`, the path of a YAML file with them, which others override.

    Raises:
        ConfigError: with every fault.
    """
    given = dict(arguments)
    path = given.pop("config", None)
    try:
        values = (yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}) if path else {}
        config = ServeConfig.model_validate({**values, **given})
    except (OSError, yaml.YAMLError, TypeError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise ConfigError(str(path or "arguments"), faults) from None
    return build(config)


def start(config: ServeConfig, say: Callable[[str], None] = print) -> str:
    """Starts the application on a Ray that runs already, or on a local one, and waits until it answers.

    Args:
        config: what to serve.
        say: takes lines of progress.

    Returns:
        The address of the API, such as http://127.0.0.1:8000/v1.

    Raises:
        ConfigError: other machines could ask, and there are no API keys; or the keys cannot be read.
        ModelError: the base model is missing.
        RegistryError: the registry cannot be opened.
        NotReadyError: the port is taken, or the engine does not start.
    """
    host, port = config.http.host, config.http.port
    _check_port(host, port)
    config = located(config)
    _further_keys(config)
    if not ray.is_initialized():
        connect(config)
    _hush()
    application = build(config)
    say(f"starting the engine for {config.id} ({'on GPU' if config.engine.use_gpu else 'about a minute on CPU'}) ...")
    try:
        serve.start(http_options=HTTPOptions(host=host, port=port))
        serve.run(application, name=APP, route_prefix="/")
    except RuntimeError as error:
        raise NotReadyError(f"the application did not start: {_reason(str(error), *_reports())}") from error
    address = f"http://{host}:{port}/v1"
    say(f"ready at {address}")
    return address


def stop() -> None:
    """Stops the application and Serve; Ray goes on. Does nothing in a process that is not connected to Ray."""
    if ray.is_initialized():  # Serve would else start a Ray of its own, or wait for one that is gone
        serve.shutdown()


def connect(config: ServeConfig) -> None:
    """Joins the Ray cluster that the config names, or starts a local one."""
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {} if address else {"num_cpus": config.ray.num_cpus, "include_dashboard": False}
    ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)


def located(config: ServeConfig) -> ServeConfig:
    """Makes local addresses absolute, because replicas run in folders of their own.

    Raises:
        ModelError: the base model is neither a checkpoint's folder nor a hub id.
    """
    changes: dict[str, Any] = {}
    if config.access.keys:
        changes["access"] = config.access.model_copy(update={"keys": str(Path(config.access.keys).absolute())})
    logs = {"access_file": config.log.access_file, "shadow_file": config.log.shadow_file}
    files = {key: str(Path(file).absolute()) for key, file in logs.items() if file}
    if files:
        changes["log"] = config.log.model_copy(update=files)
    if "://" not in config.registry:
        changes["registry"] = str(Path(config.registry).absolute())
    base = Path(config.base)
    if base.is_dir():
        if not (base / "config.json").is_file():
            raise ModelError(f"base model {config.base}: the folder holds no config.json, so it is no checkpoint")
        changes |= {"base": str(base.absolute()), "base_id": config.id}
    elif not _HUB_ID.fullmatch(config.base):
        raise ModelError(f"base model {config.base}: there is no such folder, and it is no Hugging Face model id")
    return config.model_copy(update=changes)


def _further_keys(config: ServeConfig) -> str:
    """The API keys of the environment, once those and the file's are found fit to start with."""
    further = os.environ.get(ENVIRONMENT, "")
    check_exposure(config.http.host, KeySource(config.access.keys, further), open_to_all=config.access.open)
    return further


def _check_port(host: str, port: int) -> None:
    """Refuses a port that is taken, which Serve itself would only log."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            fault = "is taken by another program" if error.errno == errno.EADDRINUSE else f"cannot be used ({error})"
            raise NotReadyError(f"port {port} on {host} {fault}: free it, or set http.port to another") from None


def _hush() -> None:
    """Keeps this process's terminal for progress; the replicas' logs are in Ray's session folder, whole."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)


def _reports() -> list[str]:
    """What Serve says of deployments that do not run."""
    found = serve.status().applications.get(APP)
    return [report.message for report in found.deployments.values() if report.message] if found else []


def _reason(*reports: str) -> str:
    """What Serve's long reports say went wrong: the last error that they name, to their end, in one line."""
    lines = [line.strip() for report in reports for line in report.splitlines() if line.strip()]
    blamed = [index for index, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception)\b.*:", line)]
    return " ".join(lines[blamed[-1] :] if blamed else lines[:1])[:500] or "no reason given"
