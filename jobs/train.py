"""`python -m jobs.train --config FILE`: raw rows -> a tuned adapter bundle, published to a registry."""

from __future__ import annotations

from collections.abc import Sequence

from jobs import cli
from serve.registry import Registry
from sft.config import TrainConfig

DESCRIPTION = """Train a LoRA adapter on instruction data, and publish it.

The run is kept in STORAGE/NAME: resolved config, metrics.jsonl, quarantine.jsonl, checkpoints and the finished
bundle. The same command goes on from the last checkpoint of a run that was stopped; a finished run is only published.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, then publishes where the config names a registry."""
    _, config = cli.configure(cli.parser("train", DESCRIPTION), TrainConfig, argv)
    from sft.trainer import train  # PyTorch takes seconds to import, which --help and a faulty config need not wait for

    result = train(config, say=say)
    say(f"{result.steps} steps, last loss {result.loss:.4f}")
    if config.registry is None:
        return
    registry = Registry.open(config.registry, create=True)
    version = registry.publish(result.bundle, config.name)
    say(f"published {version.id} to {config.registry}")
    if config.alias is not None:
        registry.promote(config.alias, version.id)
        say(f"alias {config.alias} -> {version.id}")


def say(line: str) -> None:
    """Prints a line at once, so that it can be followed in a log."""
    print(line, flush=True)


if __name__ == "__main__":
    cli.run(main)
