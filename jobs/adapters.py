"""Looks after a registry of adapters: lists, shows, verifies, publishes, promotes and rolls back."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from jobs.cli import configure, parser, run
from serve.errors import UnknownModelError
from serve.registry import Registry
from serve.versions import AliasEntry, Version, VersionId
from sft.adapter import Bundle, verify_bundle
from sft.errors import ConfigError

Answer = tuple[Any, str]
"""What a command found or changed: as plain data for `--json`, and as text."""


class RegistryConfig(BaseModel):
    """The one key that this job needs of a training or serving config."""

    model_config = ConfigDict(frozen=True)

    registry: str | None = Field(None, description="Registry of adapters: a folder, s3://, gs:// or az://.")


@dataclass(frozen=True)
class Command:
    """One subcommand."""

    help: str
    answer: Callable[[argparse.Namespace, RegistryConfig], Answer]
    arguments: tuple[tuple[str, dict[str, Any]], ...] = ()


def _list(_: argparse.Namespace, config: RegistryConfig) -> Answer:
    registry = _registry(config)
    aliases = registry.aliases()
    versions = [version for name in registry.names() for version in registry.versions(name)]
    pointing = {v.id: ", ".join(a for a, entry in aliases.items() if entry.version == v.id) for v in versions}
    data = {
        "aliases": {alias: str(entry.version) for alias, entry in aliases.items()},
        "versions": [_version_data(version) for version in versions],
    }
    rows = [
        [str(v.id), pointing[v.id], v.bundle.base_model, str(v.bundle.rank), _when(v.published_at), v.published_by]
        for v in versions
    ]
    if not rows:
        return data, "the registry holds no versions yet"
    return data, _table(["VERSION", "ALIASES", "BASE", "RANK", "PUBLISHED", "BY"], rows)


def _show(arguments: argparse.Namespace, config: RegistryConfig) -> Answer:
    registry = _registry(config)
    version = registry.get(_version(registry, arguments.version))
    bundle = version.bundle
    lines = [
        f"{version.id}",
        f"  published  {_when(version.published_at)} by {version.published_by}",
        f"  digest     {version.digest}",
        f"  base       {bundle.base_model} ({bundle.base_fingerprint[:16]})",
        f"  template   {bundle.template_fingerprint[:16]}",
        f"  rank       {bundle.rank} on {', '.join(bundle.target_modules)}",
        f"  files      {', '.join(f'{name} ({file.size:,} bytes)' for name, file in bundle.files.items())}",
        "  lineage",
        *(f"    {line}" for line in json.dumps(bundle.lineage, indent=2, sort_keys=True).splitlines()),
    ]
    return {**_version_data(version), "lineage": bundle.lineage}, "\n".join(lines)


def _history(arguments: argparse.Namespace, config: RegistryConfig) -> Answer:
    entries = _registry(config).history(arguments.alias)
    if not entries:
        raise UnknownModelError(f"there is no alias {arguments.alias}")
    rows = [
        [str(e.number), e.action, str(e.version), str(e.previous or "-"), _when(e.at), e.by, e.reason] for e in entries
    ]
    headings = ["ENTRY", "ACTION", "VERSION", "BEFORE", "AT", "BY", "REASON"]
    return [entry.model_dump(mode="json") for entry in entries], _table(headings, rows)


def _verify(arguments: argparse.Namespace, _: RegistryConfig) -> Answer:
    bundle = verify_bundle(arguments.folder)
    data = {"folder": str(arguments.folder), "base_model": bundle.base_model, "rank": bundle.rank}
    return data, f"{arguments.folder} is whole and sound: {_described(bundle)}"


def _publish(arguments: argparse.Namespace, config: RegistryConfig) -> Answer:
    version = _registry(config, create=True).publish(arguments.folder, arguments.name)
    text = f"published {version.id}: {_described(version.bundle)}"
    return _version_data(version), f"{text}\nno alias moved; to serve it: promote {version.id}"


def _promote(arguments: argparse.Namespace, config: RegistryConfig) -> Answer:
    registry = _registry(config)
    version = VersionId.parse(arguments.version)
    alias = arguments.alias or version.name
    before = registry.alias(alias)
    entry = registry.promote(alias, version, reason=arguments.reason)
    return entry.model_dump(mode="json"), _moved(entry, before)


def _rollback(arguments: argparse.Namespace, config: RegistryConfig) -> Answer:
    registry = _registry(config)
    before = registry.alias(arguments.alias)
    entry = registry.rollback(arguments.alias, reason=arguments.reason)
    return entry.model_dump(mode="json"), _moved(entry, before)


_REASON = ("--reason", {"default": "", "metavar": "TEXT", "help": "kept in the alias's history"})
_ALIAS = ("alias", {"metavar": "ALIAS"})
_FOLDER = ("folder", {"metavar": "FOLDER", "type": Path, "help": "an adapter bundle, as a run writes it"})

COMMANDS = {
    "list": Command("all versions, and the aliases that point at them", _list),
    "show": Command(
        "one version and its lineage",
        _show,
        (("version", {"metavar": "MODEL", "help": "NAME@vN, or an alias"}),),
    ),
    "verify": Command("check a bundle's hashes, shapes and numbers", _verify, (_FOLDER,)),
    "publish": Command(
        "add a bundle as the next version of a name",
        _publish,
        (_FOLDER, ("--name", {"required": True, "metavar": "NAME", "help": "the adapter's name"})),
    ),
    "promote": Command(
        "point an alias at a version",
        _promote,
        (
            ("version", {"metavar": "NAME@vN"}),
            ("--alias", {"metavar": "ALIAS", "help": "by default the version's name"}),
            _REASON,
        ),
    ),
    "rollback": Command("point an alias back at the version that it served before", _rollback, (_ALIAS, _REASON)),
    "history": Command("all moves of an alias", _history, (_ALIAS,)),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The job."""
    words = list(sys.argv[1:] if argv is None else argv)
    overview = argparse.ArgumentParser(prog="python -m jobs.adapters", description=__doc__, allow_abbrev=False)
    overview.epilog = (
        "Every command takes --registry ADDRESS, or --config FILE whose `registry` is used; see COMMAND --help."
    )
    commands = overview.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help, add_help=False)
    name = overview.parse_args(words[:1]).command
    command = COMMANDS[name]
    made = parser(f"adapters {name}", f"{command.help[0].upper()}{command.help[1:]}.")
    for argument, options in command.arguments:
        made.add_argument(argument, **options)
    made.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments, config = configure(made, RegistryConfig, words[1:])
    data, text = command.answer(arguments, config)
    print(json.dumps(data, indent=2) if arguments.json else text)
    return 0


