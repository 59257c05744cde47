from __future__ import annotations

import os
import secrets
from pathlib import Path

import hypothesis
import pytest

from jobs.demo_model import prepare_demo_model
from sft.base import BaseTokenizer
from tests.tiny import small_base, write_tiny_model

# Ray reads its token once per process, so every cluster of a session must share one.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

# What else the machine does is no fault of an example.
hypothesis.settings.register_profile("raysft", deadline=None)
hypothesis.settings.load_profile("raysft")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo's base model, a real checkpoint; made once, in about half a minute, and kept in build/."""
    folder = Path(os.environ.get("RAYSFT_DEMO_MODEL", "build/demo/model")).absolute()
    prepare_demo_model(folder)
    return folder


@pytest.fixture(scope="session")
def base() -> BaseTokenizer:
    """A small tokenizer with a ChatML template."""
    return small_base()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with that tokenizer, as an ordinary checkpoint."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests run on asyncio alone, as the gateway does."""
    return "asyncio"
