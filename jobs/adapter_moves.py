"""The commands of `python -m jobs.adapters` that change what is served: in the registry, or through a server."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jobs.adapter_command import Answer, RegistryConfig, registry_of
from jobs.adapter_text import moved, moved_text, when
from serve.errors import NotReadyError
from serve.registry import Registry
from serve.versions import AliasEntry, Retirement, VersionId, check_name, check_share
from sft.errors import ConfigError

REASON = ("--reason", {"default": "", "metavar": "TEXT", "help": "why; kept with the change"})
ENDPOINT: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "--endpoint",
        {"metavar": "URL", "help": "a running server that makes the change, once all its replicas are ready for it"},
    ),
    (
        "--key_file",
        {"type": Path, "metavar": "FILE", "help": "API key for the endpoint; by default of RAYSFT_API_KEY, if set"},
    ),
)
VERSION = ("version", {"metavar": "NAME@vN"})
ALIAS = ("alias", {"metavar": "ALIAS"})
OF_ALIAS = ("--alias", {"required": True, "metavar": "ALIAS", "help": "the alias whose sessions are split"})


def promote(arguments: argparse.Namespace, config: RegistryConfig) -> Answer:
    """Points an alias at a version, for all sessions; with --gate only if it passes."""
    version = VersionId.parse(arguments.version)
    alias, reason = check_name(arguments.alias or version.name), arguments.reason
    if arguments.gate:
        if arguments.endpoint is None:
            raise ConfigError(
                "command line",
                ["--gate asks the version on the engine that is to serve it: give --endpoint, a running server's URL"],
            )
        from jobs import promotion  # it imports every checker, which other commands need not wait for

        return promotion.promote(arguments.endpoint, arguments.key_file, arguments.gate, alias, version, reason)

    def move(registry: Registry) -> AliasEntry:
        return registry.promote(alias, version, reason=reason)

    return _move(arguments, config, alias, move, {"version": str(version)})


def canary(arguments: argparse.Namespace, config: RegistryConfig) -> Answer:
    """Gives a share of an alias's sessions to a version on trial."""
    alias, version = arguments.alias, VersionId.parse(arguments.version)
    weight, reason = arguments.weight, arguments.reason
    check_share(weight, "weight")

    def move(registry: Registry) -> AliasEntry:
        return registry.canary(alias, version, weight, reason=reason)

    return _move(arguments, config, alias, move, {"version": str(version), "weight": weight})


def shadow(arguments: argparse.Namespace, config: RegistryConfig) -> Answer:
    """Copies a share of an alias's sessions to a version."""
    alias, version = arguments.alias, VersionId.parse(arguments.version)
    share, reason = arguments.share, arguments.reason
    check_share(share, "share")

    def move(registry: Registry) -> AliasEntry:
        return registry.shadow(alias, version, share, reason=reason)

    return _move(arguments, config, alias, move, {"version": str(version), "share": share})


def rollback(arguments: argparse.Namespace, config: RegistryConfig) -> Answer:
    """Undoes an alias's last move."""
    alias = arguments.alias
    return _move(arguments, config, alias, lambda registry: registry.rollback(alias, reason=arguments.reason), {})


def _move(
    arguments: argparse.Namespace,
    config: RegistryConfig,
    alias: str,
    act: Callable[[Registry], AliasEntry],
    fields: dict[str, Any],
) -> Answer:
    """Moves an alias in the registry; or, with --endpoint, has the server do it, once its replicas are ready."""
    if arguments.endpoint is None:
        registry = registry_of(config)
        before = registry.alias(alias)
        entry = act(registry)
        return entry.model_dump(mode="json"), moved(entry, before)
    done = _asked(arguments, f"aliases/{check_name(alias)}/{arguments.command}", fields)
    try:
        text = moved_text(done)
    except (KeyError, ValidationError):
        raise NotReadyError(f"{arguments.endpoint} sent what no raysft server sends") from None
    return {**done.pop("entry"), **done}, text


def retire(arguments: argparse.Namespace, config: RegistryConfig) -> Answer:
    """Ends a version."""
    version = VersionId.parse(arguments.version)
    if arguments.endpoint is None:
        registry = registry_of(config)
        known = registry.retirement(version) is not None
        record = registry.retire(version, reason=arguments.reason)
    else:
        done = _asked(arguments, f"versions/{version}/retire", {})
        try:
            known, record = not done["moved"], Retirement.model_validate(done["retirement"])
        except (KeyError, ValidationError):
            raise NotReadyError(f"{arguments.endpoint} sent what no raysft server sends") from None
    data = {"version": str(version), **record.model_dump(mode="json")}
    if known:
        return data, f"{version} was retired already, by {record.by} on {when(record.at)}; nothing changed"
    return data, f"{version} is retired: it cannot be promoted any more, and new requests for it are refused"


def _asked(arguments: argparse.Namespace, path: str, fields: dict[str, Any]) -> dict[str, Any]:
    """What the server of --endpoint says to a change."""
    # An HTTP client takes a while to import, which commands on a registry need not wait for.
    from jobs.endpoint import post, read_key

    key = read_key(arguments.key_file)
    return post(arguments.endpoint, key, f"admin/{path}", {**fields, "reason": arguments.reason})