def _registry(config: RegistryConfig, *, create: bool = False) -> Registry:
    if config.registry is None:
        raise ConfigError("command line", ["registry: is missing; give --registry, or --config with such a key"])
    return Registry.open(config.registry, create=create)


def _version(registry: Registry, text: str) -> VersionId:
    if "@" in text:
        return VersionId.parse(text)
    entry = registry.alias(text)
    if entry is None:
        raise UnknownModelError(f"there is no alias {text}; name a version as NAME@vN")
    return entry.version


def _version_data(version: Version) -> dict[str, Any]:
    data = version.model_dump(mode="json", exclude={"bundle"})
    return {**data, "base_model": version.bundle.base_model, "rank": version.bundle.rank}


def _moved(entry: AliasEntry, before: AliasEntry | None) -> str:
    if before is not None and before.number == entry.number:
        return f"{entry.alias} serves {entry.version} already; nothing changed"
    origin = f"from {entry.previous} " if entry.previous else ""
    return f"{entry.alias} moved {origin}to {entry.version} (entry {entry.number}, {entry.action})"


def _described(bundle: Bundle) -> str:
    return f"rank {bundle.rank} on {len(bundle.target_modules)} kinds of modules of {bundle.base_model}"


def _when(moment: Any) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%SZ}"


def _table(headings: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [headings, *rows])
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    run(main)
