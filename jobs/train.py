"""`python -m jobs.train --config FILE`: raw rows -> a tuned adapter bundle, published to a registry."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jobs import cli
from jobs.cli import say
from jobs.publish import publish_once
from jobs.registry_check import check_registry
from serve.registry import Registry
from serve.versions import VersionId
from sft.config import TrainConfig

DESCRIPTION = """Train a LoRA adapter on instruction data, and publish it.

The run is kept in STORAGE/NAME: resolved config, metrics.jsonl, quarantine.jsonl, checkpoints and the finished
bundle. The same command goes on from the last checkpoint of a run that was stopped; a finished run is only published.

With --preflight nothing is trained: config, data, template, storage, cluster and the memory of a worker are checked,
and the exit code is 1 where the run could not start.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, then publishes where the config names a registry."""
    made = cli.parser("train", DESCRIPTION)
    made.add_argument("--preflight", action="store_true", help="check all that can be checked, and train nothing")
    made.add_argument("--json", action="store_true", help="print what --preflight found as JSON")
    arguments, config = cli.configure(made, TrainConfig, argv)
    if arguments.preflight:
        return _preflight(config, as_json=arguments.json)
    if arguments.json:
        made.error("--json goes with --preflight")
    from sft.trainer import train  # PyTorch takes seconds to import, which --help and a faulty config need not wait for

    with start_folder(config) as adapter:
        result = train(config, say=say, adapter=adapter)
    say(f"{result.steps} steps, last loss {result.loss:.4f}")
    if config.registry is None:
        return 0
    registry = Registry.open(config.registry, create=True)
    version, new = publish_once(registry, result.bundle, config.name)
    say(f"published {version.id} to {config.registry}" if new else f"{version.id} in {config.registry} is this bundle")
    if config.alias is not None:
        registry.promote(config.alias, version.id)
        say(f"alias {config.alias} -> {version.id}")
    return 0


@contextmanager
def start_folder(config: TrainConfig) -> Iterator[Path | None]:
    """The version that a run goes on from as a local folder; None where it names none.

    Raises:
        RaysftError: there is no such version, or it is damaged.
    """
    version = config.model.adapter_version
    if version is None or config.registry is None:
        yield None
        return
    registry = Registry.open(config.registry)
    with tempfile.TemporaryDirectory(prefix="raysft-start-") as work:
        yield registry.download(registry.get(VersionId.parse(version)), Path(work) / "bundle")


def _preflight(config: TrainConfig, *, as_json: bool) -> int:
    from jobs.preflight_text import lines, plain
    from sft.preflight import preflight

    registry = config.registry
    found = preflight(config, [("registry", lambda: check_registry(registry))] if registry else [])
    say(json.dumps(plain(found), indent=1) if as_json else "\n".join(lines(found)))
    return 0 if found.sound else 1


if __name__ == "__main__":
    cli.run(main)
