"""Makes API keys for the server: the key itself is shown once, and the line for the server's file holds its hash."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import ValidationError

from jobs.cli import run
from serve.keys import Key, Scope, hash_key, new_key
from sft.errors import ConfigError

LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrency")


def main(argv: Sequence[str] | None = None) -> int:
    """The job."""
    overview = argparse.ArgumentParser(prog="python -m jobs.keys", description=__doc__, allow_abbrev=False)
    commands = overview.add_subparsers(dest="command", required=True, metavar="COMMAND")
    create = commands.add_parser("create", help="make a key", description="Make a key.", allow_abbrev=False)
    create.add_argument("--id", required=True, metavar="NAME", help="names the key in logs: a-z, 0-9 and -")
    create.add_argument(
        "--scope", nargs="+", choices=get_args(Scope), default=["chat"], help="what it may do; by default chat"
    )
    create.add_argument(
        "--models",
        nargs="+",
        default=["*"],
        metavar="NAME",
        help="models that it may ask: base, aliases, versions, or patterns such as 'support*'; by default all",
    )
    for limit in LIMITS:
        create.add_argument(f"--{limit}", type=int, metavar="N", help="by default the server's limits.*")
    create.add_argument("--json", action="store_true", help="print the key and its line as JSON")
    arguments = overview.parse_args(argv)
    key, line = _made(arguments)
    if arguments.json:
        print(json.dumps({"key": key, "line": line}, indent=2))
        return 0
    print("the key, which is shown only now:", file=sys.stderr)
    print(key, file=sys.stderr)
    print("\nthe line for the file that access.keys names:", file=sys.stderr, flush=True)
    print(json.dumps(line))
    return 0


def _made(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """A new key, and what the server keeps of it."""
    text = new_key(arguments.id)
    limits = {limit: getattr(arguments, limit) for limit in LIMITS}
    try:
        made = Key(id=arguments.id, hash=hash_key(text), scopes=arguments.scope, models=arguments.models, **limits)
    except ValidationError as error:
        faults = [f"--{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise ConfigError("command line", faults) from None
    return text, made.model_dump(mode="json", exclude_none=True)


if __name__ == "__main__":
    run(main)
