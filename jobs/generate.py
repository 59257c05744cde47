"""`python -m jobs.generate --output FOLDER --target N --teacher.model NAME`: instruction data from a teacher."""

from __future__ import annotations

from collections.abc import Sequence

from generate.config import GenerateConfig
from generate.run import ROWS, generate
from jobs import cli
from jobs.endpoint import read_key
from sft.cluster import connect

DESCRIPTION = """Make instruction data with a teacher, which any OpenAI-compatible endpoint can be; its API key is read
from RAYSFT_API_KEY. Modes: self_instruct, evolve and magpie. Writes rows.jsonl, which training reads, and beside it
every rejected candidate with its reason, the teacher's answers and a summary; the same command again goes on where it
was stopped. Exit code 0 where the target was reached, 1 where the teacher failed or gave too few rows, 2 where the
configuration is wrong.
"""
CPUS = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    """The job."""
    _, config = cli.configure(cli.parser("generate", DESCRIPTION), GenerateConfig, argv)
    key = read_key(None)
    teacher = config.teacher
    if teacher.workers:
        connect(config.ray.address, num_cpus=config.ray.num_cpus, needed_cpus=CPUS * teacher.workers)
    cli.say(f"{config.mode}: {config.target:,} rows from {teacher.model} at {teacher.url}")
    summary = generate(config, key, cli.say)
    for line in summary.lines():
        print(line)
    print(f"rows: {config.output / ROWS}")
    return 0 if summary.complete else 1


if __name__ == "__main__":
    cli.run(main)
