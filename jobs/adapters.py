"""Looks after a registry of adapters: what there is and who moved what; publishes, proves, promotes, retires."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from rich.console import Console

from evals.errors import GateError
from jobs.adapter_command import Answer, Command, RegistryConfig, registry_of
from jobs.adapter_moves import ALIAS, ENDPOINT, OF_ALIAS, REASON, VERSION, canary, promote, retire, rollback, shadow
from jobs.adapter_text import (
    Rows,
    alias_table,
    described,
    history_table,
    size_text,
    unfinished_table,
    version_table,
    version_text,
    when,
)
from jobs.cli import configure, parser, run
from jobs.merge_text import MERGED_TYPES, merge_data, merge_text
from serve.errors import BadRequestError, UnknownModelError
from serve.versions import AliasEntry, VersionId, summary
from sft.adapter import verify_bundle
from sft.errors import AdapterError

FITTED_ROWS = 200
"""Longer tables are printed as they are also in a terminal: to fit them takes longer than to read the registry."""


def _list(_: argparse.Namespace, config: RegistryConfig) -> Answer:
    registry = registry_of(config)
    contents = registry.contents()
    registry.preload(contents.versions)
    versions, damaged = [], []
    for version in sorted(contents.versions):
        try:
            versions.append(registry.get(version))
        except AdapterError as error:
            damaged.append(str(error))
    data = {
        "aliases": {alias: entry.model_dump(mode="json") for alias, entry in contents.aliases.items()},
        "versions": [{**summary(version), "retired": version.id in contents.retired} for version in versions],
        "damaged": damaged,
    }
    if not contents.versions:
        return data, "the registry holds no versions yet; add one with publish"
    aliases = ["", alias_table(contents.aliases)] if contents.aliases else ["no alias is promoted yet"]
    return data, [version_table(versions, contents), *aliases, *damaged]


def _show(arguments: argparse.Namespace, config: RegistryConfig) -> Answer:
    registry = registry_of(config)
    aliases = registry.aliases()
    version = registry.get(_version(aliases, arguments.version))
    retirement, evaluations = registry.retirement(version.id), registry.evaluations(version.id)
    naming = {alias: entry for alias, entry in aliases.items() if version.id in entry.parts()}
    data = {
        **summary(version),
        "aliases": {alias: entry.parts()[version.id] for alias, entry in naming.items()},
        "retired": retirement.model_dump(mode="json") if retirement else None,
        "files": {name: file.model_dump() for name, file in version.bundle.files.items()},
        "lineage": version.bundle.lineage,
        "evaluations": [one.model_dump(mode="json") for one in evaluations],
    }
    return data, version_text(version, naming, retirement, evaluations)


def _history(arguments: argparse.Namespace, config: RegistryConfig) -> Answer:
    entries = registry_of(config).history(arguments.alias)
    if not entries:
        raise UnknownModelError(f"there is no alias {arguments.alias}; list shows those that there are")
    return [entry.model_dump(mode="json") for entry in entries], [history_table(entries)]


def _verify(arguments: argparse.Namespace, config: RegistryConfig) -> Answer:
    what: str = arguments.bundle
    if "@" in what and not Path(what).exists():
        bundle = registry_of(config).verify(VersionId.parse(what)).bundle
    else:
        bundle = verify_bundle(Path(what))
    data = {"verified": what, "base_model": bundle.base_model, "rank": bundle.rank}
    return data, f"{what} is whole and sound: {described(bundle)}"


def _publish(arguments: argparse.Namespace, config: RegistryConfig) -> Answer:
    version = registry_of(config, create=True).publish(arguments.folder, arguments.name)
    text = f"published {version.id}: {described(version.bundle)}"
    return summary(version), f"{text}\nno alias moved; to serve it: promote {version.id}"


def _gc(arguments: argparse.Namespace, config: RegistryConfig) -> Answer:
    if not arguments.older_than >= 0:
        raise BadRequestError(f"--older_than {arguments.older_than}: must be a number of hours from 0")
    registry = registry_of(config)
    found = registry.unfinished(timedelta(hours=arguments.older_than))
    gone = [upload for upload in found if arguments.delete and registry.collect(upload)]
    data = {
        "deleted": arguments.delete,
        "unfinished": [
            {"version": str(upload.id), "files": upload.files, "bytes": upload.size, "touched": when(upload.modified)}
            for upload in (gone if arguments.delete else found)
        ],
    }
    if not found:
        return data, f"no unfinished upload is older than {arguments.older_than:g} hours; nothing to clean up"
    size = size_text(sum(upload.size for upload in (gone if arguments.delete else found)))
    if arguments.delete:
        return data, f"unfinished uploads given up: {len(gone)}; deleted {size}"
    advice = f"unfinished uploads: {len(found)}, {size}; nothing was deleted: --delete does it"
    return data, [unfinished_table(found), advice]


def _merge(arguments: argparse.Namespace, config: RegistryConfig) -> Answer:
    from sft.merge import merge  # PyTorch takes seconds to import, which no other command needs

    what: str = arguments.bundle
    with tempfile.TemporaryDirectory(prefix="raysft-") as scratch:
        folder = Path(what)
        if "@" in what and not folder.exists():
            registry = registry_of(config)
            folder = registry.download(registry.get(VersionId.parse(what)), Path(scratch) / "bundle")
        merged = merge(folder, arguments.base, arguments.output, arguments.dtype)
    return merge_data(merged), merge_text(what, merged)


COMMANDS = {
    "list": Command("all versions and aliases, and which serves which", _list),
    "show": Command(
        "one version: its base, files, lineage, and the aliases that name it",
        _show,
        (("version", {"metavar": "MODEL", "help": "NAME@vN, or an alias for its stable version"}),),
    ),
    "history": Command("all moves of an alias: who, when and why", _history, (ALIAS,)),
    "verify": Command(
        "check a bundle's files, hashes, settings, shapes and numbers",
        _verify,
        (
            (
                "bundle",
                {"metavar": "FOLDER|NAME@vN", "help": "a bundle's folder, or a version, whose files are read back"},
            ),
        ),
    ),
    "publish": Command(
        "add a bundle as the next version of a name",
        _publish,
        (
            ("folder", {"metavar": "FOLDER", "type": Path, "help": "an adapter bundle, as a run writes it"}),
            ("--name", {"required": True, "metavar": "NAME", "help": "the adapter's name"}),
        ),
    ),
    "merge": Command(
        "write base and adapter as one ordinary checkpoint, for servers without adapters",
        _merge,
        (
            ("bundle", {"metavar": "FOLDER|NAME@vN", "help": "an adapter bundle's folder, or a version"}),
            ("--base", {"required": True, "metavar": "FOLDER", "type": Path, "help": "the base model's checkpoint"}),
            ("--output", {"required": True, "metavar": "FOLDER", "type": Path, "help": "new folder to write"}),
            (
                "--dtype",
                {"choices": MERGED_TYPES, "metavar": "TYPE", "help": f"{', '.join(MERGED_TYPES)}; default: the base's"},
            ),
        ),
    ),
    "promote": Command(
        "point an alias at a version, for all sessions; ends its canary",
        promote,
        (
            VERSION,
            ("--alias", {"metavar": "ALIAS", "help": "by default the version's name"}),
            (
                "--gate",
                {"type": Path, "metavar": "FILE", "help": "only if the version, on the endpoint, passes this gate"},
            ),
            REASON,
            *ENDPOINT,
        ),
    ),
    "canary": Command(
        "give a share of an alias's sessions to a version on trial",
        canary,
        (
            VERSION,
            OF_ALIAS,
            ("--weight", {"required": True, "type": float, "metavar": "W", "help": "0.1 is 10 %%; 0 ends the trial"}),
            REASON,
            *ENDPOINT,
        ),
    ),
    "shadow": Command(
        "send copies of a share of an alias's sessions to a version; its answers go to nobody",
        shadow,
        (
            VERSION,
            OF_ALIAS,
            ("--share", {"required": True, "type": float, "metavar": "S", "help": "0.1 is 10 %%; 0 ends it"}),
            REASON,
            *ENDPOINT,
        ),
    ),
    "rollback": Command("undo an alias's last promote, canary or shadow", rollback, (ALIAS, REASON, *ENDPOINT)),
    "retire": Command(
        "end a version: no alias may name it again, no request get it", retire, (VERSION, REASON, *ENDPOINT)
    ),
    "gc": Command(
        "find uploads that never became whole, and delete them on request",
        _gc,
        (
            (
                "--older_than",
                {"type": float, "default": 24.0, "metavar": "HOURS", "help": "untouched for so long (default: 24)"},
            ),
            ("--delete", {"action": "store_true", "help": "delete them, rather than only show them"}),
        ),
    ),
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
    arguments.command = name
    code = 0
    try:
        data, shown = command.answer(arguments, config)
    except GateError as failed:
        data, shown, code = failed.data, str(failed), failed.exit_code
    if arguments.json:
        print(json.dumps(data, indent=2))
    else:
        _print(shown)
    return code


def _print(shown: str | list[str | Rows]) -> None:
    console = Console(highlight=False)
    for part in [shown] if isinstance(shown, str) else shown:
        if isinstance(part, str):
            print(part)
        elif console.is_terminal and len(part.rows) <= FITTED_ROWS:
            console.print(part.table())
        else:
            print(part.text())


def _version(aliases: dict[str, AliasEntry], text: str) -> VersionId:
    if "@" in text:
        return VersionId.parse(text)
    if text not in aliases:
        raise UnknownModelError(f"there is no alias {text}; name a version as NAME@vN")
    return aliases[text].version


if __name__ == "__main__":
    run(main)
