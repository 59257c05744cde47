"""What every job's command line shares: `--config FILE`, dotted overrides, one readable message, an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel
from pydantic_settings import BaseSettings, CliSettingsSource

from sft.config import read_config
from sft.errors import RaysftError

Config = TypeVar("Config", bound=BaseModel)

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Starts a job's parser; the job adds its own arguments before `configure` reads them."""
    made = argparse.ArgumentParser(
        prog=f"python -m jobs.{prog}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--config", metavar="FILE", type=Path, help="YAML file; every key can also be given as an option")
    return made


def configure(
    made: argparse.ArgumentParser, model: type[Config], argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, Config]:
    """Parses a command line and reads the config that it names.

    Every field of `model` becomes a dotted option (`--train.learning_rate 2e-4`) that wins over the file.

    Returns:
        The job's own arguments, and the validated config.

    Raises:
        ConfigError: with all faults of the file and of the options together.
    """
    own = {action.dest for action in made._actions}
    settings = type("Settings", (model, BaseSettings), {"__doc__": model.__doc__})
    source = CliSettingsSource[argparse.ArgumentParser](
        settings, root_parser=made, cli_parse_args=False, cli_hide_none_type=True, cli_avoid_json=True
    )
    arguments, rest = made.parse_known_args(argv)
    values = vars(arguments)
    overrides = source(parsed_args={key: value for key, value in values.items() if key not in own})()
    unknown = tuple(word.split("=", 1)[0] for word in rest if word.startswith("--"))
    strays = [word for word in rest if not word.startswith("--")]
    if strays and not unknown:
        made.error(f"unexpected argument: {strays[0]}")
    config = read_config(model, arguments.config, overrides, unknown)
    return argparse.Namespace(**{key: value for key, value in values.items() if key in own}), config


def say(line: str) -> None:
    """Prints a line at once, so that it can be followed in a log."""
    print(line, flush=True)


def run(job: Callable[[], int | None]) -> None:
    """Runs a job as a process: errors of users become one message on stderr and an exit code."""
    try:
        code = job() or 0
    except RaysftError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = INTERRUPTED
    sys.stdout.flush()
    sys.exit(code)
