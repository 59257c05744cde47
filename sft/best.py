"""The checkpoint with the lowest held-out loss, kept beside the newest ones in a folder of its own.

Which step was best is said by the history that ordinary checkpoints carry. A former best one is removed only when an
ordinary checkpoint knows its successor, so the one that a run goes on from always finds its own.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from sft import storage
from sft.checkpoint import MANIFEST, RunState, verify_checkpoint
from sft.errors import CheckpointError
from sft.watch import best_step

PREFIX = "best-"


def best_address(run: str, step: int) -> str:
    """Where the best checkpoint of a run's folder lies, if it is that of this step."""
    return f"{run}/{PREFIX}{step:08d}"


def put_best(folder: Path, run: str, step: int) -> None:
    """Copies a checkpoint's folder to where the best one lies; whole, or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    storage.upload(folder, best_address(run, step), last=MANIFEST)


def remove_former(run: str, state: RunState) -> None:
    """Removes best checkpoints that are so no more, once an ordinary checkpoint with this state is safe."""
    step = best_step(state.history)
    if step is not None:
        for name in storage.folders(run):
            if name.startswith(PREFIX) and f"{run}/{name}" != best_address(run, step):
                storage.remove(f"{run}/{name}")


def fetch_best(run: str, state: RunState) -> Path:
    """The best checkpoint of a run as a local folder.

    Args:
        run: address of the run's folder.
        state: of its last checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    step = best_step(state.history)
    if step is None:
        raise CheckpointError(
            f"{run}: no held-out loss was measured, so no checkpoint is the best; use evaluate.use last"
        )
    address = best_address(run, step)
    local = Path(address)
    if "://" in address:
        local = Path(tempfile.mkdtemp(prefix="raysft-")) / "best"
        storage.download(address, local)
    verify_checkpoint(local)
    return local
