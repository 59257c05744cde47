"""The checkpoints of a run in its storage: keeps a new one whole or not at all, and finds the one to go on from.

A run's folder is the only record of its checkpoints, so neither a lost driver nor a lost node can leave it wrong.
Which step was the best is said by the held-out losses that ordinary checkpoints carry. A former best checkpoint is
removed only when an ordinary one knows its successor, so the one that a run goes on from finds its own.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft import storage
from sft.checkpoint import MANIFEST, Fingerprints, RunState, verify_checkpoint, write_checkpoint
from sft.engine import ParameterState
from sft.errors import CheckpointError, StorageError, TrainingError
from sft.run import changed_keys, told_changes
from sft.watch import best_step

PREFIX = "checkpoint-"
BEST_PREFIX = "best-"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class Found:
    """A whole checkpoint of this run: its name in the run's folder, where it can be read, and where the run stands."""

    name: str
    folder: Path
    run: RunState


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        address: the run's folder.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._damaged: set[str] = set()

    def newest(
        self, fingerprints: Fingerprints, config: Mapping[str, Any], work: Path, tell: Callable[[str], None]
    ) -> Found | None:
        """Finds the newest whole checkpoint.

        Args:
            fingerprints: of the run that wants to go on.
            config: its resolved config.
            work: an empty local folder, into which remote checkpoints are copied.
            tell: takes a warning for each damaged checkpoint that was passed over, and a word on each half one.

        Returns:
            None where the run has no checkpoint yet.

        Raises:
            CheckpointError: there are checkpoints but none is whole, or the newest whole one is another run's.
        """
        faults = []
        for name in reversed(self._names()):
            if storage.read(f"{self._address}/{name}/{MANIFEST}") is None:
                tell(f"{name} was not written to its end; passing it over")
                continue
            try:
                found = self.fetch(name, work)
            except CheckpointError as error:
                self._damaged.add(name)
                faults.append(str(error).replace(str(work), self._address))  # not the copy, which will be gone
                continue
            _check_owner(f"{self._address}/{name}", found.run, fingerprints, config)
            for fault in faults:
                tell(f"warning: {fault}")
            if faults:
                tell(
                    f"warning: going on from {name}, the newest whole checkpoint: what was trained after step "
                    f"{found.run.step} is trained again"
                )
            return found
        if faults:
            shown = "\n".join(f"  - {fault}" for fault in faults)
            raise CheckpointError(
                f"no checkpoint in {self._address} is whole:\n{shown}\n"
                f"Bring one back from a copy, or choose another `name` to begin anew; nothing was changed there"
            )
        return None

    def fetch(self, name: str, work: Path) -> Found:
        """Proves a checkpoint by its name; a remote one is copied below the local folder `work`.

        Raises:
            CheckpointError: it is damaged.
            StorageError: it cannot be read.
        """
        address = f"{self._address}/{name}"
        if "://" not in address:
            return Found(name, Path(address), verify_checkpoint(Path(address)))
        local = work / name
        storage.download(address, local)
        return Found(name, local, verify_checkpoint(local))

    def keep(
        self,
        run: RunState,
        parameters: Mapping[str, ParameterState],
        peft_config: Mapping[str, Any] | None,
        metrics: bytes,
        number: int | None,
    ) -> None:
        """Writes a checkpoint, then removes all but the newest `number` whole ones (None keeps all).

        Raises:
            TrainingError: it cannot be written; says how much room is missing. The older ones are untouched.
        """
        # A name that was never used: a kill may have left half a checkpoint of the same step.
        self._write(f"{PREFIX}{run.step:08d}-{uuid.uuid4().hex[:8]}", run, parameters, peft_config, metrics)
        if number is not None:
            self._prune(number)
        best = _best_name(run)
        if best is not None:
            for name in storage.folders(self._address):
                if name.startswith(BEST_PREFIX) and name != best:
                    _clear(f"{self._address}/{name}")

    def keep_best(
        self,
        run: RunState,
        parameters: Mapping[str, ParameterState],
        peft_config: Mapping[str, Any] | None,
        metrics: bytes,
    ) -> None:
        """Writes the checkpoint with the lowest held-out loss so far, beside the ordinary ones.

        Raises:
            TrainingError: as `keep`.
        """
        name = f"{BEST_PREFIX}{run.step:08d}"
        _clear(f"{self._address}/{name}")  # of a run that was stopped before an ordinary checkpoint of this step
        self._write(name, run, parameters, peft_config, metrics)

    def best(self, run: RunState, work: Path) -> Found:
        """Finds the checkpoint with the lowest held-out loss.

        Args:
            run: of the ordinary checkpoint that knows which it is.
            work: a local folder, into which a remote one is copied.

        Raises:
            CheckpointError: there is none, or it is damaged.
            StorageError: it cannot be read.
        """
        name = _best_name(run)
        if name is None:
            raise CheckpointError(
                f"{self._address}: no held-out loss was measured that is a number, so no checkpoint is the best; "
                "use evaluate.use last with another `name`"
            )
        return self.fetch(name, work)

    def _write(
        self,
        name: str,
        run: RunState,
        parameters: Mapping[str, ParameterState],
        peft_config: Mapping[str, Any] | None,
        metrics: bytes,
    ) -> None:
        address = f"{self._address}/{name}"
        with tempfile.TemporaryDirectory(prefix="raysft-checkpoint-") as scratch:
            where = scratch
            tensors = [tensor for state in parameters.values() for tensor in (state.value, *state.moments.values())]
            needed = sum(tensor.nbytes for tensor in tensors) + len(metrics)
            try:
                write_checkpoint(Path(scratch), run, parameters, peft_config, metrics)
                where, needed = address, sum(path.stat().st_size for path in Path(scratch).iterdir())
                storage.upload(Path(scratch), address, last=MANIFEST)
            except (OSError, StorageError) as error:
                _clear(where)
                cause = error if isinstance(error, OSError) else error.__cause__
                raise _not_kept(run.step, where, needed, cause) from None

    def _names(self) -> list[str]:
        """Names of all checkpoints, half ones too, by step."""
        return [name for name in storage.folders(self._address) if name.startswith(PREFIX)]

    def _prune(self, number: int) -> None:
        names = self._names()
        whole = [
            name
            for name in names
            if name not in self._damaged and storage.read(f"{self._address}/{name}/{MANIFEST}") is not None
        ]
        for name in set(names) - set(whole[-number:]):
            _clear(f"{self._address}/{name}")


