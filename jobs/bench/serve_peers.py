"""The servers that are compared: each in a process of its own, with the same engine and the same engine flags."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from jobs.bench.load import Address, fetch
from jobs.bench.machine import BenchmarkError
from sft.hardware import cpu_has_bfloat16

BASE_ID = "smollm2-135m-instruct"
START_S = 400.0
STOP_S = 60.0
RAY_CPUS = 8
"""Logical ones: proxy, gateway and engine fit on a small machine."""


@dataclass(frozen=True)
class Setup:
    """What every contender serves, and how: rule: the engine's flags are the same for all."""

    base: Path
    """Folder of the base model, absolute."""
    folder: Path
    """Where configs, logs and registries of the run go."""
    dtype: str = field(default_factory=lambda: "bfloat16" if cpu_has_bfloat16() else "float32")
    max_model_len: int = 1024
    max_loras: int = 4
    max_lora_rank: int = 16
    kv_cache_gib: int = 1

    def engine_arguments(self) -> dict[str, Any]:
        """The flags, as vLLM names them."""
        return {
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "enforce_eager": True,
            "enable_lora": True,
            "max_loras": self.max_loras,
            "max_lora_rank": self.max_lora_rank,
            "enable_prefix_caching": True,
        }


def vllm_command(setup: Setup, port: int) -> list[str]:
    """Bare vLLM: its own server."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(setup.base), "--served-model-name", BASE_ID]
    for name, value in setup.engine_arguments().items():
        flag = f"--{name.replace('_', '-')}"
        command += [flag] if value is True else [flag, str(value)]
    return command


def ray_command(setup: Setup, port: int) -> list[str]:
    """Ray Serve LLM's own application."""
    arguments = {"base": str(setup.base), "base_id": BASE_ID, "port": port, "num_cpus": RAY_CPUS}
    engine = {"engine_kwargs": setup.engine_arguments(), "kv_cache_gib": setup.kv_cache_gib}
    return [sys.executable, "-m", "jobs.bench.serve_ray_llm", json.dumps({**arguments, **engine})]


def our_command(setup: Setup, port: int, **sections: Any) -> list[str]:
    """Ours; `sections` are further ones of the config."""
    config = {
        "registry": str(setup.folder / "registry"),
        "base": str(setup.base),
        "base_id": BASE_ID,
        "engine": {
            "dtype": setup.dtype,
            "max_model_len": setup.max_model_len,
            "max_loras": setup.max_loras,
            "max_lora_rank": setup.max_lora_rank,
            "kv_cache_gib": setup.kv_cache_gib,
            "extra": {"enable_prefix_caching": True},
        },
        "http": {"port": port},
        "ray": {"num_cpus": RAY_CPUS},
        **sections,
    }
    path = setup.folder / f"serve-{port}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return [sys.executable, "-m", "jobs.serve", "--config", str(path)]


PEERS: Mapping[str, Callable[[Setup, int], list[str]]] = {
    "vllm_serve": vllm_command,
    "ray_serve_llm": ray_command,
    "raysft": our_command,
}


@contextmanager
def running(
    setup: Setup, name: str, command: Callable[[Setup, int], list[str]], key: str | None = None
) -> Iterator[Address]:
    """Starts a server, waits until it answers, and stops it with all its processes at the end.

    Raises:
        BenchmarkError: it does not start; the message ends with the end of its log.
    """
    address = Address(_free_port(), key)
    log = setup.folder / f"{name}.log"
    # Every server chooses its threads by itself, as it does for its users.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": str(setup.kv_cache_gib), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(setup, address.port), stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment
        )
    try:
        asyncio.run(_ready(address, process, log))
        yield address
    finally:
        _stop(process)


async def _ready(address: Address, process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for the first whole answer: that the routes are there does not yet mean that an engine is."""
    body = {"model": BASE_ID, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    ends_at = time.monotonic() + START_S
    while time.monotonic() < ends_at and process.poll() is None:
        with suppress(OSError, EOFError, ValueError):
            status, _ = await fetch(address, "POST", "/v1/chat/completions", body)
            if status == 200:
                return
        await asyncio.sleep(1)
    fault = "ended" if process.poll() is not None else f"did not answer within {START_S:g} s"
    raise BenchmarkError(f"{log.stem} {fault}:\n{log.read_text(errors='replace')[-3000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a server in good order, then whatever is left of the processes that it started."""
    family: list[psutil.Process] = []
    with suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    if process.poll() is None:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    for member in alive:
        with suppress(psutil.Error):
            member.kill()
    psutil.wait_procs(alive, timeout=10)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
