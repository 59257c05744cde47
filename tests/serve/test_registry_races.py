"""Many processes at one registry at once, and publishers that are killed: nothing is lost, overwritten or torn."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest

from serve.errors import BadRequestError, ConflictError, UnknownModelError
from serve.registry import Registry
from serve.versions import AliasState, VersionId
from sft.adapter import ADAPTER_WEIGHTS, MANIFEST, hash_file
from tests.bundles import tiny_bundle

ALIASES = ("live", "beta")


def work(address: str, bundle: str, worker: int, rounds: int) -> tuple[list[str], list[tuple[str, int]], int]:
    """One process: publishes its own bundle and moves aliases at random.

    Returns:
        What it published, the entries that it wrote, and how often it lost a race.
    """
    registry = Registry.open(address)
    choose = random.Random(worker)
    published: list[str] = []
    written: list[tuple[str, int]] = []
    lost = 0
    by = f"worker-{worker}"
    for _ in range(rounds):
        mine = registry.publish(Path(bundle), "support", by=by).id
        published.append(str(mine))
        alias, action = choose.choice(ALIASES), choose.choice(["promote", "canary", "shadow", "rollback"])
        try:
            if action == "rollback":
                entry = registry.rollback(alias, by=by)
            elif action == "promote":
                entry = registry.promote(alias, mine, by=by)
            else:
                entry = getattr(registry, action)(alias, mine, choose.random(), by=by)
            written.append((alias, entry.number))
        except ConflictError:
            lost += 1
        except (BadRequestError, UnknownModelError):
            continue
    return published, written, lost


def test_many_processes_lose_and_overwrite_nothing(tmp_path: Path) -> None:
    workers, rounds = 8, 12
    registry = Registry.open(tmp_path / "registry", create=True)
    for worker in range(workers):
        tiny_bundle(tmp_path / f"w{worker}", seed=worker)
    # One import of the registry for all processes, which then start together.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.serve.test_registry_races"])
    with context.Pool(workers) as pool:
        jobs = [(registry.address, str(tmp_path / f"w{worker}"), worker, rounds) for worker in range(workers)]
        results = pool.starmap(work, jobs, chunksize=1)

    numbers = sorted(VersionId.parse(text).number for published, _, _ in results for text in published)
    assert numbers == list(range(1, workers * rounds + 1))
    versions = registry.versions("support")
    assert [version.id.number for version in versions] == numbers
    for version in versions:
        worker = int(version.published_by.removeprefix("worker-"))
        assert str(version.id) in results[worker][0]
        stored = Path(registry.address) / f"versions/support/v{version.id.number}"
        for file in (*version.bundle.files, MANIFEST):
            assert hash_file(stored / file) == hash_file(tmp_path / f"w{worker}" / file)

    claimed = Counter((worker, *entry) for worker, (_, written, _) in enumerate(results) for entry in written)
    logged: Counter[tuple[int, str, int]] = Counter()
    for alias in ALIASES:
        history = registry.history(alias)
        assert [entry.number for entry in history] == list(range(1, len(history) + 1))
        undo: list[AliasState] = []
        for entry in history:
            logged[int(entry.by.removeprefix("worker-")), alias, entry.number] += 1
            assert entry.previous == (undo[-1].version if undo else None)
            if entry.action == "rollback":
                undo.pop()
                assert entry.state == undo[-1]
            else:
                undo.append(entry.state)
    assert claimed == logged
    assert set(claimed.values()) == {1}
    assert sum(lost for _, _, lost in results) > 0, "the processes never met: this proves nothing"


KILLED = """
import os, signal, sys
from pathlib import Path
from serve.registry import Registry
from serve.store import FolderStore

left = int(sys.argv[3])

def dying(method):
    def call(self, key, *arguments):
        global left
        if left == 0 and key.startswith("versions/"):
            if method.__name__ == "write":
                target = Path(sys.argv[1], key)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(Path(sys.argv[2], target.name).read_bytes()[:50])
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return method(self, key, *arguments)
    return call

FolderStore.create, FolderStore.write = dying(FolderStore.create), dying(FolderStore.write)
Registry.open(sys.argv[1]).publish(Path(sys.argv[2]), "support")
"""


@pytest.mark.parametrize("step", ["reservation", "first file", "second file", "third file", "manifest"])
def test_a_publisher_that_is_killed_leaves_no_version_and_blocks_nobody(tmp_path: Path, step: str) -> None:
    steps = ["reservation", "first file", "second file", "third file", "manifest"].index(step)
    registry = Registry.open(tmp_path / "registry", create=True)
    tiny_bundle(tmp_path / "bundle")
    registry.publish(tmp_path / "bundle", "support")
    words = [sys.executable, "-c", KILLED, registry.address, str(tmp_path / "bundle"), str(steps)]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": os.getcwd()}, check=False)
    assert done.returncode == -signal.SIGKILL

    assert Registry.open(registry.address).version_ids() == [VersionId("support", 1)]
    with pytest.raises(UnknownModelError, match="support@v2"):
        registry.promote("live", VersionId("support", 2))
    after = registry.publish(tmp_path / "bundle", "support").id
    assert after == VersionId("support", 2 if step == "reservation" else 3)
    assert registry.promote("live", after).version == after

    uploads = registry.unfinished(timedelta())
    assert [upload.id for upload in uploads] == ([] if step == "reservation" else [VersionId("support", 2)])
    assert all(registry.collect(upload) for upload in uploads)
    assert registry.unfinished(timedelta()) == []
    assert list(Path(registry.address).rglob(f"v2/{ADAPTER_WEIGHTS}")) == (
        [Path(registry.address) / f"versions/support/v2/{ADAPTER_WEIGHTS}"] if step == "reservation" else []
    )
    assert registry.verify(after).id == after
