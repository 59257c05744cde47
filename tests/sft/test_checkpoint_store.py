from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sft import storage
from sft.checkpoint import MANIFEST, OPTIMIZER, Fingerprints, RunState, read_metrics
from sft.checkpoint_store import CheckpointStore, Found
from sft.engine import ParameterState
from sft.errors import CheckpointError, StorageError, TrainingError
from tests.sft.test_run import config

PRINTS = Fingerprints("b", "t", "d")
SIZE = 2800
"""Values of the one parameter: a checkpoint is about 12 bytes times that."""


@pytest.fixture(params=["", "file://"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run's folder: as a local path, and as the address of a store that is copied from."""
    (tmp_path / "run").mkdir()
    return f"{request.param}{tmp_path}/run"


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    return config(folder, **changes).model_dump(mode="json")


def state(tmp_path: Path, step: int) -> RunState:
    return RunState(step, 0, step, 0, PRINTS, values(tmp_path))


def keep(store: CheckpointStore, run: RunState, number: int | None = 2) -> None:
    weights = torch.full((SIZE,), float(run.step))
    moments = {"exp_avg": torch.zeros(SIZE), "exp_avg_sq": torch.zeros(SIZE)}
    store.keep(run, {"w": ParameterState(weights, moments)}, {"r": 1}, b'{"step": %d}\n' % run.step, number)


def newest(address: str, tmp_path: Path, told: list[str], **changes: Any) -> Found | None:
    work = tmp_path / f"work{len(list(tmp_path.glob('work*')))}"
    work.mkdir()
    return CheckpointStore(address).newest(PRINTS, values(tmp_path, **changes), work, told.append)


def folders(tmp_path: Path, step: int = 0) -> list[Path]:
    return sorted((tmp_path / "run").glob(f"checkpoint-{step:08d}-*" if step else "checkpoint-*"))


def test_the_newest_are_kept_and_the_newest_is_found(address: str, tmp_path: Path) -> None:
    told: list[str] = []
    assert newest(address, tmp_path, told) is None
    store = CheckpointStore(address)
    for step in (3, 6, 9):
        keep(store, state(tmp_path, step))
    assert [path.name.split("-")[1] for path in folders(tmp_path)] == ["00000006", "00000009"]
    found = newest(address, tmp_path, told)
    assert found is not None
    assert (found.run, read_metrics(found.folder)) == (state(tmp_path, 9), b'{"step": 9}\n')
    assert told == []


def test_all_are_kept_where_no_number_is_given(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for step in (3, 6, 9):
        keep(CheckpointStore(f"{tmp_path}/run"), state(tmp_path, step), None)
    assert len(folders(tmp_path)) == 3


def test_half_a_checkpoint_is_passed_over_and_later_removed(address: str, tmp_path: Path) -> None:
    store = CheckpointStore(address)
    keep(store, state(tmp_path, 3))
    half = tmp_path / "run/checkpoint-00000006-killed"
    shutil.copytree(folders(tmp_path, 3)[0], half)
    (half / MANIFEST).unlink()
    told: list[str] = []
    found = newest(address, tmp_path, told)
    assert found is not None
    assert found.run.step == 3
    assert told == ["checkpoint-00000006-killed was not written to its end; passing it over"]
    keep(store, state(tmp_path, 6))
    keep(store, state(tmp_path, 9))
    assert [path.name.split("-")[1] for path in folders(tmp_path)] == ["00000006", "00000009"]
    assert not half.exists()


def test_a_run_that_was_killed_in_its_first_checkpoint_begins_anew(address: str, tmp_path: Path) -> None:
    (tmp_path / "run/checkpoint-00000003-killed").mkdir()
    (tmp_path / "run/checkpoint-00000003-killed/state.json").write_text("{")
    assert newest(address, tmp_path, []) is None


def test_a_damaged_checkpoint_gives_way_to_the_one_before_with_a_warning(address: str, tmp_path: Path) -> None:
    store = CheckpointStore(address)
    for step in (3, 6):
        keep(store, state(tmp_path, step))
    path = folders(tmp_path, 6)[0] / OPTIMIZER
    path.write_bytes(path.read_bytes()[:-100])
    told: list[str] = []
    work = tmp_path / "work"
    work.mkdir()
    found = store.newest(PRINTS, values(tmp_path), work, told.append)
    assert found is not None
    assert found.run.step == 3
    assert len(told) == 2
    said = told[0].removeprefix("warning: ").removeprefix("file://")
    assert said.startswith(f"{path}: the file is not what the manifest says")
    assert told[1].endswith("the newest whole checkpoint: what was trained after step 3 is trained again")
    # It does not count as one of the two that are kept.
    keep(store, state(tmp_path, 9))
    assert [path.name.split("-")[1] for path in folders(tmp_path)] == ["00000003", "00000009"]


def test_where_none_is_whole_nothing_is_touched(address: str, tmp_path: Path) -> None:
    for step in (3, 6):
        keep(CheckpointStore(address), state(tmp_path, step))
    for path in folders(tmp_path):
        (path / OPTIMIZER).unlink()
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        newest(address, tmp_path, [])
    first, *lines, last = str(caught.value).splitlines()
    assert first == f"no checkpoint in {address} is whole:"
    assert [line.rsplit(": ", 1)[1] for line in lines] == ["the file is missing"] * 2
    assert last == "Bring one back from a copy, or choose another `name` to begin anew; nothing was changed there"
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before


@pytest.mark.parametrize(
    ("prints", "words"),
    [
        (replace(PRINTS, data="x"), "its data differs; choose another `name`, or take the data back"),
        (
            replace(PRINTS, base="x", template="y"),
            "its base model, chat template differ; choose another `name`, or take the base model and the chat template",
        ),
    ],
)
def test_a_foreign_checkpoint_is_refused_and_not_passed_over(tmp_path: Path, prints: Fingerprints, words: str) -> None:
    (tmp_path / "run").mkdir()
    store = CheckpointStore(f"{tmp_path}/run")
    keep(store, state(tmp_path, 3))
    keep(store, replace(state(tmp_path, 6), fingerprints=prints))
    with pytest.raises(CheckpointError, match=words):
        newest(f"{tmp_path}/run", tmp_path, [])


def test_a_checkpoint_of_another_config_is_refused_with_the_fields(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    keep(CheckpointStore(f"{tmp_path}/run"), state(tmp_path, 3))
    with pytest.raises(CheckpointError, match=r"another config:\n  - lora.rank: was 16, now 8\nChoose another `name`"):
        newest(f"{tmp_path}/run", tmp_path, [], lora={"rank": 8})
    assert newest(f"{tmp_path}/run", tmp_path, [], scaling={"num_workers": {"min": 1, "max": 4}}) is not None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True
        ).returncode
    ):
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


FULL = (
    r"the checkpoint of step 6 could not be written to .*: no space left. It needs 3\d kB, \d\d kB are free, "
    r"\d\d kB are missing. Make room there or lower checkpoint.num_to_keep; the checkpoint before it is good"
)


def test_a_full_disk_leaves_the_old_checkpoint_and_no_half_one(small_disk: Path, tmp_path: Path) -> None:
    store = CheckpointStore(str(small_disk))
    keep(store, state(tmp_path, 3))
    with pytest.raises(TrainingError, match=FULL):
        keep(store, state(tmp_path, 6))
    assert [path.name.split("-")[1] for path in small_disk.iterdir()] == ["00000003"]
    found = store.newest(PRINTS, values(tmp_path), tmp_path, lambda _: None)
    assert found is not None
    assert found.run.step == 3


def test_a_full_scratch_disk_is_said(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    (small_disk / "other").write_bytes(bytes(44_000))
    with pytest.raises(TrainingError, match=FULL):
        keep(CheckpointStore(f"{tmp_path}/run"), state(tmp_path, 6))
    assert [path.name for path in small_disk.iterdir()] == ["other"]
    assert folders(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, ": no space left. It needs 3"), (errno.EIO, " ([Errno 5] Input/output error)")],
)
def test_a_store_that_fails_half_way_is_said(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def half(folder: Path, address: str, *, last: str) -> None:
        assert last == MANIFEST
        storage.write(f"{address}/state.json", (folder / "state.json").read_bytes())
        raise StorageError("half") from OSError(number, os.strerror(number))

    monkeypatch.setattr(storage, "upload", half)
    with pytest.raises(TrainingError) as caught:
        keep(CheckpointStore(address), state(tmp_path, 6))
    assert words in str(caught.value)
    assert "the same command goes on from there" in str(caught.value)
    assert folders(tmp_path) == []


def keep_best(store: CheckpointStore, run: RunState) -> None:
    store.keep_best(run, {"w": ParameterState(torch.full((SIZE,), float(run.step)), {})}, {"r": 1}, b"")


def test_the_best_is_kept_until_an_ordinary_checkpoint_knows_a_better_one(address: str, tmp_path: Path) -> None:
    store, told = CheckpointStore(address), list[str]()
    runs = {
        step: replace(state(tmp_path, step), history=((2, 2.0), (4, 1.0), (6, 3.0))[: step // 2]) for step in (2, 4, 6)
    }
    keep_best(store, runs[2])
    keep(store, runs[2])
    keep_best(store, runs[4])
    assert [store.best(runs[step], tmp_path).run.step for step in (2, 4, 6)] == [2, 4, 4]
    keep_best(store, runs[4])  # the run was stopped before an ordinary checkpoint, and came here again
    keep(store, replace(runs[6], finished=True), 1)
    assert [path.name for path in (tmp_path / "run").glob("best-*")] == ["best-00000004"]
    found = newest(address, tmp_path, told)
    assert found is not None
    assert (found.run, told) == (replace(runs[6], finished=True), [])
    best = store.best(found.run, tmp_path)
    assert (best.run, best.name) == (runs[4], "best-00000004")


def test_a_best_checkpoint_that_is_not_there_or_damaged_is_named(address: str, tmp_path: Path) -> None:
    store = CheckpointStore(address)
    nan = replace(state(tmp_path, 2), history=((2, float("nan")),))
    with pytest.raises(CheckpointError, match="no held-out loss was measured that is a number"):
        store.best(nan, tmp_path)
    run = replace(nan, history=((2, 1.0),))
    keep_best(store, run)
    (tmp_path / "run" / "best-00000002" / OPTIMIZER).write_bytes(b"")
    with pytest.raises(CheckpointError, match=OPTIMIZER):
        store.best(run, tmp_path)
