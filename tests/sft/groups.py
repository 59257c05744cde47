"""Groups of workers in plain processes: `python -m tests.sft.groups FOLDER some` or `... all`.

One process imports PyTorch and DeepSpeed, which takes longer than the steps, and forks them all.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import torch

from sft.process_group import join_workers
from tests.ports import free_port
from tests.sft import cuts, preference_steps, steps


def work(rank: int, workers: int, port: int, folder: Path, choice: str) -> None:
    """One worker of a group."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(workers), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    join_workers("cpu")
    if choice == "some" and workers < 3:
        steps.main(rank, workers, folder)
        preference_steps.main(rank, workers, folder)
    cuts.run(rank, workers, folder, choice)


def main(folder: Path, choice: str) -> None:
    """Runs groups of 1, 2 and 3 workers, one after the other."""
    import deepspeed  # noqa: F401

    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    for workers in cuts.WORKERS:
        port = free_port()
        group = [context.Process(target=work, args=(rank, workers, port, folder, choice)) for rank in range(workers)]
        for process in group:
            process.start()
        for process in group:
            process.join()
        if any(process.exitcode for process in group):
            sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
