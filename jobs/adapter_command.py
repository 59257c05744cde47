"""What every command of `python -m jobs.adapters` is: a function from arguments and a registry to an answer."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from jobs.adapter_text import Rows
from serve.registry import Registry
from sft.errors import ConfigError

Answer = tuple[Any, "str | list[str | Rows]"]
"""What a command found or changed: as plain data for `--json`, and as text and tables for people."""


class RegistryConfig(BaseModel):
    """The one key that this job needs of a training or serving config."""

    model_config = ConfigDict(frozen=True)

    registry: str | None = Field(None, description="Registry of adapters: a folder, s3://, gs://, az:// or abfss://.")


@dataclass(frozen=True)
class Command:
    """One subcommand."""

    help: str
    answer: Callable[[argparse.Namespace, RegistryConfig], Answer]
    arguments: tuple[tuple[str, dict[str, Any]], ...] = ()


def registry_of(config: RegistryConfig, *, create: bool = False) -> Registry:
    """Opens the registry that a command line names.

    Raises:
        ConfigError: it names none.
        RegistryError: there is none, or it cannot be reached.
    """
    if config.registry is None:
        raise ConfigError("command line", ["registry: is missing; give --registry, or --config with such a key"])
    return Registry.open(config.registry, create=create)
