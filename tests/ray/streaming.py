"""Streams an epoch under a small object store: `python -m tests.ray.streaming FOLDER BASE`. Prints what it took."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import ray
import ray.data
from ray._private.internal_api import memory_summary

from sft.data import epoch_on_ray, plan_data
from sft.data_config import DataSection
from sft.feed import FeedPlan, training_rows
from sft.mask import Example
from sft.rows import examples
from sft.selection import Epochs

STORE_BYTES = 96 << 20


def main(folder: Path, base: Path) -> None:
    """Reads, masks, shuffles and packs an epoch of all rows below a folder, and forgets it row by row."""
    ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=STORE_BYTES)
    section = DataSection.model_validate({"sources": [{"path": str(folder)}], "max_length": 4096})
    epochs = Epochs(plan_data(section, base), 0, None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first = taken = 0

    def stream() -> Iterator[Example]:
        nonlocal taken
        for table in epoch_on_ray(epochs.plan, epochs.order(0), None):
            taken += table.num_rows
            yield from examples(table)

    tokens = count = 0
    for row in training_rows(stream(), FeedPlan(0, 500, 4, 1, "packed", 1, 4096), 0):
        first = first or taken
        count += len(row)
        tokens += sum(len(example.input_ids) for example in row)
    summary = memory_summary(address=ray.get_runtime_context().gcs_address, stats_only=True)
    print(
        json.dumps(
            {
                "rows": count,
                "bytes": 8 * tokens,  # ids and labels
                "grown": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10,
                "rows_before_the_first": first,
                "spilled": "Spilled" in summary,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