def _best_name(run: RunState) -> str | None:
    step = best_step(run.history)
    return None if step is None else f"{BEST_PREFIX}{step:08d}"


def _clear(address: str) -> None:
    """Removes what is not needed; that it cannot be removed is no reason to stop a run."""
    with suppress(StorageError):
        storage.remove(address)


def _check_owner(address: str, run: RunState, fingerprints: Fingerprints, config: Mapping[str, Any]) -> None:
    names = {"base": "base model", "template": "chat template", "data": "data", "adapter": "start adapter"}
    other = [what for field, what in names.items() if getattr(run.fingerprints, field) != getattr(fingerprints, field)]
    if other:
        raise CheckpointError(
            f"{address} belongs to another run: its {', '.join(other)} differ{'s' if len(other) == 1 else ''}; "
            f"choose another `name`, or take the {' and the '.join(other)} back"
        )
    changed = changed_keys(run.config, config)
    if changed:
        raise CheckpointError(f"{address} was trained with another config:\n{told_changes(changed)}")


def _not_kept(step: int, address: str, needed: int, error: BaseException | None) -> TrainingError:
    what = f"the checkpoint of step {step} could not be written to {address}"
    after = "the checkpoint before it is good, and the same command goes on from there"
    if not isinstance(error, OSError) or error.errno not in _FULL:
        return TrainingError(f"{what} ({error}); {after}")
    free = _free(address)
    room = "" if free is None else f", {_size(free)} are free, {_size(max(needed - free, 0))} are missing"
    return TrainingError(
        f"{what}: no space left. It needs {_size(needed)}{room}. Make room there or lower "
        f"checkpoint.num_to_keep; {after}"
    )


def _free(address: str) -> int | None:
    """Free bytes where a local path lies; None where that cannot be asked."""
    if "://" in address:
        return None
    path = Path(address)
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
